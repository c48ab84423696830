"""The protocol of writers, and which one settings name. No torch."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from ...config.make import Writer as Settings
from ..asks import Answer, Ask


class Writer(Protocol):
    """Writes answers to asks."""

    identity: dict[str, Any]  # what an answer depends on besides its ask: a part of its key
    label: str  # what names it to people

    def check(self) -> None:
        """UserError where it cannot be reached, before anything is asked."""

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        """An answer to each ask whose key is not known, as they become ready, in whatever order.

        UserError where no ask can be answered; where one alone cannot, its answer says why (`asks.failed`).
        """

    def close(self) -> None:
        """End what it has started."""


class Nobody:
    """The writer of a pipeline without one, whose stages ask nothing."""

    identity: dict[str, Any] = {}
    label = "nobody"

    def check(self) -> None:
        pass

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        raise AssertionError("a stage asks, and config/make_stages.py says that it does not")

    def close(self) -> None:
        pass


def writer_of(settings: Settings | None, device: Callable[[], Any], stop: Callable[[], bool], sounds: bool = False) -> Writer:
    """The writer that settings name.

    device   gives the device of a model in this process, when it is loaded
    stop     whether the command is asked to stop
    sounds   whether asks are of sounds
    """
    if settings is None:
        return Nobody()
    if settings.kind == "api":
        from .api import ServedWriter

        return ServedWriter(settings, stop)
    if settings.kind == "command":
        from .command import ProgramWriter

        return ProgramWriter(settings, stop)
    if settings.kind == "recorded":
        from .recorded import RecordedWriter

        return RecordedWriter(settings)
    if sounds:
        from .speech import SpeechWriter

        return SpeechWriter(settings, device, stop)
    from .local import ModelWriter

    return ModelWriter(settings, device, stop)
