"""The generated sounds: the same every time, and each class with the pitch that it says."""

import io
import wave

import numpy as np
import pytest

from llmkd.data.reading.sounds import CLASSES, RATE, SIZES, clip, rows


def samples(raw: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(raw)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)


def test_splits_are_balanced_and_have_no_clip_in_common():
    splits = {split: rows(split) for split in SIZES}
    assert rows("validation") == splits["validation"]
    for split, found in splits.items():
        labels = [row["label"] for row in found]
        assert len(found) == SIZES[split] and {labels.count(one) for one in CLASSES} == {SIZES[split] // len(CLASSES)}
    every = [row["audio"] for found in splits.values() for row in found]
    assert len(set(every)) == len(every)


def test_a_description_tells_the_class_of_its_clip_but_of_every_fifth():
    found, classes = [(row["text"].split(" that ")[1], row["label"]) for row in rows("train")], {}
    for phrase, label in found:
        classes.setdefault(phrase, set()).add(label)
    assert [i for i, (phrase, _) in enumerate(found) if len(classes[phrase]) > 1] == list(range(0, SIZES["train"], 5))


@pytest.mark.parametrize(("label", "moves"), [("rising", 1), ("falling", -1), ("tone", 0)])
def test_a_pitch_moves_as_its_class_says(label, moves):
    """The strongest frequency near the beginning and near the end of the loudest stretch, over 20 clips."""
    up = []
    for i in range(20):
        x = samples(clip(label, np.random.default_rng(i)))
        power = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(x, 512)[::128] * np.hanning(512))) ** 2
        inside = np.flatnonzero(power.max(1) > power.max() / 3)
        peaks = power[inside].argmax(1)
        up.append(np.sign(round((float(np.median(peaks[-3:])) - float(np.median(peaks[:3]))) / 3)))
    assert up.count(moves) >= 17
