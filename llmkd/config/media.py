"""Settings of sounds and images: features that are computed from them, augmentation, and file names that a pattern reads."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .fields import as_tuple, config_dataclass, fixed, with_setting_names
from .formats import FORMATS

Transforms = tuple[dict[str, Any], ...]


@config_dataclass
class InputFeatures:
    kind: Literal["log_mel", "pixels"] = fixed(
        description="log_mel (sounds): logarithm of the power in bands of Slaney's mel scale, every 10 ms, as Whisper's; pixels (images): colours"
        " from -1 to 1.",
    )
    rate: Annotated[int, Field(ge=1000, le=192_000)] = fixed(
        16_000, description="log_mel: samples per second, a multiple of 200. Clips of another rate are resampled."
    )
    mels: Annotated[int, Field(ge=1, le=1000)] = fixed(80, description="log_mel: number of bands.")
    seconds: Annotated[float, Field(ge=0.05, le=3600)] | None = fixed(
        None,
        description="log_mel: length of every clip's features. Shorter clips are filled with silence; for longer ones see data.too_long.",
    )
    size: Annotated[int, Field(ge=4, le=4096)] | None = fixed(None, description="pixels: height and width to which every image is resized.")


@config_dataclass
class Augment:
    audio: Transforms = fixed(
        (),
        description="For formats audio and speech: transforms of audiomentations, applied in order, each with its name and arguments: "
        "[{TimeStretch: {p: 0.5, min_rate: 0.9}}]. They are drawn anew for every clip in every epoch.",
    )
    image: Transforms = fixed(
        (),
        description="For format image: transforms of albumentations, in the same form: [{HorizontalFlip: {p: 0.5}}].",
    )
    prompt: Transforms = fixed(
        (),
        description="Edits of the prompt, each with the share of words that it changes: [{swap: 0.1}, {delete: 0.1}, {typo: 0.05}]. They edit the"
        " users' texts for language models, the prompts with task: text_to_text, and the texts for classifiers. Targets are "
        "unchanged.",
    )
    teacher_sees: Literal["same", "clean"] = fixed(
        "same",
        description="Version of an augmented example that the teacher reads. same: the student's; clean: the original, which a teacher cache "
        "needs.",
    )


#: {setting of data.augment: the formats whose files it augments}.
AUGMENTED = {"audio": ("audio", "speech"), "image": ("image",)}


def reads_files(data: Any) -> bool:
    """Whether classifiers' rows are sounds or images. `data`: that section of a recipe."""
    forms = (FORMATS[source.format] for source in as_tuple(data.train))
    return any(form.file and form.supervised == "label" for form in forms)


def media_contradictions(recipe: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of sounds and images, in the form of `contradictions.contradictions`. `recipe`: the whole recipe."""
    data, features, augment = recipe.data, recipe.data.features, recipe.data.augment
    formats = {source.format for source in (*as_tuple(data.train), *as_tuple(data.validation))}
    new = (recipe.student.architecture or {}).get("model_type") == "builtin_cnn"
    if features:
        yield from _feature_contradictions(features, formats)
    elif new and formats & {"audio", "image"}:
        kind = "log_mel, rate, mels and seconds" if "audio" in formats else "pixels and size"
        yield (
            ("data.features", "student.architecture"),
            f"not given, and builtin_cnn has no way of its own to read files: give kind: {kind}",
        )
    if recipe.student.architecture and formats & {"audio", "image"} and not (features or new):
        yield (
            ("student.architecture", "data.train"),
            f"found {recipe.student.architecture.get('model_type')} with rows of sounds or images, and nothing says how new weights of it read files; "
            "use builtin_cnn with data.features, or name student.model, a folder with preprocessor_config.json",
        )
    if recipe.student.architecture and features and not new:
        kind = recipe.student.architecture.get("model_type")
        yield ("data.features", "student.architecture"), f"set for {kind}, which has a way of its own to read files; leave it out"
    if not augment:
        return
    if not any(getattr(augment, kind) for kind in (*AUGMENTED, "prompt")):
        yield ("data.augment",), f"names no transform; give some under {', '.join(AUGMENTED)} or prompt, or leave data.augment out"
    for kind, theirs in AUGMENTED.items():
        if getattr(augment, kind) and not formats & set(theirs):
            yield (f"data.augment.{kind}", "data.train"), f"set, but no rows have format: {' or '.join(theirs)}; leave it out"
    teachers = with_setting_names(recipe.teacher, "teacher")
    if teachers and all(one.reads for _, one in teachers) and augment.teacher_sees == "same":
        path, column = teachers[0][0], teachers[0][1].reads
        yield (
            ("data.augment.teacher_sees", f"{path}.reads"),
            f"found same with {path}.reads: {column}, a column that is not augmented; set it to clean",
        )
        return
    for path, teacher in teachers:
        if teacher.cache and not teacher.reads and augment.teacher_sees == "same":
            yield (
                ("data.augment.teacher_sees", f"{path}.cache"),
                f"found same with {path}.cache, which holds answers to the clean examples; use clean, or leave the cache out",
            )
    inside = next((name for name in ("features", "attention") if getattr(recipe.loss, name)), None)
    asked = [one for _, one in teachers if inside and (len(teachers) == 1 or one.name == getattr(recipe.loss.features, "teacher", None))]
    if inside and augment.teacher_sees == "clean" and not all(one.reads for one in asked):
        yield (
            (f"loss.{inside}", "data.augment.teacher_sees"),
            f"compares layers, and with teacher_sees: clean the teacher's positions are others than the student's; use same, or leave loss.{inside} out",
        )


def _feature_contradictions(features: InputFeatures, formats: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    needed, format = ("seconds", "audio") if features.kind == "log_mel" else ("size", "image")
    if format not in formats:
        yield ("data.features.kind", "data.train"), f"found {features.kind}, but no rows have format: {format}; leave data.features out"
    if getattr(features, needed) is None:
        yield (f"data.features.{needed}",), f"not given; {features.kind} needs it"
    for name, others in (("log_mel", ("size",)), ("pixels", ("seconds",))):
        for other in others:
            if features.kind == name and getattr(features, other) is not None:
                yield (f"data.features.{other}",), f"set with kind: {name}, which has none; leave it out"
    if features.rate % 200:
        near, why = max(1, round(features.rate / 200)) * 200, "by which 25 ms and 10 ms are whole numbers of samples"
        yield ("data.features.rate",), f"found {features.rate}, expected a multiple of 200, {why}; use {near}"


def pattern_problem(pattern: str, column: str) -> str | None:
    """The problem with a source's `pattern`, as found and expected; None if there is none. `column`: the format's own name for the file."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        return f"found {pattern!r}, which is no regular expression ({error}); correct it"
    if not groups:
        return f"found {pattern!r} without a named group; name what it reads: (?P<label>...)"
    return f"found the group {column!r}, which is the file itself; name it otherwise" if column in groups else None
