"""A small generated set of sounds: tones, chirps and pulses in noise, one second each at 8,000 Hz, as WAV files in memory.

It needs no download and is the same on every machine but for the last bit of some samples. A class is how the pitch moves, not which pitch it
is: base pitch, length, beginning, loudness and noise are drawn for every clip. Each clip has a description as text, of which every fifth does
not tell its class from another one's.
"""

import io
import wave

import numpy as np

VERSION = 1
RATE = 8_000
CLASSES = ("falling", "pulses", "rising", "tone", "two_tones", "vibrato")
SIZES = {"train": 300, "validation": 120, "test": 120}
_SEEDS = {"train": 1, "validation": 2, "test": 3}
_SECONDS = 1.0
_THINGS = ("whistle", "siren", "flute", "horn", "signal", "sound")
#: The descriptions of a clip: by its class, and by a property that two classes share.
_WORDS = {
    "falling": ("sinks from high to low", "slides down", "drops steadily"),
    "pulses": ("beeps in short bursts", "is cut into beats", "goes on and off"),
    "rising": ("climbs from low to high", "slides up", "lifts steadily"),
    "tone": ("holds one note", "stays level", "never changes"),
    "two_tones": ("is a chord of two notes", "sounds twice at once", "has two pitches"),
    "vibrato": ("wavers around a note", "trembles", "swings up and down"),
}
_VAGUE = (
    (("falling", "rising"), ("changes its pitch from one end to the other", "slides")),
    (("tone", "two_tones"), ("is long and even", "hums along")),
    (("pulses", "vibrato"), ("repeats something quickly", "shakes")),
)
_VAGUE_EVERY = 5
_SILENCE = 0.05  # seconds over which a sound begins and ends


def rows(split: str) -> list[dict]:
    """{audio: the bytes of a WAV file, label: class, text: a description} of each clip of a split, the classes in turn. KeyError for another split."""
    labels, seed = [CLASSES[i % len(CLASSES)] for i in range(SIZES[split])], _SEEDS[split]
    return [
        {
            "audio": clip(label, np.random.default_rng((seed, i))),
            "label": label,
            "text": description(label, np.random.default_rng((seed, i, 1)), i % _VAGUE_EVERY == 0),
        }
        for i, label in enumerate(labels)
    ]


def description(label: str, draw: np.random.Generator, vague: bool) -> str:
    """A sentence about a clip of a class. `vague`: it fits another class as well."""
    phrases = next(words for classes, words in _VAGUE if label in classes) if vague else _WORDS[label]
    return f"a {draw.choice(_THINGS)} that {draw.choice(phrases)}"


def clip(label: str, draw: np.random.Generator) -> bytes:
    """One sound of a class, drawn by `draw`."""
    pitch, length, loud = draw.uniform(300, 1200), draw.uniform(0.4, 0.8), draw.uniform(0.1, 0.3)
    start, noise_db = draw.uniform(0, _SECONDS - length), draw.uniform(0, 12)
    time = np.arange(round(length * RATE)) / RATE
    sound = _wave(label, pitch, time, length, draw) * np.clip(np.minimum(time, length - time) / _SILENCE, 0, 1)
    samples = draw.normal(0, 10 ** (-noise_db / 20) / 2**0.5, round(_SECONDS * RATE))
    at = round(start * RATE)
    samples[at : at + len(sound)] += sound
    pcm = np.clip(np.rint(samples * loud * 2**14), -(2**15), 2**15 - 1).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm.tobytes())
    return out.getvalue()


def _wave(label: str, pitch: float, time: np.ndarray, length: float, draw: np.random.Generator) -> np.ndarray:
    """Samples between -1 and 1. A pitch in Hz that moves has the integral of itself, times 2 pi, as its phase."""
    ratio, share = draw.uniform(1.5, 2.5), time / length
    if label in ("rising", "falling"):
        low, high = pitch, pitch * ratio
        first, last = (low, high) if label == "rising" else (high, low)
        phase = first * time + (last - first) * share * time / 2
    elif label == "vibrato":
        speed = draw.uniform(5, 9)
        phase = pitch * time + 0.08 * pitch * np.sin(2 * np.pi * speed * time) / (2 * np.pi * speed)
    else:
        phase = pitch * time
    sound = np.sin(2 * np.pi * phase)
    if label == "two_tones":
        return (sound + np.sin(2 * np.pi * pitch * ratio * time)) / 2
    if label == "pulses":
        return sound * (np.sin(2 * np.pi * draw.uniform(6, 10) * time) > 0)
    return sound
