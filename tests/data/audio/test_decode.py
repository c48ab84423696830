"""Sound files: what is decoded, and what is refused by name."""

import io
from collections import Counter

import numpy as np
import pytest

from llmkd.data.audio.decode import converted, decode
from llmkd.errors import UserError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")


def file_of(samples, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(("kind", "subtype", "off"), [("WAV", "PCM_16", 2**-15), ("FLAC", "PCM_24", 2**-22), ("MP3", None, 0.05)])
def test_samples_are_those_that_were_written(kind, subtype, off, tmp_path):
    wanted, path = tone(440, 16_000), tmp_path / "a"
    path.write_bytes(file_of(wanted, 16_000, kind, subtype))
    clip = decode(path, 16_000, "f.jsonl:1")
    assert clip.samples.dtype == np.float32 and (clip.rate, clip.channels) == (16_000, 1)
    assert np.abs(clip.samples - wanted).max() <= off
    assert clip.content_hash == decode(path.read_bytes(), 16_000, "").content_hash


def test_a_tone_keeps_its_pitch_at_another_rate_and_channels_are_averaged():
    left, right = tone(440, 44_100), tone(1000, 44_100)
    clip = decode(file_of(np.stack([left, right], 1), 44_100, subtype="FLOAT"), 8_000, "")
    inner = slice(200, -200)  # the filter begins and ends in silence
    assert len(clip.samples) == 4_000 and (clip.rate, clip.channels) == (44_100, 2)
    assert np.abs(clip.samples - (tone(440, 8_000) + tone(1000, 8_000)) / 2)[inner].max() < 1e-3
    above = decode(file_of(tone(5_000, 44_100), 44_100, subtype="FLOAT"), 8_000, "").samples  # more than 8,000 Hz can hold
    assert np.abs(above[inner]).max() < 1e-4


def test_what_was_converted_is_one_line():
    clips = Counter({(8_000, 1): 3, (44_100, 2): 2, (16_000, 1): 1})
    assert converted(clips, 8_000) == "of 6 clips resampled to 8,000 Hz: 1 from 16,000 Hz, 2 from 44,100 Hz; mixed to one channel: 2"
    assert converted(Counter({(8_000, 1): 3}), 8_000) is None


SOUND = np.random.default_rng(0).normal(0, 0.1, 4_000)
WAV, MP3, OGG, FLAC = (file_of(SOUND, 8_000, kind) for kind in ("WAV", "MP3", "OGG", "FLAC"))
NAN = SOUND.copy()
NAN[70] = np.nan
AIFF = file_of(SOUND, 8_000, "AIFF")
ODD = WAV[:36] + b"LIST\x03\0\0\0abc\0" + WAV[36:]  # a part of 3 bytes before the sound, and the byte that makes it even


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the file is empty"),
        (b"ID,label\n1,2\n", "not a sound file (it begins with b'ID,label')"),
        (WAV[:-3000], "cut short: its header says 8,000 bytes of sound, and 5,000 follow"),
        (ODD[:-3000], "cut short: its header says 8,000 bytes of sound, and 5,000 follow"),
        (WAV[:30], "cut short: it ends before its sound begins"),
        (AIFF[:-3000], "cut short: its header says 8,008 bytes of sound, and 5,008 follow"),
        (MP3[:-500], "cut short: its header says"),
        (OGG[: len(OGG) // 2], "cut short: its last page is missing"),
        (FLAC[: len(FLAC) // 2], "a damaged sound file"),
        (file_of(SOUND[:0], 8_000), "the sound has no samples"),
        (file_of(NAN, 8_000, subtype="FLOAT"), "sample 70 is not a finite number"),
        (file_of(SOUND[:1], 48_000), "the sound has 1 sample at 48,000 Hz, none at 8,000 Hz"),
    ],
)
def test_what_is_no_whole_sound_is_refused_with_its_place(raw, says):
    with pytest.raises(UserError) as caught:
        decode(raw, 8_000, "train.parquet:7")
    assert str(caught.value).startswith("train.parquet:7: ") and says in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="f.csv:2: .*gone.wav: No such file"):
        decode(tmp_path / "gone.wav", 8_000, "f.csv:2")


def test_whole_files_of_unusual_containers_are_read():
    piped = bytearray(WAV)
    piped[40:44] = b"\xff" * 4  # a size that was not known when the header was written
    for raw in (bytes(piped), ODD, MP3, OGG, AIFF, FLAC):
        assert len(decode(raw, 8_000, "").samples) >= 4_000
