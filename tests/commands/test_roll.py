"""`llmkd roll`: answers with the writer's own ids as rows of tokens, whatever batch and order, resumed after a kill at any byte, scored and trained on."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from llmkd.cli import main
from llmkd.commands import roll as command
from llmkd.commands.arguments import parse
from llmkd.commands.roll import roll
from llmkd.config.recipe import Source
from llmkd.data.encoding.encode import encode
from llmkd.data.encoding.token_rows import vocabulary_hash
from llmkd.data.prompts import Prompt
from llmkd.data.reading.skills import tokenizer
from llmkd.data.reading.sources import read_source
from llmkd.errors import Stopped, UserError
from llmkd.rollouts.answer_file import about_path
from llmkd.rollouts.batches import by_length
from llmkd.rollouts.generate import Completion
from llmkd.rollouts.sampling import Sampling
from llmkd.rollouts.writer import LocalWriter

DRAWN = Sampling(1.0, 5, seed=3)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(make_recipe, world):
    """The recipe of the world, and of its training rows what a student reads up to the first target."""
    recipe = make_recipe()
    source = recipe.data.train
    examples = encode(read_source(source, "data.train"), source, recipe.data, tokenizer())
    parts = [examples.example(i) for i in range(len(examples))]
    return recipe, [ids[: int(np.flatnonzero(mask)[0])].tolist() for ids, mask in parts]


def test_rows_are_prompts_with_the_ids_that_the_model_goes_on_with(asked, world, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    recipe, prompts = asked
    found = roll("student", recipe, tmp_path / "r.jsonl", Sampling(0.0, 6), limit=7, batch_size=3)
    model, end = AutoModelForCausalLM.from_pretrained(world / "student"), tokenizer().eos_token_id
    expected = []
    for ids in prompts[:7]:
        own = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
        expected.append((ids + own, [0] * len(ids) + [1] * len(own), own[-1] == end))
    written = rows(tmp_path / "r.jsonl")
    assert sorted((row["input_ids"], row["loss_mask"], row["finished"]) for row in written) == sorted(expected)
    assert {row["tokenizer"] for row in written} == {vocabulary_hash(tokenizer())}
    assert all(row["prompt"] + row["answer"] == tokenizer().decode(row["input_ids"]) for row in written if not row["finished"])
    assert (found["answers"], found["new"], found["prompts"]) == (7, 7, 7)
    assert f"7 answers to 7 prompts by {world / 'student'}, 7 of them new" in capsys.readouterr().err


def test_an_answer_depends_neither_on_its_batch_nor_on_the_order_of_the_rows(asked, world, tmp_path):
    recipe, _ = asked
    lines = (world / "train.jsonl").read_text().splitlines()[:8]
    random.Random(1).shuffle(lines)
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=Source(path=str(tmp_path / "mixed.jsonl"))))
    roll("student", recipe, tmp_path / "one.jsonl", DRAWN, limit=8, batch_size=8)
    roll("student", other, tmp_path / "two.jsonl", DRAWN, batch_size=3)
    one, two = ({row["key"]: row["input_ids"] for row in rows(tmp_path / f"{name}.jsonl")} for name in ("one", "two"))
    assert one == two and len(one) == 8
    roll("student", recipe, tmp_path / "seed.jsonl", dataclasses.replace(DRAWN, seed=4), limit=8)
    assert sorted(one.values()) != sorted(row["input_ids"] for row in rows(tmp_path / "seed.jsonl"))


def test_after_a_kill_at_any_byte_the_same_command_writes_the_same_file_and_no_answer_twice(asked, tmp_path, monkeypatch):
    recipe, _ = asked
    path = tmp_path / "r.jsonl"
    roll("student", recipe, path, DRAWN, limit=7, batch_size=3)
    whole, written = path.read_bytes(), []
    real = LocalWriter.write
    monkeypatch.setattr(
        LocalWriter, "write", lambda self, prompts, keys, sampling: written.append(len(keys)) or real(self, prompts, keys, sampling)
    )
    second = whole.index(b"\n") + 1
    for cut, computed in (
        (0, [3, 3, 1]),
        (second - 1, [3, 3, 1]),
        (second, [3, 3, 1]),
        (second + 9, [3, 3, 1]),
        (len(whole) - 1, [1]),
        (len(whole), []),
    ):
        path.write_bytes(whole[:cut])
        written.clear()
        roll("student", recipe, path, DRAWN, limit=7, batch_size=3)
        assert path.read_bytes() == whole and written == computed, cut


def test_more_samples_and_more_prompts_are_added_and_fewer_refused(asked, tmp_path):
    recipe, _ = asked
    path = tmp_path / "r.jsonl"
    roll("student", recipe, path, DRAWN, limit=2)
    before = path.read_text()
    assert roll("student", recipe, path, DRAWN, samples=3, limit=3)["new"] == 7
    assert path.read_text().startswith(before)
    assert len({row["key"] for row in rows(path)}) == len({tuple(row["input_ids"]) for row in rows(path)}) == 9
    with pytest.raises(UserError, match="holds 7 answers that are not asked for"):
        roll("student", recipe, path, DRAWN, limit=2)


def test_prompts_that_are_alike_have_answers_of_their_own(asked, tmp_path):
    recipe, _ = asked
    (tmp_path / "p.jsonl").write_text('{"instruction": "Say 3"}\n' * 3)
    roll("student", recipe, tmp_path / "r.jsonl", DRAWN, prompts=tmp_path / "p.jsonl")
    assert len({tuple(row["input_ids"]) for row in rows(tmp_path / "r.jsonl")}) == 3


def test_what_was_written_is_kept_when_a_signal_arrives(asked, tmp_path):
    class Asks:
        def __init__(self):
            self.left = 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self):
            self.left -= 1
            return self.left < 0

    recipe, _ = asked
    with pytest.raises(Stopped, match="has 3 of 7 answers, and the same command goes on"):
        roll("student", recipe, tmp_path / "r.jsonl", DRAWN, limit=7, batch_size=3, stop=Asks())
    assert len(rows(tmp_path / "r.jsonl")) == 3 and '"complete": false' in about_path(tmp_path / "r.jsonl").read_text()


def test_answers_that_are_cut_off_empty_or_too_long_are_counted(asked, tmp_path, monkeypatch, capsys):
    recipe, prompts = asked
    end, answers = tokenizer().eos_token_id, iter([(1, [9, 8]), (0, [1]), (1, [7] * 400), (0, [5, 1])])
    monkeypatch.setattr(
        LocalWriter,
        "write",
        lambda self, prompts, keys, sampling: [Completion(tuple(ids), not cut) for cut, ids in (next(answers) for _ in prompts)],
    )
    found = roll("student", recipe, tmp_path / "r.jsonl", DRAWN, limit=4)
    assert {name: found[name] for name in ("finished", "cut_off", "empty", "too_long")} == {
        "finished": 2,
        "cut_off": 2,
        "empty": 1,
        "too_long": 1,
    }
    assert found["mean_tokens"] == (2 + 1 + 400 + 2) / 4
    first, second, _, last = sorted(
        rows(tmp_path / "r.jsonl"), key=lambda row: [2, 1, 400, 3].index(sum(row["loss_mask"]) + (row["input_ids"][-2] == 5))
    )
    assert (second["answer"], second["input_ids"][-1], second["loss_mask"][-2:]) == ("", end, [0, 1])
    assert last["answer"] == tokenizer().decode([5]) and last["input_ids"][-2:] == [5, end] and not first["finished"]
    assert "1 answer with the prompt longer than data.max_length" in capsys.readouterr().err


def test_the_teacher_reads_its_context_and_the_row_has_the_students_prompt(asked, tmp_path):
    recipe, prompts = asked
    with_context = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, teacher_context="Say owl."))
    roll("teacher", recipe, tmp_path / "plain.jsonl", Sampling(0.0, 8), limit=3)
    roll("teacher", with_context, tmp_path / "told.jsonl", Sampling(0.0, 8), limit=3)
    roll("student", with_context, tmp_path / "student.jsonl", Sampling(0.0, 8), limit=3)
    plain, told, student = (rows(tmp_path / f"{name}.jsonl") for name in ("plain", "told", "student"))
    for row in (*plain, *told, *student):
        assert row["input_ids"][: row["loss_mask"].index(1)] in prompts[:3]
    assert sorted(row["answer"] for row in plain) != sorted(row["answer"] for row in told)


def test_rows_without_an_answer_and_prompts_that_fill_max_length_are_counted(asked, tmp_path, capsys):
    recipe, _ = asked
    long = " ".join(["owl"] * recipe.data.max_length)
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"instruction": i, "output": o}) + "\n" for i, o in (("a", long), (long, "b"), ("c", ""), ("d", "e")))
    )
    data = dataclasses.replace(recipe.data, train=Source(path=str(tmp_path / "t.jsonl")), too_long="drop")
    found = roll("student", dataclasses.replace(recipe, data=data), tmp_path / "r.jsonl", DRAWN)
    assert (found["answers"], found["without_prompt"]) == (2, 2), "a long answer of the data does not matter"
    assert "2 examples left out" in capsys.readouterr().err


def test_held_out_rows_are_not_asked(asked, tmp_path):
    recipe, prompts = asked
    part = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, validation_fraction=0.5, validation=None))
    found = roll("student", part, tmp_path / "r.jsonl", Sampling(1.0, 1))
    assert found["answers"] == len(prompts) - round(len(prompts) / 2)


@pytest.mark.parametrize(
    ("writer", "change", "words"),
    [
        ("teacher", {"teacher": None}, "the recipe names no teacher"),
        ("teacher", {"teacher.model": None, "teacher.cache.path": "c"}, "is a teacher cache, and no model that could write"),
        ("student", {"student.layers.count": 1, "student.layers.by": "block_influence"}, "chosen when it trains"),
        ("student", {"data.streaming": True, "train.max_steps": 3}, "roll reads all rows before it writes"),
        ("./nothing", {}, "there is no folder ./nothing"),
        ("teacher", {"teacher": {"ema": 0.9}}, "roll: teacher is a moving average of the student, which there is only while it trains"),
    ],
)
def test_who_cannot_write_is_refused(make_recipe, tmp_path, writer, change, words):
    with pytest.raises(UserError, match=words):
        roll(writer, make_recipe(**{name.replace(".", "__"): value for name, value in change.items()}), tmp_path / "r.jsonl", DRAWN)
    assert not (tmp_path / "r.jsonl").exists()


def test_what_needs_no_model_is_refused_before_one_is_looked_for(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "source_of", lambda *_: pytest.fail("a model is looked for"))
    (tmp_path / "r.jsonl").write_text("something else\n")
    with pytest.raises(UserError, match="^--to: .*r.jsonl was not written by llmkd roll"):
        roll("student", make_recipe(), tmp_path / "r.jsonl", DRAWN)
    with pytest.raises(UserError, match="^data.streaming: found true"):
        roll("student", make_recipe(data__streaming=True, train__epochs=None, train__max_steps=2), tmp_path / "new.jsonl", DRAWN)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^roll: runs in one process; leave accelerate launch out$"):
        roll("student", make_recipe(), tmp_path / "new.jsonl", DRAWN)
    assert (tmp_path / "r.jsonl").read_text() == "something else\n" and not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "r.jsonl"], "who writes is not given"),
        (["student"], "--to: not given"),
        (["student", "--to", "r.parquet"], "--to: found r.parquet, expected a file with the ending .jsonl"),
        (["student", "--to", "r.jsonl", "--temperature", "0", "--top_p", "0.9"], "--top_p: given with --temperature 0"),
        (["student", "--to", "r.jsonl", "--temperature", "0", "--samples", "2"], "--samples: given with --temperature 0"),
        (["student", "--to", "r.jsonl", "--top_p", "1.5"], "--top_p: found 1.5, expected a number from 0 to 1"),
        (["student", "teacher", "--to", "r.jsonl"], "found student teacher, expected who writes and nothing else"),
        (["student", "--to", "r.jsonl", "--prompts", "nothing.txt"], "--prompts: nothing.txt: no such file"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["roll", "--config", "r.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_writer_may_stand_before_or_behind_options_and_settings():
    for words in (
        ["student", "--config", "r", "--optim.lr", "1"],
        ["--config", "r", "--optim.lr", "1", "student"],
        ["--optim.lr=1", "student", "--config", "r"],
    ):
        options, overrides = parse("roll", words)
        assert (options.places, options.config, list(overrides)) == (["student"], "r", ["optim.lr"])


def test_from_the_command_line_answers_are_rolled_scored_and_trained_on(make_recipe, world, tmp_path, capsys):
    """Roll once, cache, train: neither writes nor asks the teacher again."""
    make_recipe()
    config, path = str(tmp_path / "recipe.yaml"), tmp_path / "r.jsonl"
    assert (
        main(
            [
                "roll",
                "teacher",
                "--config",
                config,
                "--to",
                str(path),
                "--max_new_tokens",
                "6",
                "--limit",
                "9",
                "--json",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "r.json").read_text())["answers"] == 9
    data = ["--data.train", json.dumps({"path": str(path), "format": "tokens"}), "--teacher.cache.path", str(tmp_path / "cache")]
    assert main(["cache", "--config", config, *data]) == 0
    capsys.readouterr()
    assert (
        main(["train", "--config", config, *data, "--teacher.model", "null", "--train.max_steps", "2", "--validation.teacher_check", "0"])
        == 0
    )
    assert "train: 9 examples" in capsys.readouterr().err
    assert [row["kd"] > 0 for row in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) if "kd" in row]


def test_the_batches_of_a_command_are_the_same_whatever_is_there(asked):
    recipe, prompts = asked
    asked = [command.Asked(None, np.arange(n), str(n)) for n in (3, 9, 4, 8, 5)]
    assert [[len(one.ids) for one in batch] for batch in by_length(asked, 2, lambda one: len(one.ids))] == [[9, 8], [5, 4], [3]]


def test_an_answer_ends_with_any_end_token_of_the_recipe_whichever_prompts_are_asked_now(asked, tmp_path, monkeypatch):
    recipe, prompts = asked
    each = [
        Prompt(f"p:{i}", np.array(ids, np.int32), np.array(ids, np.int32), None, frozenset({5 + i})) for i, ids in enumerate(prompts[:2])
    ]
    monkeypatch.setattr(command, "_prompts", lambda *_: (each, 0))
    ends, real = [], LocalWriter.__init__
    monkeypatch.setattr(
        LocalWriter, "__init__", lambda self, model, end_ids, size: ends.append(set(end_ids)) or real(self, model, end_ids, size)
    )
    roll("student", recipe, tmp_path / "r.jsonl", Sampling(0.0, 2), limit=1)
    roll("student", recipe, tmp_path / "r.jsonl", Sampling(0.0, 2))
    assert ends == [{1, 5, 6}] * 2, "else the answers of a resumed file could end otherwise"
    monkeypatch.setattr(command, "_prompts", lambda *_: (each[:1], 0))
    with pytest.raises(UserError, match=r"was written with end tokens \[1, 5, 6\], not \[1, 5\]"):
        roll("student", recipe, tmp_path / "r.jsonl", Sampling(0.0, 2))
