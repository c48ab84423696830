"""The way in which sounds are read: decoded at a rate, and augmented. No torch here, as worker processes load this."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .augment import SoundAugmentation
from .decode import decode


@dataclass(frozen=True)
class SoundWay:
    """See `media.worker.Way`. `rate`: samples a second; `setting`: the name of `augment` in messages."""

    rate: int
    augment: tuple[dict, ...] = ()
    setting: str = "data.augment.audio"

    def decoded(self, file: Path | bytes, place: str) -> tuple[np.ndarray, str]:
        """[S] float32."""
        clip = decode(file, self.rate, place)
        return clip.samples, clip.content_hash

    def augmentation(self) -> SoundAugmentation:
        return SoundAugmentation(self.augment, self.rate, self.setting)
