"""The teachers' settings: where a teacher's answers come from, and how several are combined. A part of `recipe.py`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .data import Data
from .fields import Count, Seed, as_tuple, changeable, config_dataclass, fixed, with_setting_names

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]


@config_dataclass
class Quantization:
    """The base's linear layers in 4 or 8 bit, by bitsandbytes or (fp8) by torch; embeddings, norms and the head keep `dtype`."""

    type: Literal["nf4", "fp4", "int8", "fp8"] = fixed(
        "nf4",
        description="Number format of the base's linear layers. int8 rounds activations too, in evaluation only; fp8 (e4m3, a scale for each row "
        "and token) too, and is for teachers, on GPUs of compute capability 8.9 or more (a CPU only imitates it).",
    )
    double_quant: bool = fixed(True, description="nf4 and fp4: quantise the quantisation constants too.")
    compute_dtype: Dtype = fixed("auto", description="nf4 and fp4: type the products are computed in; auto is dtype.")


#: The options of each kind of cache, with their defaults.
CACHE_KINDS: dict[str, dict[str, object]] = {
    "hidden": {"hidden_dtype": "auto"},
    "topk": {"k": 64, "value_bits": 8},
    "sampled": {"num_samples": 50, "temperature": 1.0, "seed": 0},
}


@config_dataclass
class Cache:
    """The teacher's outputs at every target, on disk. `llmkd cache` writes it with these settings; null is the kind's default.

    A run that reads it needs none but `path`; one that is given must be the cache's own.
    """

    path: str = fixed(min_length=1, path="output", description="Folder of the cache.")
    kind: Literal[tuple(CACHE_KINDS)] | None = fixed(
        None,
        description="What is kept of each target: hidden (the teacher's last hidden state: exact), topk (the default; its likeliest tokens and "
        "the mass of the rest) or sampled (tokens drawn from it: exact on average, for forward_kl).",
    )
    k: Count | None = fixed(None, description="topk: how many of the likeliest tokens (64).")
    value_bits: Annotated[int, Field(ge=4, le=16)] | None = fixed(None, description="topk: bits of each log-probability (8).")
    num_samples: Count | None = fixed(None, description="sampled: how many tokens are drawn (50).")
    temperature: Annotated[float, Field(gt=0)] | None = fixed(
        None, description="sampled: of the distribution drawn from (1); it must be loss.temperature."
    )
    seed: Seed | None = fixed(None, description="sampled: what the draws follow from (0).")
    hidden_dtype: Literal["auto", "float32", "bfloat16", "int8"] | None = fixed(
        None, description="hidden: type of the states; auto is the teacher's own, int8 has one scale for each target."
    )


@config_dataclass
class Teacher:
    name: str | None = fixed(None, description="What data sources call it by (their setting teacher), where there are several.")
    model: str | None = fixed(
        None, path="model", description="Folder or hub id of a model, or of a LoRA adapter (its base is read from its own configuration)."
    )
    revision: str | None = fixed(None, description="Revision of a hub model or adapter.")
    base: str | None = fixed(None, path="model", description="For an adapter: where its base is now, if not where the adapter says.")
    quantization: Quantization | None = fixed(None, description="Hold the teacher in 4 or 8 bit; null for not.")
    merge_adapter: bool = fixed(
        False,
        description="Merge the adapter into its base, in float32 and then as it is held: half the kernels of a layer. What it changes of the base "
        "is the teacher's own then, whatever share_base says.",
    )
    dtype: Dtype = fixed("auto", description="Type the teacher's weights are held in.")
    attention: Attention = fixed("auto", description="Attention implementation; auto leaves it to transformers.")
    share_base: bool = changeable(
        True,
        description="Keep weights in memory once that it has in common with the student's frozen base, or with another teacher's; false for a copy of its own.",
    )
    device: str | None = changeable(
        None,
        description="Where it is held: null for beside the student; a device (cpu, cuda:1); or offload: in the machine's memory, each layer "
        "brought to the student's device while it is used.",
    )
    cache: Cache | None = fixed(None, description="A teacher cache: llmkd cache writes it, and a run then reads it and loads no teacher.")
    weight: float = fixed(1.0, gt=0, description="Among several teachers: its share.")

    @property
    def float8(self) -> bool:
        return self.quantization is not None and self.quantization.type == "fp8"

    @property
    def loaded_in(self) -> Quantization | None:
        """The quantisation that it is loaded in; fp8 is made of 16 or 32 bit after that."""
        return None if self.float8 else self.quantization

    @property
    def is_transformed(self) -> bool:
        """Whether it is changed after it is loaded: see `models/teacher_transforms.py`."""
        return self.merge_adapter or self.float8

    @property
    def held(self) -> str:
        """In words, where it is not as it was saved."""
        return ", ".join(["adapter merged"] * self.merge_adapter + ([self.quantization.type] if self.quantization else []))


@config_dataclass
class Mixture:
    """How several teachers are combined on a target that is not left to one of them."""

    combine: Literal["probabilities", "log_probabilities", "divergences"] = fixed(
        "probabilities",
        description="probabilities: the weighted mean of their distributions (an ensemble); log_probabilities: of their logarithms (a product of "
        "experts); divergences: the weighted sum of the divergences from each.",
    )
    weights: Literal["fixed", "confidence"] = fixed(
        "fixed", description="fixed: teacher.weight; confidence: that times the probability that the teacher gives the target."
    )


def teacher_contradictions(setting: Teacher | tuple[Teacher, ...] | None, data: Data) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings of the teachers that are each right and together wrong, as `recipe.contradictions` gives them."""
    if setting == ():
        yield ("teacher",), "found an empty list; name a teacher, or leave it out"
    every = as_tuple(setting)
    for path, teacher in with_setting_names(setting, "teacher"):
        if teacher.model is None and teacher.cache is None:
            yield (
                (f"{path}.model", f"{path}.cache"),
                "not given; name the teacher's folder or hub id (or its teacher cache, cache.path)",
            )
        if teacher.model is None:
            for name in ("revision", "base", "quantization", "device"):
                if getattr(teacher, name) is not None:
                    yield (f"{path}.{name}", f"{path}.model"), "given without a model; name it, or leave this out"
            if teacher.merge_adapter:
                yield (f"{path}.merge_adapter", f"{path}.model"), "given without a model; name it, or leave this out"
        if teacher.float8 and (not teacher.quantization.double_quant or teacher.quantization.compute_dtype != "auto"):
            yield (
                (f"{path}.quantization.double_quant", f"{path}.quantization.compute_dtype"),
                "given with type: fp8, whose they are not; leave them out",
            )
        if teacher.merge_adapter and teacher.loaded_in is not None:
            yield (
                (f"{path}.merge_adapter", f"{path}.quantization"),
                f"found true with quantization {teacher.loaded_in.type}, which would round the adapter away; leave one of them out, or use type: fp8",
            )
        if teacher.merge_adapter and teacher.device == "offload":
            yield (
                (f"{path}.merge_adapter", f"{path}.device"),
                "found true with device: offload, where the way to the GPU is what takes time; leave one of them out",
            )
        if teacher.quantization is not None and teacher.device is not None and not teacher.device.startswith("cuda"):
            yield (
                (f"{path}.device", f"{path}.quantization"),
                f"found {teacher.device} with quantization, which is for a GPU; leave one of them out",
            )
        if teacher.cache is not None:
            kind = teacher.cache.kind or "topk"
            for other, options in CACHE_KINDS.items():
                for name in options:
                    if getattr(teacher.cache, name) is not None and teacher.cache.kind is not None and name not in CACHE_KINDS[kind]:
                        yield (f"{path}.cache.{name}", f"{path}.cache.kind"), f"is of kind {other}, and kind is {kind}; leave it out"
        if teacher.weight != 1 and len(every) < 2:
            yield (f"{path}.weight",), f"found {teacher.weight:g}, and there is no other teacher; leave it out"
    names = [teacher.name for teacher in every if teacher.name is not None]
    if twice := next((name for name in names if names.count(name) > 1), None):
        where = next(path for path, teacher in reversed(with_setting_names(setting, "teacher")) if teacher.name == twice)
        yield (f"{where}.name",), f"found {twice!r} twice; give every teacher a name of its own"
    folders = [(path, teacher.cache.path) for path, teacher in with_setting_names(setting, "teacher") if teacher.cache]
    if twice := next((path for n, (path, folder) in enumerate(folders) if folder in [other for _, other in folders[:n]]), None):
        yield (f"{twice}.cache.path",), "is another teacher's too; give each its own folder"
    for name, value in (("data.train", data.train), ("data.validation", data.validation)):
        for i, source in enumerate(as_tuple(value)):
            if source.teacher is not None and every and source.teacher not in names:
                path = f"{name}.{i}.teacher" if isinstance(value, tuple) else f"{name}.teacher"
                known = ", ".join(names) or "none; set teacher.name"
                yield (path, "teacher"), f"found {source.teacher!r}, and no teacher has that name; the names are: {known}"
