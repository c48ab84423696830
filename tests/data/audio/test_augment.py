"""Augmentation of sound: a pure function, the library's own results, and what is refused before anything is loaded."""

import random

import numpy as np
import pytest

from llmkd.data.audio.augment import SoundAugmentation
from llmkd.data.media.augment import seeds
from llmkd.errors import UserError

audiomentations = pytest.importorskip("audiomentations")

FOUR = [
    {"Normalize": {"apply_to": "all", "p": 1.0}},
    {"TimeStretch": {"p": 0.5, "min_rate": 0.95, "max_rate": 1.05, "leave_length_unchanged": False}},
    {"PitchShift": {"p": 0.5, "min_semitones": -2, "max_semitones": 2}},
    {"AddGaussianSNR": {"p": 0.5, "min_snr_db": 25, "max_snr_db": 40}},
]
CLIP = np.random.default_rng(1).normal(0, 0.1, 4_000).astype(np.float32)


@pytest.fixture(scope="module")
def four():
    return SoundAugmentation(FOUR, 16_000, "data.augment.audio")


def test_the_four_transforms_are_the_librarys_own_seeded_by_hand(four):
    four_of_the_library = [
        audiomentations.Normalize(apply_to="all", p=1),
        audiomentations.TimeStretch(p=0.5, min_rate=0.95, max_rate=1.05, leave_length_unchanged=False),
        audiomentations.PitchShift(p=0.5, min_semitones=-2, max_semitones=2),
        audiomentations.AddGaussianSNR(p=0.5, min_snr_db=25, max_snr_db=40),
    ]
    lengths = set()
    for epoch in range(6):
        python, numpy = seeds(5, epoch, "clip")
        random.seed(python)
        np.random.seed(numpy)
        wanted = CLIP
        for transform in four_of_the_library:
            wanted = transform(wanted, 16_000)
        got = four(CLIP, 5, epoch, "clip")
        assert got.dtype == np.float32 and np.array_equal(got, wanted)
        lengths.add(len(got))
    assert len(lengths) > 1 and four.changes_length


def test_a_clip_follows_from_seed_epoch_and_content_alone(four):
    first = [four(CLIP, 0, epoch, "a") for epoch in (0, 1)]
    four(CLIP[::-1], 9, 9, "b")
    again = [four(CLIP, 0, epoch, "a") for epoch in (1, 0)][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    others = [four(CLIP, 1, 0, "a"), four(CLIP, 0, 0, "b"), first[1]]
    assert not any(x.shape == first[0].shape and np.array_equal(x, first[0]) for x in others)


def test_nobody_else_sees_other_random_numbers(four):
    random.seed(1)
    np.random.seed(1)
    wanted = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    before = CLIP.copy()
    four(CLIP, 0, 0, "a")
    assert (random.random(), np.random.random()) == wanted and np.array_equal(CLIP, before)


def test_groups_hold_lists_of_the_same_form():
    asked = [
        {"SomeOf": {"num_transforms": [1, 2], "transforms": [{"Gain": {"p": 1.0}}, {"PolarityInversion": None}, {"Reverse": {"p": 1.0}}]}}
    ]
    group = SoundAugmentation(asked, 8_000, "a")
    assert not group.changes_length and len({group(CLIP, 0, epoch, "a").tobytes() for epoch in range(8)}) > 3


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([{"TimeStrech": {}}], "a.0: audiomentations .* has no transform 'TimeStrech' for a recipe; did you mean TimeStretch?"),
        ([{"Lambda": {}}], "a.0: .* no transform 'Lambda' for a recipe"),
        ([{"Gain": {}}, {"TimeStretch": {"min_rat": 1}}], r"a.1.TimeStretch.min_rat: no such argument; .* did you mean min_rate\?"),
        ([{"TimeStretch": {"min_rate": 2, "max_rate": 1}}], "a.0.TimeStretch: found .* refuses .min_rate must not be greater"),
        ([{"TimeStretch": {"p": 2}}], "a.0.TimeStretch: found {'p': 2}, which audiomentations .* refuses"),
        (["Gain"], "a.0: found 'Gain', expected one transform"),
        ([{"Gain": [1]}], "a.0.Gain: found .* expected its arguments by name"),
        ([{"OneOf": {"transforms": [{"Gane": {}}]}}], "a.0.OneOf.transforms.0: .* did you mean Gain"),
        ([{"Compose": {"transforms": []}}], "a.0.Compose.transforms: found .*, expected a list"),
        ([{"RoomSimulator": {}}], "a.0.* RoomSimulator fails|a.0.RoomSimulator: found .* refuses"),
        ([{"Gain": {"min_gain_db": float("nan"), "max_gain_db": 0.0}}], "a.0: Gain gives samples that are not finite"),
    ],
)
def test_wrong_transforms_are_refused_by_name(asked, says):
    with pytest.raises(UserError, match=says):
        SoundAugmentation(asked, 8_000, "a")


def test_a_transform_that_gives_no_sound_names_the_clip():
    with pytest.raises(UserError, match="f.jsonl:3: Reverse gives no samples"):
        SoundAugmentation([{"Reverse": {"p": 1.0}}], 8_000, "a")(CLIP[:0], 0, 0, "a", "f.jsonl:3")
