"""Runs with several sources: each is reported, weighted, held out from and recorded, and the run resumes bit for bit."""

import json
import shutil

import pytest

from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import distance, weights


@pytest.fixture
def several(world, make_recipe):
    def make(out: str = "out", first=None, second=None, **changes):
        train = [
            {"path": str(world / "train.jsonl"), **(first or {})},
            {"path": "builtin:skills", "format": "chat", "limit": 20, **(second or {})},
        ]
        return make_recipe(out, **{"data__train": train, "train__epochs": 2} | changes)

    return make


def test_examples_of_several_formats_train_together_and_are_written_down(several, world, capsys):
    validation = [{"path": str(world / "held.jsonl")}, {"path": "builtin:skills", "format": "chat", "split": "validation", "limit": 5}]
    prepared = prepare(several(data__validation=validation, second={"weight": 2}))
    assert len(prepared.train) == 57 and prepared.train.source.tolist() == [0] * 37 + [1] * 20
    assert prepared.places[36].endswith("train.jsonl:37") and prepared.places[37] == "builtin:skills[train]:1"
    assert len(prepared.validation) == 14 and prepared.validation.source.tolist() == [0] * 9 + [1] * 5
    said = capsys.readouterr().err
    for line in (
        f"data.train.0 ({world / 'train.jsonl'}): 37 examples",
        "data.train.1 (builtin:skills): 20 examples",
        "train: 57 examples",
        "data.validation.1 (builtin:skills): 5 examples",
        "validation: 14 examples",
    ):
        assert line in said
    assert [(o["path"], o["split"], o["rows"]) for o in prepared.origins["data.train"]] == [
        (str(world / "train.jsonl"), None, 37),
        ("builtin:skills", "train", 20),
    ]
    assert [o["rows"] for o in prepared.origins["data.validation"]] == [9, 5]


def test_held_out_rows_keep_their_sources(several):
    prepared = prepare(several(data__validation_fraction=0.3))
    both = sorted(
        [
            *zip(prepared.train.source, prepared.train.row, strict=True),
            *zip(prepared.validation.source, prepared.validation.row, strict=True),
        ]
    )
    assert both == [(0, i) for i in range(37)] + [(1, i) for i in range(37, 57)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"second": {"weight": 0.01}}, "data.train.1.weight: 0.01 of 20 examples is none; raise it"),
        ({"first": {"format": "text"}}, "train.jsonl:1: no column 'text'"),
        ({"data__max_length": 60}, "data.train.0: none of .*train.jsonl's 37 rows gives a supervised token .* data.train.0.format"),
    ],
)
def test_a_source_that_gives_nothing_is_named(several, settings, words):
    with pytest.raises(UserError, match=words):
        prepare(several(**settings))


def test_a_weighted_run_resumes_bit_for_bit(several, tmp_path):
    settings = {
        "first": {"weight": 0.5},
        "second": {"weight": 1.5},
        "checkpoint__every": 1,
        "checkpoint__keep": 99,
        "student__lora__dropout": 0.3,
    }
    summary = run(several("whole", **settings))
    assert summary["steps"] == 2 * 6  # round(18.5) + 30 = 48 examples by 8
    out = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "adapter")
    for path in (out / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > 7:
            shutil.rmtree(path)
    run(several("part", **settings), resume=True)
    assert distance(weights(out), weights(tmp_path / "whole")) == 0
    with pytest.raises(UserError, match=r"^data.train.0.weight: "):
        (out / "summary.json").unlink()
        run(several("part", **settings | {"first": {"weight": 0.75}}), resume=True)


def test_a_run_goes_on_with_the_held_out_rows_it_began_with(make_recipe, world, tmp_path):
    held = tmp_path / "held.jsonl"
    lines = (world / "held.jsonl").read_text().splitlines(keepends=True)
    held.write_text("".join(lines))
    settings = {"data__validation": {"path": str(held)}, "train__max_steps": 2, "checkpoint__every": 1}
    run(make_recipe("held", **settings))
    (tmp_path / "held/summary.json").unlink()
    held.write_text(lines[0])
    with pytest.raises(UserError, match="^the held-out data has changed since the run"):
        run(make_recipe("held", **settings), resume=True)


def test_one_source_in_a_list_is_that_source(trained, world):
    one = trained("one", data__train=[{"path": str(world / "train.jsonl")}], train__max_steps=3)
    assert distance(one, trained("plain", train__max_steps=3)) == 0


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (
            "chat",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "r"}]},
        ),
        ("prompt_completion", {"prompt": "q: "}),
        ("prompt_completion", {"prompt": [{"role": "user", "content": "q"}]}),
        ("alpaca", {"instruction": "q"}),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_of_a_question_only_the_choice_is_supervised(make_recipe, tmp_path, format, row, renamed):
    names = {"choices": "options", "answer": "label"} if renamed else {}
    question = row | {names.get("choices", "choices"): ["Yes.", "No, it is so."], names.get("answer", "answer"): 1}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    prepared = prepare(make_recipe(data__choices={"path": str(tmp_path / "q.jsonl"), "format": format, "fields": names}))
    questions, tokenizer = prepared.questions, prepared.tokenizer
    assert (questions.counts, questions.answers) == ([2], [1])
    said = [tokenizer.decode(ids[marks]).strip() for ids, marks in (questions.examples.example(i) for i in range(2))]
    assert said == [f"Yes.{tokenizer.eos_token}", f"No, it is so.{tokenizer.eos_token}"]


def test_a_choice_that_is_too_long_is_refused_and_never_cut(make_recipe, tmp_path):
    """Cut off, it would get a higher likelihood."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"instruction": "Say 1", "choices": ["Yes.", "It is so. " * 40], "answer": 0}) + "\n")
    with pytest.raises(UserError, match=r"q.jsonl:1: \d+ tokens, more than data.max_length \(150\)"):
        prepare(make_recipe(data__max_length=150, data__too_long="truncate", data__choices={"path": str(tmp_path / "q.jsonl")}))
