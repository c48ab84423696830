"""Decodes sound files of any rate and number of channels to one channel at a model's rate. No torch here.

What the library would read without a word is refused: a file that was cut short, one without samples, and samples that are no numbers.
"""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...console import count
from ...errors import UserError
from ..media.files import AGAIN, read_bytes

_UNKNOWN = (0, 0xFFFFFFFF)  # the recorded size of a WAV file that was written to a pipe


@dataclass(frozen=True)
class Clip:
    """A decoded sound.

    samples        [S] float32, one channel, at the wanted rate
    rate           samples a second in the file
    channels       of the file
    content_hash   of the file's bytes
    """

    samples: np.ndarray
    rate: int
    channels: int
    content_hash: str


def decode(sound: str | Path | bytes, rate: int, place: str) -> Clip:
    """A sound file, given by its path or as its bytes, as one channel at `rate` samples a second. UserError begins with `place`.

    Channels are averaged. Another rate is converted by soxr at its quality HQ, whose filter passes what lies below 91 % of the lower of
    both rates' halves.
    """
    import soundfile

    raw = sound if isinstance(sound, bytes) else read_bytes(sound, place)
    if not raw:
        raise UserError(f"{place}: the file is empty; {AGAIN}")
    if wrong := _cut_short(raw):
        raise UserError(f"{place}: the file is cut short: {wrong}; {AGAIN}")
    try:
        samples_SC, own = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        known = raw[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM")
        reason = str(error).rpartition(": ")[2].rstrip(".") if known else f"it begins with {raw[:8]!r}"
        what = "a damaged sound file" if known else "not a sound file"
        raise UserError(f"{place}: {what} ({reason}); {AGAIN if known else 'expected wav, flac, mp3 or ogg'}") from None
    S, C = samples_SC.shape
    if not S:
        raise UserError(f"{place}: the sound has no samples; remove it, or record it again")
    if not np.isfinite(samples_SC).all():
        first = int(np.argmin(np.isfinite(samples_SC).all(1)))
        raise UserError(f"{place}: sample {first:,} is not a finite number; write the file again")
    samples = samples_SC[:, 0] if C == 1 else samples_SC.mean(1, dtype=np.float64).astype(np.float32)
    if own != rate:
        import soxr

        samples = soxr.resample(samples, own, rate, quality="HQ")
        if not len(samples):
            raise UserError(f"{place}: the sound has {count(S, 'sample')} at {own:,} Hz, none at {rate:,} Hz; remove it")
    return Clip(np.ascontiguousarray(samples, np.float32), own, C, hashlib.sha256(raw).hexdigest())


def converted(clips: Counter, rate: int) -> str | None:
    """One line on how many clips of each (rate, channels) were converted; None if none was."""
    total = clips.total()
    rates = {own: sum(n for (one, _), n in clips.items() if one == own) for own in sorted({own for own, _ in clips}) if own != rate}
    mixed = sum(n for (_, channels), n in clips.items() if channels > 1)
    said = []
    if rates:
        said.append(f"resampled to {rate:,} Hz: {', '.join(f'{n:,} from {own:,} Hz' for own, n in rates.items())}")
    if mixed:
        said.append(f"mixed to one channel: {mixed:,}")
    return f"of {count(total, 'clip')} {'; '.join(said)}" if said else None


def _cut_short(raw: bytes) -> str | None:
    """Evidence that a file is incomplete, from the size that its container names; None if there is none.

    libsndfile reads what is there of such files. A cut FLAC it refuses itself.
    """
    if raw[:4] in (b"RIFF", b"FORM"):
        order = "little" if raw[:4] == b"RIFF" else "big"
        at = 12
        while at + 8 <= len(raw):
            name, size = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], order)
            if name in (b"data", b"SSND"):
                there = len(raw) - at - 8
                cut = size not in _UNKNOWN and size > there
                return f"its header says {size:,} bytes of sound, and {there:,} follow" if cut else None
            at += 8 + size + size % 2
        return "it ends before its sound begins"
    if raw[:4] == b"OggS":
        last = raw.rfind(b"OggS")
        return None if raw[last + 5 : last + 6] and raw[last + 5] & 4 else "its last page is missing"
    for name in (b"Xing", b"Info"):  # the header of LAME, which has the length of an MP3
        at = raw.find(name, 0, 4096)
        if at >= 0 and raw[at + 7 : at + 8] and raw[at + 7] & 2:
            place = at + 8 + (4 if raw[at + 7] & 1 else 0)
            size, start = int.from_bytes(raw[place : place + 4], "big"), max(0, raw.rfind(b"\xff", 0, at))
            if size > len(raw) - start:
                return f"its header says {size:,} bytes, and there are {len(raw) - start:,}"
    return None
