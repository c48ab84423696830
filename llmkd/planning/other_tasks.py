"""The parts of a plan for classifiers and encoder-decoder models: examples, kinds of models, and their configurations.

Of a model only its configuration is read, and its tokenizer, feature extractor or image processor. For a model that a future run writes, they
follow from that run's recipe.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import as_tuple
from ..config.recipe import Data, Recipe, Teacher
from ..config.views import views_of
from ..data.dataset import read_data
from ..data.encoding.labelled_text import label_names
from ..data.encoding.tokenizer import load_tokenizer
from ..data.reading.sources import Rows
from ..errors import UserError
from ..files import temporary_folder
from ..model_folder.files import TOKENIZER, ModelFiles, hub_origin, locate
from ..models.classifier import ClassifierKind, labelled
from ..models.kinds import ModelKind
from ..tasks.builtin import register
from ..tasks.classification import has_head, names_of
from ..tasks.pictures import find_image_processor
from ..tasks.registry import task_named
from ..tasks.sound import find_extractor
from ..tasks.task import FoundModels
from ..teachers.resolve import TeacherSource
from ..training.prepare import batching
from .assumed import assumed_of
from .model_configs import NEW, ModelConfig
from .work import ASSUMED, KnownData, Made, lacking_data

#: Marks the configuration of a future classifier as one with a head.
_HEADED = {"architectures": ["ForClassification"]}


@dataclass(frozen=True)
class OfTask:
    """The result of `find_of_task`.

    data     the training examples
    vocab    the size of the vocabulary that the tokenizer and all models share, or the number of classes
    kinds    of the models, by setting (student.model, teacher.model, ...)
    configs  of the models, by setting, completed as in a run
    """

    data: KnownData
    vocab: int
    kinds: dict[str, ModelKind]
    configs: dict[str, dict]


def find_of_task(recipe: Recipe, student: ModelConfig, teachers: Sequence[tuple[str, Teacher, ModelConfig | None]], made: Made) -> OfTask:
    """Find examples, kinds and configurations. UserError if a model's tokenizer, feature extractor or image processor is not on this machine,
    and for rows that a run would refuse."""
    register()
    task, data = task_named(recipe.task), Data(**{**vars(recipe.data), "validation": None})
    found = {"student.model": student} | {f"{name}.model": config for name, _, config in teachers if config}
    configs = {setting: one.config for setting, one in found.items()}
    lacking = lacking_data(recipe, made)
    rows = {"data.train": [], "data.validation": []} if lacking else read_data(data, views_of(one for _, one, _ in teachers))
    if recipe.task == "classification":
        rows["data.train"] = rows["data.train"] or [_row_of_each_class(configs, lacking)]
        names = names_of(student.config) if _is_headed(student.config) else label_names(rows["data.train"])
        coming = [setting for setting, one in found.items() if one.coming and setting != "student.model" and not _is_headed(one.config)]
        configs |= {setting: labelled(names) | configs[setting] | _HEADED for setting in coming}
    with temporary_folder("plan") as folder:
        files = {setting: _files(setting, one, configs[setting], folder) for setting, one in found.items() if one.base != NEW}
        sources = tuple(TeacherSource(name, one, files.get(f"{name}.model"), None) for name, one, _ in teachers)
        processor = task.find_processor(recipe.student, FoundModels(files.get("student.model"), sources, configs), data, rows)
        if lacking:
            examples = assumed_of(processor, data, max(ASSUMED, recipe.train.batch_size))
            known = KnownData(
                examples, None, False, f"{lacking}: every example is assumed to be as long as possible; for text, data.max_length tokens"
            )
        else:
            order = batching(recipe.train, recipe.seed, data.packing)
            known = KnownData(task.encode(rows, data, order, as_tuple(recipe.teacher), processor).train, None, True)
    kinds = {setting: task.kind(processor, known.examples, setting) for setting in found}
    complete = {setting: _completed(configs[setting], one, kinds[setting], processor.vocab) for setting, one in found.items()}
    return OfTask(known, processor.vocab, kinds, complete)


def _is_headed(config: dict) -> bool:
    return has_head(ModelFiles(Path(), None, config))


def _row_of_each_class(configs: dict[str, dict], lacking: str) -> Rows:
    """A row of each class, in place of rows that are not on this machine. The classes are those of a model with a head; UserError without one."""
    names = next((names_of(config) for config in configs.values() if _is_headed(config)), None)
    if names is None:
        raise UserError(f"data.train: {lacking}, so its classes are unknown; provide its rows, or name a model that has the classes")
    labels = [int(name) if all(map(str.isdigit, names)) else name for name in names]
    return Rows([{"label": label} for label in labels], [""] * len(labels), "")


def _files(setting: str, found: ModelConfig, config: dict, folder: Path) -> ModelFiles:
    """The files that read data for a model; for a future model they are written to `folder`. UserError if they are not on this machine."""
    origin = found.files and hub_origin(found.files)
    base = locate(origin[0], setting, origin[1], TOKENIZER) if origin else found.files
    if not (found.tokenizer or found.features):
        if base is None:
            raise UserError(
                f"{setting}: its tokenizer, feature extractor or image processor is not on this machine; download its small files "
                f"(hf download {found.base} --exclude '*.safetensors'), or name a folder that has them"
            )
        return ModelFiles(base, None, config)
    place = folder / setting
    place.mkdir()
    for path in (one for pattern in TOKENIZER for one in (base.glob(pattern) if base else ())):
        shutil.copy(path, place)
    if found.tokenizer:
        load_tokenizer(found.tokenizer, setting).save_pretrained(place)
    if found.features:
        reader = find_extractor if found.features.kind == "log_mel" else find_image_processor
        reader(None, found.features, setting).save_pretrained(place)
    return ModelFiles(place, None, config)


def _completed(config: dict, found: ModelConfig, kind: ModelKind, vocab: int) -> dict:
    """A configuration, with what a run adds for new weights or a classifier's new head."""
    if found.files is not None and not isinstance(kind, ClassifierKind):
        return config
    return kind.architecture(vocab) | {name: value for name, value in config.items() if value is not None}
