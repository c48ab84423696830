"""`llmkd data` shows figures and the mask: every character once, the supervised ones marked, in colour on a terminal."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from llmkd import cli
from llmkd.commands.preview_data import mark_supervised
from llmkd.config.recipe import Data, Source
from llmkd.data.encoding.encode import encode
from llmkd.data.encoding.supervised_text import supervised_spans
from tests.kit.data import END, rows_of, skills_tokenizer, talk, tiny

ENDS = "answers end with '<|end|>' (1), at which the saved student's generation stops\n"


@pytest.fixture
def command(world, tmp_path, capsys, monkeypatch):
    """Run `llmkd data` on a recipe of the small world; its exit code, stdout and stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def go(*words, **data):
        recipe = {
            "output_dir": "o",
            "student": {"model": str(world / "student")},
            "data": {"train": {"path": str(world / "train.jsonl")}, "max_length": 256} | data,
        }
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        code = cli.main(["data", "--config", str(tmp_path / "r.yaml"), *words])
        return code, *capsys.readouterr()

    return go


def test_the_supervised_stretch_is_marked_and_nothing_is_lost(command):
    code, out, err = command("--show", "2")
    assert code == 0 and err == ENDS
    examples = out.split("\nexample ")[1:]
    assert len(examples) == 2
    for text in examples:
        head, body = text.split("\n", 1)
        assert re.fullmatch(r"\d+ of 37  .*train.jsonl:\d+  \d+ tokens, \d+ of them supervised", head)
        assert re.fullmatch(r"(?s)Below is .*### Response:\n⟦Yes\..*<\|end\|>⟧\n+", body), body


def test_the_figures_of_every_source_and_of_all(command, world):
    sources = [{"path": str(world / "train.jsonl"), "limit": 10}, {"path": str(world / "held.jsonl"), "weight": 2}]
    code, out, _ = command("--show", "0", train=sources, max_length=100, validation={"path": str(world / "held.jsonl")})
    lines = [line.split() for line in out.splitlines() if not line.startswith(" ")]
    assert code == 0 and [line[0] for line in lines] == ["data.train.0", "data.train.1", "in", "data.validation"]
    one, two, both = (list(map(str, line[2:])) for line in lines[:3])
    assert both[0] == "19" and all(int(a) + int(b) == int(c.replace(",", "")) for a, b, c in zip(one[:2], two[:2], both[:2], strict=True))
    assert int(one[0]) == int(one[1]) + int(one[5]) + int(one[6])  # rows = examples + too long + without an answer


def test_one_example_by_its_number(command):
    assert "example 36 of 37" in command("--example", "36")[1]
    for words, start in (
        (["--example", "37"], "llmkd: --example: found 37"),
        (["--show", "x"], "llmkd: --show: found 'x'"),
        (["--show", "-1"], "llmkd: --show: found -1"),
    ):
        code, _, err = command(*words)
        assert code == 2 and err.removeprefix(ENDS).startswith(start)


@pytest.mark.parametrize(("name", "coloured"), [("NO_COLOR", False), ("FORCE_COLOR", True), (None, False)])
def test_colour_is_for_terminals_unless_it_is_forced(command, monkeypatch, name, coloured):
    if name:
        monkeypatch.setenv(name, "1")
    out = command("--show", "1")[1]
    assert ("\x1b[1;32m" in out) == coloured and ("⟦" in out) != coloured


def test_settings_on_the_command_line_and_a_stream(command):
    code, out, _ = command("--data.max_length", "200", "--show", "0")
    assert code == 0 and out.splitlines()[1].split()[-1] < "200"
    code, out, _ = command("--data.streaming", "true", "--train.max_steps", "5", "--train.batch_size", "8", "--show", "1")
    assert code == 0 and "the first step of a stream" in out and "example " in out


def test_a_pipeline_and_a_missing_recipe_are_refused(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text("output_dir: o\nstages: {a: {recipe: a.yaml}, b: {cache: b.yaml}}\nteacher: a\nstudents: [a]\n")
    assert cli.main(["data", "--config", str(tmp_path / "s.yaml")]) == 2
    assert "is a pipeline; name the recipe of one of its runs: a.yaml, b.yaml" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path.parent)  # by the names that they have from here
    assert cli.main(["data", "--config", f"{tmp_path.name}/s.yaml"]) == 2
    assert f"one of its runs: {tmp_path.name}/a.yaml, {tmp_path.name}/b.yaml" in capsys.readouterr().err
    assert cli.main(["data"]) == 2 and "--config: not given" in capsys.readouterr().err


def test_what_a_run_refuses_of_the_data_is_refused(command, world, tmp_path):
    for words, data, problem in (
        (["--data.max_length", "257"], {}, "data.max_length: found 257, and student.model has 256 positions; lower it"),
        (["--data.validation_fraction", "0.01"], {}, "data.validation_fraction: 0.01 of 37 rows is none; raise it to 0.027 or more"),
        (
            [],
            {"train": [{"path": str(world / "train.jsonl")}, {"path": str(world / "held.jsonl"), "weight": 0.01}]},
            "data.train.1.weight: 0.01 of 9 examples is none; raise it, or leave the source out",
        ),
    ):
        code, _, err = command(*words, "--show", "0", **data)
        assert (code, err) == (2, f"llmkd: {problem}\n")
    config = json.loads((world / "teacher/config.json").read_text())
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 200}))
    assert "and teacher.model has 200 positions" in command("--teacher.model", str(tmp_path / "short"))[2]
    assert command("--teacher.model", str(tmp_path / "yet_to_come"), "--show", "0")[0] == 0


def test_rows_that_are_both_trained_on_and_held_out_are_a_warning(command, world):
    train = str(world / "train.jsonl")
    for data, names in (
        ({"validation": {"path": train, "limit": 5}}, "data.validation and data.train"),
        ({"train": [{"path": train}, {"path": train, "weight": 2}], "validation_fraction": 0.3}, "data.train.1 and data.train.0"),
    ):
        code, _, err = command("--show", "0", **data)
        assert code == 0 and f"warning: {names} are the same data ({train})" in err
    assert command("--show", "0", train=[{"path": train}, {"path": train}])[2] == ENDS


@pytest.mark.parametrize("module", ["llmkd", "llmkd.cli"])
def test_the_command_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "nothing: no such command" in done.stderr


@pytest.mark.parametrize("answer", ["é", "😀", "你好", "a 😀", "\u200d"])
@pytest.mark.parametrize("tokenizer", [tiny, skills_tokenizer])
def test_a_character_of_several_tokens_is_never_cut(tokenizer, answer):
    tok = tokenizer()
    ids = tok(f"😀{answer}😀", add_special_tokens=False)["input_ids"]
    for first in range(1, len(ids)):
        for last in range(first + 1, len(ids) + 1):
            marks = [first <= i < last for i in range(len(ids))]
            parts = supervised_spans(ids, marks, tok)
            assert "".join(text for text, _ in parts) == f"😀{answer}😀" and all("\ufffd" not in text for text, _ in parts)


def test_control_characters_of_the_data_do_not_reach_the_terminal():
    encoded = encode(rows_of({"text": "a\x1b[31mb\r\x07\n\tc"}), Source(path="f", format="text"), Data(), tiny())
    shown = mark_supervised(*encoded.example(0), tiny(), colour=False)
    assert shown == f"a⟦\\x1b[31mb\\r\\x07\n\tc{END}⟧"


def test_the_text_shown_is_the_text_encoded():
    encoded = encode(rows_of(talk("s be kind", "u q é", "a one", "u r", "a two 😀")), Source(path="f", format="chat"), Data(), tiny())
    ids, marks = encoded.example(0)
    shown = mark_supervised(ids, marks, tiny(), colour=False)
    assert re.findall("⟦(.*?)⟧", shown) == [f"one{END}", f"two 😀{END}"]
    assert shown.replace("⟦", "").replace("⟧", "") == tiny().decode(ids) and np.count_nonzero(marks)


def test_no_torch_of_ours(tmp_path):
    code = "import sys, llmkd.commands.preview_data; print('torch' in sys.modules, 'transformers' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
