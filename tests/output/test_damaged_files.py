"""Each file that a command reads, damaged: it is named in one line, with what to do, or the result is what it would have been.

A checkpoint's own files are in training/test_checkpoint.py, byte by byte.
"""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from llmkd_eval.comparison import item_results
from llmkd_eval.harness import record_files

from llmkd import files
from llmkd.cli import main
from llmkd.config import loader
from llmkd.errors import UserError
from llmkd.files import Damaged, read_sealed, sha256_file, write_sealed
from llmkd.model_folder import weights as weight_files
from llmkd.output.run_files import read_identity, read_run_file, read_summary
from llmkd.teachers.cache.shards import TeacherCache, read_header
from tests.conftest import plain_recipe, said, weights
from tests.faults.flips import flip


def flipped(path: Path) -> None:
    """One bit of one byte, another one for each file."""
    content, chosen = bytearray(path.read_bytes()), random.Random(path.name)
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(7)
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "one bit flipped": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "another type": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\xfa\n" + path.read_bytes()[4:]),
}


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    """Folders run (finished, three checkpoints, with the best), other (a copy), and sweep of two arms; their recipes beside them."""
    root = tmp_path_factory.mktemp("runs")
    recipe = plain_recipe(world, root / "run")
    recipe["data"] |= {"validation": {"path": str(world / "held.jsonl")}}
    recipe |= {"validation": {"every": 1}, "checkpoint": {"every": 1, "keep": 9, "best_by": "ce"}}
    recipe["train"] |= {"max_steps": 3}
    (root / "run.yaml").write_text(json.dumps(recipe))
    shorter = {"train.max_steps": 1, "optim.warmup_steps": 0, "checkpoint.every": None, "checkpoint.best_by": None}
    sweep = {"output_dir": str(root / "sweep"), "recipe": str(root / "run.yaml"), "set": shorter, "grid": {"loss.kd_ratio": [0.0, 0.5]}}
    (root / "sweep.yaml").write_text(json.dumps(sweep))
    assert main(["train", "--config", str(root / "run.yaml")]) == 0
    assert main(["sweep", "--config", str(root / "sweep.yaml")]) == 0
    shutil.copytree(root / "run", root / "other")
    return root


def unfinished(run: Path) -> None:
    """As a kill after step 2 leaves it."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/step-3")


#: name: (the folder that is copied, what is done to it first, the command). {victim} is the copy, {runs} the folder of all.
COMMANDS = {
    "resume": ("run", unfinished, "train --config {runs}/run.yaml --resume --output_dir {victim}"),
    "finished": ("run", lambda run: None, "train --config {runs}/run.yaml --resume --output_dir {victim}"),
    "export": ("run", lambda run: None, "export {victim} --to {victim}/whole"),
    "best": ("run", lambda run: None, "export {victim} --to {victim}/whole --checkpoint best"),
    "compare": ("run", lambda run: None, "compare {runs}/other {victim}"),
    "report": ("sweep", lambda sweep: None, "report {victim}"),
    "sweep": ("sweep", lambda sweep: None, "sweep --config {runs}/sweep.yaml --resume --output_dir {victim}"),
}
ARM = "arms/kd_ratio-0.5"
ADAPTER = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "llmkd.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
READ = [
    *(("resume", name) for name in ("recipe.yaml", "identity.json", "metrics.jsonl")),
    *(("finished", name) for name in ("recipe.yaml", "summary.json", *(f"adapter/{name}" for name in ADAPTER))),
    *(("export", f"adapter/{name}") for name in (*ADAPTER, "README.md")),
    *(("best", name) for name in ("summary.json", "identity.json", "checkpoints/step-3/manifest.json")),
    *(("compare", name) for name in ("recipe.yaml", "summary.json", "held_out.jsonl")),
    *(
        ("report", name)
        for name in ("sweep.json", *(f"{ARM}/{one}" for one in ("recipe.yaml", "summary.json", "metrics.jsonl", "held_out.jsonl")))
    ),
    *(("sweep", name) for name in ("sweep.json", f"{ARM}/recipe.yaml")),
]
#: A damage that these do not look at, since the command does not need the file, or makes it again.
HARMLESS = {
    ("export", "adapter/README.md", "one bit flipped"),
    ("export", "adapter/README.md", "empty"),
    ("export", "adapter/README.md", "half"),
    ("export", "adapter/README.md", "another type"),
}


@pytest.fixture
def call(runs, tmp_path, capsys):
    """A command on a copy of its folder that `damage(copy)` has changed: exit code and lines of stderr."""

    def go(command: str, damage) -> tuple[int, list[str]]:
        base, before, words = COMMANDS[command]
        victim = tmp_path / "victim"
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(runs / base, victim)
        before(victim)
        damage(victim)
        capsys.readouterr()
        code = main([word.format(runs=runs, victim=victim) for word in words.split()])
        return code, said(capsys).splitlines()

    return go


@pytest.mark.slow
@pytest.mark.parametrize(("command", "file"), READ, ids=lambda value: value)
def test_a_damaged_file_is_named_in_one_line_or_harmless(call, runs, tmp_path, command, file):
    for kind, damage in DAMAGES.items():
        code, lines = call(command, lambda victim, damage=damage: damage(victim / file))
        named = [line for line in lines if Path(file).name in line]
        ended = [line for line in lines if line.startswith("llmkd: ")]
        assert code in (0, 2) and not any("bug" in line for line in lines), (kind, lines)
        assert len(ended) == (code == 2), (kind, lines)
        if code == 2:
            assert named == ended and ";" in ended[0], (kind, ended)
        elif command == "resume":
            assert_same_weights(tmp_path / "victim", runs / "run")
            assert named or summary(tmp_path / "victim") == summary(runs / "run"), (kind, lines)
        else:
            assert named or (command, file, kind) in HARMLESS, (kind, lines)


def assert_same_weights(run: Path, other: Path) -> None:
    found = weights(run)
    assert all(torch.equal(value, found[name]) for name, value in weights(other).items())


def summary(run: Path) -> dict:
    return {name: value for name, value in read_sealed(run / "summary.json").items() if name != "files"}


@pytest.mark.parametrize("file", ["identity.json", "recipe.yaml"])
def test_one_of_the_two_files_that_say_which_run_it_is_may_be_lost(call, runs, tmp_path, file):
    """The other one, or the checkpoints, hold what it says."""
    code, lines = call("resume", lambda victim: (victim / file).unlink())
    assert code == 0 and any("resuming after step 2" in line for line in lines)
    assert read_sealed(tmp_path / "victim/identity.json") == read_sealed(runs / "run/identity.json") | {
        "recipe.yaml": read_sealed(tmp_path / "victim/identity.json")["recipe.yaml"]
    }


@pytest.mark.parametrize("lost", [("identity.json",), ("recipe.yaml",), ("identity.json", "recipe.yaml")], ids="+".join)
def test_and_then_other_settings_are_still_refused(call, runs, lost, monkeypatch):
    base, before, words = COMMANDS["resume"]
    monkeypatch.setitem(COMMANDS, "resume", (base, before, f"{words} --optim.lr 0.5"))
    code, lines = call("resume", lambda victim: [(victim / name).unlink() for name in lost])
    assert code == 2
    words = {1: "optim.lr: 0.01 in the run" if lost == ("identity.json",) else "the settings differ from those", 2: "holds no run of llmkd"}
    assert any(words[len(lost)] in line for line in lines), lines


def test_a_checkpoint_of_another_run_or_step_is_passed_over_by_a_whole_run(call, runs, tmp_path, capsys, monkeypatch):
    assert main(["train", "--config", str(runs / "run.yaml"), "--seed", "5", "--output_dir", str(tmp_path / "foreign")]) == 0

    def foreign(victim):
        shutil.copytree(tmp_path / "foreign/checkpoints/step-3", victim / "checkpoints/step-3")
        shutil.copytree(victim / "checkpoints/step-1", victim / "checkpoints/step-999")

    code, lines = call("resume", foreign)
    passed = [line for line in lines if line.startswith("passing over the checkpoint")]
    assert code == 0 and len(passed) == 2 and "step-999 (it is beyond the run's last step, 3)" in passed[0]
    assert "step-3 (it belongs to another run, which differs in settings)" in passed[1] and any(
        "resuming after step 2 of 3" in one for one in lines
    )
    assert sorted(path.name for path in (tmp_path / "victim/checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]
    assert_same_weights(tmp_path / "victim", runs / "run")


@pytest.mark.parametrize("command", ["finished", "best"])
def test_the_summary_of_another_run_is_not_taken_for_this_ones(call, runs, tmp_path, command):
    """A whole one, of a run with the same settings and another seed."""

    def foreign(victim):
        other = tmp_path / "other.yaml"
        other.write_text((victim / "recipe.yaml").read_text().replace("seed: 0", "seed: 5"))
        content = read_sealed(victim / "summary.json")
        assert content["files"]["recipe.yaml"] != sha256_file(other)
        content["files"]["recipe.yaml"] = sha256_file(other)
        write_sealed(victim / "summary.json", content)

    code, lines = call(command, foreign)
    assert code == 2 and "summary.json: belongs to another run (with another recipe.yaml);" in lines[-1]


def test_the_list_of_another_sweep_is_not_taken_for_this_ones(call):
    def foreign(victim):
        content = read_sealed(victim / "sweep.json")
        content["arms"]["kd_ratio-0.5"]["run"] = "0" * 64
        write_sealed(victim / "sweep.json", content)

    code, lines = call("report", foreign)
    (named,) = [line for line in lines if "is another run than sweep.json says" in line]
    assert code == 0 and named.startswith("warning: ") and "arms/kd_ratio-0.5 is another" in named


def test_a_lost_list_of_a_sweep_is_made_anew_from_its_runs(call, tmp_path):
    code, lines = call("sweep", lambda victim: (victim / "sweep.json").unlink())
    assert code == 0 and any("sweep.json is missing, and is made anew: finished arms are kept" in line for line in lines)
    assert "every arm is done" in lines
    assert {arm["status"] for arm in read_sealed(tmp_path / "victim/sweep.json")["arms"].values()} == {"done"}


@pytest.mark.parametrize("content", [{"arms": []}, {"arms": {}, "groups": {}}, {"arms": {"kd_ratio-0": {}}, "groups": [], "stages": {}}])
def test_a_list_of_a_sweep_that_is_whole_and_no_state_is_refused(call, content):
    code, lines = call("sweep", lambda victim: write_sealed(victim / "sweep.json", content))
    assert code == 2 and "sweep.json: is not a sweep's state; delete it and run the sweep again with --resume" in lines[-1]


def test_a_misspelt_checksum_is_no_missing_one(tmp_path):
    """Files of earlier versions have none; a flipped bit in its name must not make one of those."""
    write_sealed(tmp_path / "a.json", {"a": 1})
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("checksum", "checksuo"))
    with pytest.raises(Damaged, match="its last key is 'checksuo', and should be 'checksum'"):
        read_sealed(tmp_path / "a.json")


def test_a_file_that_this_user_may_not_read_is_not_to_be_deleted_or_made_again(runs, caches, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "open_file", denied)
    for read, path in (
        (lambda path: read_run_file(path, "delete it"), runs / "run/summary.json"),
        (lambda path: record_files.read_record(path.parent, "summary"), runs / "run/summary.json"),
        (lambda path: weight_files.read_json(path, "student.model"), runs / "run/adapter/adapter_config.json"),
        (lambda path: TeacherCache.open(path.parent), caches / "topk/cache.json"),
        (loader.read, runs / "run.yaml"),
    ):
        with pytest.raises(UserError, match=f"{path}.* ?Permission denied") as refused:
            read(path)
        assert str(refused.value).endswith("; give this user the right to read it")


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_a_damaged_file_of_a_teacher_cache_is_named(caches, tmp_path, kind):
    read = [path.name for path in (caches / kind).iterdir() if path.name == "cache.json" or path.suffix == ".safetensors"]
    assert len(read) == (2 if kind == "topk" else 3)
    for name in read:
        for damage in DAMAGES.values():
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            shutil.copytree(caches / kind, tmp_path / "cache")
            damage(tmp_path / "cache" / name)
            with pytest.raises(
                UserError, match=f"^teacher.cache.path: .*{name}.* is damaged .*; delete it and run llmkd cache again"
            ) as refused:
                TeacherCache.open(tmp_path / "cache")
            assert len(refused.value.problems) == 1


@pytest.mark.parametrize("name", ["quiz.json", "quiz.jsonl"])
def test_a_damaged_file_of_an_evaluation_is_named(tmp_path, name):
    items = [{"id": i, "hash": f"h{i}", "metrics": {"acc": i % 2}} for i in range(4)]
    record = {"task": "quiz", "version": 1, "n": 4, "metrics": {"acc": {"value": 0.5, "higher_is_better": True}}}
    for kind, damage in DAMAGES.items():
        for run in ("a", "b"):
            shutil.rmtree(tmp_path / run, ignore_errors=True)
            record_files.write_task(tmp_path / run / "eval", record, items)
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
        damage(tmp_path / "b/eval" / name)
        for read in (record_files.read_items, item_results.read):
            with pytest.raises(UserError, match=f"{name}: .*evaluate") as refused:
                read(tmp_path / "b", "quiz")
            assert len(refused.value.problems) == 1, kind


def test_one_bit_of_a_byte_of_a_small_file(runs, caches, tmp_path):
    """It is named, or nothing that is read differs. A few bytes of each; what commands make of flips in all files: python -m tests.faults.flips."""
    items = [{"id": i, "hash": f"h{i}", "metrics": {"acc": i % 2}} for i in range(4)]
    record = {"task": "quiz", "version": 1, "n": 4, "metrics": {"acc": {"value": 0.5, "higher_is_better": True}}}
    record_files.write_task(tmp_path / "evaluated/eval", record, items)
    readers = {
        runs / "run/summary.json": lambda path: read_summary(path.parent, "do so"),
        runs / "run/identity.json": lambda path: read_identity(path.parent),
        runs / "sweep/sweep.json": lambda path: read_run_file(path, "do so"),
        caches / "topk/cache.json": lambda path: read_header(path.parent),
        tmp_path / "evaluated/eval/quiz.json": lambda path: record_files.read_items(path.parent, "quiz"),
        tmp_path / "evaluated/eval/quiz.jsonl": lambda path: record_files.read_items(path.parent, "quiz"),
    }
    for place, read in readers.items():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(place.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors", "checkpoints", "arms", "adapter"))
        path = tmp_path / "copy" / place.name
        whole, expected = path.read_bytes(), read(path)
        for offset in range(0, len(whole), 17):
            path.write_bytes(whole)
            done = flip(path, offset)
            try:
                assert read(path) == expected, f"{place.name}: {done}"
            except UserError as error:
                assert len(error.problems) == 1 and place.name in error.problems[0], (done, error.problems)
