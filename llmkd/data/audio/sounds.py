"""The sounds of some examples: their files, and how long they are. No torch here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...console import count, info
from ..media.examples import MediaFiles, read_each
from ..media.workers import MediaWorkers
from .decode import converted, decode
from .way import SoundWay


@dataclass(frozen=True)
class Sounds(MediaFiles):
    """See `MediaFiles`. `num_samples`: int64 [E], at the rate of `workers.way`."""

    num_samples: np.ndarray

    def take(self, chosen: np.ndarray) -> "Sounds":
        return replace(super().take(chosen), num_samples=self.num_samples[chosen])

    def joined(self, others: "Sequence[Sounds]") -> "Sounds":
        return replace(super().joined(others), num_samples=np.concatenate([one.num_samples for one in (self, *others)]))


def read_sounds(rows: Sequence[dict], column: str, places: Sequence[str], workers: MediaWorkers, setting: str) -> Sounds:
    """The sounds that rows name or hold, each decoded once. UserError names every incomplete or unreadable file; one line reports conversions."""
    kinds: Counter[tuple[int, int]] = Counter()

    def measured(file, place: str) -> tuple[str, int]:
        clip = decode(file, workers.way.rate, place)
        kinds[clip.rate, clip.channels] += 1
        return clip.content_hash, len(clip.samples)

    files, found = read_each(rows, column, places, measured)
    hashes, lengths = [content_hash for content_hash, _ in found], [length for _, length in found]
    if said := converted(kinds, workers.way.rate):
        info(f"{setting}: {said}")
    if len(set(hashes)) < len(hashes):
        info(f"{setting}: {count(len(hashes) - len(set(hashes)), 'clip')} of {len(hashes):,} have the bytes of another one")
    return Sounds(files, hashes, list(places), workers, np.array(lengths, np.int64))


def way_of(rate: int, augment: Sequence[dict]) -> SoundWay:
    """The way in which clips are read. UserError for an invalid transform; the check loads audiomentations if there are any."""
    way = SoundWay(rate, tuple(augment))
    if augment and way.augmentation().changes_length:
        info(f"{way.setting}: clips become longer or shorter; of one that is then longer than a model reads the end is cut")
    return way
