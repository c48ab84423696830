"""Log-mel features against the textbook's sums in float64, and against Whisper's feature extractor."""

import math

import numpy as np
import pytest

from llmkd.data.audio.log_mel import LogMel, empty_filters


def sound(n: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 0.1, n).astype(np.float32)


def textbook(samples, rate: int, mels: int, frame: int) -> list[float]:
    """log10 of the power in each mel filter of one frame, by sums over sines and cosines."""
    width, hop = rate // 40, rate // 100
    at = [frame * hop - width // 2 + i for i in range(width)]
    x = [float(samples[abs(n)]) * (0.5 - 0.5 * math.cos(2 * math.pi * i / width)) for i, n in enumerate(at)]
    power = []
    for k in range(width // 2 + 1):
        real = sum(v * math.cos(2 * math.pi * k * i / width) for i, v in enumerate(x))
        imaginary = sum(v * math.sin(2 * math.pi * k * i / width) for i, v in enumerate(x))
        power.append(real**2 + imaginary**2)

    def hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * math.log(rate / 2000, 6.4)
    edges = [hertz(top * i / (mels + 1)) for i in range(mels + 2)]
    out = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = [
            max(0, min((k * rate / width - low) / (middle - low), (high - k * rate / width) / (high - middle))) for k in range(len(power))
        ]
        out.append(math.log10(max(1e-10, sum(w * p for w, p in zip(weights, power, strict=True)) * 2 / (high - low))))
    return out


def test_features_are_the_textbooks():
    samples, features = sound(1_600), LogMel(8_000, 20, 0.2)(sound(1_600))
    assert features.shape == (20, 20) and features.dtype == np.float32
    for frame in (0, 7, 18):  # the first is mirrored at the beginning
        wanted = np.array(textbook(samples, 8_000, 20, frame))
        assert np.abs(features[:, frame] * 4 - 4 - wanted).max() < 1e-5


def test_features_are_whispers_at_its_rate():
    from transformers import WhisperFeatureExtractor

    samples = sound(12_345)
    wanted = WhisperFeatureExtractor(feature_size=80, chunk_length=1)(samples, sampling_rate=16_000).input_features[0]
    assert np.abs(LogMel(16_000, 80, 1.0)(samples) - wanted).max() < 1e-4


def test_short_clips_end_in_silence_and_long_ones_are_cut():
    log_mel, samples = LogMel(8_000, 20, 0.5), sound(8_000)
    assert np.array_equal(log_mel(samples), log_mel(samples[:4_000]))
    silent = log_mel(samples[:2_000])
    assert silent.shape == (20, 50) and np.ptp(silent[:, 30:]) == 0 and np.isclose(silent.max() - silent.min(), 2)
    assert np.isfinite(log_mel(np.zeros(100, np.float32))).all()


@pytest.mark.parametrize(("mels", "some"), [(40, False), (128, True)])
def test_filters_between_two_frequencies_are_counted(mels, some):
    """At 8,000 Hz the frequencies of the transform are 40 Hz apart, the edges of 128 filters 18 Hz at the low end."""
    assert (empty_filters(8_000, mels) > 0) == some


def test_they_are_saved_and_loaded_as_a_feature_extractor(tmp_path):
    from llmkd.data.audio.feature_extractor import LogMelFeatureExtractor

    LogMelFeatureExtractor(20, 8_000, seconds=0.2).save_pretrained(tmp_path)
    extractor, clips = LogMelFeatureExtractor.from_pretrained(tmp_path), [sound(900), sound(1_600)]
    wanted = np.stack([LogMel(8_000, 20, 0.2)(clip) for clip in clips])
    for given in (clips, np.stack([np.pad(clips[0], (0, 700)), clips[1]])):
        assert np.array_equal(extractor(given, sampling_rate=8_000, return_tensors="pt")["input_features"].numpy(), wanted)
    for given in (clips[1], clips[1].tolist()):
        assert np.array_equal(extractor(given)["input_features"], wanted[1:])
    with pytest.raises(ValueError, match="found clips of 16000 Hz, expected 8000 Hz"):
        extractor(clips, sampling_rate=16_000)
