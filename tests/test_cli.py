"""The command line: help texts, mistakes in one line each, completion, and what stays free of torch."""

import json
import subprocess
import sys

import pytest

from llmkd import __version__, cli
from llmkd.commands import arguments
from llmkd.config.recipe import Recipe
from llmkd.config.schema import describe
from llmkd.errors import UserError
from tests.conftest import plain_recipe


def refused(capsys, *argv) -> str:
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("llmkd: ") and len(err.splitlines()) == 1 and "usage:" not in err, err
    return err.removeprefix("llmkd: ").rstrip()


def shown(capsys, *argv) -> str:
    assert cli.main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_a_help_text_of_its_own(capsys, command):
    text = shown(capsys, command, "--help")
    assert text == shown(capsys, command, "-h") == shown(capsys, "help", command)
    assert text.startswith(f"usage: llmkd {command}") and "\nexample:\n  " in text and f"llmkd {command}" in text.split("example:")[1]
    if command not in ("recipes", "init", "completion"):
        assert "exit codes: 0 done" in text
    flags = [flag for flag in arguments.command_parsers()[command].flags() if flag != "--help"]
    assert all(flag in text for flag in flags)
    others = [other for other in cli.COMMANDS if other != command and f"usage: llmkd {other}" in text]
    assert not others and max(map(len, text.splitlines())) <= 140


def test_the_overview_names_every_command(capsys):
    text = shown(capsys, "--help")
    assert text == shown(capsys) == shown(capsys, "help")
    assert list(cli.COMMANDS) == [command.name for command in arguments.COMMANDS] == list(arguments.command_parsers())
    assert all(f"\n  {command} " in text for command in cli.COMMANDS)


def test_version(capsys):
    assert shown(capsys, "--version") == shown(capsys, "version") == f"llmkd {__version__}\n"


def test_help_on_one_section_of_the_settings(capsys):
    every = [path for path, *_ in describe(Recipe)]
    named = lambda text: [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]  # noqa: E731
    assert named(shown(capsys, "train", "--help", "all")) == every
    for section in ("loss", "data.train", "optim.lr"):
        found = named(shown(capsys, "train", "--help", section))
        assert found == [path for path in every if path == section or path.startswith(section + ".")] and found
    assert named(shown(capsys, "train", "--help=loss")) == named(shown(capsys, "help", "data", "loss"))
    assert "--grid" in shown(capsys, "sweep", "--help", "grid")
    overview = shown(capsys, "train", "--help")
    assert all(f"\n  {section} " in overview for section in {path.partition(".")[0] for path in every if "." in path})
    assert refused(capsys, "train", "--help", "los") == "--help los: no such section or setting; did you mean loss?"
    assert "the sections are student, teacher" in refused(capsys, "train", "--help", "zzz")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "trian: no such command; did you mean train? there are train, sweep"),
        (["zzz"], "zzz: no such command; there are train, sweep"),
        (["train", "--resum", "--config", "x"], "--resum: train has no such option; did you mean --resume?"),
        (["train", "--conf", "x"], "--conf: train has no such option; did you mean --config?"),
        (["doctor", "--config", "x", "--resume"], "--resume: doctor has no such option; it belongs to llmkd train, sweep"),
        (["train", "--config", "x", "--show", "3"], "--show: train has no such option; it belongs to llmkd data"),
        (["train", "--resume=maybe"], "--resume: found maybe, expected true or false, or --resume without a value"),
        (["train", "--config", "a", "--config", "b"], "--config: given twice; keep one"),
        (["train", "--optim.lr", "1", "--optim.lr", "2", "--config", "x"], "--optim.lr: given twice; keep one"),
        (["train", "--config", "x", "--optim.lr"], "--optim.lr: no value given; write --optim.lr VALUE"),
        (["train", "x.yaml"], "x.yaml: not understood; the recipe is given by --config x.yaml"),
        (["sweep"], "--config: not given; name a recipe"),
        (["cache", "--config", "x", "--check", "--import", "f"], "--check: given together with --import"),
        (["export"], "export: a run's folder is not given; write llmkd export RUN"),
        (["export", "a", "b"], "export: found a b, expected a run's folder and nothing else"),
        (["export", "a", "--two", "b"], "--two: export has no such option; did you mean --to?"),
        (["export", "a", "--quick"], "--quick: export has no such option; it has --to, --checkpoint"),
        (["export", "runs/none"], "runs/none: no such folder"),
        (["eval", "runs/none", "--tasks", "x"], "eval: there is no folder runs/none"),
        (
            ["eval", "m", "--tasks", "x", "--dtype", "float12"],
            "--dtype: found float12, expected one of float32, bfloat16, float16, float64; did you mean float32?",
        ),
        (["eval", "m", "--tasks", "x", "--batch_size", "0"], "--batch_size: found 0, expected auto or a whole number >= 1"),
        (["eval", "m", "--tasks", "x", "--limit", "0"], "--limit: found 0, expected a whole number >= 1"),
        (["eval", "m", "--tasks", "x", "--limit", "²"], "--limit: found '²', expected a whole number >= 1"),
        (["eval", "m"], "eval: no task is given"),
        (["eval", "--tasks", "x"], "eval: no model is given"),
        (["compare"], "compare: no run given"),
        (["report", "a", "b"], "report: found a b, expected the folder of a sweep"),
        (["recipes", "x"], "x: recipes takes no such argument"),
        (["completion", "fish"], "completion: found fish, expected bash or zsh"),
        (
            ["export", "run", "--to=~no-such-user/x"],
            "~no-such-user/x: no home folder of that name is known; set HOME, or write the path out",
        ),
        (["report", "~no-such-user/x"], "~no-such-user/x: no home folder of that name is known"),
        (["init", "quickstrt"], "init: there is no recipe quickstrt; did you mean quickstart?"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, argv, text):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *argv).startswith(text)
    assert not list(tmp_path.iterdir())


def test_a_tilde_in_an_option_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options, _ = arguments.parse("tasks", ["~/data", "--to=~/tasks"])
    assert (options.places, options.to) == (["/home/me/data"], "/home/me/tasks")


def test_switches_are_understood_as_settings_are_written():
    for words, resume in (
        (["--resume"], True),
        (["--resume=true"], True),
        (["--resume", "true"], True),
        (["--resume=False"], False),
        (["--resume", "false"], False),
        ([], False),
    ):
        options, overrides = arguments.parse("train", ["--config", "r", *words, "--optim.lr", "-1e-4", "--seed=3", "--teacher", "null"])
        assert options.resume is resume and options.config == "r" and overrides == {"optim.lr": -1e-4, "seed": 3, "teacher": None}


def test_a_settings_last_name_is_left_to_the_recipes_check(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("output_dir: out\nstudent: {model: base}\ndata: {train: {path: a.jsonl}}\n")
    assert refused(capsys, "train", "--config", str(tmp_path / "r.yaml"), "--lr", "1e-4") == "--lr: unknown setting; did you mean optim.lr?"


def test_positional_arguments_and_options_in_any_order():
    for words in (["a", "--json", "f", "b", "--common"], ["--common", "--json=f", "a", "b"], ["a", "b", "--common", "--json", "f"]):
        options, _ = arguments.parse("compare", words)
        assert (options.places, options.json, options.common) == (["a", "b"], "f", True)


def test_values_of_settings_are_left_as_they_are():
    words = ["--data.train", "[{path: a.jsonl}, {path: b.jsonl}]", "--config", "r", "--output_dir", "--x"]
    with pytest.raises(UserError, match="--output_dir: no value given"):
        arguments.parse("train", words)
    _, overrides = arguments.parse("train", [*words[:-1], "1e3"])
    assert overrides == {"data.train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "output_dir": "1e3"}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_and_settings(capsys, shell):
    script = shown(capsys, "completion", shell)
    assert all(command in script for command in cli.COMMANDS)
    assert all(f"--{path}" in script for path in ("config", "resume", "optim.lr", "students_per_teacher", "checkpoint"))


def test_bash_completes(capsys, tmp_path):
    (tmp_path / "c.bash").write_text(shown(capsys, "completion", "bash"))
    ask = """. ./c.bash; complete -p llmkd >/dev/null
        c() { COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=(); _shtab_llmkd; echo "${COMPREPLY[*]}"; }
        c llmkd tr; c llmkd train --optim.l; c llmkd completion ''"""
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["train", "--optim.lr", "bash zsh"], done.stderr


def test_help_mistakes_and_listing_load_no_torch():
    calls = [["--help"], ["recipes"], ["completion", "zsh"], ["export", "runs/none"], ["eval", "runs/none", "--tasks", "x"]]
    calls += [[command, "--help"] for command in cli.COMMANDS]
    code = (
        "import json, sys, llmkd.cli\n"
        f"codes = [llmkd.cli.main(argv) for argv in {calls!r}]\n"
        "print(json.dumps([codes, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes[3:5] == [2, 2] and not any(codes[:3] + codes[5:])
    assert not {"torch", "transformers", "datasets", "peft", "accelerate", "lm_eval", "huggingface_hub"} & set(modules)


AT_SERVER = "--teacher {server:\xa0'http://127.0.0.1:9',model:\xa0m}"
NO_KEY = " --teacher.api_key_env NO_KEY"
ASKING = (
    "train --config r.yaml {}",
    "sweep --config s.yaml {}",
    "cache --config r.yaml {} --teacher.cache.path c",
    "roll teacher --config r.yaml --to a.jsonl {}",
    "doctor --config r.yaml {}",
)


def test_what_is_missing_or_cannot_be_written_to_is_said_before_torch_is_loaded(world, tmp_path):
    """In a process of its own, one command after another."""
    recipe = plain_recipe(world, tmp_path / "out") | {"optim": {"lr": 0.01}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    (tmp_path / "s.yaml").write_text(
        json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "r.yaml", "grid": {"loss.kd_ratio": [0, 1]}})
    )
    for name in ("empty", "unfinished", "full/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "unfinished/recipe.yaml").write_text("")
    cases = {
        "train --config none.yaml": "none.yaml: No such file",
        "train --config r.yaml --output_dir /proc/no": "output_dir: /proc/no cannot be created",
        "train --config r.yaml --student.model ./no": "student.model: there is no folder",
        "train --config r.yaml --data.train.path no.jsonl": "there is no file or folder",
        "train --config r.yaml --data.train.fields {instruction:\xa0no}": "no column 'no'",
        "sweep --config s.yaml --output_dir /proc/no": "output_dir: /proc/no cannot be created",
        "cache --config r.yaml --teacher.cache.path /proc/no": "teacher.cache.path: /proc/no cannot be created",
        "cache --config r.yaml --teacher.cache.path c --import no": "--import: no: no such file",
        "data --config none.yaml": "none.yaml: No such file",
        "export empty": "is the run finished?",
        "export unfinished": "is the run finished?",
        "export full --to /proc/no --checkpoint 3": "--to: /proc/no cannot be created",
        "export full --checkpoint 3": "has no checkpoint 3; it has none",
        "eval empty --tasks x": "neither config.json nor adapter_config.json",
        "eval unfinished --tasks x": "is the run finished?",
        "compare no empty": "no: no such folder",
        "report no": "no: no such folder; name the output_dir of a sweep",
        "report empty": "holds no sweep.json",
        "init quickstart /proc/no": "init: /proc/no cannot be created",
        "cache --config r.yaml --teacher.cache.path c --check": "there is no teacher cache at c; llmkd cache writes one",
        "sample empty": "is the run finished?",
        "sample empty --prompts no.txt": "--prompts: no.txt: no such file",
        "tasks empty --to /proc/no": "--to: /proc/no cannot be created",
        "roll studnet --config r.yaml --to a.jsonl": "roll: found studnet, which is neither a folder nor a part of the recipe; did you mean student?",
        "roll student --config none.yaml --to a.jsonl": "none.yaml: No such file",
        "roll student --config r.yaml --to /proc/no/a.jsonl": "--to: /proc cannot be written to",
        "roll student --config r.yaml --to a.txt": "--to: found a.txt, expected a file with the ending .jsonl",
        "roll student --config r.yaml --to a.jsonl --prompts no.txt": "--prompts: no.txt: no such file",
        "roll teacher --config r.yaml --to a.jsonl --teacher.model ./no": "teacher.model: there is no folder",
        "roll student --config r.yaml --to a.jsonl --data.train.fields {instruction:\xa0no}": "no column 'no'",
        "plan --config none.yaml": "none.yaml: No such file",
        "plan --config r.yaml --student.model ./no": "student.model: there is no folder",
        "plan --config r.yaml --data.train.path no.jsonl": "there is no file or folder",
        "plan --config r.yaml --gpu a1000": "--gpu: found a1000",
        "doctor --config none.yaml": "none.yaml: No such file",
        "doctor --config s.yaml": "is a sweep, and doctor examines a recipe",
        "doctor --config r.yaml --student.model ./no": "student.model: there is no folder",
        "doctor --config r.yaml --data.train.path no.jsonl": "there is no file or folder",
        "doctor --config r.yaml --to /proc/no/page.html": "--to: /proc cannot be written to",
        **{command.format(AT_SERVER + NO_KEY): "teacher.api_key_env: the environment variable NO_KEY is not set" for command in ASKING},
        **{command.format(AT_SERVER): "teacher.server: http://127.0.0.1:9 refuses the connection; start it" for command in ASKING},
    }
    calls = [[word.replace("\xa0", " ") for word in words.split(" ")] for words in cases]
    code = (
        "import json, sys, llmkd.cli\n"
        f"codes = [llmkd.cli.main(argv) for argv in {calls!r}]\n"
        "print(json.dumps([codes, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.startswith("llmkd: ") and "more rows" not in line]
    assert codes == [2] * (len(cases) - len(ASKING)) + [1] * len(ASKING) and len(lines) == len(cases), done.stderr
    for line, words in zip(lines, cases.values(), strict=True):
        assert words in line
    assert not {"torch", "transformers", "peft", "accelerate", "lm_eval"} & set(modules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "r.yaml", "s.yaml", "unfinished"]


@pytest.mark.parametrize(
    ("words", "resume"),
    [(["--resume=True"], True), (["--resume", "TRUE"], True), (["--resume=False"], False), (["--resume", "false", "--seed", "3"], False)],
)
def test_a_switch_may_be_written_as_a_setting_is(words, resume):
    assert arguments.parse("train", ["--config", "r.yaml", *words])[0].resume is resume
