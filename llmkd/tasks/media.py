"""The sounds and images of a run, which all of its models share: decoded once before training, and in the same processes for every batch."""

from collections.abc import Callable, Sequence
from typing import Any

from ..config.data import Data
from ..data.audio import sounds as of_sounds
from ..data.audio.sounds import Sounds
from ..data.images import pictures as of_pictures
from ..data.media.examples import MediaFiles
from ..data.media.workers import MediaWorkers


class MediaOfRun:
    """`rate`: samples a second at which sounds are decoded: the highest of the models' rates, so that what any reads is in them."""

    def __init__(self, data: Data):
        self.rate, self._augment, self._count = 0, data.augment, data.workers
        self._workers: dict[str, MediaWorkers] = {}
        self._last: dict[str, tuple[Sequence[dict], MediaFiles]] = {}  # by column

    def read_by(self, extractor: Any) -> None:
        self.rate = max(self.rate, extractor.sampling_rate)

    def sounds(self, rows: Sequence[dict], column: str, places: Sequence[str], setting: str) -> Sounds:
        """See `read_sounds`; the column of the rows that were read last is not decoded again. All readers are to be known."""
        workers = self._started("audio", lambda augment: of_sounds.way_of(self.rate, augment))
        return self._read(rows, column, lambda: of_sounds.read_sounds(rows, column, places, workers, setting))

    def pictures(self, rows: Sequence[dict], column: str, places: Sequence[str], setting: str) -> MediaFiles:
        """See `read_pictures`; likewise. The transforms are tried on training images."""
        workers = self._started("image", of_pictures.way_of)
        tried = workers.way.augmentation() if workers.way.augment and setting.startswith("data.train") else None
        return self._read(rows, column, lambda: of_pictures.read_pictures(rows, column, places, workers, tried))

    def _started(self, kind: str, way: Callable[[Sequence[dict]], Any]) -> MediaWorkers:
        if kind not in self._workers:
            self._workers[kind] = MediaWorkers(way(getattr(self._augment, kind) if self._augment else ()), self._count)
        return self._workers[kind]

    def _read(self, rows: Sequence[dict], column: str, read: Callable[[], Any]) -> Any:
        if column not in self._last or self._last[column][0] is not rows:
            self._last[column] = rows, read()
        return self._last[column][1]
