"""The teachers that a recipe names, found and checked before a model is loaded: a model's files, or a teacher cache."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.fields import shaping, with_setting_names
from ..config.recipe import Recipe, distils
from ..config.teacher import CACHE_KINDS, Teacher
from ..data.encoding import token_cache
from ..data.examples import ALL_TEACHERS, Examples
from ..errors import UserError
from ..model_files import ModelFiles, find, fingerprint, read_json
from .cache.shards import TeacherCache, read_header


@dataclass(frozen=True)
class TeacherSource:
    """A teacher by its setting's name (teacher, or teacher.0, ...): its model's files, if it names one, and its cache, if it has one."""

    setting: str
    settings: Teacher
    files: ModelFiles | None
    cache: TeacherCache | None

    @property
    def tuned(self) -> bool:
        """Whether it was trained by somebody for some task: an adapter, or what a run of llmkd left."""
        return bool(self.files and (self.files.adapter or (self.files.base.parent / "summary.json").exists()))

    @property
    def identity(self) -> str:
        """What tells its answers from another teacher's; nothing for those that are yet to come from elsewhere."""
        if self.cache is not None:
            return self.cache.identity
        if self.files is None:
            return ""
        return " ".join(fingerprint(folder, f"{self.setting}.model") for folder in (self.files.base, self.files.adapter) if folder)


def resolve_teachers(recipe: Recipe, open_caches: bool = True) -> tuple[TeacherSource, ...]:
    """Every teacher of a recipe that distils. Without `open_caches` those are not opened: they are yet to be written."""
    out = []
    for setting, one in with_setting_names(recipe.teacher, "teacher") if distils(recipe) else ():
        files = find(one.model, f"{setting}.model", one.revision, one.base) if one.model else None
        if files:
            check_transforms(files, one, setting)
        cache = TeacherCache.open(one.cache.path, f"{setting}.cache.path") if one.cache and open_caches else None
        out.append(TeacherSource(setting, one, files, cache))
    return tuple(out)


def check_transforms(files: ModelFiles, settings: Teacher, setting: str) -> None:
    """UserError where there is no adapter to merge, or where the base is quantised on disk and is to be merged into, or rounded, anew."""
    if settings.merge_adapter and not files.adapter:
        raise UserError(f"{setting}.merge_adapter: found true, and {settings.model} is not an adapter; leave it out")
    if settings.is_transformed and "quantization_config" in files.config:
        name = "quantization" if settings.float8 else "merge_adapter"
        raise UserError(f"{setting}.{name}: {files.base} is quantised already; leave it out, or name the unquantised model")


def provenance(recipe: Recipe, teacher: TeacherSource, tokenizer, contents: dict[str, str]) -> dict[str, dict]:
    """What a teacher cache follows from. `contents` are the hashes of the data."""
    one, data, weights = teacher.settings, recipe.data, {"dtype": teacher.settings.dtype}
    if files := teacher.files:
        folders = {"base": files.base, "adapter": files.adapter}
        weights = {"dtype": held_in(files, one)} | {
            name: folder and f"{fingerprint(folder, f'{teacher.setting}.model')} {read_as(folder, f'{teacher.setting}.model')}"
            for name, folder in folders.items()
        }
    template = hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
    return {
        "tokenizer": {"tokenizer": token_cache.tokenizer_hash(tokenizer, template=False), "chat_template": template},
        "teacher": weights | {"quantization": one.quantization and one.quantization.type, "merge_adapter": one.merge_adapter or None},
        "data": contents | {f"data.{name}": value for name, value in shaping(data, "teacher").items()},
    }


#: What of a model's or an adapter's configuration says where it came from, or how it is held, and not what it computes.
_BOOKKEEPING = {
    *("_name_or_path", "architectures", "auto_mapping", "base_model_name_or_path", "dtype", "inference_mode", "peft_version"),
    *("quantization_config", "revision", "task_type", "torch_dtype", "transformers_version", "use_cache"),
}


def read_as(folder: Path, setting: str) -> str:
    """A hash of the configuration that weights are read by: an adapter of another lora_alpha, say, is another teacher."""
    name = "adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"
    said = {key: value for key, value in read_json(folder / name, setting).items() if key not in _BOOKKEEPING}
    if isinstance(modules := said.get("target_modules"), list):  # a set, written in any order
        said["target_modules"] = sorted(map(str, modules))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def held_in(files: ModelFiles, settings: Teacher) -> str:
    """The type of a teacher's weights: as the recipe says, or as they were saved."""
    return files.dtype or "float32" if settings.dtype == "auto" else settings.dtype


def contents(prepared) -> dict[str, str]:
    """Of `Prepared.identity` the hashes of the data."""
    return {name: prepared.identity[name] for name in ("the training data", "the held-out data")}


_OTHER = {
    "tokenizer": "with another tokenizer",
    "chat_template": "with another chat template",
    "base": "by a teacher on another base",
    "adapter": "by a teacher with another adapter, or with none",
    "merge_adapter": "by a teacher whose adapter was merged, or was not, unlike this one's",
}


def check_cache(recipe: Recipe, teacher: TeacherSource, tokenizer, vocab: int) -> None:
    """Refuse a teacher cache of another tokenizer, template, teacher or kind than the recipe's; every difference is named."""
    header, setting, cache = teacher.cache.header, teacher.setting, teacher.settings.cache
    provenance_then, kept = header["provenance"], header["kind"]
    where, ours = f"{setting}.cache.path: {cache.path} was made", provenance(recipe, teacher, tokenizer, {})
    problems = []
    for part in ("tokenizer", "teacher") if teacher.files else ("tokenizer",):
        for name, value in ours[part].items():
            if provenance_then[part].get(name) != value:
                then = _OTHER.get(name, f"by a teacher with {name} {provenance_then[part].get(name)}, not {value}")
                problems.append(f"{where} {then}; give the one that it was made with, or write another by llmkd cache")
    if header["vocab"] != vocab:
        problems.append(
            f"{where} over {header['vocab']} entries of the vocabulary, and the models of this run have {vocab}; write another by llmkd cache"
        )
    for name in ("kind", *(name for known in CACHE_KINDS.values() for name in known)):
        value, then = getattr(cache, name), kept["name"] if name == "kind" else kept.get(name)
        if value not in (None, "auto", then):
            problems.append(f"{setting}.cache.{name}: found {value}, and {cache.path} was made with {then}; leave it out")
    if problems := problems + sample_problems(recipe, cache.path, kept):
        raise UserError(*problems)


def check_sampled_caches(recipe: Recipe) -> None:
    """Refuse a recipe whose loss the samples in one of its caches are not right for. Of caches that are there yet, and by their headers alone."""
    problems = []
    for setting, one in with_setting_names(recipe.teacher, "teacher") if distils(recipe) else ():
        if one.cache and (Path(one.cache.path).expanduser() / "cache.json").exists():
            header = read_header(Path(one.cache.path).expanduser(), f"{setting}.cache.path")
            problems += sample_problems(recipe, one.cache.path, header["kind"])
    if problems:
        raise UserError(*problems)


def sample_problems(recipe: Recipe, path: str, kept: dict) -> list[str]:
    """What is wrong with a recipe that learns from a teacher cache of this kind, if that holds samples."""
    if kept["name"] != "sampled":
        return []
    loss, drawn, by, problems = recipe.loss, kept["temperature"], recipe.checkpoint.best_by, []
    why = f"and {path} holds samples, which are right on average"
    if loss.temperature != drawn:
        problems.append(f"loss.temperature: found {loss.temperature:g}, {why} at the temperature that they were drawn at, {drawn:g}")
    if loss.divergence != "forward_kl":
        problems.append(f"loss.divergence: found {loss.divergence}, {why} for forward_kl alone")
    if recipe.mixture.combine == "log_probabilities":
        problems.append(f"mixture.combine: found log_probabilities, {why} for probabilities and divergences alone")
    if by not in (None, "ce", "forward_kl" if drawn == 1 else None):
        problems.append(f"checkpoint.best_by: found {by}, {why} for forward_kl at their own temperature alone; use ce")
    return problems


def check_coverage(teacher: TeacherSource, number: int, parts: dict[str, tuple[Examples | None, Sequence[str]]], ours: dict) -> None:
    """Refuse a teacher cache that lacks examples that teacher `number` is to answer.

    `parts` are each setting's examples and their places, `ours` is what a teacher cache of this recipe would be made of.
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
                + "; run llmkd cache for these"
            )


def examples_of(encoded: Examples, number: int) -> np.ndarray:
    """The examples that teacher `number` answers, alone or with others."""
    return np.flatnonzero(np.isin(encoded.teacher_index, (ALL_TEACHERS, number)))
