"""The configurations of a recipe's models, and its data, as far as a plan can find them without a run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..config.recipe import Recipe, Teacher, used_teachers
from ..data.encoding.tokenizer import shared_vocab
from ..errors import UserError, attribute_to_student
from ..model_folder.files import rows_of
from ..models.kinds import CAUSAL, ModelKind
from .model_configs import Coming, ModelConfig, find_teachers, student_config
from .other_tasks import find_of_task
from .work import KnownData, Made, known_data


@dataclass(frozen=True)
class Found:
    """The configurations of a recipe's models, and its data.

    students   the configuration of each student that trains side by side
    teachers   (setting, settings, configuration) of each; the configuration is None if only a cache or a server is known
    vocab      the size of the vocabulary that the tokenizer and all models share; for classifiers the number of classes
    kinds      by setting (student.model, ...), the kinds of models other than causal language models
    """

    students: list[ModelConfig]
    teachers: list[tuple[str, Teacher, ModelConfig | None]]
    vocab: int
    data: KnownData
    kinds: dict[str, ModelKind] = field(default_factory=dict)

    def kind(self, setting: str = "student.model") -> ModelKind:
        return self.kinds.get(setting, CAUSAL)

    @property
    def whole(self) -> bool:
        """Whether models are run with all their layers: only for causal language models can a few layers represent many."""
        return bool(self.kinds)

    @property
    def student(self) -> ModelConfig:
        return self.students[0]

    @property
    def live(self) -> list[tuple[str, Teacher, ModelConfig]]:
        """The teachers whose models are loaded."""
        return [
            (setting, one, config) for setting, one, config in self.teachers if one.cache is None and not one.server and one.ema is None
        ]

    @property
    def averages(self) -> list[str]:
        """The settings of teachers that are a moving average of the student's weights."""
        return [setting for setting, one, _ in self.teachers if one.ema is not None]

    def with_teachers(self, recipe: Recipe) -> "Found":
        """The same for a recipe that has the same teachers with other settings."""
        configs = {setting: config for setting, _, config in self.teachers}
        return dataclasses.replace(self, teachers=[(setting, one, configs.get(setting)) for setting, one in used_teachers(recipe)])


def find(recipes: Sequence[Recipe], recipe_folder: Path, coming: Coming = MappingProxyType({}), made: Made = MappingProxyType({})) -> Found:
    """The models and data of a recipe, or of several whose students share a teacher: data and teacher are those of the first.

    coming   earlier runs of a pipeline, which may write its models
    made     folders that earlier stages write, which may hold its data

    UserError for a model or data that a plan cannot find.
    """
    recipe, students = recipes[0], []
    for k, one in enumerate(recipes):
        with attribute_to_student(k):
            students.append(student_config(one.student, recipe_folder, coming=coming))
    student = students[0]
    teachers = find_teachers(used_teachers(recipe), recipe_folder, coming)
    if recipe.task != "causal_lm":
        of_task = find_of_task(recipe, student, teachers, made)
        students = [dataclasses.replace(one, config=of_task.configs["student.model"]) for one in students]
        teachers = [
            (name, one, config and dataclasses.replace(config, config=of_task.configs[f"{name}.model"])) for name, one, config in teachers
        ]
        return Found(students, teachers, of_task.vocab, of_task.data, of_task.kinds)
    rows = {"student.model": rows_of(student.config)} | {f"{name}.model": rows_of(config.config) for name, _, config in teachers if config}
    data = known_data(recipe, student, made)
    known = [count for count in rows.values() if count]
    if data.tokenizer is not None:
        vocab = shared_vocab(data.tokenizer, rows)
    elif known:
        vocab = min(known)
    else:
        raise UserError("student.architecture: found neither vocab_size nor a tokenizer to take it from; give one of them")
    if student.config.get("vocab_size") is None and "text_config" not in student.config:
        students = [dataclasses.replace(one, config={"vocab_size": vocab} | one.config) for one in students]
    return Found(students, teachers, vocab, data)
