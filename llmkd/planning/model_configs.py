"""Configurations of models and adapters for a plan, from a folder, the hub, a run that has not run yet, or llmkd's own table."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..config.loader import load_recipe
from ..config.media import InputFeatures
from ..config.paths import written_by
from ..config.recipe import Lora, PartLayers, Student, Teacher
from ..errors import UserError, brief
from ..model_folder.files import ModelFiles, check_config, refuse_mistyped_folder
from ..model_folder.layers import layer_count, layer_words
from ..model_folder.weights import read_json
from .known_models import KNOWN

_TABLE = "llmkd's own table, since the hub was not reached"
NEW = "new weights"  # stands for the base of a student without one


#: Future runs, by the absolute path of their output folder: the path of the recipe, its student, and its `data.features`.
Coming = Mapping[Path, tuple[Path, Student, InputFeatures | None]]


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a model.

    config                the base's config.json
    base                  the identity of the base: two models with the same base may share its weights
    adapter               the settings of an adapter on it; None without one
    files                 the base's folder on this machine, for its tokenizer; None without one
    origin                where the configuration comes from, if not from the model itself; else ""
    coming                whether a future run writes the model, so that all this comes from that run's recipe
    tokenizer, features   settings that read data for the model in place of its files
    cut_from, parts       for an encoder-decoder model with fewer layers: its base, and the layers that are kept, by part
    """

    config: dict
    base: str
    adapter: Lora | None = None
    files: Path | None = None
    origin: str = ""
    coming: bool = False
    tokenizer: str | None = None
    features: InputFeatures | None = None
    cut_from: str = ""
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def has_as_its_base(self, name: str) -> bool:
        """Whether a parameter of this name is the base's parameter of the same name, and not that of another layer."""
        found = re.search(r"(encoder|decoder)\.(?:layers|block)\.(\d+)\.", name)
        return not (self.parts and found) or self.parts[found[1]][int(found[2]) : int(found[2]) + 1] == (int(found[2]),)


def find_models(
    settings: Student, named: Sequence[tuple[str, Teacher]], recipe_folder: Path
) -> tuple[ModelConfig, list[tuple[str, Teacher, ModelConfig | None]]]:
    """The student's configuration, and what `find_teachers` returns."""
    return student_config(settings, recipe_folder), find_teachers(named, recipe_folder)


def find_teachers(
    named: Sequence[tuple[str, Teacher]], recipe_folder: Path, coming: Coming = MappingProxyType({})
) -> list[tuple[str, Teacher, ModelConfig | None]]:
    """(setting, settings, configuration) of every teacher; the configuration is None for a teacher without a model to load."""
    found = []
    for setting, one in named:
        model = one.model_path
        config = find_config(model, f"{setting}.model", one.revision, one.base, recipe_folder, coming=coming) if model else None
        found.append((setting, one, config))
    return found


def find_config(
    name: str,
    setting: str,
    revision: str | None,
    base: str | None,
    recipe_folder: Path,
    writers: tuple[Path, ...] = (),
    coming: Coming = MappingProxyType({}),
) -> ModelConfig:
    """The configuration of a folder, a hub id, or the folder that another run will write. No weights are read or downloaded.

    base           the base of an adapter, if it is not the one that its adapter_config.json names
    recipe_folder  the recipe's folder: another recipe in it may write the model
    writers        the recipes that were followed so far
    coming         further runs that may write the model
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            return _with_adapter(read_json(folder / "adapter_config.json", setting), name, setting, base, recipe_folder)
        return ModelConfig(_own_config(folder, name, setting), str(folder.resolve()), files=folder)
    place = Path(os.path.abspath(folder))
    if (of_run := coming.get(place.parent)) and of_run[0] not in writers:
        return _of_coming_run(folder, *of_run[1:], (*writers, of_run[0]), coming)
    if (writer := written_by(place, recipe_folder)) and writer not in writers:
        other = load_recipe(writer)
        return _of_coming_run(folder, other.student, other.data.features, (*writers, writer), coming)
    refuse_mistyped_folder(name, setting)
    reason = ""
    for file in ("config.json", "adapter_config.json"):
        try:
            path = _download(name, file, revision)
        except Exception as error:
            reason = reason or type(error).__name__
            continue
        if file == "adapter_config.json":
            return _with_adapter(read_json(path, setting), name, setting, base, recipe_folder)
        return ModelConfig(_own_config(path.parent, name, setting), name, files=path.parent)
    if name in KNOWN:
        return ModelConfig(KNOWN[name], name, origin=_TABLE)
    raise UserError(
        f"{setting}: the config.json of {name} is not in the hub's cache, could not be downloaded ({reason}), and is not in llmkd's own table; "
        f"download it once with a connection (hf download {name} config.json), or name a folder with that file"
    )


def _of_coming_run(
    folder: Path, student: Student, features: InputFeatures | None, writers: tuple[Path, ...], coming: Coming
) -> ModelConfig:
    """The configuration of a model that does not exist yet, from the student of the recipe that will write it, the last of `writers`."""
    found = student_config(student, writers[-1].parent, writers, coming)
    origin = "; ".join(filter(None, [f"{writers[-1]}, which has not run yet", found.origin]))
    read_by = {"tokenizer": student.tokenizer or found.tokenizer, "features": features or found.features}
    found = dataclasses.replace(found, coming=True, **read_by)
    if folder.name == "adapter":
        return dataclasses.replace(found, adapter=found.adapter or student.lora or Lora(), origin=origin)
    return dataclasses.replace(found, adapter=None, base=str(folder), origin=origin)


def _download(name: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=revision))


def _own_config(folder: Path, name: str, setting: str) -> dict:
    if not (folder / "config.json").is_file():
        raise UserError(f"{setting}: {name} has neither config.json nor adapter_config.json; a plan needs one of them, but no weights")
    config = read_json(folder / "config.json", setting)
    check_config(config, f"{name}/config.json", setting)
    return config


def _with_adapter(adapter: dict, name: str, setting: str, base: str | None, recipe_folder: Path) -> ModelConfig:
    if adapter.get("peft_type") != "LORA":
        raise UserError(
            f"{setting}: {name} is an adapter of type {adapter.get('peft_type')}; a plan supports only LORA, so name its base instead"
        )
    base_name = base or adapter.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise UserError(f"{setting}: {name}/adapter_config.json names no base model; set {setting.removesuffix('.model')}.base to it")
    found = find_config(base_name, setting, adapter.get("revision"), None, recipe_folder)
    targets = adapter.get("target_modules") or "all-linear"
    lora = Lora(
        rank=adapter.get("r", 8),
        alpha=float(adapter.get("lora_alpha", 8)),
        dropout=adapter.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=tuple(adapter.get("modules_to_save") or ()),
        rslora=bool(adapter.get("use_rslora")),
        dora=bool(adapter.get("use_dora")),
    )
    return dataclasses.replace(found, adapter=lora)


def student_config(
    student: Student, recipe_folder: Path, writers: tuple[Path, ...] = (), coming: Coming = MappingProxyType({})
) -> ModelConfig:
    """The configuration of a recipe's student. That of new weights has no vocabulary size if the recipe leaves it to the tokenizer."""
    if student.architecture is not None:
        return ModelConfig(dict(student.architecture), NEW)
    found = find_config(student.model, "student.model", student.revision, student.base, recipe_folder, writers, coming)
    if isinstance(student.layers, PartLayers):
        return _cut_parts(found, student.layers)
    return found if student.layers is None else _cut(found, student)


def _cut(found: ModelConfig, student: Student) -> ModelConfig:
    """The configuration of a student with fewer layers than its base. If the layers are yet to be measured, others stand in: they are all alike."""
    from ..models.depth import evenly, kept_of, smaller_config

    base = Path(found.base)
    kept = kept_of(student, ModelFiles(base, base if found.adapter else None, found.config))
    kept = kept or evenly(student.layers.count, layer_count(found.config)[1])
    config = smaller_config(found.config, transformers_config(found.config, "student.model"), kept)
    return dataclasses.replace(found, config=config, base=f"{found.base}, {layer_words(kept)}")


def _cut_parts(found: ModelConfig, wanted: PartLayers) -> ModelConfig:
    """The configuration of an encoder-decoder student with fewer layers in its parts."""
    from ..models.depth_parts import described, kept_parts, smaller_config

    files = ModelFiles(Path(found.base), None, found.config)
    smaller = {"config": smaller_config(files, wanted), "base": described(files, wanted)}
    return dataclasses.replace(found, cut_from=found.base, parts=kept_parts(files, wanted), **smaller)


def transformers_config(config: dict, setting: str):
    """transformers' configuration object for a config.json, with the family's defaults."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:
        raise UserError(f"{setting}: transformers cannot read its configuration ({brief(error)}); correct its config.json") from error
