"""Decodes image files to arrays of red, green and blue. No torch here.

Refused is what the library would read as something else: files that are cut short, moving pictures (of which it reads the first), and more than
8 bits a channel (which it cuts).
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..media.files import AGAIN, read_bytes


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    pixels         [height, width, 3] uint8, turned as its file says it is to be seen
    mode           of the file, in the library's words: RGB, L (grey), P (palette), RGBA, ...
    content_hash   of the file's bytes
    """

    pixels: np.ndarray
    mode: str
    content_hash: str


def decode(image: str | Path | bytes, place: str) -> Picture:
    """An image file, given by its path or as its bytes. UserError begins with `place`. Transparent parts are shown on white."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    raw = image if isinstance(image, bytes) else read_bytes(image, place)
    if not raw:
        raise UserError(f"{place}: the file is empty; {AGAIN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(raw))
            frames, mode = getattr(opened, "n_frames", 1), opened.mode
            opened.load()
    except UnidentifiedImageError:
        raise UserError(f"{place}: not an image (it begins with {raw[:8]!r}); expected png, jpeg, webp, bmp or gif") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{place}: the image has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # the library raises OSError, SyntaxError, struct.error and others
        raise UserError(f"{place}: a damaged image ({(str(error).splitlines() or [type(error).__name__])[0][:160]}); {AGAIN}") from None
    if frames > 1:
        raise UserError(f"{place}: the image has {frames} frames; save the one that is meant")
    if mode[:1] in ("I", "F"):
        raise UserError(f"{place}: the image has more than 8 bits a channel (mode {mode}); save it with 8")
    turned = ImageOps.exif_transpose(opened)
    if "A" in turned.getbands() or "transparency" in turned.info:
        seen = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return Picture(np.asarray(turned.convert("RGB")), mode, hashlib.sha256(raw).hexdigest())
