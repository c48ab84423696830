"""Help lists every setting; a user's mistake ends with exit code 2 and a line each, before anything heavy is imported."""

import dataclasses
import json
import subprocess
import sys
import typing

import pytest

from llmkd import cli
from llmkd.config import schema
from llmkd.config.recipe import Recipe
from tests.kit.settings import BASE


def leaves(kind=Recipe, prefix=""):
    """Path, field and whether it is a section, straight from the dataclasses."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inside = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)]
        yield prefix + field.name, field, bool(inside)
        if inside:
            yield from leaves(inside[0], f"{prefix}{field.name}.")


def test_help_lists_every_setting_with_its_default_and_one_sentence():
    lines = schema.help_text().splitlines()
    shown = {head.split()[0]: (head, sentence) for head, sentence in zip(lines[::2], lines[1::2], strict=True)}
    expected = [(f"--{path}", field) for path, field, section in leaves() if not section]
    sections = {f"--{path}" for path, _, section in leaves() if section}
    assert [path for path in shown if path not in sections] == [path for path, _ in expected]
    for path, field in expected:
        head, sentence = shown[path]
        assert field.default.description and sentence.strip() == field.default.description
        assert sentence.rstrip().endswith(".")
        assert "default " in head
    for path, default in {"optim.lr": "0.0002", "train.epochs": "null", "optim.betas": "[0.9, 0.999]", "student.method": "lora"}.items():
        assert shown[f"--{path}"][0].endswith(f"default {default})")


def test_help_says_what_an_optional_section_is():
    text = schema.help_text()
    assert not [
        path
        for path, field, section in leaves()
        if section and getattr(field.default, "description", None) and field.default.description not in text
    ]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--help"], "llmkd train"),
        ([], "llmkd train"),
        (["--version"], "llmkd "),
        (["train", "--help"], "--optim.lr"),
        (["export", "--help"], "export"),
    ],
)
def test_asking_for_help_is_no_failure(capsys, argv, text):
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert text in out and not err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["--config: not given"]),
        (["train", "--config"], ["--config: no value"]),
        (["train", "--config", "nope.yaml"], ["--config nope.yaml: No such file"]),
        (["train", "--config", "."], ["--config .: Is a directory"]),
        (["train", "nope.yaml"], ["nope.yaml: not understood"]),
        (["train", "\u2013config", "BAD"], ["\u2013config: begins with a dash that is no hyphen; write --config"]),
        (["train", "--config", "BAD", "\u2014resume"], ["\u2014resume: begins with a dash that is no hyphen; write --resume"]),
        (
            ["train", "--config", "BAD", "--resume", "out/checkpoints/step-2"],
            ["--resume: found out/checkpoints/step-2, and it takes no value"],
        ),
        (["train", "-c", "BAD"], ["-c: not understood; the recipe is given by --config FILE"]),
        (["train", "--recipe", "BAD"], ["--recipe: not understood; the recipe is given by --config FILE"]),
        (
            ["train", "--config", "/dev/null"],
            ["--config /dev/null: is a pipe or a device, and a recipe is read more than once; write it to a file"],
        ),
        (["--config", "r.yaml"], ["--config: not understood; name the command first, such as llmkd train --config r.yaml"]),
        (
            ["trian"],
            [
                "trian: no such command; did you mean train? there are train, sweep, cache, data, roll, make, plan, doctor, sample, export, eval, tasks, compare, report"
            ],
        ),
        (["export", "run", "--too", "x"], ["--too: export has no such option"]),
        (["train", "--config", "BAD"], [":5: optim.lr: ", ":6: sed: ", ":7: train.max_steps: "]),
        (["train", "--config", "BAD", "--optim.lr", "1", "--train.epochs", "null"], [":6: sed: "]),
        (["train", "--config", "BAD", "--resume", "--optim.lr=x"], ["--optim.lr: ", ":6: sed: ", ":7: train.max_steps: "]),
    ],
)
def test_what_the_user_can_mend_ends_with_2_and_a_line_each(capsys, tmp_path, argv, words):
    bad = tmp_path / "bad.yaml"
    bad.write_text(BASE + "optim: {lr: -1}\nsed: 3\ntrain: {epochs: 1, max_steps: 2}\n")
    assert cli.main([str(bad) if word == "BAD" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == len(words) and "Traceback" not in err
    assert all(line.startswith("llmkd: ") and word in line for line, word in zip(lines, words, strict=True)), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml"]


def test_a_name_with_characters_of_a_terminal_stays_one_line_that_shows_them(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text(BASE + '"a\\nb\\e[31m": 1\n')
    assert cli.main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"bad.yaml:5: a\nb\x1b[31m: unknown setting" in line


def test_debug_shows_where(capsys):
    assert cli.main(["train", "--config", "nope.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_recipe_is_checked_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "r.yaml").write_text(BASE)
    (tmp_path / "bad.yaml").write_text(BASE + "sed: 1\n")
    code = (
        "import json, sys, llmkd, llmkd.config.loader, llmkd.cli, llmkd.training.early_checks, llmkd.commands.cache_selection\n"
        "llmkd.config.loader.load_recipe('r.yaml')\n"
        "codes = [llmkd.cli.main(a) for a in (['train', '--help'], ['--help'], ['train', '--config', 'bad.yaml'])]\n"
        "print(json.dumps([codes, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 2]
    assert not {"torch", "transformers", "datasets", "peft", "accelerate", "tokenizers", "safetensors", "matplotlib"} & set(modules)
