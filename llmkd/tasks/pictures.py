"""Images as model inputs, and image processors as readers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.data import Data
from ..config.media import InputFeatures
from ..data.examples import Draw
from ..model_folder.files import ModelFiles
from .builtin import register
from .media import MediaInputs, MediaOfRun, MediaReader, read_from

if TYPE_CHECKING:
    from torch import Tensor


class PictureInputs(MediaInputs):
    """Images; `reader` is an image processor."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: 1 each, since all images cost the same."""
        return np.ones(len(self.files), np.int64)

    def shown(self, i: int, reader) -> str:
        return "an image"

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        pixels = self.files.read(indices, draw)
        # the format is given, since transformers would take the rows of an image that is 3 pixels high for its channels
        return dict(self.reader(pixels, return_tensors="pt", input_data_format="channels_last"))


class PictureReader(MediaReader):
    """An image processor as a `Reader`."""

    kind = "image"

    @classmethod
    def of(
        cls, column: str, files: ModelFiles | None, config: dict, setting: str, student, data: Data, media: MediaOfRun
    ) -> "PictureReader":
        return cls(column, find_image_processor(files.base if files else None, data.features, setting), media)

    def inputs(self, rows: list[dict], places: list[str], data: Data, setting: str) -> tuple[PictureInputs, np.ndarray, np.ndarray]:
        pictures = self.media.pictures(rows, self.column, places, setting)
        return PictureInputs(pictures, self.reader), np.arange(len(rows)), np.zeros(0, np.int64)


def find_image_processor(folder: Path | None, features: InputFeatures | None, setting: str) -> Any:
    """The image processor of a model's folder, or for new weights (`folder` None) the one that data.features describes. UserError if there is none."""
    from transformers import AutoImageProcessor

    register()
    if folder is None:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        return ViTImageProcessorPil(size={"height": features.size, "width": features.size})
    return read_from(folder, AutoImageProcessor, "images", "image processor", setting)
