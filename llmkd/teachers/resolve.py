"""Find and check the teachers that a recipe names, before a model is loaded: a model's files, a teacher cache, or both. No torch here."""

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
    """Where a teacher's outputs come from: the files of its model, its cache, or both (then the cache is read); or a server, whose answers
    are kept."""

    setting: str  # the name of its setting: teacher, or teacher.0, ...
    settings: Teacher
    files: ModelFiles | None
    cache: TeacherCache | None
    answers: Answers | None = None  # of a server, once the tokenizer is known

    @property
    def needs_model(self) -> bool:
        """Whether a run must load its model."""
        return self.cache is None and not self.settings.server

    @property
    def asks_server(self) -> bool:
        """Whether a run asks a server: not if its cache is complete."""
        return self.cache is None and bool(self.settings.server)

    @property
    def part(self) -> str | None:
        """What a run knows of the teacher's distribution, where that is not all of it: `top 64 tokens`, `50 samples`."""
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
        """The teacher itself, whose signals are on `device`. If it needs a model (a LanguageModel), it takes the next of `models`.

        taps   what its signals hold from inside the model, if it needs one
        """
        if self.needs_model:
            from .live import LiveTeacher

            return LiveTeacher(next(models), taps, self.setting)
        from .cached import CachedTeacher

        return CachedTeacher(self.cache, device)

    @property
    def weights(self) -> dict[str, str | None]:
        """What its model computes with, see `identity.weights_of`; of a cache alone, what was recorded of the model that made it."""
        if self.files:
            return weights_of(self.files.base, self.files.adapter, f"{self.setting}.model")
        recorded = self.cache.header["provenance"]["teacher"] if self.cache else served_weights(self.settings)
        return {"base": recorded.get("base") or recorded.get("served"), "adapter": recorded.get("adapter")}

    @property
    def tuned(self) -> bool:
        """Whether it looks fine-tuned: it is an adapter, or the output of an llmkd run."""
        return bool(self.files and (self.files.adapter or (self.files.base.parent / "summary.json").exists()))

    @property
    def identities(self) -> dict[str, str]:
        """What `--resume` compares of the teacher, by file: equal ones give equal outputs. Empty for a cache that is still to be imported.

        UserError where a file is not what the record beside it says, and for an adapter on other weights than those it was trained on.
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
    """What a run computes from its teachers' outputs; sampled tokens do not suffice for all of it.

    loss      its divergence and temperature
    mixture   how several teachers are combined
    best_by   `checkpoint.best_by`
    others    the divergences of training sources that have one of their own, by setting
    """

    loss: Loss
    mixture: Mixture
    best_by: str | None
    others: dict[str, str] = field(default_factory=dict)


def resolve_teachers(named: Sequence[tuple[str, Teacher]], open_caches: bool = True) -> tuple[TeacherSource, ...]:
    """Every teacher, by its setting and settings. `open_caches` is false where the caches are still to be written."""
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
    """The same teacher; where a server is asked, with the answers that are kept: in its cache's folder, or else in one of `data.cache_dir`."""
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
    """The format in which a server's answers are kept: of a cache of kind topk."""
    from .cache.records import TopKFormat

    cache = settings.cache
    bits = CACHE_KINDS["topk"]["value_bits"] if cache is None or cache.value_bits is None else cache.value_bits
    return TopKFormat(vocab, min(settings.of_server("top_k"), vocab), bits, LISTED_EXPONENTS)


def check_transforms(files: ModelFiles, settings: Teacher, setting: str) -> None:
    """UserError for `merge_adapter` without an adapter, and for merging into, or converting, a base that is quantised on disk."""
    if settings.merge_adapter and not files.adapter:
        raise UserError(f"{setting}.merge_adapter: found true, and {settings.model} is not an adapter; leave it out")
    if settings.is_transformed and "quantization_config" in files.config:
        name = "quantization" if settings.float8 else "merge_adapter"
        raise UserError(f"{setting}.{name}: {files.base} is quantised already; leave it out, or name the unquantised model")


def provenance(settings: Data, teacher: TeacherSource, processor: dict[str, str], data: dict[str, str]) -> dict[str, dict]:
    """All that the contents of a teacher cache depend on, by name: what reads the rows (`processor`), teacher and data. `data` are the hashes of the data."""
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
    """What is known of a model that a server has: the name that it is asked by, or else the server's address."""
    return {"served": settings.model or base_address(settings.server)} if settings.server else {}


def weights_dtype(files: ModelFiles, settings: Teacher) -> str:
    """The type of a teacher's weights in memory: the recipe's, or for `auto` the type they were saved in."""
    return loaded_dtype(files.config, settings.dtype)


def data_hashes(prepared) -> dict[str, str]:
    """The hashes of the data in `Prepared.identity`."""
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
    """UserError, naming every difference, for a cache of another tokenizer, chat template, teacher or kind than the recipe's."""
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
    """Whether a cache of an earlier version, which recorded samples of the weights, was made by this folder's model as far as they tell."""
    if not known or not folder or known.startswith(WHOLE):
        return False
    weights, _, config = known.partition(" ")
    return same_weights(weights, folder, f"{setting}.model") and config == config_hash(folder, f"{setting}.model")


def check_sampled_caches(named: Sequence[tuple[str, Teacher]], use: SignalUse) -> None:
    """UserError where a run needs more than the samples in one of its teachers' caches. Reads the headers of caches that exist."""
    problems = []
    for setting, one in named:
        if one.cache and one.cache.is_written:
            header = read_header(Path(one.cache.path).expanduser(), f"{setting}.cache.path")
            problems += sample_problems(use, one.cache.path, header["kind"])
    if problems:
        raise UserError(*problems)


def sample_problems(use: SignalUse, path: str, kept: dict) -> list[str]:
    """Why a run cannot use a cache with this `kept` (the header's "kind"): it holds a part of the teacher's distribution, and sampled tokens
    estimate one divergence at one temperature."""
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
    """UserError where the cache lacks examples that teacher `number` is used for.

    parts   for each data setting its examples (None where there are none) and the place of each in its file
    ours    the `provenance` that a cache of this recipe would have
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
    """Indices of the examples that teacher `number` is used for, alone or in the ensemble."""
    return np.flatnonzero(np.isin(encoded.teacher_index, (ALL_TEACHERS, number)))
