"""Classifiers before a run: what is refused, and the classes, texts and pairs that rows become."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import transformers

from llmkd.data.encoding.tokenizer import load_tokenizer
from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from tests.kit.classifiers import SMALL, made, rows_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return functools.partial(made, tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def teacher(recipe, tmp_path_factory) -> Path:
    """An untrained classifier with the classes of the rows."""
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), load_tokenizer("builtin:skills", "", ends=False)
    names = dict(enumerate(prepare(recipe("plain")).processor.labels))
    classes = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = transformers.AutoConfig.for_model(**SMALL, vocab_size=len(tokenizer), pad_token_id=0, **classes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WRONG = {
    "format": ({"data__train__format": "text", "data__train__name": "prose"}, "which task: classification does not read"),
    "packing": ({"data__packing": True}, "data.packing: set with task: classification"),
    "attention": ({"loss__attention": {}, "teacher__model": "t"}, "loss.attention: set with task: classification"),
    "shard": ({"train__shard": "full"}, "train.shard: set with task: classification"),
    "formats": (
        {"data__validation": {"path": "birds", "format": "audio"}},
        "data.validation.format: found audio with data.train.format: labelled",
    ),
    "new sound": (
        {"data": {"train": {"path": "builtin:sounds", "format": "audio"}}, "validation": {}, "checkpoint": {}},
        "student.architecture: found bert with rows of sounds or images, .* builtin_cnn",
    ),
    "no corpus": (
        {"data": {"train": {"path": "builtin:skills", "format": "image"}}, "validation": {}, "checkpoint": {}},
        "data.train.path: found 'builtin:skills'; format image has no built-in corpus",
    ),
    "server": ({"teacher__server": "http://x:1"}, "teacher.server: set with task: classification"),
    "best": (
        {"task": "causal_lm", "data__train__format": "text", "data__train__name": "prose", "data__validation": None},
        "a metric of task",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_a_classifier_is_refused_by_name(recipe, case):
    changes, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        recipe("refused", **changes)


PAIRS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "text_pair": "d", "label": "x"}]


@pytest.mark.parametrize(
    ("train", "held_out", "said"),
    [
        ([*PAIRS, {"text": "e"}], PAIRS, r"train.jsonl:4: no column 'label'"),
        ([*PAIRS, {"text": "e", "label": None}], PAIRS, r"train.jsonl:4: label is null, expected the name of a class"),
        ([*PAIRS, {"text": "e", "label": 0.5}], PAIRS, r"train.jsonl:4: label is"),
        (
            PAIRS,
            [*PAIRS, {"text": "e", "label": "z"}],
            r"validation.jsonl:4: the label 'z' is none of the student's classes; it has 'x', 'y'",
        ),
        (PAIRS[:1], PAIRS[:1], "have 1 class"),
    ],
)
def test_rows_that_cannot_be_used_are_named(recipe, tmp_path, train, held_out, said):
    plain = {"format": "labelled"}
    files = {
        f"data__{name}": plain | {"path": str(rows_of(tmp_path / f"{name}.jsonl", *rows))}
        for name, rows in (("train", train), ("validation", held_out))
    }
    with pytest.raises(UserError, match=said):
        prepare(recipe("refused", **files))


def test_labels_of_teacher_and_student_are_compared(recipe, teacher, tmp_path):
    prepared = prepare(recipe("refused", teacher__model=str(teacher)))
    names = prepared.processor.labels
    assert prepared.train.names == names and prepared.vocab == 8
    for change, said in (
        ({"id2label": {str(i): name for i, name in enumerate(reversed(names))}}, "its classes are in another order than the student's"),
        ({"id2label": {str(i): f"LABEL_{i}" for i in range(8)}}, "write teacher.model's names as id2label"),
        ({"id2label": {str(i): f"other {i}" for i in range(8)}}, "its classes are others than the student's"),
        ({"problem_type": "multi_label_classification"}, "teacher.model: its config.json says problem_type: multi_label_classification"),
        ({"architectures": ["BertModel"]}, "has no head of a classifier; train it"),
    ):
        shutil.copytree(teacher, tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((teacher / "config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            prepare(recipe("refused", teacher__model=str(tmp_path / "model")))
    config = json.loads((teacher / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"id2label": config["id2label"] | {"1": names[0]}}))
    with pytest.raises(UserError, match=f"student.model: id2label in its config.json calls 2 classes '{names[0]}'"):
        prepare(recipe("refused", student__architecture=None, student__tokenizer=None, student__model=str(tmp_path / "model")))


def test_a_number_and_its_digits_are_one_class(recipe, tmp_path):
    """Of files that write labels otherwise."""
    rows = [{"text": text, "label": label} for text, label in (("a", 1), ("b", "1"), ("c", 0), ("d", 10), ("e", 2))]
    file = {"path": str(rows_of(tmp_path / "rows.jsonl", *rows)), "format": "labelled"}
    train = prepare(recipe("digits", data__train=file, data__validation=None, validation__every=None, checkpoint__best_by=None)).train
    assert train.names == ("0", "1", "10", "2") and train.labels.tolist() == [1, 1, 0, 2, 3]


def test_a_teacher_that_is_the_students_average_needs_another_input(recipe, teacher):
    given = {"student__architecture": None, "student__tokenizer": None, "student__model": str(teacher), "loss__kd_ratio": 1.0}
    with pytest.raises(UserError, match=r"teacher.ema: set with loss.kd_ratio 1"):
        prepare(recipe("averaged", **given, teacher={"ema": 0.9}))


def test_long_texts_and_pairs(recipe, tmp_path):
    file = rows_of(tmp_path / "long.jsonl", *PAIRS, {"text": "robin " * 30, "label": 3})
    given = {
        "data__train": {"path": str(file), "format": "labelled"},
        "data__validation": None,
        "validation__every": None,
        "checkpoint__best_by": None,
    }
    dropped, cut = (prepare(recipe("long", **given, data__max_length=12, data__too_long=how)).train for how in ("drop", "truncate"))
    assert (len(dropped), len(cut)) == (3, 4) and cut.lengths.max() == 12 and cut.names == ("3", "x", "y")
    assert dataclasses.replace(cut, counts={}).lengths[2] > cut.lengths[0]  # both texts of a pair
    with pytest.raises(UserError, match=r"long.jsonl:4: \d+ tokens, and data.max_length is 12"):
        prepare(recipe("long", **given, data__max_length=12, data__too_long="refuse"))
