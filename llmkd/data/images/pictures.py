"""The images of some examples: their files, each decoded once. No torch here."""

from collections.abc import Sequence

import numpy as np

from ..media.examples import MediaFiles, read_each
from ..media.workers import MediaWorkers
from .augment import PictureAugmentation
from .decode import decode
from .way import PictureWay


def read_pictures(
    rows: Sequence[dict], column: str, places: Sequence[str], workers: MediaWorkers, tried: PictureAugmentation | None = None
) -> MediaFiles:
    """The images that rows name or hold. UserError names every file that is no whole image.

    tried   transforms that are tried on an image of the smallest height and width that are there: crops may ask for more
    """

    def seen(file, place: str) -> tuple[str, tuple[int, int]]:
        picture = decode(file, place)
        return picture.content_hash, picture.pixels.shape[:2]

    files, found = read_each(rows, column, places, seen)
    if tried and found:
        height, width = np.min([size for _, size in found], axis=0)
        tried.tried(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    return MediaFiles(files, [content_hash for content_hash, _ in found], list(places), workers)


def way_of(augment: Sequence[dict]) -> PictureWay:
    """The way in which images are read. UserError for an invalid transform; the check loads albumentations if there are any."""
    way = PictureWay(tuple(augment))
    if augment:
        way.augmentation()
    return way
