"""Augmentation of images: a pure function, the library's own results, what is refused before anything is loaded, and training batches."""

import hashlib
import io
import random
from dataclasses import replace

import numpy as np
import pytest

from llmkd.config.media import InputFeatures
from llmkd.data.examples import Draw
from llmkd.data.images.augment import PictureAugmentation
from llmkd.data.images.pictures import read_pictures
from llmkd.data.images.way import PictureWay
from llmkd.data.inputs import Reading
from llmkd.data.labelled import LabelledExamples
from llmkd.data.media.augment import seeds
from llmkd.data.media.worker import Reader
from llmkd.errors import ChangedFiles, UserError
from llmkd.tasks.pictures import PictureInputs, find_image_processor

A = pytest.importorskip("albumentations")
Image = pytest.importorskip("PIL.Image")

ASKED = (
    {"HorizontalFlip": {"p": 0.5}},
    {"OneOf": {"transforms": [{"RandomBrightnessContrast": {"p": 1.0}}, {"GaussNoise": {"p": 1.0}}], "p": 0.8}},
    {"RandomCrop": {"height": 10, "width": 9, "p": 1.0}},
)
PIXELS = np.random.default_rng(1).integers(0, 256, (16, 12, 3), np.uint8)


class Here:
    """What reads files in this process, in place of others."""

    def __init__(self, way):
        self.way, self.read, self.asked = way, Reader(way), []

    def __call__(self, jobs):
        self.asked += [job.draw for job in jobs]
        return [self.read(job) for job in jobs]


def png(n: int, height: int = 16) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (height, 12, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def way():
    return PictureWay(ASKED)


def test_an_image_follows_from_seed_epoch_and_content_as_the_library_makes_it(way):
    ours = way.augmentation()
    theirs = [
        A.HorizontalFlip(p=0.5),
        A.OneOf([A.RandomBrightnessContrast(p=1), A.GaussNoise(p=1)], p=0.8),
        A.RandomCrop(height=10, width=9, p=1),
    ]
    before, made = PIXELS.copy(), []
    for epoch in (0, 1, 2, 3, 0):
        own = random.Random(seeds(5, epoch, "file")[0]).getrandbits(64)
        draws, wanted = (np.random.default_rng(own), random.Random(own)), PIXELS
        for transform in theirs:
            transform.set_random_state(*draws)
        for transform in theirs:
            wanted = transform(image=wanted)["image"]
        made.append(ours(PIXELS, 5, epoch, "file"))
        assert made[-1].shape == (10, 9, 3) and np.array_equal(made[-1], wanted)
        ours(PIXELS[::-1], 9, epoch, "another")
    assert np.array_equal(made[0], made[4]) and len({one.tobytes() for one in made}) == 4 and np.array_equal(PIXELS, before)


def test_transforms_draw_apart_from_one_another():
    """Seeded alike, two flips of one probability would both be done or both not."""
    both = PictureAugmentation([{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}], "a")
    forms = {v: k for k, v in enumerate(one.tobytes() for one in (PIXELS, PIXELS[:, ::-1], PIXELS[::-1], PIXELS[::-1, ::-1]))}
    assert len({forms[both(PIXELS, 0, epoch, "x").tobytes()] for epoch in range(24)}) == 4


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([{"RandomHorizontalFlip": {}}], "a.0: albumentations .* has no transform 'RandomHorizontalFlip' .* did you mean HorizontalFlip?"),
        ([{"Lambda": {}}], "a.0: .* no transform 'Lambda' for a recipe"),
        ([{"RandomCrop": {"heigth": 4}}], r"a.0.RandomCrop.heigth: no such argument; .* did you mean height\?"),
        ([{"HorizontalFlip": {"p": 2}}], "a.0.HorizontalFlip: found .* refuses .p: Input should be less than or equal to 1.; correct it"),
        ([{"OneOf": {"transforms": [{"VerticalFlop": {}}]}}], "a.0.OneOf.transforms.0: .* did you mean VerticalFlip"),
        ([{"RandomCrop": {"height": 17, "width": 4}}], "a.0: RandomCrop fails .Crop size .* exceeds image dimensions"),
        ([{"ConstrainedCoarseDropout": {}}], "a.0: ConstrainedCoarseDropout fails .Neither valid mask nor"),
        ([{"RandomResizedCrop": {"size": 20}}], "a.0.RandomResizedCrop: found .* refuses .size: Input should be a valid tuple"),
        ([{"Rotate": {"limit": [1, 2], "interpolation": [7]}}], "a.0.Rotate: found .*interpolation"),
        ([{"ToFloat": {}}], "a.0: ToFloat gives values of type float32, expected uint8"),
        ([{"CenterCrop": {"height": 9, "width": 9}}, {"CenterCrop": {"height": 10, "width": 9}}], "a.1: CenterCrop fails"),
    ],
)
def test_wrong_transforms_are_refused_by_name(asked, says):
    with pytest.raises(UserError, match=says):
        PictureAugmentation(asked, "a").tried(PIXELS)


def test_transforms_are_tried_on_the_smallest_image_that_is_there(way):
    rows, places = [{"image": png(0)}, {"image": png(1, 9)}], ["f.parquet:1", "f.parquet:2"]
    assert len(read_pictures(rows, "image", places, Here(way))) == 2  # as held-out rows are
    with pytest.raises(UserError, match="data.augment.image.2: RandomCrop fails"):
        read_pictures(rows, "image", places, Here(way), way.augmentation())


@pytest.mark.parametrize("clean", [False, True])
def test_batches_are_the_same_however_they_are_cut_and_the_teacher_reads_what_it_is_to(way, clean):
    files, processor = [png(n) for n in range(4)], find_image_processor(None, InputFeatures("pixels", size=8), "")
    pictures = read_pictures([{"image": one} for one in files], "image", [f"f.parquet:{n}" for n in range(4)], Here(way))
    inputs = PictureInputs(pictures, processor)
    theirs = {"teacher": Reading(inputs, augmented=False)} if clean else {}
    examples = LabelledExamples(inputs, np.zeros(4, np.int64), np.arange(4), ("a",), of_teachers=theirs)
    whole = examples.batch([2, 0, 3, 1], Draw(0, 1, 7))
    halves = [examples.batch(some, Draw(0, 1, step)) for step, some in ((7, [2, 0]), (8, [3, 1]))]
    for model in ("student", "teacher"):
        one, *two = (batch.view_of(model).inputs["pixel_values"].numpy() for batch in (whole, *halves))
        assert np.array_equal(one, np.concatenate(two))
    seen = [way.augmentation()(np.asarray(Image.open(io.BytesIO(f))), 0, 1, hashlib.sha256(f).hexdigest()) for f in files]
    wanted = processor(seen, return_tensors="np", input_data_format="channels_last")["pixel_values"][[2, 0, 3, 1]]
    as_it_is = examples.batch([2, 0, 3, 1]).student.inputs["pixel_values"].numpy()
    assert np.array_equal(whole.student.inputs["pixel_values"].numpy(), wanted) and not np.array_equal(wanted, as_it_is)
    assert np.array_equal(whole.view_of("teacher").inputs["pixel_values"].numpy(), as_it_is if clean else wanted)
    assert pictures.workers.asked[:4] == [(0, 1)] * 4
    with pytest.raises(ChangedFiles, match="f.parquet:0: the file was changed"):
        replace(pictures, hashes=["other"] * 4).read([0])
