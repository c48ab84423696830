"""Settings of the teachers: the model or cache of each, and how several are combined. A part of `recipe.py`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .data import Data
from .fields import Count, Patience, Seconds, Seed, Temperature, as_tuple, changeable, config_dataclass, fixed, with_setting_names
from .served import SERVER_DEFAULTS, server_contradictions
from .sharding import Shard

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]


@config_dataclass
class Quantization:
    """The base's linear layers in 4 or 8 bits, by bitsandbytes or (fp8) by torch. Embeddings, norms and the head keep `dtype`."""

    type: Literal["nf4", "fp4", "int8", "fp8"] = fixed(
        "nf4",
        description="Number format of the base's linear layers. int8 also rounds activations, in evaluation only. fp8 (e4m3, one scale per row and "
        "token) also rounds activations; it is for teachers, on GPUs of compute capability 8.9 or more (a CPU only imitates it).",
    )
    double_quant: bool = fixed(True, description="nf4 and fp4: quantise the quantisation constants too.")
    compute_dtype: Dtype = fixed("auto", description="nf4 and fp4: dtype of the matrix products; auto: the same as dtype.")


OFFLOAD = "offload"  # the device of a teacher whose weights are kept in CPU memory
#: The options of each kind of cache, with their defaults.
CACHE_KINDS: dict[str, dict[str, object]] = {
    "hidden": {"hidden_dtype": "auto"},
    "topk": {"k": 64, "value_bits": 8},
    "sampled": {"num_samples": 50, "temperature": 1.0, "seed": 0},
}
#: Exponents s for which the tail mass, the logarithm of the sum of p^s over the tail, is stored in a top-k cache: temperatures 4, 2, 1 and 1/2.
TAIL_EXPONENTS = (0.25, 0.5, 1.0, 2.0)
#: The same for caches of a server's or a file's most likely tokens: more of the tail is not known.
LISTED_EXPONENTS = (1.0,)


@config_dataclass
class Cache:
    """A teacher cache: the teacher's outputs at every target, on disk. `llmkd cache` writes it with these settings; null: the kind's default.

    A run that reads the cache needs `path` only. Any other setting must have the value that the cache was written with.
    """

    path: str = fixed(min_length=1, path="output", description="Folder of the cache.")
    kind: Literal[tuple(CACHE_KINDS)] | None = fixed(
        None,
        description="What is stored for each target. topk (default for language models): the teacher's most likely tokens and the tail mass. "
        "hidden (default for classifiers): the teacher's last hidden state, or a classifier's logits; exact. sampled: tokens sampled "
        "from the teacher; unbiased, for forward_kl only.",
    )
    k: Count | None = fixed(None, description="topk: number of most likely tokens (64).")
    value_bits: Annotated[int, Field(ge=4, le=16)] | None = fixed(None, description="topk: bits per log-probability (8).")
    num_samples: Count | None = fixed(None, description="sampled: number of tokens sampled for each target (50).")
    temperature: Temperature | None = fixed(None, description="sampled: temperature of the sampling (1); it must equal loss.temperature.")
    seed: Seed | None = fixed(None, description="sampled: seed of the sampling (0).")
    hidden_dtype: Literal["auto", "float32", "bfloat16", "int8"] | None = fixed(
        None, description="hidden: dtype of the states; auto: the teacher's own; int8: with one scale per target."
    )

    def options(self, kind: str) -> dict[str, object]:
        """The options of a kind, with its defaults where they are not given."""
        return {key: default if getattr(self, key) is None else getattr(self, key) for key, default in CACHE_KINDS[kind].items()}

    @property
    def is_written(self) -> bool:
        """Whether the folder holds a finished cache."""
        return (Path(self.path).expanduser() / "cache.json").exists()


@config_dataclass
class Teacher:
    name: str | None = fixed(None, description="With several teachers: the name of this one, for the setting teacher of data sources.")
    model: str | None = fixed(
        None,
        path="model",
        description="Folder or hub id of a model, or of a LoRA adapter (its adapter_config.json names the base). With server: the name under "
        "which the server serves it; null: its only model.",
    )
    ema: Annotated[float, Field(ge=0, lt=1)] | None = fixed(
        None,
        description="Instead of model: the teacher is the exponential moving average of the student's own trainable weights. After each step it "
        "is this fraction of itself (such as 0.999) and the rest of the student. Frozen weights are in memory once; the average is in"
        " the checkpoints.",
    )
    server: str | None = changeable(
        None,
        description="Address of a server that gives the teacher's log-probabilities, http://host:port. No teacher is loaded. Answers are kept in "
        "cache.path, or else in a folder of data.cache_dir, so that nothing is asked twice.",
    )
    api: Literal["vllm", "sglang"] | None = fixed(None, description="server: its API (vllm).")
    top_k: Count | None = fixed(
        None,
        description="server: number of most likely tokens to ask for (64). vLLM returns at most its --max-logprobs, 20 by default.",
    )
    requests: Count | None = changeable(None, description="server: maximum number of concurrent requests of each process (8).")
    timeout: Seconds | None = changeable(None, description="server: seconds that one request may take (300).")
    patience: Patience | None = changeable(
        None,
        description="server: seconds for which a request is retried while the server is gone or busy (600), so that it can be restarted "
        "meanwhile.",
    )
    api_key_env: str | None = changeable(
        None, description="server: the environment variable that holds its key, which is written nowhere; null: no key is sent."
    )
    reads: str | None = fixed(
        None,
        description="Column that the teacher reads instead of the student's, to predict the same targets. With task: classification text, audio, "
        "image, or prompt (another text, with format labelled); with task: speech_recognition prompt (a text); null: the student's "
        "column.",
    )
    revision: str | None = fixed(None, description="Revision of a hub model or adapter.")
    base: str | None = fixed(
        None, path="model", description="For an adapter: folder or hub id of its base, if it is not where adapter_config.json says."
    )
    quantization: Quantization | None = fixed(None, description="Load the teacher in 4 or 8 bits; null: not quantised.")
    merge_adapter: bool = fixed(
        False,
        description="Merge the adapter into its base, for half as many kernels per layer. The merge is computed in float32 and rounded to the "
        "teacher's dtype. Merged weights are never shared with the student.",
    )
    dtype: Dtype = fixed("auto", description="Dtype of the teacher's weights; auto: the dtype they were saved in.")
    attention: Attention = fixed("auto", description="Attention implementation; auto: the default of transformers.")
    share_base: bool = changeable(
        True,
        description="Hold weights that are equal to the student's frozen base, or to another teacher's, in memory only once; false: a copy of its own.",
    )
    device: str | None = changeable(
        None,
        description="Device of the teacher's weights. null: the student's; cpu, cuda:1, ...: that device; offload: CPU memory, with each layer "
        "copied to the student's device while it computes.",
    )
    shard: Shard | None = changeable(
        None,
        description="How several processes hold the teacher. none: each holds all of it; full: each holds a part of every weight; null: as in "
        "train.shard.",
    )
    cache: Cache | None = fixed(None, description="Teacher cache: llmkd cache writes it; a run then reads it and loads no teacher.")
    weight: float = fixed(1.0, ge=1e-6, le=1e6, description="With several teachers: relative weight of this one in the mixture.")

    @property
    def model_path(self) -> str | None:
        """Folder or hub id of the model that can be loaded; None for one that a server has."""
        return None if self.server else self.model

    @property
    def label(self) -> str:
        """Its name in messages: its model, its cache or its server."""
        return self.model or (self.cache.path if self.cache else self.server)

    def of_server(self, name: str) -> float | str:
        """A setting that belongs to server, or its default."""
        value = getattr(self, name)
        if name == "top_k" and value is None and self.cache:
            value = self.cache.k
        return SERVER_DEFAULTS[name] if value is None else value

    @property
    def float8(self) -> bool:
        return self.quantization is not None and self.quantization.type == "fp8"

    @property
    def loaded_in(self) -> Quantization | None:
        """The quantisation in which the weights are loaded. None for fp8: the loaded weights are converted to it."""
        return None if self.float8 else self.quantization

    @property
    def is_transformed(self) -> bool:
        """Whether the teacher is changed after loading: see `models/teacher_transforms.py`."""
        return self.merge_adapter or self.float8

    @property
    def held(self) -> str:
        """A description of how the weights in memory differ from the saved ones; "" if they do not."""
        return ", ".join(["adapter merged"] * self.merge_adapter + ([self.quantization.type] if self.quantization else []))


@config_dataclass
class Mixture:
    """How several teachers are combined, for examples whose source does not name one teacher."""

    combine: Literal["probabilities", "log_probabilities", "divergences"] = fixed(
        "probabilities",
        description="probabilities: weighted mean of the teachers' distributions (an ensemble); log_probabilities: weighted mean of their logarithms "
        "(a product of experts); divergences: weighted sum of the divergences from each teacher.",
    )
    weights: Literal["fixed", "confidence"] = fixed(
        "fixed", description="fixed: teacher.weight; confidence: teacher.weight times the teacher's probability of the target."
    )


def loaded_by(settings: Any) -> Teacher:
    """The settings for loading a model, from settings with some of the names of a teacher's."""
    names = ("model", "revision", "base", "quantization", "dtype", "attention")
    return Teacher(**{name: getattr(settings, name) for name in names})


def teacher_contradictions(setting: Teacher | tuple[Teacher, ...] | None, data: Data) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of the teachers' settings, in the form of `contradictions.contradictions`."""
    if setting == ():
        yield ("teacher",), "found an empty list; name a teacher, or leave it out"
    every = as_tuple(setting)
    for path, teacher in with_setting_names(setting, "teacher"):
        yield from server_contradictions(path, teacher)
        yield from _ema_contradictions(path, teacher, len(every))
        if teacher.model is None and teacher.cache is None and teacher.server is None and teacher.ema is None:
            yield (
                (f"{path}.model", f"{path}.cache", f"{path}.server", f"{path}.ema"),
                "not given; name the teacher's folder or hub id (or its teacher cache, cache.path, or its server)",
            )
        if teacher.model is None and not teacher.server and teacher.ema is None:
            for name in ("revision", "base", "quantization", "device"):
                if getattr(teacher, name) is not None:
                    yield (f"{path}.{name}", f"{path}.model"), "set without a model; name the model, or leave this out"
            if teacher.merge_adapter:
                yield (f"{path}.merge_adapter", f"{path}.model"), "set without a model; name the model, or leave this out"
        if teacher.float8 and (not teacher.quantization.double_quant or teacher.quantization.compute_dtype != "auto"):
            yield (
                (f"{path}.quantization.double_quant", f"{path}.quantization.compute_dtype"),
                "set with type: fp8, but they belong to nf4 and fp4; leave them out",
            )
        if teacher.merge_adapter and teacher.loaded_in is not None:
            yield (
                (f"{path}.merge_adapter", f"{path}.quantization"),
                f"found true with quantization {teacher.loaded_in.type}, which would round the adapter away; leave one of them out, or use type: fp8",
            )
        if teacher.merge_adapter and teacher.device == "offload":
            yield (
                (f"{path}.merge_adapter", f"{path}.device"),
                "found true with device: offload, where copying to the GPU takes the time and merging saves none; leave one of them out",
            )
        if teacher.quantization is not None and teacher.device is not None and not teacher.device.startswith("cuda"):
            yield (
                (f"{path}.device", f"{path}.quantization"),
                f"found {teacher.device} with quantization, which needs a GPU; leave one of them out",
            )
        if teacher.cache is not None and not teacher.server:
            kind = teacher.cache.kind or "topk"
            for other, options in CACHE_KINDS.items():
                for name in options:
                    if getattr(teacher.cache, name) is not None and teacher.cache.kind is not None and name not in CACHE_KINDS[kind]:
                        yield (f"{path}.cache.{name}", f"{path}.cache.kind"), f"belongs to kind {other}, but kind is {kind}; leave it out"
        if teacher.weight != 1 and len(every) < 2:
            yield (f"{path}.weight",), f"found {teacher.weight:g}, but there is only one teacher; leave it out"
    names = [teacher.name for teacher in every if teacher.name is not None]
    if twice := next((name for name in names if names.count(name) > 1), None):
        where = next(path for path, teacher in reversed(with_setting_names(setting, "teacher")) if teacher.name == twice)
        yield (f"{where}.name",), f"found {twice!r} twice; give every teacher a name of its own"
    folders = [(path, teacher.cache.path) for path, teacher in with_setting_names(setting, "teacher") if teacher.cache]
    if twice := next((path for n, (path, folder) in enumerate(folders) if folder in [other for _, other in folders[:n]]), None):
        yield (f"{twice}.cache.path",), "is the cache of another teacher too; give each teacher its own folder"
    for name, value in (("data.train", data.train), ("data.validation", data.validation)):
        for i, source in enumerate(as_tuple(value)):
            if source.teacher is not None and every and source.teacher not in names:
                path = f"{name}.{i}.teacher" if isinstance(value, tuple) else f"{name}.teacher"
                known = ", ".join(names) or "none; set teacher.name"
                yield (path, "teacher"), f"found {source.teacher!r}, but no teacher has that name; the names are: {known}"


def _ema_contradictions(path: str, teacher: Teacher, count: int) -> Iterator[tuple[tuple[str, ...], str]]:
    if teacher.ema is None:
        return
    if count > 1:
        yield (f"{path}.ema", "teacher"), "set with several teachers; an average of the student's own weights is the only one"
    for name in ("server", "cache", "quantization", "device"):
        if getattr(teacher, name) is not None:
            yield (
                (f"{path}.{name}", f"{path}.ema"),
                "set with ema, and the average is where the student is and as the student is, and changes; leave it out",
            )
    for name, default in (("merge_adapter", False), ("dtype", "auto"), ("attention", "auto"), ("share_base", True)):
        if getattr(teacher, name) != default:
            yield (f"{path}.{name}", f"{path}.ema"), "set with ema, where it is the student's; leave it out"
