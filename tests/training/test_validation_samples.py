"""validation.samples: greedy answers to the same held-out prompts at each validation, which leave the training as it is."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from llmkd.commands.sample import sample
from llmkd.config import loader
from llmkd.data.reading.skills import tokenizer
from llmkd.errors import UserError
from llmkd.files import read_sealed, sha256_file
from llmkd.output.run_folder import RunFolder
from llmkd.output.samples import add_samples, last_samples, read_samples
from llmkd.rollouts.generate import Completion
from llmkd.rollouts.sampling import Sampling
from llmkd.training.prepare import prepare
from llmkd.training.run import run, train_together
from llmkd.training.shutdown import ShutdownRequest
from tests.conftest import distance, plain_recipe, weights
from tests.training.test_resume import LONG, comparable, unfinish

KEYS = ["step", "place", "prompt", "reference", "text", "tokens", "finished"]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run of six steps with dropout, validated before the first and after steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("samples")
    (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / "out")))
    changes = {name.replace("__", "."): value for name, value in LONG.items()} | {"data.validation.path": str(world / "held.jsonl")}
    changes |= {"validation.every": 2, "validation.samples": 3, "validation.sample_tokens": 7, "validation.teacher_check": 0}
    recipe = loader.load_recipe(root / "r.yaml", changes)
    run(recipe)
    return recipe


def test_each_validation_leaves_the_students_greedy_answers(whole, world):
    out = Path(whole.output_dir)
    found = read_samples(out)
    assert [list(record) for record in found] == [KEYS] * 12 and [record["step"] for record in found] == [
        n for n in (0, 2, 4, 6) for _ in range(3)
    ]
    assert len({record["prompt"] for record in found}) == 3
    rows = [json.loads(line) for line in (world / "held.jsonl").read_text().splitlines()]
    assert all(record["reference"] == rows[int(record["place"].rpartition(":")[2]) - 1]["output"] for record in found)
    of_command = sample(out, count=3, max_new_tokens=7, models=("before", "after"))
    for name, records in (("before", found[:3]), ("after", last_samples(out))):
        for one, record in zip(of_command.asked, records, strict=True):
            assert (one.place, one.prompt, one.reference) == (record["place"], record["prompt"], record["reference"])
            assert dataclasses.asdict(one.answers[name]) == {key: record[key] for key in ("text", "tokens", "finished")}
    assert any(a["text"] != b["text"] for a, b in zip(found[:3], found[-3:], strict=True)), "it learnt something"
    assert read_sealed(out / "summary.json")["files"]["samples.jsonl"] == sha256_file(out / "samples.jsonl")


def test_the_training_is_bit_for_bit_the_same_without(whole, trained, world):
    plain = trained("plain", **LONG, data__validation__path=str(world / "held.jsonl"), validation__every=2, validation__teacher_check=0)
    out = Path(whole.output_dir)
    assert distance(plain, weights(out)) == 0 and not (out.parent / "plain/samples.jsonl").exists()


def test_a_resumed_run_goes_on_without_a_step_twice(whole, tmp_path):
    out, before = tmp_path / "out", (Path(whole.output_dir) / "samples.jsonl").read_bytes()
    for step, kept in ((3, before), (4, before), (2, b"".join(before.splitlines(True)[:4]) + b'{"step": 2, "pl')):
        shutil.copytree(whole.output_dir, out, dirs_exist_ok=True)
        unfinish(out, step)
        (out / "samples.jsonl").write_bytes(kept)
        run(dataclasses.replace(whole, output_dir=str(out)), resume=True)
        steps = [record["step"] for record in read_samples(out)]
        assert steps == sorted(steps) and {steps.count(n) for n in (4, 6)} == {3} and steps.count(0) == 3
        assert (out / "samples.jsonl").read_bytes() == before or step == 2
        assert distance(weights(out), weights(Path(whole.output_dir))) == 0 and comparable(out) == comparable(Path(whole.output_dir))
        shutil.rmtree(out)


def test_what_was_written_in_training_stands_before_the_validation_of_its_step(whole, tmp_path):
    """Steps 1 and 2 of training, 2 of validation; then an attempt that goes on after step 1."""

    def add(step: int, text: str, **more) -> list[str]:
        add_samples(tmp_path, step, [dict(zip(KEYS, (step, "f:1", "p", "r", text, 3, True), strict=True)) | more])
        return [record["text"] for record in read_samples(tmp_path)]

    training = {"training": True}
    add(1, "a", **training)
    add(2, "b", **training)
    assert add(2, "c") == ["a", "b", "c"] and add(2, "d") == ["a", "b", "d"] and [one["text"] for one in last_samples(tmp_path)] == ["d"]
    assert add(3, "e", **training) == ["a", "b", "d", "e"] and [one["text"] for one in last_samples(tmp_path)] == ["d"]
    assert add(2, "f", **training) == ["a", "f"] and last_samples(tmp_path) == [] and add(2, "g") == ["a", "f", "g"]


def test_a_damaged_line_is_named_and_the_others_are_kept(whole, tmp_path, capsys):
    lines = (Path(whole.output_dir) / "samples.jsonl").read_text().splitlines(True)
    (tmp_path / "samples.jsonl").write_text(lines[0] + "{torn\n" + '{"step": "two"}\n' + lines[1])
    notes = []
    assert [json.dumps(record, ensure_ascii=False) + "\n" for record in read_samples(tmp_path, notes.append)] == lines[:2]
    assert len(notes) == 1 and "samples.jsonl: line 2 is left out" in notes[0] and "and 1 more" in notes[0]
    assert read_samples(tmp_path / "none") == last_samples(tmp_path / "none") == []


def test_an_answer_ends_where_training_teaches_it_to_and_is_written_without_that_token(make_recipe, world, monkeypatch):
    import llmkd.training.validation_samples as module

    tok, asked = tokenizer(), []
    ended = Completion((*tok("It is 7.", add_special_tokens=False)["input_ids"], tok.eos_token_id), True)
    monkeypatch.setattr(
        module, "generate", lambda model, prompts, sampling, ends, size: (asked.append((sampling, ends)), [ended] * len(prompts))[1]
    )
    recipe = make_recipe(
        data__validation={"path": str(world / "held.jsonl")}, validation__samples=2, train__max_steps=2, validation__teacher_check=0
    )
    run(recipe)
    assert all(sampling == Sampling(0.0, 64) and tok.eos_token_id in ends for sampling, ends in asked) and len(asked) == 2
    assert [(record["text"], record["finished"]) for record in read_samples(Path(recipe.output_dir))] == [("It is 7.", True)] * 4


def test_students_side_by_side_write_what_each_writes_alone(make_recipe, world):
    given = {"data__validation": {"path": str(world / "held.jsonl")}, "validation__samples": 3, "validation__sample_tokens": 9}
    given |= {"train__max_steps": 4, "validation__teacher_check": 0, "optim__warmup_steps": 0, "optim__schedule": "constant"}
    slow, fast, alone = (make_recipe(out, **given, optim__lr=lr) for out, lr in (("slow", 1e-4), ("fast", 0.1), ("alone", 0.1)))
    assert train_together([slow, fast], [RunFolder(one, False) for one in (slow, fast)], ShutdownRequest()) == [None, None]
    run(alone)
    slows, fasts, alones = ((Path(one.output_dir) / "samples.jsonl").read_bytes() for one in (slow, fast, alone))
    assert fasts == alones != slows and slows.splitlines()[:3] == fasts.splitlines()[:3], "before training they are one"


def test_all_that_ends_an_answer_is_given(whole, tmp_path, monkeypatch):
    """The end tokens of the training data, the tokenizer's, and those of the model's generation config."""
    import llmkd.training.validation_samples as module

    asked = []
    monkeypatch.setattr(
        module, "generate", lambda model, prompts, sampling, ends, size: (asked.append(ends), [Completion((7,), False)] * len(prompts))[1]
    )
    monkeypatch.setattr(module, "stops_of", lambda model: {31})
    prepared = dataclasses.replace(prepare(whole), end_tokens={29, 30})
    module.write_samples(tmp_path, 1, None, prepared, whole.validation)
    assert asked == [{tokenizer().eos_token_id, 29, 30, 31}] and read_samples(tmp_path)[0]["text"] == tokenizer().decode([7])


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"data__train_on_input": True, "data__validation_fraction": 0.2, "teacher": None, "loss__kd_ratio": 0.0},
            "with data.train_on_input",
        ),
        ({}, "there are no held-out rows"),
    ],
)
def test_samples_without_prompts_are_refused(make_recipe, changes, problem):
    with pytest.raises(UserError) as found:
        make_recipe(**changes, validation__samples=2)
    assert any("validation.samples: found 2" in line and problem in line for line in found.value.problems)
