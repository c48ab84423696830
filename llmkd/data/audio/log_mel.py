"""Log-mel features of sound, as Whisper's but at any rate. No torch here.

Frames of 25 ms every 10 ms under a periodic Hann window, each centred on its time (the sound is mirrored at both ends); power of the
Fourier transform; triangles on Slaney's mel scale from 0 Hz to half the rate, each with an area of one; log10, of which what is more than 8
below the clip's largest value is raised to that; (x + 4) / 4. At 16,000 Hz and 80 mels these are the features of Radford et al. 2022,
"Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2, whose filters end at 8,000 Hz at every rate.
"""

import functools
from dataclasses import dataclass

import numpy as np

_FLOOR = 1e-10
_RANGE = 8.0  # powers of ten


@dataclass(frozen=True)
class LogMel:
    """The features of clips of `seconds`: shorter ones end in silence, longer ones are cut at the end.

    rate   samples a second, a multiple of 200
    mels   filters M
    """

    rate: int
    mels: int
    seconds: float

    @property
    def frames(self) -> int:
        """F, the number of frames of every clip: one every 10 ms."""
        return self.num_samples // self._hop

    @property
    def num_samples(self) -> int:
        return round(self.seconds * 100) * self._hop

    @property
    def _hop(self) -> int:
        return self.rate // 100

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Samples [S] to features [M, F] in float32."""
        sound = np.zeros(self.num_samples)
        sound[: len(samples)] = samples[: self.num_samples]
        width = self.rate // 40
        padded = np.pad(sound, width // 2, mode="reflect")
        frames_FW = np.lib.stride_tricks.sliding_window_view(padded, width)[:: self._hop][: self.frames]
        power_FK = np.abs(np.fft.rfft(frames_FW * _hann(width))) ** 2
        log_MF = np.log10(np.maximum(mel_filters(self.rate, width, self.mels) @ power_FK.T, _FLOOR))
        return ((np.maximum(log_MF, log_MF.max() - _RANGE) + 4) / 4).astype(np.float32)


def empty_filters(rate: int, mels: int) -> int:
    """The number of filters that lie between two frequencies of the transform and would always give silence."""
    return int((mel_filters(rate, rate // 40, mels).max(1) == 0).sum())


@functools.lru_cache(8)
def mel_filters(rate: int, width: int, mels: int) -> np.ndarray:
    """The triangles [M, K] over the K = width // 2 + 1 frequencies of the transform, in float64."""
    hertz_K = np.arange(width // 2 + 1) * rate / width
    edges = _to_hertz(np.linspace(0, _to_mel(rate / 2), mels + 2))
    low, middle, high = (edges[i : i + mels, None] for i in range(3))
    rising, falling = (hertz_K - low) / (middle - low), (high - hertz_K) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (high - low))


def _to_mel(hertz: float) -> float:
    """Slaney's scale: linear to 1,000 Hz (15 mels), above that 27 mels for a factor of 6.4."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) * 27 / np.log(6.4)


def _to_hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))


@functools.lru_cache(8)
def _hann(width: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
