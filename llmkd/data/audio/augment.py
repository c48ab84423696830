"""Augmentation of sound by audiomentations, as a pure function of (seed, epoch, content of the clip). No torch here.

The library draws from Python's and numpy's global generators. Both are seeded for each clip and set back after it; since other threads
would see that meanwhile, training does it in processes of its own (`workers.py`).
"""

import contextlib
import difflib
import hashlib
import inspect
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError

_LOCK = threading.Lock()
_GROUPS = ("Compose", "OneOf", "SomeOf")  # their transforms are lists of the same form
_TRIALS = 3


class Augmentation:
    """Transforms of audiomentations, one after another.

    asked     [{name: arguments}, ...], as in a recipe
    rate      samples a second of the clips
    setting   its name in messages

    UserError names every transform or argument that the library does not have, and what the library says of wrong values. `changes_length`:
    whether a clip may become longer or shorter.
    """

    def __init__(self, asked: Sequence[Mapping[str, Any]], rate: int, setting: str):
        problems: list[str] = []
        self.rate, self.setting, self.changes_length = rate, setting, False
        self._transforms = [_transform(one, f"{setting}.{i}", problems) for i, one in enumerate(asked)]
        if problems:
            raise UserError(*problems)
        self._try(asked)

    def __call__(self, samples: np.ndarray, seed: int, epoch: int, content_hash: str, place: str = "") -> np.ndarray:
        """Samples [S] float32 to [S'] float32. UserError with `place` where a transform fails or does not give finite samples."""
        with seeded(*seeds(seed, epoch, content_hash)):
            for transform in self._transforms:
                samples = self._applied(transform, samples, place)
        return samples

    def _applied(self, transform, samples: np.ndarray, place: str) -> np.ndarray:
        name = type(transform).__name__
        try:
            out = np.asarray(transform(samples=np.array(samples, np.float32), sample_rate=self.rate), np.float32)
        except Exception as error:  # the library raises its own exceptions, Python's and those of what it calls
            raise UserError(f"{place or self.setting}: {name} fails ({_first(error)}); change its arguments, or leave it out") from error
        if out.ndim != 1 or not len(out) or not np.isfinite(out).all():
            what = "no samples" if not out.size else f"an array of shape {out.shape}" if out.ndim != 1 else "samples that are not finite"
            raise UserError(f"{place or self.setting}: {name} gives {what}; change its arguments, or leave it out")
        return out

    def _try(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Apply each transform to a second of noise: what the library needs more, such as a program, shows before training does."""
        noise = np.random.default_rng(0).normal(0, 0.1, self.rate).astype(np.float32)
        problems = []
        for i, transform in enumerate(self._transforms):
            p, transform.p = transform.p, 1.0
            try:
                with seeded(0, 0):
                    lengths = {len(self._applied(transform, noise, f"{self.setting}.{i}")) for _ in range(_TRIALS)}
                self.changes_length |= lengths != {len(noise)}
            except UserError as error:
                problems += error.problems
            finally:
                transform.p = p
        if problems:
            raise UserError(*problems)


def seeds(seed: int, epoch: int, content_hash: str) -> tuple[int, int]:
    """The seeds of Python's and of numpy's generator for one clip in one epoch."""
    digest = hashlib.sha256(f"{seed} {epoch} {content_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:12], "big")


@contextlib.contextmanager
def seeded(python: int, numpy: int) -> Iterator[None]:
    """Both global generators seeded in here, and as they were before after it. One thread at a time."""
    with _LOCK:
        before = random.getstate(), np.random.get_state()
        try:
            random.seed(python)
            np.random.seed(numpy)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _transform(asked: Any, setting: str, problems: list[str]):
    """The library's object; None with what is wrong in `problems`."""
    library = _library(setting)
    if not isinstance(asked, Mapping) or len(asked) != 1:
        problems.append(f"{setting}: found {asked!r}, expected one transform with its arguments, such as {{Gain: {{p: 0.5}}}}")
        return None
    name, arguments = next(iter(asked.items()))
    known = {one: kind for one, kind in vars(library).items() if inspect.isclass(kind) and one != "Lambda"}
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
        problems.append(f"{setting}: audiomentations {library.__version__} has no transform {name!r} for a recipe{hint}")
        return None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        problems.append(f"{setting}.{name}: found {arguments!r}, expected its arguments by name, such as {{p: 0.5}}")
        return None
    accepted = [one for one in inspect.signature(known[name].__init__).parameters if one != "self"]
    wrong = [one for one in arguments if one not in accepted]
    for one in wrong:
        near = difflib.get_close_matches(str(one), accepted, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"{setting}.{name}.{one}: no such argument; {name} has {', '.join(accepted)}{hint}")
    if wrong:
        return None
    values, before = dict(arguments), len(problems)
    if name in _GROUPS:
        inner = values.get("transforms")
        if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
            problems.append(f"{setting}.{name}.transforms: found {inner!r}, expected a list of transforms")
            return None
        values["transforms"] = [_transform(one, f"{setting}.{name}.transforms.{i}", problems) for i, one in enumerate(inner)]
        if isinstance(values.get("num_transforms"), list):
            values["num_transforms"] = tuple(values["num_transforms"])  # the library tells a range from a number by this type
    if len(problems) > before:
        return None
    try:
        return known[name](**values)
    except Exception as error:  # the library raises its own exceptions, Python's and those of what it imports
        problems.append(f"{setting}.{name}: found {arguments!r}, which audiomentations refuses ({_first(error)}); correct it")
        return None


def _library(setting: str):
    try:
        import audiomentations
    except ImportError:
        raise UserError(f'{setting}: augmentation of sound needs audiomentations; install it: pip install "llmkd[audio]"') from None
    return audiomentations


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
