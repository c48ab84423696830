"""The sounds and images of a run, and the common base of their inputs and readers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config.data import Data
from ..data.audio import sounds as of_sounds
from ..data.audio.sounds import Sounds
from ..data.images import pictures as of_pictures
from ..data.media.examples import MediaFiles
from ..data.media.packages import refuse_missing_packages
from ..data.media.workers import MediaWorkers
from ..errors import UserError, brief


class MediaOfRun:
    """Decodes the sounds and images of a run.

    rate   samples per second at which sounds are decoded: the highest rate of the models, so that each can resample from it
    """

    def __init__(self, data: Data):
        self.rate, self._augment, self._count = 0, data.augment, data.workers
        self._workers: dict[str, MediaWorkers] = {}
        self._last: dict[str, tuple[Sequence[dict], MediaFiles]] = {}  # by column

    def read_by(self, extractor: Any) -> None:
        self.rate = max(self.rate, extractor.sampling_rate)

    def sounds(self, rows: Sequence[dict], column: str, places: Sequence[str], setting: str) -> Sounds:
        """See `read_sounds`. The column is not decoded again for the same rows. Call `read_by` for all extractors first, since they set the rate."""
        workers = self._started("audio", lambda augment: of_sounds.way_of(self.rate, augment), setting)
        return self._read(rows, column, lambda: of_sounds.read_sounds(rows, column, places, workers, setting))

    def pictures(self, rows: Sequence[dict], column: str, places: Sequence[str], setting: str) -> MediaFiles:
        """See `read_pictures`. The column is not decoded again for the same rows. Transforms are tried on training images."""
        workers = self._started("image", of_pictures.way_of, setting)
        tried = workers.way.augmentation() if workers.way.augment and setting.startswith("data.train") else None
        return self._read(rows, column, lambda: of_pictures.read_pictures(rows, column, places, workers, tried))

    def _started(self, kind: str, way: Callable[[Sequence[dict]], Any], setting: str) -> MediaWorkers:
        if kind not in self._workers:
            refuse_missing_packages(kind, setting)
            self._workers[kind] = MediaWorkers(way(getattr(self._augment, kind) if self._augment else ()), self._count)
        return self._workers[kind]

    def _read(self, rows: Sequence[dict], column: str, read: Callable[[], Any]) -> Any:
        if column not in self._last or self._last[column][0] is not rows:
            self._last[column] = rows, read()
        return self._last[column][1]


@dataclass(frozen=True)
class MediaInputs:
    """Base class of `data.inputs.Inputs` of files; a subclass adds `lengths`, `shown` and `batch`. `reader`: a feature extractor or image processor."""

    files: MediaFiles
    reader: Any
    positions = False

    def take(self, chosen: np.ndarray) -> "MediaInputs":
        return replace(self, files=self.files.take(chosen))

    @staticmethod
    def joined(parts: "Sequence[MediaInputs]") -> "MediaInputs":
        first, *others = parts
        return replace(first, files=first.files.joined([one.files for one in others]))

    def content(self, i: int) -> bytes:
        return (self.files.hashes[i] + self._settings).encode()

    @cached_property
    def _settings(self) -> str:
        return settings_of(self.reader)


@dataclass(frozen=True)
class MediaReader:
    """Base class of a `Reader` of files; a subclass adds `kind` and `inputs`."""

    column: str
    reader: Any
    media: MediaOfRun
    tokens = pad = None

    @cached_property
    def identity(self) -> str:
        return settings_of(self.reader)

    def save(self, folder: Path) -> None:
        self.reader.save_pretrained(folder)


def read_from(folder: Path, auto: Any, what: str, called: str, setting: str) -> Any:
    """The feature extractor or image processor in a model's folder, loaded by the transformers class `auto`. UserError if there is none."""
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise UserError(
            f"{setting}: {folder} has no preprocessor_config.json, which says how its model reads {what}; fetch it, or name another model"
        )
    try:
        return auto.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises its own exceptions and Python's
        raise UserError(f"{setting}: {folder} has no {called} that transformers can read ({brief(error)}); fetch it again") from error


def settings_of(extractor) -> str:
    """The settings of a feature extractor or image processor, as text, by which `--resume` and caches recognise it."""
    return json.dumps(extractor.to_dict(), sort_keys=True, default=str)
