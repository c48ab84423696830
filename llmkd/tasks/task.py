"""The protocol `Task`: what kind of model a recipe trains, how its data is encoded and how its models are measured. No torch."""

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
    """The files of the recipe's models: their folders and configurations, without weights."""

    student: ModelFiles | None  # None for new weights
    teachers: tuple[TeacherSource, ...]
    configs: dict[str, dict]  # by setting (student.model, teacher.model, ...)


class Processor(Protocol):
    """Turns rows into the inputs of models, and is saved with a student.

    reader       a tokenizer, a feature extractor or an image processor
    vocab        V, the number of events over which student and teacher are compared: the tokens that all models have, or the classes
    labels       the names of the classes, in their order; empty for tokens
    identity     hashes by which `--resume` recognises it, by name
    provenance   hashes on which a teacher cache depends, by name
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
    """The recipe's data as examples. `places` are the file and line of each example."""

    source: TrainingSource
    train: Examples  # of a stream only the first step's
    places: Sequence[str]
    validation: Examples | None
    validation_places: Sequence[str]
    questions: Questions | None
    identity: dict[str, str]  # hashes of the training and the held-out data
    end_tokens: set[int]  # tokens that end the training answers; of a stream in the steps read so far
    origins: dict[str, list[dict]]  # by setting (data.train, ...) its sources: path, name, split, resolved revision, rows


class Measures(Protocol):
    """The task's own metrics in validation, in addition to cross-entropy and the comparison with the teacher.

    rows    the names of the values of `of_rows`; their means over all targets are metrics
    kept    those of `rows` whose means are not metrics: their sums over each example are recorded only
    shown   the metrics that the progress bar shows
    """

    rows: tuple[str, ...]
    kept: tuple[str, ...]
    shown: tuple[str, ...]

    def of_rows(self, log_q_nV: "Tensor", labels_n: "Tensor") -> "dict[str, Tensor]":
        """Values of each target, [n] by name, from the student's log-probabilities and the labels."""

    def metrics(self, means: dict[str, float], sums: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        """Further metrics, from the means over all targets and from each example's sums [examples], weighted by `weights` [examples]."""

    def of_texts(self, model: Any, data: Examples, accelerator: Any) -> dict[str, float]:
        """Metrics of the texts that a model generates for held-out examples; empty if it generates none. All processes call it together."""


class Task(Protocol):
    """Makes examples, models and metrics from a recipe's sections. The training loop, the terms of the loss and the teachers do not know the task."""

    name: str

    def measures(self, processor: Processor, validation: Validation) -> Measures: ...

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> Processor:
        """The processor of the data, for all models. UserError if a teacher's differs; no weights are read."""

    def encode(
        self, rows: dict[str, list[Rows]], data: Data, batching: Batching, teachers: tuple[Teacher, ...], processor: Processor
    ) -> EncodedData:
        """Encode the rows that were read: training examples, as a batch source too, and held-out examples."""

    def report(self, data: EncodedData, student: Student, files: ModelFiles | None, processor: Processor) -> None:
        """Print notes on the examples that matter for the trained model, such as its end tokens."""

    def student_files(self, files: ModelFiles | None, processor: Processor) -> ModelFiles | None:
        """The files of the student; if it needs a new head, those of a copy that has one."""

    def kind(self, processor: Processor, examples: Examples | None = None, setting: str = "student.model") -> "ModelKind":
        """How the model of `setting` (student.model, teacher.model, ...) is loaded and run. `examples`: some on which the loaded model is tried."""

    def generation(self, student: Student, files: ModelFiles | None, end_tokens: set[int]) -> dict | None:
        """The generation config that is saved with a student; None for a model that does not generate."""

    def pipeline(self, processor: Processor) -> str:
        """The name of the transformers pipeline for its models."""
