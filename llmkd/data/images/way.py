"""The way in which images are read: decoded, and augmented. No torch here, as worker processes load this."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .augment import PictureAugmentation
from .decode import decode


@dataclass(frozen=True)
class PictureWay:
    """See `media.worker.Way`. `setting`: the name of `augment` in messages."""

    augment: tuple[dict, ...] = ()
    setting: str = "data.augment.image"

    def decoded(self, file: Path | bytes, place: str) -> tuple[np.ndarray, str]:
        """[height, width, 3] uint8."""
        picture = decode(file, place)
        return picture.pixels, picture.content_hash

    def augmentation(self) -> PictureAugmentation:
        return PictureAugmentation(self.augment, self.setting)
