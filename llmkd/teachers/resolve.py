"""Finds and checks the teachers that a recipe names, before a model is loaded: a model's files, a teacher cache or a server. No torch."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config.data import Data
from ..config.fields import shaping
from ..config.recipe import OF_THE_STUDENT, Loss
from ..config.schedule import in_words
from ..config.served import base_address
from ..config.target_weights import rules_in_use, unusable_cache
from ..config.teacher import CACHE_KINDS, LISTED_EXPONENTS, TAIL_EXPONENTS, Mixture, Teacher
from ..data.encoding import token_cache
from ..data.examples import ALL_TEACHERS, Examples
from ..errors import UserError
from ..files import checksum
from ..model_folder.files import ModelFiles, find, loaded_dtype
from ..model_folder.identity import WHOLE, config_hash, identity_of, same_weights, verify, weights_of
from .answers import Answers
from .cache.shards import TeacherCache, read_header

if TYPE_CHECKING:
    from .. import signals


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher's outputs come from.

    setting    teacher, or teacher.0, ... in a list
    settings   of this teacher
    files      the files of its model, if it names one
    cache      its cache, if there is one; it is read even if there is a model too
    answers    the stored answers of its server, once the tokenizer is known
    """

    setting: str
    settings: Teacher
    files: ModelFiles | None
    cache: TeacherCache | None
    answers: Answers | None = None

    @property
    def needs_model(self) -> bool:
        """Whether a run must load its model."""
        return self.cache is None and not self.settings.server

    @property
    def asks_server(self) -> bool:
        """Whether a run asks a server: it does not if the cache is complete."""
        return self.cache is None and bool(self.settings.server)

    @property
    def part(self) -> str | None:
        """The part of the teacher's distribution that a run gets, such as `top 64 tokens` or `50 samples`; None for all of it."""
        if self.cache:
            kept, vocab = self.cache.header["kind"], self.cache.header["vocab"]
        elif self.answers is not None:
            kept, vocab = self.answers.format.options(), self.answers.format.vocab
        else:
            return None
        if kept["name"] == "topk" and kept["k"] < vocab:
            return f"top {kept['k']} tokens"
        return f"{kept['num_samples']} samples" if kept["name"] == "sampled" else None

    def open(self, device, models: Iterator, taps: "signals.Taps") -> "signals.Teacher":
        """The teacher, whose signals are on `device`. If it needs a model (a LanguageModel), it takes the next one of `models`.

        taps   the values inside the model that its signals are to hold
        """
        if self.needs_model:
            from .live import LiveTeacher

            return LiveTeacher(next(models), taps, self.setting)
        from .cached import CachedTeacher

        return CachedTeacher(self.cache, device)

    @property
    def weights(self) -> dict[str, str | None]:
        """The hashes of its model's base and adapter, see `identity.weights_of`; of a cache without a model those that it records."""
        if self.files:
            return weights_of(self.files.base, self.files.adapter, f"{self.setting}.model")
        recorded = self.cache.header["provenance"]["teacher"] if self.cache else served_weights(self.settings)
        return {"base": recorded.get("base") or recorded.get("served"), "adapter": recorded.get("adapter")}

    @property
    def tuned(self) -> bool:
        """Whether it is known to be fine-tuned: it is an adapter, or the output of an llmkd run."""
        return bool(self.files and (self.files.adapter or (self.files.base.parent / "summary.json").exists()))

    @property
    def identities(self) -> dict[str, str]:
        """The hashes by which `--resume` recognises the teacher, by file; equal ones mean equal outputs. Empty for a cache that is yet to be imported.

        UserError if a file differs from what llmkd recorded when writing it, or an adapter's base is not the one that it was trained on.
        """
        if self.cache is not None:
            return {f"the {self.setting}'s cache": self.cache.identity}
        if self.answers is not None:
            return {f"the {self.setting}'s server": self.answers.identity}
        if self.files is None:
            return {}
        verify(self.files.base, self.files.adapter, f"{self.setting}.model")
        return identity_of(f"the {self.setting}", f"{self.setting}.model", self.files.base, self.files.adapter)


@dataclass(frozen=True)
class SignalUse:
    """How a run uses its teachers' outputs. Caches of sampled tokens do not support all of it.

    loss      the loss, for its divergence and temperature
    mixture   how several teachers are combined
    best_by   `checkpoint.best_by`
    others    the divergences of training sources that have their own, by setting
    """

    loss: Loss
    mixture: Mixture
    best_by: str | None
    others: dict[str, str] = field(default_factory=dict)


def resolve_teachers(named: Sequence[tuple[str, Teacher]], open_caches: bool = True) -> tuple[TeacherSource, ...]:
    """The source of every teacher of (setting, settings). UserError for files or caches that are missing or unusable.

    open_caches   false for caches that are yet to be written
    """
    out = []
    for setting, one in named:
        files = find(one.model, f"{setting}.model", one.revision, one.base) if one.model_path else None
        if files:
            check_transforms(files, one, setting)
        written = one.cache and (not one.server or one.cache.is_written)
        cache = TeacherCache.open(one.cache.path, f"{setting}.cache.path") if written and open_caches else None
        out.append(TeacherSource(setting, one, files, cache))
    return tuple(out)


def with_answers(teacher: TeacherSource, data: Data, tokenizer, vocab: int) -> TeacherSource:
    """The teacher, with the stored answers if it asks a server. They are in its cache's folder, or else in a folder of `data.cache_dir`."""
    one = teacher.settings
    if not teacher.asks_server:
        return teacher
    record_format = listed_format(one, vocab)
    known = {"tokenizer": token_cache.tokenizer_hash(tokenizer, template=False), "model": one.model or base_address(one.server)}
    folder = one.cache.path if one.cache else token_cache.answers_root(data) / checksum([known, record_format.options(), vocab])[:32]
    return dataclasses.replace(
        teacher, answers=Answers(folder, record_format, known, f"{teacher.setting}.cache.path" if one.cache else teacher.setting)
    )


def listed_format(settings: Teacher, vocab: int):
    """The record format of a server's answers: that of a cache of kind topk."""
    from .cache.records import TopKFormat

    cache = settings.cache
    bits = CACHE_KINDS["topk"]["value_bits"] if cache is None or cache.value_bits is None else cache.value_bits
    return TopKFormat(vocab, min(settings.of_server("top_k"), vocab), bits, LISTED_EXPONENTS)


def check_transforms(files: ModelFiles, settings: Teacher, setting: str) -> None:
    """UserError for `merge_adapter` without an adapter, and for merging or fp8 with a base that is quantised on disk."""
    if settings.merge_adapter and not files.adapter:
        raise UserError(f"{setting}.merge_adapter: found true, and {settings.model} is not an adapter; leave it out")
    if settings.is_transformed and "quantization_config" in files.config:
        name = "quantization" if settings.float8 else "merge_adapter"
        raise UserError(f"{setting}.{name}: {files.base} is quantised already; leave it out, or name the unquantised model")


def provenance(settings: Data, teacher: TeacherSource, processor: dict[str, str], data: dict[str, str]) -> dict[str, dict]:
    """Everything that the contents of a teacher cache depend on, by name: tokenizer, teacher and data.

    processor   `Processor.provenance` of what reads the rows
    data        hashes of the data, see `data_hashes`
    """
    one, weights = teacher.settings, {"dtype": teacher.settings.dtype}
    if files := teacher.files:
        weights = {"dtype": weights_dtype(files, one)} | weights_of(files.base, files.adapter, f"{teacher.setting}.model")
    if one.server:
        weights |= served_weights(one)
    return {
        "tokenizer": processor,
        "teacher": weights | {"quantization": one.quantization and one.quantization.type, "merge_adapter": one.merge_adapter or None},
        "data": data | {f"data.{name}": value for name, value in shaping(settings, "teacher").items()},
    }


def served_weights(settings: Teacher) -> dict[str, str]:
    """All that is known of a server's model: the name that it is asked for by, or else the server's address."""
    return {"served": settings.model or base_address(settings.server)} if settings.server else {}


def weights_dtype(files: ModelFiles, settings: Teacher) -> str:
    """The dtype of a teacher's weights in memory: the recipe's, or for `auto` the one they were saved in."""
    return loaded_dtype(files.config, settings.dtype)


def data_hashes(prepared) -> dict[str, str]:
    """The hashes of the data, from `Prepared.identity`."""
    return {name: prepared.identity[name] for name in ("the training data", "the held-out data")}


_OTHER = {
    "tokenizer": "with another tokenizer",
    "chat_template": "with another chat template",
    "labels": "with other classes, or in another order",
    "what reads files": "of sounds or images that were read otherwise",
    "base": "by a teacher on another base",
    "adapter": "by a teacher with another adapter, or with none",
    "merge_adapter": "by a teacher whose adapter was merged, or was not, unlike this one's",
}


def check_cache(teacher: TeacherSource, data: Data, use: SignalUse, processor: dict[str, str], vocab: int) -> None:
    """UserError, with every difference, if a cache was made with another tokenizer, chat template, teacher or kind than the recipe's."""
    header, setting, cache = teacher.cache.header, teacher.setting, teacher.settings.cache
    provenance_then, kept = header["provenance"], header["kind"]
    where, ours = f"{setting}.cache.path: {cache.path} was made", provenance(data, teacher, processor, {})
    problems = []
    for part in ("tokenizer", "teacher") if teacher.files or teacher.settings.server else ("tokenizer",):
        for name, value in ours[part].items():
            known = provenance_then[part].get(name)
            if known != value and not (name in ("base", "adapter") and _same_by_samples(known, getattr(teacher.files, name), setting)):
                then = _OTHER.get(name, f"by a teacher with {name} {known}, not {value}")
                problems.append(f"{where} {then}; use that one, or write another cache with llmkd cache")
    if header["vocab"] != vocab:
        problems.append(f"{where} over {header['vocab']} tokens, and the models of this run have {vocab}; write another with llmkd cache")
    for name in ("kind", *(name for known in CACHE_KINDS.values() for name in known)):
        value, then = getattr(cache, name), kept["name"] if name == "kind" else kept.get(name)
        if value not in (None, "auto", then):
            problems.append(f"{setting}.cache.{name}: found {value}, and {cache.path} was made with {then}; leave it out")
    if (wanted := teacher.settings.top_k) is not None and min(wanted, vocab) != kept.get("k"):
        problems.append(f"{setting}.top_k: found {wanted}, and {cache.path} was made with {kept.get('k')}; leave it out")
    if problems := problems + sample_problems(use, cache.path, kept):
        raise UserError(*problems)


def _same_by_samples(known: str | None, folder: Path | None, setting: str) -> bool:
    """Whether a cache of an earlier version, which recorded only samples of the weights, agrees with this folder's model in these."""
    if not known or not folder or known.startswith(WHOLE):
        return False
    weights, _, config = known.partition(" ")
    return same_weights(weights, folder, f"{setting}.model") and config == config_hash(folder, f"{setting}.model")


def check_sampled_caches(named: Sequence[tuple[str, Teacher]], use: SignalUse) -> None:
    """UserError if a run needs more than one of its caches holds. Reads the headers of the caches that exist."""
    problems = []
    for setting, one in named:
        if one.cache and one.cache.is_written:
            header = read_header(Path(one.cache.path).expanduser(), f"{setting}.cache.path")
            problems += sample_problems(use, one.cache.path, header["kind"])
    if problems:
        raise UserError(*problems)


def sample_problems(use: SignalUse, path: str, kept: dict) -> list[str]:
    """The reasons why a run cannot use a cache. `kept`: "kind" of the cache's header.

    A top-k cache holds a part of the teacher's distribution only; sampled tokens estimate one divergence at one temperature.
    """
    entropy = kept.get("tail_exponents") in (None, list(TAIL_EXPONENTS))
    rules = (unusable_cache(setting, by, kept["name"], entropy) for setting, by in rules_in_use(use.loss.keep, use.loss.target_weights))
    problems = [f"{problem} ({path})" for problem in rules if problem]
    if kept["name"] != "sampled":
        return problems
    loss, drawn, by = use.loss, kept["temperature"], use.best_by
    why = f"and {path} holds sampled tokens, which estimate the loss without bias"
    if loss.kd_ratio and loss.temperature != drawn:
        problems.append(f"loss.temperature: found {in_words(loss.temperature)}, {why} only at the temperature of their sampling, {drawn:g}")
    for setting, divergence in ({"loss.divergence": loss.divergence} | use.others).items() if loss.kd_ratio else ():
        if divergence != "forward_kl":
            problems.append(f"{setting}: found {divergence}, {why} for forward_kl only")
    if use.mixture.combine == "log_probabilities":
        problems.append(f"mixture.combine: found log_probabilities, {why} for probabilities and divergences only")
    if by not in (None, *OF_THE_STUDENT, "forward_kl" if drawn == 1 else None):
        problems.append(f"checkpoint.best_by: found {by}, {why} for forward_kl at the temperature of their sampling only; use ce")
    return problems


def check_coverage(teacher: TeacherSource, number: int, parts: dict[str, tuple[Examples | None, Sequence[str]]], ours: dict) -> None:
    """UserError if the cache lacks examples that teacher `number` is used for.

    parts   of each data setting its examples, or None, and the place of each example in its file
    ours    the `provenance` of a cache of this recipe
    """
    then, now = teacher.cache.header["provenance"]["data"], ours["data"]
    for setting, (encoded, places) in parts.items():
        if encoded is None:
            continue
        mine = examples_of(encoded, number)
        missing = teacher.cache.missing([encoded.content_hash(i) for i in mine])
        if missing:
            shown = [
                f"{name} {then.get(name)}, now {value}" if name.startswith("data.") else name
                for name, value in now.items()
                if then.get(name) != value
            ]
            raise UserError(
                f"{teacher.setting}.cache.path: {teacher.settings.cache.path} lacks {len(missing)} of {len(mine)} examples of {setting}, such as "
                f"{places[mine[missing[0]]]}"
                + (f"; it was made of other data ({', '.join(shown)})" if shown else "")
                + "; run llmkd cache with this recipe"
            )


def examples_of(encoded: Examples, number: int) -> np.ndarray:
    """The indices of the examples that teacher `number` is used for, alone or in a mixture, int64 [examples]."""
    return np.flatnonzero(np.isin(encoded.teacher_index, (ALL_TEACHERS, number)))
