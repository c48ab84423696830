"""The protocol of writers, and the choice of one by its settings. No torch."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from ...config.make import Writer as Settings
from ..asks import Answer, Ask


class Writer(Protocol):
    """Writes answers to asks."""

    identity: dict[str, Any]  # everything besides the ask that an answer depends on: a part of the ask's key
    label: str  # its name for people

    def check(self) -> None:
        """UserError if the writer cannot be reached. Called before the first ask."""

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        """An answer to each ask whose key is not in `known`, in the order in which they become ready.

        UserError if no ask can be answered. If a single ask cannot, its answer says why (`asks.failed`).
        """

    def close(self) -> None:
        """End the processes and threads that it has started, and free its model."""


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
    """The writer that the settings describe.

    device   returns the device of a model in this process; called when it is loaded
    stop     returns whether the command was asked to stop
    sounds   whether asks are about sounds
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
