"""Image files: what is decoded, and what is refused by name."""

import io

import numpy as np
import pytest

from llmkd.data.images.decode import decode
from llmkd.errors import UserError

Image = pytest.importorskip("PIL.Image")
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def file_of(pixels, kind: str = "PNG", mode: str | None = None, **settings) -> bytes:
    image, out = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(out, kind, **settings)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "settings"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_pixels_are_those_that_were_written(kind, settings, tmp_path):
    (tmp_path / "a").write_bytes(raw := file_of(PIXELS, kind, **settings))
    picture = decode(tmp_path / "a", "f.jsonl:1")
    assert np.array_equal(picture.pixels, PIXELS) and picture.content_hash == decode(raw, "").content_hash


def test_grey_turned_and_transparent_images_are_seen_as_they_are_shown():
    grey = decode(file_of(PIXELS[:, :, 0]), "").pixels
    assert np.array_equal(grey, np.repeat(PIXELS[:, :, :1], 3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    assert np.array_equal(decode(file_of(PIXELS, exif=exif.tobytes()), "").pixels, np.rot90(PIXELS, -1))
    clear = np.concatenate([PIXELS, np.where(np.arange(30) < 15, 0, 255).astype(np.uint8)[None, :, None].repeat(20, 0)], 2)
    seen = decode(file_of(clear), "").pixels
    assert (seen[:, :15] == 255).all() and np.array_equal(seen[:, 15:], PIXELS[:, 15:])


FRAMES = io.BytesIO()
Image.fromarray(PIXELS).save(FRAMES, "GIF", save_all=True, append_images=[Image.fromarray(PIXELS[::-1])])


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the file is empty"),
        (b"RIFF1234WAVEfmt ", "not an image"),
        (file_of(PIXELS)[:-200], "a damaged image"),
        (file_of(PIXELS, "JPEG")[:-200], "a damaged image"),
        (FRAMES.getvalue(), "the image has 2 frames"),
        (file_of(PIXELS[:, :, 0].astype(np.uint16) * 257), "more than 8 bits a channel"),
    ],
)
def test_what_is_no_whole_image_is_refused_with_its_place(raw, says):
    with pytest.raises(UserError) as caught:
        decode(raw, "f.parquet:7")
    assert str(caught.value).startswith("f.parquet:7: ") and says in str(caught.value)


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="more than 100 pixels"):
        decode(file_of(PIXELS), "")
