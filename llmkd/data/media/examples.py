"""The sound or image files of some examples: where they are, and what is in them, clean or augmented for a draw. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..examples import Draw
from ..reading.media import media_of
from ..reading.problems import BadRow, ErrorCollector
from .worker import Job
from .workers import MediaWorkers


@dataclass(frozen=True)
class MediaFiles:
    """E files, of which none is in memory but those that a row holds as bytes.

    files     of each, its path or its bytes
    hashes    of each, the sha256 of its file
    places    of each, `FILE:LINE` or its file
    workers   processes that decode and augment, shared by all parts that are taken
    """

    files: list[Path | bytes]
    hashes: list[str]
    places: list[str]
    workers: MediaWorkers

    def __len__(self) -> int:
        return len(self.files)

    def take(self, chosen: np.ndarray):
        """The files with these indices, in this order."""
        files, hashes, places = ([of_each[i] for i in chosen] for of_each in (self.files, self.hashes, self.places))
        return replace(self, files=files, hashes=hashes, places=places)

    def joined(self, others: "Sequence[MediaFiles]"):
        """These files followed by those of others."""
        files, hashes, places = ([x for one in (self, *others) for x in getattr(one, name)] for name in ("files", "hashes", "places"))
        return replace(self, files=files, hashes=hashes, places=places)

    def read(self, indices: Sequence[int], draw: Draw | None = None) -> list[np.ndarray]:
        """Samples or pixels of some files, augmented for a draw, or clean without one."""
        key = None if draw is None else (draw.seed, draw.epoch)
        return self.workers([Job(self.files[i], self.hashes[i], self.places[i], key) for i in indices])


def read_each(
    rows: Sequence[dict], column: str, places: Sequence[str], decode: Callable[[Path | bytes, str], Any]
) -> tuple[list[Path | bytes], list[Any]]:
    """The files that rows name or hold, and what is in each. UserError names every row whose file cannot be decoded."""
    problems, files, found = ErrorCollector(), [], []
    for row, place in zip(rows, places, strict=True):
        try:
            file = media_of(row[column], place)
            found.append(decode(file, place))
            files.append(file)
        except BadRow as error:
            problems.add(f"{place}: {column}: {error}")
        except UserError as error:
            for problem in error.problems:
                problems.add(problem)
    problems.raise_if_any()
    return files, found
