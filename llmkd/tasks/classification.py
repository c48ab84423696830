"""Classification: rows with a label. Each example has one target, and models are compared in their distributions over the classes."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.fields import as_tuple
from ..config.formats import FORMATS
from ..config.recipe import Data, Source, Student, Teacher, Validation
from ..data.batching import Batching
from ..data.dataset import Dataset, teacher_index
from ..data.encoding.labelled_text import class_numbers, is_default, label_names, listed
from ..data.examples import Examples
from ..data.labelled import LabelledExamples
from ..data.reading.sources import Rows
from ..errors import UserError
from ..model_folder.files import ModelFiles
from .metrics.classification import confusion, macro_f1
from .planned import encoded_data
from .readers import Readers, find_readers
from .task import EncodedData, FoundModels

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.classifier import ClassifierKind


#: By the kind of input: the transformers class that loads classifiers, and the pipeline that uses them.
LOADED_BY = {
    "text": ("AutoModelForSequenceClassification", "text-classification"),
    "audio": ("AutoModelForAudioClassification", "audio-classification"),
    "image": ("AutoModelForImageClassification", "image-classification"),
}


@dataclass(frozen=True)
class ClassProcessor:
    """The readers and the classes of classifiers, as a `Processor`."""

    readers: Readers
    labels: tuple[str, ...]

    @property
    def reader(self) -> Any:
        return self.readers.student.reader

    @property
    def vocab(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        return self.readers.provenance | {"labels": hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()}

    @property
    def identity(self) -> dict[str, str]:
        return self.readers.identity | {"the labels": self.provenance["labels"]}

    def save(self, folder: Path) -> None:
        self.readers.student.save(folder)


class ClassMeasures:
    """See `Measures`: accuracy, and macro F1 over all classes. Each example's label and answer are recorded for the confusion matrix."""

    rows, kept, shown = ("accuracy", "label", "answer"), ("label", "answer"), ("accuracy", "f1")

    def __init__(self, labels: Sequence[str]):
        self.classes = len(labels)

    def of_rows(self, log_q_nV: "Tensor", labels_n: "Tensor") -> "dict[str, Tensor]":
        answer_n = log_q_nV.argmax(-1)
        return {"accuracy": (answer_n == labels_n).double(), "label": labels_n.double(), "answer": answer_n.double()}

    def metrics(self, means: dict[str, float], sums: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        label, answer = (sums[name].astype(np.int64) for name in ("label", "answer"))
        return {"accuracy": means["accuracy"], "f1": macro_f1(confusion(label, answer, self.classes, weights))}

    def of_texts(self, model: Any, data: Examples, accelerator: Any) -> dict[str, float]:
        return {}


class Classification:
    """See `Task`."""

    name = "classification"

    def measures(self, processor: ClassProcessor, validation: Validation) -> ClassMeasures:
        return ClassMeasures(processor.labels)

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> ClassProcessor:
        refuse_several_answers(models.configs)
        names = class_names(models.student, rows["data.train"])
        refuse_other_labels(names, models)
        refuse_other_kinds(models, data)
        return ClassProcessor(find_readers(student, models, data), names)

    def encode(
        self, rows: dict[str, list[Rows]], data: Data, batching: Batching, teachers: tuple[Teacher, ...], processor: ClassProcessor
    ) -> EncodedData:
        encode = lambda read, source, name: _encoded(read, source, name, data, teachers, processor)  # noqa: E731
        return encoded_data(rows, data, batching, encode, refuse_unknown_classes)

    def report(self, data: EncodedData, student: Student, files: ModelFiles | None, processor: ClassProcessor) -> None:
        pass

    def student_files(self, files: ModelFiles | None, processor: ClassProcessor) -> ModelFiles | None:
        if files is None or has_head(files):
            return files
        from ..models.new_head import with_head

        reader = processor.readers.student
        return with_head(files, processor.labels, LOADED_BY[reader.kind][0], reader.pad, "student.model")

    def kind(self, processor: ClassProcessor, examples: Examples | None = None, setting: str = "student.model") -> "ClassifierKind":
        from ..models.classifier import ClassifierKind

        reader = processor.readers.of(setting)
        return ClassifierKind(LOADED_BY[reader.kind][0], processor.labels, reader.tokens, reader.pad, examples)

    def generation(self, student: Student, files: ModelFiles | None, end_tokens: set[int]) -> None:
        return None

    def pipeline(self, processor: ClassProcessor) -> str:
        return LOADED_BY[processor.readers.student.kind][1]


def _encoded(read: Rows, source: Source, setting: str, data: Data, teachers: tuple[Teacher, ...], processor: ClassProcessor) -> Dataset:
    labels = class_numbers(read, processor.labels, setting, "the student")
    own, theirs, kept, _, counts = processor.readers.inputs(read, data, setting)
    examples = LabelledExamples(own, labels[kept], kept, processor.labels, counts, of_teachers=theirs)
    examples.teacher_index[:] = teacher_index(source, teachers)
    examples.weigh(vars(source.loss))
    origin = read.origin | {"used": len(kept)}
    return Dataset(f"{setting} ({source.path})", examples, [read.places[i] for i in kept], [origin])


def has_head(files: ModelFiles) -> bool:
    """Whether a model has a classifier's head, by the class that its configuration names. Adapters have one."""
    return files.adapter is not None or any(name.endswith("Classification") for name in files.config.get("architectures") or [])


def names_of(config: dict) -> tuple[str, ...]:
    """The names of a classifier's classes, in their order, from its configuration; LABEL_0, LABEL_1, ... if it has none, as in transformers."""
    given = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    return tuple(str(name) for _, name in sorted(given.items(), key=lambda one: int(one[0])))


def refuse_other_kinds(models: FoundModels, data: Data) -> None:
    """UserError for a classifier of another kind of input than the column that it would read, if transformers knows the class that its
    configuration names."""
    form = FORMATS[as_tuple(data.train)[0].format]
    columns = {"student.model": form.reads} | {
        f"{one.setting}.model": one.settings.reads or form.reads for one in models.teachers if one.files
    }
    for setting, column in columns.items():
        config, kind = models.configs[setting], form.kind_of(column)
        for name in config.get("architectures") or ():
            known = [one for one in LOADED_BY if name in classes_of(one, config)]
            if known and kind not in known:
                fix = "" if setting.startswith("student") else f"set {setting.removesuffix('model')}reads to a column of that kind, or "
                raise UserError(
                    f"{setting}: {name} reads {' or '.join(known)}, and its column {column!r} is {kind}; {fix}name another model"
                )


def classes_of(kind: str, config: dict) -> set[str]:
    """The names of the model classes of classifiers for a kind of input. `config`: a model's config.json, which tells the built-in classifier's kind."""
    from transformers.models.auto import modeling_auto

    tasks = re.sub("(?<!^)([A-Z])", r"_\1", LOADED_BY[kind][0].removeprefix("AutoModelFor")).upper()
    found = getattr(modeling_auto, f"MODEL_FOR_{tasks}_MAPPING_NAMES").values()
    own = {"image" if config.get("inputs") == "pixel_values" else "audio": "BuiltinCnnForClassification"}.get(kind)
    return {name for one in (*found, own) for name in (one if isinstance(one, tuple) else (one,))}


def class_names(student: ModelFiles | None, train: Sequence[Rows]) -> tuple[str, ...]:
    """The names of a run's classes: those of the student's head, or for a new head those in the training rows. UserError for fewer than two, and
    for two of the same name."""
    names = names_of(student.config) if student and has_head(student) else label_names(train)
    if len(names) < 2:
        raise UserError(
            f"data.train: its rows have {len(names)} class, {listed(names)}, and there is nothing to tell apart; give rows of two or more"
        )
    if several := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(
            f"student.model: id2label in its config.json calls {names.count(several[0])} classes {several[0]!r}, expected a name of its own for each; "
            "rename them there"
        )
    return names


def refuse_several_answers(configs: dict[str, dict]) -> None:
    """UserError for a model whose outputs are not a distribution over its classes. `configs`: each model's config.json, by setting."""
    for setting, config in configs.items():
        if (found := config.get("problem_type")) not in (None, "single_label_classification"):
            raise UserError(
                f"{setting}: its config.json says problem_type: {found}, and here one class of several is right; use a model with "
                "single_label_classification"
            )


def refuse_other_labels(names: tuple[str, ...], models: FoundModels) -> None:
    """UserError if a teacher is not a classifier, or does not have the student's classes in the same order."""
    for teacher in models.teachers:
        if not teacher.files:
            continue
        setting, theirs = f"{teacher.setting}.model", names_of(teacher.files.config)
        if not has_head(teacher.files):
            raise UserError(
                f"{setting}: {teacher.files.base} has no head of a classifier; train it on the labels first, with task: classification"
            )
        if theirs == names:
            continue
        if len(theirs) == len(names) and (is_default(theirs) or is_default(names)):
            whose = setting if is_default(theirs) else "student.model"
            raise UserError(
                f"{setting}: its classes are {listed(theirs)}, and the student's {listed(names)}; where nobody has named them their order is not "
                f"known: write {whose}'s names as id2label into its config.json"
            )
        how = "in another order" if sorted(theirs) == sorted(names) else "others"
        raise UserError(
            f"{setting}: its classes are {how} than the student's: {listed(theirs)}, and {listed(names)}; use models of the same classes in "
            "the same order"
        )


def refuse_unknown_classes(train: Dataset, held_out: Dataset) -> None:
    """UserError for held-out rows with a class that no training row has."""
    known, examples = set(np.unique(train.examples.labels).tolist()), held_out.examples
    lacking = [i for i, label in enumerate(examples.labels.tolist()) if label not in known]
    if lacking:
        name = examples.names[examples.labels[lacking[0]]]
        raise UserError(
            f"{held_out.places[lacking[0]]}: the class {name!r} is in held-out rows and in no training row ({len(lacking)} such rows); give "
            "training rows of it, or leave these out (where)"
        )
