"""What models read of images: the built-in pixels by hand, two processors, and files that are bad or change."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from llmkd.config.data import Data
from llmkd.config.media import InputFeatures
from llmkd.data.images import pictures
from llmkd.data.images.pictures import read_pictures
from llmkd.data.images.way import PictureWay
from llmkd.data.media.workers import MediaWorkers
from llmkd.errors import ChangedFiles, UserError
from llmkd.tasks.media import MediaOfRun
from llmkd.tasks.pictures import PictureInputs, find_image_processor

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def workers():
    some = MediaWorkers(PictureWay(), 1)
    yield some
    some.close()


def test_pixels_are_colours_from_minus_one_to_one_and_each_model_has_its_processor(tmp_path, workers):
    values, out = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    student = find_image_processor(None, InputFeatures("pixels", size=8), "student.architecture")
    student.save_pretrained(tmp_path)
    teacher = find_image_processor(tmp_path, None, "teacher.model")
    teacher.size = {"height": 4, "width": 4}
    read = read_pictures([{"image": out.getvalue()}] * 2, "image", ["f.parquet:1", "f.parquet:2"], workers)
    inputs = PictureInputs(read, student).take(np.array([1]))
    mine, theirs = (replace(inputs, reader=one).batch([0], None) for one in (student, teacher))
    assert np.abs(mine["pixel_values"][0].numpy() - (values / 127.5 - 1).transpose(2, 0, 1)).max() < 1e-6
    three = inputs.joined([replace(inputs, files=replace(inputs.files, places=[one])) for one in "abc"])
    assert theirs["pixel_values"].shape == (1, 3, 4, 4) and three.lengths.tolist() == [1, 1, 1] and three.files.places == ["a", "b", "c"]
    assert inputs.content(0) != replace(inputs, reader=teacher).content(0)
    low, out = np.random.default_rng(1).integers(0, 256, (3, 8, 3), np.uint8), io.BytesIO()  # as many pixels high as there are colours
    Image.fromarray(low).save(out, "PNG")
    student.size = {"height": 3, "width": 8}
    read = read_pictures([{"image": out.getvalue()}], "image", ["f.parquet:1"], workers)
    (found,) = PictureInputs(read, student).batch([0], None)["pixel_values"]
    assert np.abs(found.numpy() - (low / 127.5 - 1).transpose(2, 0, 1)).max() < 1e-6
    with pytest.raises(UserError, match="teacher.model: .* has no preprocessor_config.json"):
        find_image_processor(tmp_path / "none", None, "teacher.model")


def test_transforms_are_tried_on_training_images_alone_and_each_column_is_decoded_once(monkeypatch):
    way, tried = SimpleNamespace(augment=({"HorizontalFlip": {}},), augmentation=lambda: "transforms"), []
    monkeypatch.setattr(pictures, "way_of", lambda augment: way)
    monkeypatch.setattr(pictures, "read_pictures", lambda rows, column, places, workers, what: tried.append(what))
    media = MediaOfRun(Data())
    for setting in ("data.train", "data.train.1", "data.validation"):
        media.pictures([], "image", [], setting)
    assert tried == ["transforms", "transforms", None]
    tried.clear()
    one, other = [], []
    for column, rows in (("image", one), ("still", one), ("image", one), ("image", other)):  # as models of two columns do in turn
        media.pictures(rows, column, [], "data.validation")
    assert len(tried) == 3


def test_bad_files_are_all_named_and_one_that_changes_ends_the_run(tmp_path, workers):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        read_pictures(
            [{"image": "a.png"}, {"image": "b.png"}, {"image": b"no"}],
            "image",
            [f"{tmp_path}/f.csv:{n}" for n in (2, 3, 4)],
            workers,
        )
    assert [":3: " in caught.value.problems[0], ":4: not an image" in caught.value.problems[1]] == [True, True]
    found = read_pictures([{"image": "a.png"}], "image", [f"{tmp_path}/f.csv:2"], workers)
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ChangedFiles, match="f.csv:2: the file was changed"):
        found.read([0])
