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
from ..data.images import decode
from ..data.reading.files import BadRow
from ..data.reading.media import media_of
from ..data.reading.problems import ErrorCollector
from ..errors import ChangedFiles, UserError
from ..model_folder.files import ModelFiles
from .builtin import register
from .sound import read_from, settings_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PictureInputs:
    """Images as a model reads them, of which none is in memory but those that a row holds as bytes; see `data.inputs.Inputs`.

    files, hashes, places   of each: its path or its bytes, the sha256 of its file, and `FILE:LINE` or its file
    reader                  the model's image processor
    """

    files: list[Path | bytes]
    hashes: list[str]
    places: list[str]
    reader: Any
    positions = False

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: 1, since all cost the same."""
        return np.ones(len(self.files), np.int64)

    def take(self, chosen: np.ndarray) -> "PictureInputs":
        files, hashes, places = ([of_each[i] for i in chosen] for of_each in (self.files, self.hashes, self.places))
        return replace(self, files=files, hashes=hashes, places=places)

    @staticmethod
    def joined(parts: "Sequence[PictureInputs]") -> "PictureInputs":
        files, hashes, places = ([x for one in parts for x in getattr(one, name)] for name in ("files", "hashes", "places"))
        return replace(parts[0], files=files, hashes=hashes, places=places)

    def content(self, i: int) -> bytes:
        return (self.hashes[i] + self._settings).encode()

    @cached_property
    def _settings(self) -> str:
        return settings_of(self.reader)

    def shown(self, i: int, reader) -> str:
        return "an image"

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        """Nothing is random here."""
        pictures = []
        for i in indices:
            picture = decode(self.files[i], self.places[i])
            if picture.content_hash != self.hashes[i]:
                raise ChangedFiles(
                    f"{self.places[i]}: the file was changed while the run reads it; write it back, and continue with --resume"
                )
            pictures.append(picture.pixels)
        return dict(self.reader(pictures, return_tensors="pt", input_data_format="channels_last"))  # else an image 3 pixels high is turned


@dataclass(frozen=True)
class PictureReader:
    """An image processor as a `Reader`."""

    column: str
    reader: Any
    kind = "image"
    tokens = pad = None

    @classmethod
    def of(cls, column: str, files: ModelFiles | None, config: dict, setting: str, student, data: Data, clips) -> "PictureReader":
        return cls(column, find_image_processor(files.base if files else None, data.features, setting))

    @cached_property
    def identity(self) -> str:
        return settings_of(self.reader)

    def inputs(self, rows: list[dict], places: list[str], data: Data, setting: str) -> tuple[PictureInputs, np.ndarray, int]:
        return read_pictures(rows, self.column, places, self.reader), np.arange(len(rows)), 0

    def save(self, folder: Path) -> None:
        self.reader.save_pretrained(folder)


def read_pictures(rows: Sequence[dict], column: str, places: Sequence[str], reader: Any) -> PictureInputs:
    """The images that rows name or hold, each decoded once. UserError names every file that is no whole image."""
    problems, files, hashes = ErrorCollector(), [], []
    for row, place in zip(rows, places, strict=True):
        try:
            file = media_of(row[column], place)
            hashes.append(decode(file, place).content_hash)
            files.append(file)
        except BadRow as error:
            problems.add(f"{place}: {column}: {error}")
        except UserError as error:
            for problem in error.problems:
                problems.add(problem)
    problems.raise_if_any()
    return PictureInputs(files, hashes, list(places), reader)


def find_image_processor(folder: Path | None, features: InputFeatures | None, setting: str) -> Any:
    """The image processor of a model's folder, or of the recipe's features for new weights. UserError where there is none."""
    from transformers import AutoImageProcessor

    register()
    if folder is None:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        return ViTImageProcessorPil(size={"height": features.size, "width": features.size})
    return read_from(folder, AutoImageProcessor, "images", "image processor", setting)
