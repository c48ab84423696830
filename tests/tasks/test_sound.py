"""What models read of sounds: extractors of several families, their longest clip, and two views."""

import io
import json

import numpy as np
import pytest
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from llmkd.config.data import Data
from llmkd.config.media import InputFeatures
from llmkd.data.audio.sounds import read_sounds, way_of
from llmkd.data.examples import Draw
from llmkd.data.media.workers import MediaWorkers
from llmkd.errors import UserError
from llmkd.tasks.media import MediaOfRun, settings_of
from llmkd.tasks.sound import SoundInputs, find_extractor, fitting, inputs_of, limit_of

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("audiomentations")

LOG_MEL = InputFeatures("log_mel", rate=8_000, mels=20, seconds=0.2)


def wav(n: int, samples: int = 1_200) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(n).normal(0, 0.1, samples), 8_000, format="WAV")
    return out.getvalue()


@pytest.fixture(scope="module")
def sounds():
    workers = MediaWorkers(way_of(8_000, [{"PolarityInversion": {"p": 1.0}}]), 1)
    rows = [{"audio": wav(n, 1_200 + 100 * n)} for n in range(3)]
    yield read_sounds(rows, "audio", [f"f.parquet:{n + 1}" for n in range(3)], workers, "data.train")
    workers.close()


def test_sounds_are_decoded_at_the_highest_rate_of_the_models_and_none_costs_nothing():
    media = MediaOfRun(Data())
    for extractor in (Wav2Vec2FeatureExtractor(sampling_rate=16_000), Wav2Vec2FeatureExtractor(sampling_rate=8_000)):
        media.read_by(extractor)
    found = media.sounds([{"audio": wav(0)}, {"audio": wav(1, 40)}], "audio", ["f.parquet:1", "f.parquet:2"], "data.train")
    assert found.num_samples.tolist() == [2_400, 80]  # 1,200 and 40 at 8,000 Hz
    assert SoundInputs(found, extractor).lengths.tolist() == [15, 1]


def test_silent_bands_and_clips_that_change_their_length_are_said(capsys):
    find_extractor(None, InputFeatures("log_mel", rate=8_000, mels=200, seconds=0.2), "student.architecture")
    way_of(8_000, [{"TimeStretch": {"p": 1.0, "leave_length_unchanged": False}}])
    said = capsys.readouterr().err
    assert "data.features.mels: found 200, of which " in said and "data.augment.audio: clips become longer or shorter" in said
    find_extractor(None, LOG_MEL, "student.architecture")
    way_of(8_000, [{"PolarityInversion": {"p": 1.0}}])
    assert not capsys.readouterr().err


def test_the_longest_clip_of_each_family():
    assert limit_of(find_extractor(None, LOG_MEL, "student.architecture"), 16_000) == 3_200
    assert (
        limit_of(WhisperFeatureExtractor(chunk_length=2), 16_000) == 32_000
        and limit_of(WhisperFeatureExtractor(chunk_length=2), 8_000) == 16_000
    )
    assert limit_of(ASTFeatureExtractor(max_length=50), 16_000) == 8_000 and limit_of(Wav2Vec2FeatureExtractor(), 16_000) is None


def test_clips_are_resampled_to_each_models_rate_and_padded():
    clips = [np.sin(np.arange(n) * 2 * np.pi * 440 / 8_000).astype(np.float32) for n in (800, 400)]
    found = inputs_of(Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True), clips, 8_000)
    wanted = np.sin(np.arange(1_600) * 2 * np.pi * 440 / 16_000)
    assert found["input_values"].shape == (2, 1_600) and found["attention_mask"].sum(1).tolist() == [1_600, 800]
    assert np.abs(found["input_values"][0].numpy() - wanted)[200:-200].max() < 1e-2 and not found["input_values"][1, 800:].any()


def test_inputs_are_those_of_the_clips_clean_or_of_a_draw(sounds):
    plain, clean = Wav2Vec2FeatureExtractor(sampling_rate=8_000, do_normalize=False), sounds.read([0, 2])
    drawn, as_they_are = (SoundInputs(sounds, plain).batch([0, 2], draw)["input_values"] for draw in (Draw(0, 0, 1), None))
    for i, clip in enumerate(clean):
        assert np.array_equal(as_they_are[i, : len(clip)], clip) and np.array_equal(drawn[i, : len(clip)], -clip)
    assert SoundInputs(sounds, find_extractor(None, LOG_MEL, "")).batch([0, 2], None)["input_features"].shape == (2, 20, 20)


def test_lengths_are_hundredths_of_a_second_that_are_read(sounds):
    assert SoundInputs(sounds, Wav2Vec2FeatureExtractor(sampling_rate=8_000)).lengths.tolist() == [15, 16, 17]
    short = find_extractor(None, InputFeatures("log_mel", rate=8_000, mels=20, seconds=0.16), "")
    part = SoundInputs(sounds, short).take(np.array([2, 0]))
    assert part.lengths.tolist() == [16, 15] and part.content(0).startswith(sounds.hashes[2].encode())
    assert part.joined([part, part.take(np.array([1]))]).lengths.tolist() == [16, 15, 15]


@pytest.mark.parametrize(("too_long", "used"), [("drop", [True, False]), ("truncate", [True, True]), ("refuse", None)])
def test_clips_that_are_longer_than_the_model_reads(too_long, used):
    given = np.array([800, 1_000]), 900, 1_000, too_long, lambda i: f"f.csv:{i + 2}", "student.model"
    if used is not None:
        assert fitting(*given).tolist() == used
        return
    with pytest.raises(UserError, match="f.csv:3: 1.00 s long, and student.model reads 0.90 s .1 of 2 clips"):
        fitting(*given)


def test_extractors_are_saved_found_and_compared(tmp_path):
    log_mel = find_extractor(None, LOG_MEL, "")
    log_mel.save_pretrained(tmp_path)
    assert settings_of(find_extractor(tmp_path, None, "teacher.model")) == settings_of(log_mel)
    assert settings_of(log_mel) != settings_of(find_extractor(None, InputFeatures("log_mel", rate=8_000, mels=21, seconds=0.2), ""))
    (whisper := tmp_path / "whisper").mkdir()
    (whisper / "processor_config.json").write_text(json.dumps({"feature_extractor": WhisperFeatureExtractor(feature_size=20).to_dict()}))
    assert find_extractor(whisper, None, "teacher.model").feature_size == 20
    with pytest.raises(UserError, match="teacher.model: .* has no preprocessor_config.json"):
        find_extractor(tmp_path / "none", None, "teacher.model")
