"""Checks within a second: a recipe's settings against this machine, and against configurations and weight headers of local models. No torch.

A model on the hub is checked after its download. All checks are repeated on the loaded models.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import is_offline_mode

from ..config.features import feature_teacher
from ..config.fields import OneOrMany
from ..config.recipe import Loss, Student
from ..config.teacher import OFFLOAD, Teacher
from ..errors import UserError
from ..model_folder.files import TOKENIZER, ModelFiles, find, layers_of, loaded_dtype, locate, refuse_mistyped_folder, width_of
from ..model_folder.modules import refuse_large_rank, refuse_missing_modules, refuse_unknown_family
from ..model_folder.quantised import refuse_quantised
from ..model_folder.trainable import refuse_untrainable
from ..model_folder.weights import modules_are_named, read_json
from ..process.devices import why_missing
from .layer_pairs import refuse_attention, refuse_features

NARROW = ("float16", "bfloat16")


def refuse_early(student: Student, loss: Loss, teacher: OneOrMany[Teacher], teachers: Sequence[tuple[str, Teacher]]) -> None:
    """UserError for what the loaded models would be refused for, as far as the machine and the files of local models show it.

    teacher   the recipe's setting
    teachers  (setting, settings) of the teachers that are used
    """
    for setting, one in teachers:
        refuse_missing_device(setting, one)
    files = {"student.model": local_files(student, "student.model")}
    files |= {f"{setting}.model": local_files(one, f"{setting}.model") for setting, one in teachers if not one.server}
    mine = files["student.model"]
    if student.tokenizer and not student.tokenizer.startswith("builtin:"):
        if is_offline_mode():
            locate(student.tokenizer, "student.tokenizer", wanted=TOKENIZER)
        else:
            refuse_mistyped_folder(student.tokenizer, "student.tokenizer")
    if student.architecture:
        refuse_unknown_family(student.architecture)
    refuse_types(student, mine, [setting for setting, one in teachers if one.ema is not None])
    for setting, quantization in [("student", student.quantization), *((setting, one.quantization) for setting, one in teachers)]:
        if found := files.get(f"{setting}.model"):
            refuse_quantised(found.base, found.config, f"{setting}.model", quantization is not None)
    if student.layers is None:  # else the number of layers is known after the base is cut
        configs = {setting: found.config for setting, found in files.items() if found}
        configs |= {"student.model": student.architecture} if student.architecture else {}
        refuse_layers(loss, configs, feature_teacher(loss.features, teacher), teachers)
    if mine and not mine.adapter and student.lora:
        refuse_large_rank(mine.base, student.lora.rank)
        refuse_missing_modules(mine.base, mine.config, student.lora.target_modules, student.lora.modules_to_save)
        if not modules_are_named(mine.base, student.lora.target_modules, student.lora.modules_to_save):
            from ..models.lora import refuse_missing_modules as by_the_model

            by_the_model(student, mine)


def refuse_missing_device(setting: str, teacher: Teacher) -> None:
    """UserError for a device that this machine does not have."""
    name = teacher.device
    if name not in (None, OFFLOAD) and (why := why_missing(name)):
        raise UserError(f"{setting}.device: found {name}, which {why}; name a device of this machine, such as cpu, or leave it out")


def local_files(settings: Student | Teacher, setting: str) -> ModelFiles | None:
    """The files of a model on this machine; None for one that may be on the hub. UserError if it can be neither."""
    if not settings.model:
        return None
    folder = Path(settings.model).expanduser()
    if not folder.is_dir() and not is_offline_mode():
        refuse_mistyped_folder(settings.model, setting)
        return None
    if (folder / "adapter_config.json").is_file():
        base = settings.base or read_json(folder / "adapter_config.json", setting).get("base_model_name_or_path")
        if not isinstance(base, str) or not (Path(base).expanduser().is_dir() or is_offline_mode()):
            return None
    return find(settings.model, setting, settings.revision, settings.base)


def refuse_types(student: Student, files: ModelFiles | None, averages: list[str]) -> None:
    """UserError for weights that would train in a dtype too narrow for that, or for a moving average of them.

    averages   the teachers that are a moving average of the student (`ema`)
    """
    full, copies = student.method == "full", bool(student.lora and student.lora.modules_to_save)
    if not full and not copies or not (files or student.architecture):
        return
    config = files.config if files else {}
    dtype = loaded_dtype(config, student.dtype)
    if full:
        refuse_untrainable(files, bool(config.get("quantization_config")), dtype)
    elif dtype == "float16":
        raise UserError("student.dtype: modules_to_save would train in float16; set float32, with mixed_precision: bf16 for speed")
    if averages and dtype in NARROW:
        what = "the student's weights" if full else "student.lora.modules_to_save"
        raise UserError(
            f"{averages[0]}.ema: {what} would train in {dtype}, where an average loses small steps; set student.dtype: float32, with "
            "student.mixed_precision: bf16 for speed"
        )


def refuse_layers(loss: Loss, configs: dict[str, dict], of_features: str, teachers: Sequence[tuple[str, Teacher]]) -> None:
    """UserError for layers and widths that loss terms compare and the models do not have.

    configs      the models' configurations that are known, by setting (student.model, teacher.model, ...)
    of_features  the setting of the teacher of `loss.features`
    """
    if loss.attention and (both := [configs[name] for name in ("student.model", f"{teachers[0][0]}.model") if name in configs])[1:]:
        refuse_attention(loss.attention, *both)
    if loss.features:
        both = [configs.get(name, {}) for name in ("student.model", f"{of_features}.model")]
        refuse_features(loss.features, *((layers_of(one), width_of(one)) for one in both))
