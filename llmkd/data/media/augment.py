"""Augmentation of sounds and images by a library's transforms, as a pure function of (seed, epoch, content of the file). No torch here.

The libraries draw from Python's and numpy's global generators, or from generators of their own. The global ones are seeded for each file and
set back after it; since other threads would see that meanwhile, training does it in processes of its own (`workers.py`).
"""

import contextlib
import difflib
import hashlib
import inspect
import random
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from ...errors import UserError

_LOCK = threading.Lock()
_TRIALS = 3


class Augmentation:
    """Transforms of a library, one after another.

    asked     [{name: arguments}, ...], as in a recipe
    setting   its name in messages

    UserError names every transform or argument that the library does not have, and what the library says of wrong values. A subclass says
    which library it is, and how one of its transforms is applied.
    """

    library: str  # its name and version
    groups: tuple[str, ...]  # transforms with a list of transforms of the same form

    def __init__(self, asked: Sequence[Mapping[str, Any]], setting: str):
        problems: list[str] = []
        self.setting = setting
        known = self.known()
        self._transforms = [self._made(one, f"{setting}.{i}", known, problems) for i, one in enumerate(asked)]
        if problems:
            raise UserError(*problems)

    def known(self) -> dict[str, type]:
        """The transforms that a recipe may name. UserError if the library is not installed."""
        raise NotImplementedError

    def arguments(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """A transform's arguments in the library's types, which YAML may not have."""
        return given

    def applied(self, transform: Any, value: np.ndarray) -> np.ndarray:
        """The transformed value. Errors of the transform are passed on."""
        raise NotImplementedError

    def wrong(self, value: np.ndarray) -> str | None:
        """A description of a transform's result if no model can read it; None if one can."""
        raise NotImplementedError

    def __call__(self, value: np.ndarray, seed: int, epoch: int, content_hash: str, place: str = "") -> np.ndarray:
        """A value transformed for an epoch. UserError with `place` if a transform fails, or gives a result that no model can read."""
        with seeded(*seeds(seed, epoch, content_hash)):
            self.seeded_here()
            for transform in self._transforms:
                value = self._checked(transform, value, place or self.setting)
        return value

    def seeded_here(self) -> None:
        """Seed the library's own generators from Python's and numpy's global ones."""

    def tried(self, value: np.ndarray) -> set[tuple[int, ...]]:
        """The shapes that some draws of all transforms give a value.

        What the library needs more, such as a program, shows here before training does. UserError names every transform that fails.
        """
        before, problems, shapes = [transform.p for transform in self._transforms], {}, set()
        for transform in self._transforms:
            transform.p = 1.0
        try:
            with seeded(0, 0):
                for _ in range(_TRIALS):
                    self.seeded_here()
                    made = value
                    for i, transform in enumerate(self._transforms):
                        try:
                            made = self._checked(transform, made, f"{self.setting}.{i}")
                        except UserError as error:  # the next transform is tried on the value before this one
                            problems |= dict.fromkeys(error.problems)
                    shapes.add(made.shape)
        finally:
            for transform, p in zip(self._transforms, before, strict=True):
                transform.p = p
        if problems:
            raise UserError(*problems)
        return shapes

    def _checked(self, transform: Any, value: np.ndarray, place: str) -> np.ndarray:
        name = type(transform).__name__
        try:
            out = self.applied(transform, value)
        except Exception as error:  # the library raises its own exceptions, Python's and those of what it calls
            raise UserError(f"{place}: {name} fails ({said(error)}); change its arguments, or leave it out") from error
        if what := self.wrong(out):
            raise UserError(f"{place}: {name} gives {what}; change its arguments, or leave it out")
        return out

    def _made(self, asked: Any, setting: str, known: dict[str, type], problems: list[str]):
        """The library's object; None if there are problems, which are added to `problems`."""
        if not isinstance(asked, Mapping) or len(asked) != 1:
            problems.append(
                f"{setting}: found {asked!r}, expected one transform with its arguments, such as {{{next(iter(known))}: {{p: 0.5}}}}"
            )
            return None
        name, given = next(iter(asked.items()))
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
            problems.append(f"{setting}: {self.library} has no transform {name!r} for a recipe{hint}")
            return None
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            problems.append(f"{setting}.{name}: found {given!r}, expected its arguments by name, such as {{p: 0.5}}")
            return None
        accepted = [one for one in inspect.signature(known[name].__init__).parameters if one != "self"]
        wrong = [one for one in given if one not in accepted]
        for one in wrong:
            near = difflib.get_close_matches(str(one), accepted, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{setting}.{name}.{one}: no such argument; {name} has {', '.join(accepted)}{hint}")
        if wrong:
            return None
        values, before = self.arguments(name, dict(given)), len(problems)
        if name in self.groups:
            inner = values.get("transforms")
            if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
                problems.append(f"{setting}.{name}.transforms: found {inner!r}, expected a list of transforms")
                return None
            values["transforms"] = [self._made(one, f"{setting}.{name}.transforms.{i}", known, problems) for i, one in enumerate(inner)]
        if len(problems) > before:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # albumentations warns if it uses defaults instead
                return known[name](**values)
        except Exception as error:  # the library raises its own exceptions, Python's and those of what it imports
            problems.append(f"{setting}.{name}: found {given!r}, which {self.library} refuses ({said(error)}); correct it")
            return None


def seeds(seed: int, epoch: int, content_hash: str) -> tuple[int, int]:
    """The seeds of Python's and of numpy's generator for one file in one epoch."""
    digest = hashlib.sha256(f"{seed} {epoch} {content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:12], "big")


@contextlib.contextmanager
def seeded(python: int, numpy: int) -> Iterator[None]:
    """Both global generators, seeded while the block lasts and then restored. One thread at a time."""
    with _LOCK:
        before = random.getstate(), np.random.get_state()
        try:
            random.seed(python)
            np.random.seed(numpy)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def said(error: BaseException) -> str:
    """A library's error in one line."""
    if isinstance(error.__cause__, ValidationError):
        first = error.__cause__.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
