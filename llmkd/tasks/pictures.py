"""Images as what models read: image processors, and inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.data import Data
from ..config.media import InputFeatures
from ..data.examples import Draw
from ..data.media.examples import MediaFiles
from ..model_folder.files import ModelFiles
from .builtin import register
from .media import MediaOfRun
from .sound import read_from, settings_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PictureInputs:
    """Images as a model reads them; see `data.inputs.Inputs`. `reader`: its image processor."""

    pictures: MediaFiles
    reader: Any
    positions = False

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: 1, since all cost the same."""
        return np.ones(len(self.pictures), np.int64)

    def take(self, chosen: np.ndarray) -> "PictureInputs":
        return replace(self, pictures=self.pictures.take(chosen))

    @staticmethod
    def joined(parts: "Sequence[PictureInputs]") -> "PictureInputs":
        first, *others = parts
        return replace(first, pictures=first.pictures.joined([one.pictures for one in others]))

    def content(self, i: int) -> bytes:
        return (self.pictures.hashes[i] + self._settings).encode()

    @cached_property
    def _settings(self) -> str:
        return settings_of(self.reader)

    def shown(self, i: int, reader) -> str:
        return "an image"

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        pixels = self.pictures.read(indices, draw)
        return dict(self.reader(pixels, return_tensors="pt", input_data_format="channels_last"))  # else an image 3 pixels high is turned


@dataclass(frozen=True)
class PictureReader:
    """An image processor as a `Reader`."""

    column: str
    reader: Any
    media: MediaOfRun
    kind = "image"
    tokens = pad = None

    @classmethod
    def of(
        cls, column: str, files: ModelFiles | None, config: dict, setting: str, student, data: Data, media: MediaOfRun
    ) -> "PictureReader":
        return cls(column, find_image_processor(files.base if files else None, data.features, setting), media)

    @cached_property
    def identity(self) -> str:
        return settings_of(self.reader)

    def inputs(self, rows: list[dict], places: list[str], data: Data, setting: str) -> tuple[PictureInputs, np.ndarray, np.ndarray]:
        pictures = self.media.pictures(rows, self.column, places, setting)
        return PictureInputs(pictures, self.reader), np.arange(len(rows)), np.zeros(0, np.int64)

    def save(self, folder: Path) -> None:
        self.reader.save_pretrained(folder)


def find_image_processor(folder: Path | None, features: InputFeatures | None, setting: str) -> Any:
    """The image processor of a model's folder, or of the recipe's features for new weights. UserError where there is none."""
    from transformers import AutoImageProcessor

    register()
    if folder is None:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        return ViTImageProcessorPil(size={"height": features.size, "width": features.size})
    return read_from(folder, AutoImageProcessor, "images", "image processor", setting)
