"""The sounds of some examples: where they are, how long, and their samples, clean or augmented for a draw. No torch here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...console import count, info
from ...errors import UserError
from ..examples import Draw
from ..reading.files import BadRow
from ..reading.media import media_of
from ..reading.problems import ErrorCollector
from .decode import converted, decode
from .worker import Job, Way
from .workers import ClipWorkers


@dataclass(frozen=True)
class Sounds:
    """E sounds, of which none is in memory but those that a row holds as bytes.

    files         of each, its path or its bytes
    hashes        of each, the sha256 of its file
    num_samples   int64 [E], at the rate of `workers.way`
    places        of each, `FILE:LINE` or its file
    workers       processes that decode and augment, shared by all parts that are taken
    """

    files: list[Path | bytes]
    hashes: list[str]
    num_samples: np.ndarray
    places: list[str]
    workers: ClipWorkers

    def __len__(self) -> int:
        return len(self.files)

    def take(self, chosen: np.ndarray) -> "Sounds":
        """Those with these indices, in this order."""
        files, hashes, places = ([of_each[i] for i in chosen] for of_each in (self.files, self.hashes, self.places))
        return replace(self, files=files, hashes=hashes, num_samples=self.num_samples[chosen], places=places)

    def joined(self, others: "Sequence[Sounds]") -> "Sounds":
        """These and those of others, one after another."""
        files, hashes, places = ([x for one in (self, *others) for x in getattr(one, name)] for name in ("files", "hashes", "places"))
        return replace(
            self, files=files, hashes=hashes, places=places, num_samples=np.concatenate([one.num_samples for one in (self, *others)])
        )

    def read(self, indices: Sequence[int], draw: Draw | None = None) -> list[np.ndarray]:
        """Samples [S] float32 of some, augmented for a draw; clean without one."""
        key = None if draw is None else (draw.seed, draw.epoch)
        return self.workers([Job(self.files[i], self.hashes[i], self.places[i], key) for i in indices])


def read_sounds(rows: Sequence[dict], column: str, places: Sequence[str], workers: ClipWorkers, setting: str) -> Sounds:
    """The sounds that rows name or hold, each decoded once. UserError names every file that is no whole sound; one line says what is converted."""
    problems, files, hashes, lengths, kinds = ErrorCollector(), [], [], [], Counter()
    for row, place in zip(rows, places, strict=True):
        try:
            file = media_of(row[column], place)
            clip = decode(file, workers.way.rate, place)
        except BadRow as error:
            problems.add(f"{place}: {column}: {error}")
        except UserError as error:
            for problem in error.problems:
                problems.add(problem)
        else:
            files.append(file)
            hashes.append(clip.content_hash)
            lengths.append(len(clip.samples))
            kinds[clip.rate, clip.channels] += 1
    problems.raise_if_any()
    if said := converted(kinds, workers.way.rate):
        info(f"{setting}: {said}")
    if len(set(hashes)) < len(hashes):
        info(f"{setting}: {count(len(hashes) - len(set(hashes)), 'clip')} of {len(hashes):,} have the bytes of another one")
    return Sounds(files, hashes, np.array(lengths, np.int64), list(places), workers)


def way_of(rate: int, augment: Sequence[dict], setting: str = "data.augment.audio") -> Way:
    """How clips are read; UserError where a transform is none. The check loads audiomentations, if there are any."""
    if augment:
        from .augment import Augmentation

        if Augmentation(augment, rate, setting).changes_length:
            info(f"{setting}: clips become longer or shorter; of one that is then longer than a model reads the end is cut")
    return Way(rate, tuple(augment), setting)
