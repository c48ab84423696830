"""What a recipe trains a model for: the protocol `Task`, what it makes of a recipe's sections, and what its models are measured by. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..config.recipe import Data, Student, Teacher, Validation
from ..data.batch_source import TrainingSource
from ..data.batching import Batching
from ..data.dataset import Questions
from ..data.examples import Examples
from ..data.reading.sources import Rows
from ..model_folder.files import ModelFiles
from ..teachers.resolve import TeacherSource

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.kinds import ModelKind


@dataclass(frozen=True)
class FoundModels:
    """The files of the recipe's models: their folders and configurations, and no weights."""

    student: ModelFiles | None  # None for new weights
    teachers: tuple[TeacherSource, ...]
    configs: dict[str, dict]  # by setting (student.model, teacher.model, ...)


class Processor(Protocol):
    """What turns rows into what models read, and is saved with a student.

    reader       a tokenizer, a feature extractor or an image processor
    vocab        V, the events over which student and teacher are compared: the tokens that all models have, or the classes
    labels       the names of the classes, in their order; empty for tokens
    identity     what `--resume` compares, by what it is
    provenance   what a teacher cache depends on, by name
    """

    reader: Any
    vocab: int
    labels: tuple[str, ...]

    @property
    def identity(self) -> dict[str, str]: ...

    @property
    def provenance(self) -> dict[str, str]: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class EncodedData:
    """The recipe's data as examples. `places` name where each example was read (file:line)."""

    source: TrainingSource
    train: Examples  # of a stream the first step's
    places: Sequence[str]
    validation: Examples | None
    validation_places: Sequence[str]
    questions: Questions | None
    identity: dict[str, str]  # hashes of the training and the held-out data
    end_tokens: set[int]  # that close the training answers; of a stream those of the steps that were read
    origins: dict[str, list[dict]]  # of each setting (data.train, ...) its sources: path, name, split, resolved revision, rows


class Measures(Protocol):
    """What validation takes down of each target, besides cross-entropy and the comparison with the teacher, and what follows from it.

    rows   the names of `of_rows`: summed over an example's targets, and the means over all are metrics
    kept   those of them that are no metrics themselves
    shown  the metrics that the bar shows, as the newest validation measured them
    """

    rows: tuple[str, ...]
    kept: tuple[str, ...]
    shown: tuple[str, ...]

    def of_rows(self, log_q_nV: "Tensor", labels_n: "Tensor") -> "dict[str, Tensor]":
        """By name, [n]: of the student's log-probabilities and the labels."""

    def metrics(self, means: dict[str, float], sums: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        """Further metrics, of the means, and of each example's sums [examples], which count with these weights [examples]."""

    def of_texts(self, model: Any, data: Examples, accelerator: Any) -> dict[str, float]:
        """Metrics of what a model writes for held-out examples; every process calls it. Empty where nothing is written."""


class Task(Protocol):
    """From a recipe's sections to examples, models and metrics. The training loop, the terms of the loss and the teachers do not know it."""

    name: str

    def measures(self, processor: Processor, validation: Validation) -> Measures: ...

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> Processor:
        """What reads the data for all models. UserError where a teacher's is another, before weights are read."""

    def encode(
        self, rows: dict[str, list[Rows]], data: Data, batching: Batching, teachers: tuple[Teacher, ...], processor: Processor
    ) -> EncodedData:
        """Training and held-out examples of rows that were read; the training examples as a batch source."""

    def report(self, data: EncodedData, student: Student, files: ModelFiles | None, processor: Processor) -> None:
        """Say what matters of the examples for the model that is trained on them."""

    def student_files(self, files: ModelFiles | None, processor: Processor) -> ModelFiles | None:
        """The files of a student that was found: where it needs a new head, those of the model that has one."""

    def kind(self, processor: Processor, examples: Examples | None = None, setting: str = "student.model") -> "ModelKind":
        """How the model of a setting is loaded and run: student.model, teacher.model, ... `examples`: some, on which it is tried."""

    def generation(self, student: Student, files: ModelFiles | None, end_tokens: set[int]) -> dict | None:
        """The generation config of a student; None for one that does not generate."""

    def pipeline(self, processor: Processor) -> str:
        """The name of transformers' pipeline that uses its models."""
