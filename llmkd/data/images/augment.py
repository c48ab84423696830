"""Augmentation of images by albumentations, see `media/augment.py`. No torch here.

The library has generators of its own. All transforms of a list draw from one, so that what one draws does not follow from what another does.
"""

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...errors import UserError
from ..media.augment import Augmentation

#: Base classes of the library, and transforms that a recipe cannot use because they take a function or give a tensor.
_NOT_FOR_RECIPES = (
    "BasicTransform DualTransform ImageOnlyTransform Transform3D BaseCompose Lambda OneOrOther ReplayCompose ToTensorV2 ToTensor3D".split()
)


class PictureAugmentation(Augmentation):
    """Transforms of albumentations, of pixels [height, width, 3] uint8 to such of another height and width."""

    groups = ("Compose", "OneOf", "RandomOrder", "SelectiveChannelTransform", "Sequential", "SomeOf")

    def known(self) -> dict[str, type]:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the library would ask its registry for a newer version
        try:
            with _without_torch():
                import albumentations
                from albumentations.core.composition import BaseCompose
                from albumentations.core.transforms_interface import BasicTransform
        except ImportError:
            raise UserError(
                f'{self.setting}: augmentation of images needs albumentations; install it: pip install "llmkd[image]"'
            ) from None
        self.library = f"albumentations {albumentations.__version__}"
        kinds = {name: kind for name, kind in vars(albumentations).items() if isinstance(kind, type)}
        return {name: k for name, k in kinds.items() if issubclass(k, BasicTransform | BaseCompose) and name not in _NOT_FOR_RECIPES}

    def seeded_here(self) -> None:
        own = random.getrandbits(64)
        draws = np.random.default_rng(own), random.Random(own)
        for transform in self._transforms:
            transform.set_random_state(*draws)

    def applied(self, transform: Any, value: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the library warns if a transform does nothing
            return np.asarray(transform(image=np.array(value))["image"])

    def wrong(self, value: np.ndarray) -> str | None:
        if value.dtype != np.uint8:
            return f"values of type {value.dtype}, expected uint8: the model's image processor scales them"
        return (
            None
            if value.ndim == 3 and value.shape[2] == 3 and value.size
            else f"an array of shape {value.shape}, expected red, green and blue"
        )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch while the library is imported, which would otherwise load it for transforms to tensors.

    That would take a process that only decodes images seconds.
    """
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules["torch"]
