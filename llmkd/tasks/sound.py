"""Sounds as model inputs, and feature extractors as readers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.data import Data
from ..config.media import InputFeatures
from ..console import warn
from ..data.audio.log_mel import empty_filters
from ..data.examples import Draw
from ..errors import UserError
from ..model_folder.files import ModelFiles
from .builtin import register
from .media import MediaInputs, MediaOfRun, MediaReader, read_from

if TYPE_CHECKING:
    from torch import Tensor


class SoundInputs(MediaInputs):
    """Sounds; `files` are `Sounds`, and `reader` a feature extractor."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: the length of each, as far as the model reads it, in hundredths of a second."""
        rate = self.files.workers.way.rate
        return np.maximum(1, np.minimum(self.files.num_samples, limit_of(self.reader, rate) or 2**62) * 100 // rate)

    def shown(self, i: int, reader) -> str:
        return f"{self.files.num_samples[i] / self.files.workers.way.rate:.2f} s of sound"

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        return inputs_of(self.reader, self.files.read(indices, draw), self.files.workers.way.rate)


class SoundReader(MediaReader):
    """A feature extractor as a `Reader`."""

    kind = "audio"

    @classmethod
    def of(cls, column: str, files: ModelFiles | None, config: dict, setting: str, student, data: Data, media: MediaOfRun) -> "SoundReader":
        found = find_extractor(files.base if files else None, data.features, setting)
        media.read_by(found)
        return cls(column, found, media)

    def inputs(self, rows: list[dict], places: list[str], data: Data, setting: str) -> tuple[SoundInputs, np.ndarray, np.ndarray]:
        sounds, rate = self.media.sounds(rows, self.column, places, setting), self.media.rate
        limit = limit_of(self.reader, rate)
        used = fitting(sounds.num_samples, limit, rate, data.too_long, places.__getitem__, setting)
        if not used.any():
            raise UserError(
                f"{setting}: all of its {len(used)} clips are longer than {limit / rate:g} s; set data.too_long: truncate, or cut them"
            )
        kept = np.flatnonzero(used)
        longer = np.zeros(0, np.int64) if limit is None else np.flatnonzero(sounds.num_samples > limit)
        return SoundInputs(sounds.take(kept), self.reader), kept, longer


def inputs_of(extractor, clips: Sequence[np.ndarray], rate: int) -> "dict[str, Tensor]":
    """A model's inputs [B, ...] for clips at `rate` samples per second, padded to the longest clip if the extractor has no fixed length."""
    own = extractor.sampling_rate
    if own != rate:
        import soxr

        clips = [soxr.resample(clip, rate, own, quality="HQ") for clip in clips]
    limit = limit_of(extractor, own)
    clips = [clip[:limit] for clip in clips]
    padding = {} if limit else {"padding": True}
    return dict(extractor(list(clips), sampling_rate=own, return_tensors="pt", **padding))


def limit_of(extractor, rate: int) -> int | None:
    """The longest clip that an extractor reads, in samples at `rate`; None for any length. Extractors cut longer clips silently."""
    own = extractor.sampling_rate
    if (seconds := getattr(extractor, "seconds", None)) is not None:
        samples = round(seconds * own)
    elif (n_samples := getattr(extractor, "n_samples", None)) is not None:  # Whisper's
        samples = n_samples
    elif (frames := getattr(extractor, "max_length", None)) is not None:  # of 10 ms: the Audio Spectrogram Transformer's
        samples = frames * own // 100
    else:
        return None
    return samples * rate // own


def find_extractor(folder: Path | None, features: InputFeatures | None, setting: str) -> Any:
    """The feature extractor of a model's folder, or for new weights (`folder` None) the one that data.features describes. UserError if there is none."""
    register()
    if folder is None:
        from ..data.audio.feature_extractor import LogMelFeatureExtractor

        if empty := empty_filters(features.rate, features.mels):
            warn(
                f"note: data.features.mels: found {features.mels}, of which {empty} at {features.rate:,} Hz are narrower than what 25 ms tell apart, and "
                "always silent; lower it"
            )
        return LogMelFeatureExtractor(features.mels, features.rate, seconds=features.seconds)
    from transformers import AutoFeatureExtractor

    return read_from(folder, AutoFeatureExtractor, "sound", "feature extractor", setting)


def fitting(num_samples: np.ndarray, limit: int | None, rate: int, too_long: str, places: Callable[[int], str], setting: str) -> np.ndarray:
    """Which clips are used, bool [examples], by `data.too_long`. UserError if it says refuse and a clip is longer than `limit` samples. With
    truncate all are used, since the extractors cut them."""
    longer = np.zeros(len(num_samples), bool) if limit is None else num_samples > limit
    if too_long == "refuse" and longer.any():
        i = int(np.argmax(longer))
        raise UserError(
            f"{places(i)}: {num_samples[i] / rate:.2f} s long, and {setting} reads {limit / rate:.2f} s ({int(longer.sum()):,} of {len(longer):,} clips are longer); "
            "set data.too_long: truncate or drop, or cut them"
        )
    return ~longer if too_long == "drop" else np.ones(len(longer), bool)
