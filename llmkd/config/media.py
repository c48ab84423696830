"""Settings of sounds and images: features that are computed from them, augmentation, and file names that a pattern reads."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .fields import config_dataclass, fixed

Transforms = tuple[dict[str, Any], ...]
Probability = Annotated[float, Field(ge=0, le=1)]


@config_dataclass
class SoundFeatures:
    kind: Literal["log_mel"] = fixed(
        "log_mel", description="log_mel: logarithms of the power in bands of Slaney's mel scale, every 10 ms, as Whisper's."
    )
    rate: Annotated[int, Field(ge=1000, le=192_000)] = fixed(
        16_000, description="Samples a second, a multiple of 200; clips of another rate are resampled."
    )
    mels: Annotated[int, Field(ge=1, le=1000)] = fixed(80, description="Bands.")
    seconds: Annotated[float, Field(ge=0.05, le=3600)] = fixed(
        description="Length of every clip's features: shorter clips end in silence. See data.too_long for longer ones."
    )


@config_dataclass
class Augment:
    audio: Transforms = fixed(
        (),
        description="Of format audio: transforms of audiomentations, one after another, each by its own name and arguments: [{TimeStretch: {p: 0.5, min_rate: 0.9}}]. "
        "They are drawn anew for every clip in every epoch.",
    )
    prompt: tuple[dict[Literal["swap", "delete", "typo"], Probability], ...] = fixed(
        (),
        description="Of format labelled: edits of the text's words, one after another, each with the probability that a word is edited: [{swap: 0.1}, {delete: 0.1}, "
        "{typo: 0.05}]. swap: with the next word; delete: left out; typo: two of its letters change places.",
    )
    teacher_sees: Literal["same", "clean"] = fixed(
        "same",
        description="What the teacher reads of an example that was augmented for the student: the same, or the clean one, which a teacher's cache needs.",
    )


def feature_contradictions(features: SoundFeatures) -> Iterator[tuple[str, str]]:
    """Settings of `data.features` that are each valid, but not together: yields (setting, problem and fix)."""
    if features.rate % 200:
        near = round(features.rate / 200) * 200
        yield (
            "data.features.rate",
            f"found {features.rate}, expected a multiple of 200, by which 25 ms and 10 ms are whole numbers of samples; use {near}",
        )


def pattern_problem(pattern: str, column: str) -> str | None:
    """What is wrong with a source's `pattern`: found, expected; None where nothing is. `column`: the format's own name for the file."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        return f"found {pattern!r}, which is no regular expression ({error}); correct it"
    if not groups:
        return f"found {pattern!r} without a named group; name what it reads: (?P<label>...)"
    return f"found the group {column!r}, which is the file itself; name it otherwise" if column in groups else None
