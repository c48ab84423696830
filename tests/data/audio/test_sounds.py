"""The sounds of examples: bad ones are named, parts are taken, and samples follow the draw."""

import numpy as np
import pytest

from llmkd.data.audio.sounds import read_sounds
from llmkd.data.audio.way import SoundWay
from llmkd.data.examples import Draw
from llmkd.data.media.workers import MediaWorkers
from llmkd.errors import UserError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("audiomentations")


@pytest.fixture(scope="module")
def workers():
    some = MediaWorkers(SoundWay(8_000, ({"Gain": {"min_gain_db": -6.0, "max_gain_db": 6.0, "p": 1.0}},), "data.augment.audio"), 1)
    yield some
    some.close()


@pytest.fixture
def rows(tmp_path):
    for n, (rate, channels) in enumerate([(8_000, 1), (16_000, 1), (44_100, 2)]):
        samples = np.random.default_rng(n).normal(0, 0.1, (rate // 10, channels))
        soundfile.write(tmp_path / f"{n}.wav", samples, rate)
    return [{"audio": f"{n}.wav"} for n in (0, 1, 2)], [f"{tmp_path}/f.jsonl:{n + 1}" for n in range(3)]


def test_samples_follow_the_draw_and_the_content_alone(rows, workers, capfd):
    sounds = read_sounds(rows[0], "audio", rows[1], workers, "data.train")
    said = "data.train: of 3 clips resampled to 8,000 Hz: 1 from 16,000 Hz, 1 from 44,100 Hz; mixed to one channel: 1"
    assert said in capfd.readouterr().err and sounds.num_samples.tolist() == [800] * 3
    clean, drawn, step = sounds.read([0, 1, 2]), sounds.read([0, 1, 2], Draw(0, 1, 5)), sounds.read([2, 1, 0], Draw(0, 1, 9))[::-1]
    others = sounds.read([0, 1, 2], Draw(0, 2, 5))
    for i in range(3):
        gain = drawn[i] / clean[i]
        assert np.ptp(gain) < 1e-4 and abs(gain.mean() - 1) > 1e-4 and not np.array_equal(drawn[i], others[i])
        assert np.array_equal(drawn[i], step[i])  # another step of the epoch, in another order
    part = sounds.take(np.array([2, 0]))
    assert np.array_equal(part.read([0], Draw(0, 1, 5))[0], drawn[2]) and part.places == [rows[1][2], rows[1][0]]


def test_every_bad_file_is_named_at_once(rows, workers, tmp_path):
    (tmp_path / "1.wav").write_bytes((tmp_path / "1.wav").read_bytes()[:-100])
    given = [*rows[0], {"audio": "gone.wav"}, {"audio": 3}]
    with pytest.raises(UserError) as caught:
        read_sounds(given, "audio", [*rows[1], "f.jsonl:4", "f.jsonl:5"], workers, "data.train")
    problems = caught.value.problems
    assert len(problems) == 3
    assert all(f".jsonl:{n}: " in problem for n, problem in zip((2, 4, 5), problems, strict=True))
    assert "cut short" in problems[0] and "gone.wav: No such file" in problems[1] and "audio: found a number" in problems[2]
