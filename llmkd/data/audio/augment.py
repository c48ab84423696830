"""Augmentation of sound by audiomentations, see `media/augment.py`. No torch here."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ..media.augment import Augmentation


class SoundAugmentation(Augmentation):
    """Transforms of audiomentations, of samples [S] float32 to [S'] float32.

    rate             samples a second of the clips
    changes_length   whether a clip may become longer or shorter
    """

    groups = ("Compose", "OneOf", "SomeOf")

    def __init__(self, asked: Sequence[Mapping[str, Any]], rate: int, setting: str):
        self.rate = rate
        super().__init__(asked, setting)
        noise = np.random.default_rng(0).normal(0, 0.1, rate).astype(np.float32)  # a second
        self.changes_length = self.tried(noise) != {noise.shape}

    def known(self) -> dict[str, type]:
        try:
            import audiomentations
        except ImportError:
            raise UserError(
                f'{self.setting}: augmentation of sound needs audiomentations; install it: pip install "llmkd[audio]"'
            ) from None
        self.library = f"audiomentations {audiomentations.__version__}"
        return {name: kind for name, kind in vars(audiomentations).items() if inspect.isclass(kind) and name != "Lambda"}

    def arguments(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        if isinstance(given.get("num_transforms"), list):  # the library tells a range from a number by this type
            given["num_transforms"] = tuple(given["num_transforms"])
        return given

    def applied(self, transform: Any, value: np.ndarray) -> np.ndarray:
        return np.asarray(transform(samples=np.array(value, np.float32), sample_rate=self.rate), np.float32)

    def wrong(self, value: np.ndarray) -> str | None:
        if value.ndim == 1 and len(value) and np.isfinite(value).all():
            return None
        return "no samples" if not value.size else f"an array of shape {value.shape}" if value.ndim != 1 else "samples that are not finite"
