"""A run that was stopped and resumed is, bit for bit, the run that was not; and no kill leaves it without a way on."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from llmkd import files
from llmkd.cli import main
from llmkd.errors import Stopped, UserError
from llmkd.files import read_jsonl
from llmkd.models.load import LoadContext, load_students
from llmkd.output.run_files import run_of
from llmkd.training import checkpoint
from llmkd.training.build import restore
from llmkd.training.distiller import Distiller
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from llmkd.training.validate import Evaluator
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch, train_on_two

#: Two epochs of three steps over 20 rows (the last window has 4), dropout on, validation in between.
LONG = {"data__train__limit": 20, "train__epochs": 2, "student__lora__dropout": 0.3, "checkpoint__every": 1, "checkpoint__keep": 99}
#: The same with prompts that are edited for the student in every epoch.
EDITED = LONG | {"data__augment__prompt": [{"swap": 0.3}, {"typo": 0.2}], "data__augment__teacher_sees": "clean"}
STEPS = 6


def comparable(out: Path) -> list[dict]:
    records = read_jsonl(out / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "peak_memory" and not k.endswith(("_per_s", "_seconds"))} for record in records]


def unfinish(out: Path, step: int) -> None:
    """What a kill just after the checkpoint of `step` leaves."""
    (out / "summary.json").unlink()
    shutil.rmtree(out / "adapter")
    for path in (out / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    from llmkd.config import loader

    root = tmp_path_factory.mktemp("whole")
    held = {"validation__path": str(world / "held.jsonl")}
    (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / "out")))
    changes = EDITED | {f"data__{k}": v for k, v in held.items()} | {"validation__every": 2}
    recipe = loader.load_recipe(root / "r.yaml", {k.replace("__", "."): v for k, v in changes.items()})
    run(recipe)
    return recipe


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_at_every_step(whole, step, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole.output_dir, out)
    unfinish(out, step)
    torch.manual_seed(step)  # whatever the process's own state is
    run(dataclasses.replace(whole, output_dir=str(out)), resume=True)
    assert f"resuming after step {step} of {STEPS}" in capsys.readouterr().err
    assert distance(weights(out), weights(Path(whole.output_dir))) == 0
    assert comparable(out) == comparable(Path(whole.output_dir))


def test_validation_changes_nothing(whole, trained):
    assert distance(trained("silent", **EDITED), weights(Path(whole.output_dir))) == 0


def test_a_validation_has_no_dropout(whole, world, make_recipe):
    """The last validation is that of the adapter that is left, loaded anew."""
    prepared = prepare(whole)
    (model,) = load_students(
        [dataclasses.replace(whole.student, model=f"{whole.output_dir}/adapter", lora=None)], LoadContext(prepared.vocab, "cpu")
    )
    found = Evaluator(Accelerator(cpu=True), 8).validate([model.eval()], None, prepared.validation)[0].metrics()
    last = [record["validation"] for record in read_jsonl(Path(whole.output_dir) / "metrics.jsonl") if "validation" in record][-1]
    assert last["ce"] == pytest.approx(found["ce"], rel=1e-10)


def test_another_seed_gives_another_order(whole):
    one, other = (prepare(dataclasses.replace(whole, seed=seed)).source for seed in (whole.seed, whole.seed + 1))
    first = [[step.examples for step in source.schedule()] for source in (one, other)]
    assert first[0] != first[1] and sorted(sum(first[0], [])) == sorted(sum(first[1], []))


@pytest.mark.parametrize("plain", [EDITED | {"student__lora__dropout": 0.0}, LONG])
def test_dropout_is_on_and_prompts_are_edited(whole, trained, plain):
    assert distance(trained("plain", **plain), weights(Path(whole.output_dir))) > 1e-6


def test_only_the_newest_and_the_best_are_kept(trained, world, tmp_path):
    trained(
        "kept",
        **LONG
        | {"checkpoint__keep": 2, "data__validation__path": str(world / "held.jsonl"), "validation__every": 1, "checkpoint__best_by": "ce"},
    )
    summary = json.loads((tmp_path / "kept/summary.json").read_text())
    kept = {int(p.name.split("-")[1]) for p in (tmp_path / "kept/checkpoints").iterdir()}
    assert kept == {5, 6, summary["best"]["step"]}
    values = {r["step"]: r["validation"]["ce"] for r in read_jsonl(tmp_path / "kept/metrics.jsonl") if "validation" in r}
    assert summary["best"]["value"] == min(values.values())


def test_a_checkpoint_is_small_and_plain(whole):
    files = {p.name for p in (Path(whole.output_dir) / "checkpoints/step-1").iterdir()}
    assert files == {"student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    from safetensors.torch import load_file

    assert all("lora" in name for name in load_file(Path(whole.output_dir) / "checkpoints/step-1/student.safetensors"))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_by_name(whole, damage, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole.output_dir, out)
    unfinish(out, 4)
    victim = out / "checkpoints/step-4" / ("manifest.json" if damage == "manifest" else "student.safetensors")
    raw = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        raw[-3] ^= 1
        victim.write_bytes(raw[: len(raw) // 2] if damage in ("cut", "manifest") else raw)
    run(dataclasses.replace(whole, output_dir=str(out)), resume=True)
    assert "step-4" in (said := capsys.readouterr().err) and "resuming after step 3" in said
    assert distance(weights(out), weights(Path(whole.output_dir))) == 0


def test_checkpoints_after_the_one_that_is_resumed_from_are_removed(whole, tmp_path):
    """A damaged one would stay, if the resumed run wrote none at that step."""
    for step in range(1, 5):
        shutil.copytree(Path(whole.output_dir) / f"checkpoints/step-{step}", tmp_path / f"c/step-{step}")
    (tmp_path / "c/step-4/state.json").write_text("{}")
    folder = SimpleNamespace(checkpoints=tmp_path / "c", path=tmp_path, run=run_of(Path(whole.output_dir)))
    student = SimpleNamespace(folder=folder, restore=lambda saved: None)
    assert restore([student], SimpleNamespace(restore=lambda state: None, total_steps=STEPS), main=True) == 3
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-1", "step-2", "step-3"]


def test_no_whole_checkpoint_left_is_refused(whole, tmp_path):
    shutil.copytree(Path(whole.output_dir) / "checkpoints/step-1", tmp_path / "c/step-1")
    (tmp_path / "c/step-1/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-1 \(state.json has 2 bytes"):
        checkpoint.newest([tmp_path / "c"], [run_of(Path(whole.output_dir))], STEPS)


STATE, RUN = {"best": None, "validated": None}, {"settings": "a", "data or models": "b"}


def save_points():
    return ["weights", "optimizer", "state", "manifest", "sync 0", "sync 3", "rename", "sync after", "delete old"]


@pytest.mark.parametrize("point", save_points())
def test_a_kill_inside_a_save_leaves_a_whole_checkpoint(tmp_path, point):
    """A forked child is killed with SIGKILL at one point of writing step 2; step 1, or step 2, is then whole."""
    learnt = checkpoint.Snapshot({"p": torch.arange(4.0)}, {})
    checkpoint.save(tmp_path, 1, learnt, STATE, RUN)
    child = os.fork()
    if child == 0:
        _die_at(point)
        checkpoint.save(tmp_path, 2, learnt, STATE, RUN)
        checkpoint.prune(tmp_path, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (found,) = checkpoint.newest([tmp_path], [RUN], 2)
    assert found.step == (2 if point in ("sync after", "delete old") else 1)
    checkpoint.save(tmp_path, 2, learnt, STATE, RUN)
    assert checkpoint.newest([tmp_path], [RUN], 2)[0].step == 2 and not list(tmp_path.glob("*.tmp-*"))


def _die_at(point: str) -> None:
    import safetensors.torch

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(function, calls):
        count = [0]

        def wrapped(*args, **kwargs):
            if count[0] == calls:
                kill()
            count[0] += 1
            return function(*args, **kwargs)

        return wrapped

    if point in ("weights", "optimizer"):
        safetensors.torch.save_file = after(safetensors.torch.save_file, point == "optimizer")
    elif point == "state":
        Path.write_text = kill
    elif point == "manifest":
        checkpoint.write_sealed = kill
    elif point.startswith("sync"):
        files.sync = after(files.sync, {"sync 0": 2, "sync 3": 5, "sync after": 7}[point])  # 0 and 1 are of the manifest alone
    elif point == "rename":
        os.rename = kill
    else:
        real = shutil.rmtree
        shutil.rmtree = lambda path, **kw: kill() if Path(path).name == "step-1" else real(path, **kw)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops(whole, make_recipe, tmp_path, monkeypatch, number):
    """A signal in the second step: that step is finished and saved; the resumed run is the uninterrupted one."""
    real, calls = Distiller.forward, [0]

    def forward(self, *args):
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), number)
        return real(self, *args)

    monkeypatch.setattr(Distiller, "forward", forward)
    recipe = make_recipe("stopped", **EDITED | {"checkpoint__every": None, "train__log_every": 5})  # nothing else falls due at that step
    with pytest.raises(Stopped, match="after step 2 of 6"):
        run(recipe)
    assert [p.name for p in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-2"]
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "stopped"), weights(Path(whole.output_dir))) == 0


def train_until_killed(call: int, words: list[str]) -> int:
    real, calls = Distiller.forward, [0]

    def forward(self, *args):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    Distiller.forward = forward
    return main(["train", *words])


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 8])
def test_kill_9_in_the_middle_of_an_accumulation(whole, world, tmp_path, call):
    (tmp_path / "k.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "killed")))
    changes = [w for k, v in EDITED.items() for w in ("--" + k.replace("__", "."), str(v))]
    done = launch(1, train_until_killed, call, ["--config", str(tmp_path / "k.yaml"), *changes])
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    from llmkd.config import loader

    recipe = loader.load_recipe(tmp_path / "k.yaml", {k.replace("__", "."): v for k, v in EDITED.items()})
    with pytest.raises(UserError, match="unfinished run"):
        run(recipe)
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "killed"), weights(Path(whole.output_dir))) == 0


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(world, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    changes = [w for k, v in EDITED.items() for w in ("--" + k.replace("__", "."), str(v))]
    assert train_on_two(["--config", str(tmp_path / "r.yaml"), *changes]).returncode == 0
    shutil.copytree(tmp_path / "out", tmp_path / "expected")
    unfinish(tmp_path / "out", 4)
    done = train_on_two(["--config", str(tmp_path / "r.yaml"), *changes, "--resume"])
    assert done.returncode == 0 and "resuming after step 4" in done.stderr, done.stderr[-2000:]
    assert distance(weights(tmp_path / "out"), weights(tmp_path / "expected")) == 0


def test_a_machine_that_does_not_see_the_runs_folder_is_named(monkeypatch):
    """It would begin at the first step, and the others at a later one."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [4, 4, 0])
    with pytest.raises(
        UserError, match="process 0 finds the checkpoint of step 4 there, and process 2 no checkpoint; give a folder that all"
    ):
        checkpoint.agreed(0, SimpleNamespace(num_processes=3))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own * 3)
    assert checkpoint.agreed(4, SimpleNamespace(num_processes=3)) == 4 and checkpoint.agreed(4, SimpleNamespace(num_processes=1)) == 4


def test_where_one_of_several_teachers_is_held_may_change_and_who_it_is_may_not(make_recipe, world):
    from llmkd.config.loader import dump
    from llmkd.output.run_folder import RunFolder

    two = [{"model": str(world / "adapter")}, {"model": str(world / "stranger")}]
    recipe = make_recipe(teacher=two)
    folder = Path(recipe.output_dir)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(recipe))
    RunFolder(make_recipe(teacher=[two[0] | {"device": "cpu"}, two[1] | {"share_base": False}]), True).check()
    with pytest.raises(UserError, match=r"^teacher\.1\.weight: 1\.0 in the run that is to be resumed and 2\.0 now"):
        RunFolder(make_recipe(teacher=[two[0], two[1] | {"weight": 2.0}]), True).check()


def test_resume_refuses_what_has_changed(make_recipe, world, tmp_path):
    with pytest.raises(UserError, match="holds a finished run"):
        run(make_recipe("a", train__max_steps=1, optim__warmup_steps=0))
        run(make_recipe("a", train__max_steps=1, optim__warmup_steps=0))
    assert run(make_recipe("a", train__max_steps=1, optim__warmup_steps=0), resume=True)["steps"] == 1
    unfinish_all = tmp_path / "a"
    (unfinish_all / "summary.json").unlink()
    with pytest.raises(UserError) as refused:
        run(make_recipe("a", train__max_steps=2, optim__warmup_steps=0, optim__lr=0.5), resume=True)
    assert {p.split(":")[0] for p in refused.value.problems} == {"optim.lr", "train.max_steps"}
    rows = tmp_path / "rows.jsonl"
    shutil.copy(world / "train.jsonl", rows)
    run(make_recipe("b", train__max_steps=1, optim__warmup_steps=0, data__train__path=str(rows)))
    (tmp_path / "b/summary.json").unlink()
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="the training data has changed"):
        run(make_recipe("b", train__max_steps=1, optim__warmup_steps=0, data__train__path=str(rows)), resume=True)


def test_a_finished_run_is_whole_and_one_of_an_earlier_version_is_told_of(trained, make_recipe, tmp_path):
    settings = {"train__max_steps": 1, "optim__warmup_steps": 0}
    trained("out", **settings)
    path = tmp_path / "out/adapter/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"output_dir: .*adapter_model.safetensors has changed since llmkd wrote it"):
        run(make_recipe("out", **settings), resume=True)
    (tmp_path / "out/summary.json").unlink()
    (tmp_path / "out/identity.json").write_text(json.dumps({"the student's base": "0" * 64}))
    with pytest.raises(UserError, match="was started by an earlier version of llmkd, which recorded samples of the models' weights"):
        run(make_recipe("out", **settings), resume=True)
