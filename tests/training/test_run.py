"""Whole runs of the small world: what must be the same before and after, and what is left behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd.cli import main
from llmkd.config import loader
from llmkd.config.recipe import Teacher
from llmkd.data.collate import collate
from llmkd.errors import Stopped, UserError
from llmkd.files import read_jsonl, read_sealed
from llmkd.models import load
from llmkd.models.load import LoadContext, load_teacher
from llmkd.teachers.live import LiveTeacher
from llmkd.training import build, loop
from llmkd.training.distiller import Distiller
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, said, tie, write_rows

SHORT = {"train__max_steps": 2}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_the_students_own_parameters_train(make_recipe, world, monkeypatch, method):
    built = []
    real = load.load_students
    monkeypatch.setattr(load, "load_students", lambda *a: built.extend(real(*a)) or built)
    teachers = []
    real_teacher = load.load_teacher
    monkeypatch.setattr(load, "load_teacher", lambda *a: teachers.append(real_teacher(*a)) or teachers[0])
    run(make_recipe(student__method=method, **SHORT))
    assert all(("lora_" in name) == p.requires_grad or method == "full" for name, p in built[0].model.named_parameters())
    before = load_file(world / "student/model.safetensors")
    after = {k.replace("base_layer.", ""): v for k, v in built[0].base_model.state_dict().items() if "lora_" not in k}
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before) == (method == "lora")
    assert built[0].training and not any(m.training for m in teachers[0].modules())
    assert all(p.grad is None for p in teachers[0].parameters())
    adapter = load_file(world / "adapter/adapter_model.safetensors")
    now = {k.replace(".default", ""): v for k, v in teachers[0].model.state_dict().items() if "lora_" in k}
    assert all(torch.equal(adapter[k], now[k]) for k in adapter)


def test_each_target_is_trained_exactly_once_an_epoch(make_recipe, monkeypatch):
    seen = Counter()
    real = Distiller.forward

    def forward(self, batch, signal):
        seen.update(batch.example_N.tolist())
        return real(self, batch, signal)

    monkeypatch.setattr(Distiller, "forward", forward)
    recipe = make_recipe(train__epochs=2, train__micro_batch_size=3)
    run(recipe)
    train = prepare(recipe).train
    assert seen == {i: 2 * int(train.example(i)[1].sum()) for i in range(len(train))}


@pytest.mark.parametrize(
    ("error", "step", "line"),
    [
        (RuntimeError("a bug"), 1, "llmkd: no checkpoint was written yet; --resume begins at step 1"),
        (RuntimeError("a bug"), 3, "llmkd: --resume goes on after step 2"),
        (MemoryError("2 GB"), 3, "free some memory, then continue with --resume (after step 2)"),
    ],
)
def test_an_error_in_the_middle_says_what_is_saved(command, monkeypatch, tmp_path, error, step, line):
    """Memory that runs out, or a bug: nothing more is written, and the line is true."""
    real, count = loop.optimizer_step, []

    def step_of(*given):
        count.append(1)
        if len(count) == step:
            raise error
        return real(*given)

    monkeypatch.setattr(loop, "optimizer_step", step_of)
    short = ["--train.max_steps", "4", "--checkpoint.every", "2", "--validation.teacher_check", "0"]
    code, lines = command(*short)
    assert code == 1 and lines[-1].endswith(line) and len(lines) == 2 - isinstance(error, MemoryError), lines
    assert [one.name for one in sorted((tmp_path / "out/checkpoints").glob("*"))] == (["step-2"] if step == 3 else [])


def test_without_a_teacher_it_is_supervised_fine_tuning(trained, make_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "load_teacher", lambda *a: pytest.fail("a teacher was loaded"))
    with_ratio_0 = trained("zero", loss__kd_ratio=0.0, **SHORT)
    assert distance(trained("none", teacher=None, **SHORT), with_ratio_0) == 0
    assert all("kd" not in r for r in read_jsonl(tmp_path / "zero/metrics.jsonl"))


def test_both_terms_are_logged_and_mixed(trained, tmp_path):
    trained("log", loss__kd_ratio=0.25, loss__temperature=2.0, **SHORT)
    for r in (r for r in read_jsonl(tmp_path / "log/metrics.jsonl") if "teacher_check" not in r):
        assert r["loss"] == pytest.approx(0.75 * r["ce"] + 0.25 * r["kd"], rel=1e-12)
        assert {"step", "epoch", "lr", "grad_norm", "targets", "targets_per_s", "peak_memory"} <= r.keys()


def test_temperature_and_divergence_reach_the_trainer(trained):
    runs = [
        trained(str(i), **SHORT, **c)
        for i, c in enumerate(
            (
                {},
                {"loss__temperature": 2.0},
                {"loss__divergence": "reverse_kl"},
                {"loss__divergence": "generalized_jsd"},
                {"loss__divergence": "generalized_jsd", "loss__divergence_options": {"beta": 0.9}},
            )
        )
    ]
    assert all(distance(a, b) > 1e-7 for i, a in enumerate(runs) for b in runs[:i])


def test_an_unmerged_adapter_is_a_teacher_like_any_other(world, make_recipe):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    teacher = load_teacher(Teacher(model=str(world / "adapter")), LoadContext(640, "cpu"))
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "teacher"), world / "adapter").eval()
    batch = collate(prepare(make_recipe()).train, [0, 3, 5], pad=1)
    with torch.no_grad():
        expected = reference(**batch.teacher.inputs).logits.flatten(0, 1)[batch.teacher.rows_N].log_softmax(-1)
    first, second = (LiveTeacher(teacher)(batch).log_probs(slice(None)) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def test_padded_vocabularies_are_cut_and_the_student_keeps_its_shape(world, make_recipe, trained, tmp_path):
    expected = trained("plain", student__method="full", **SHORT)
    for name, extra in (("student", 60), ("teacher", 24)):
        shutil.copytree(world / name, tmp_path / name)
        tensors = load_file(world / name / "model.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.cat([tensors[key], torch.randn(extra, tensors[key].shape[1], dtype=torch.float64)])
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"vocab_size": 640 + extra}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    got = trained(
        "padded", student__method="full", student__model=str(tmp_path / "student"), teacher__base=str(tmp_path / "teacher"), **SHORT
    )
    assert got["lm_head.weight"].shape[0] == 700
    cut = {k: v[:640] if k in ("lm_head.weight", "model.embed_tokens.weight") else v for k, v in got.items()}
    assert distance(cut, expected) < 1e-12


def test_what_a_run_leaves_behind(make_recipe, world, tmp_path):
    recipe = make_recipe(data__validation__path=str(world / "held.jsonl"), **SHORT)
    summary = run(recipe)
    out = tmp_path / "out"
    assert loader.load_recipe(out / "recipe.yaml") == recipe
    assert {"adapter", "metrics.jsonl", "loss.png", "recipe.yaml", "summary.json"} <= {p.name for p in out.iterdir()}
    assert not list(out.rglob("*.tmp-*")) and not (out / ".lock").read_text()
    assert read_sealed(out / "summary.json") == summary
    assert {
        "ce",
        "perplexity",
        "entropy",
        "forward_kl",
        "reverse_kl",
        "top1_agreement",
        "teacher_ce",
        "teacher_entropy",
        "targets",
    } == summary["validation"].keys()
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md", "adapter_model.safetensors"} <= {
        p.name for p in (out / "adapter").iterdir()
    }
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pt"))


def test_validation_metrics_from_the_models_own_logits(make_recipe, world, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = make_recipe(data__validation__path=str(world / "held.jsonl"), validation__micro_batch_size=2, **SHORT)
    metrics = run(recipe)["validation"]
    held = prepare(recipe).validation
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "student"), tmp_path / "out/adapter").eval()
    teacher = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "teacher"), world / "adapter").eval()
    q, p, y = [], [], []
    for i in range(len(held)):
        ids, marks = (torch.from_numpy(x.copy()) for x in held.example(i))
        with torch.no_grad():
            lq, lp = (m(ids[None].long()).logits[0, :-1].log_softmax(-1) for m in (student, teacher))
        q.append(lq[marks[1:]]), p.append(lp[marks[1:]]), y.append(ids[1:][marks[1:]].long())
    q, p, y = torch.cat(q), torch.cat(p), torch.cat(y)[:, None]
    expected = {
        "ce": -q.gather(1, y).mean(),
        "teacher_ce": -p.gather(1, y).mean(),
        "forward_kl": (p.exp() * (p - q)).sum(-1).mean(),
        "reverse_kl": (q.exp() * (q - p)).sum(-1).mean(),
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).double().mean(),
        "entropy": -(q.exp() * q).sum(-1).mean(),
        "teacher_entropy": -(p.exp() * p).sum(-1).mean(),
    }
    assert {k: metrics[k] for k in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-10)
    assert metrics["targets"] == len(y) and metrics["perplexity"] == pytest.approx(math.exp(metrics["ce"]), rel=1e-12)


@pytest.fixture(scope="module")
def first_step(world, tmp_path_factory) -> dict:
    """The metrics of the first step of a run on all rows at once."""
    root = tmp_path_factory.mktemp("exact")
    (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / "out")))
    run(loader.load_recipe(root / "r.yaml", {"train.batch_size": 37, "train.max_steps": 2}))
    return read_jsonl(root / "out/metrics.jsonl")[1]  # behind the teacher check's


@pytest.mark.parametrize(
    "changes",
    [
        {"student__dtype": "float32", "teacher__dtype": "float32", "student__mixed_precision": "bf16"},
        {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"},
        {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16", "student__method": "full"},
        {"student__gradient_checkpointing": True, "train__group_by_length": 4},
        {"student__lora__dora": True, "student__lora__rslora": True, "student__lora__target_modules": ("q_proj", "lm_head")},
    ],
)
def test_the_settings_that_change_how_it_is_computed_work_and_stay_near(first_step, trained, tmp_path, changes):
    """Not the same numbers, but the same first loss, to the rounding of bfloat16."""
    got = trained("other", train__batch_size=37, **SHORT, **changes)
    assert all(torch.isfinite(t).all() for t in got.values())
    found = read_jsonl(tmp_path / "other/metrics.jsonl")[1]
    assert [found[k] for k in ("ce", "kd", "targets")] == pytest.approx([first_step[k] for k in ("ce", "kd", "targets")], rel=2e-2)


@pytest.mark.slow
def test_float16_keeps_the_gradients_of_a_large_step(world, trained, tmp_path):
    """Divided by 19,229 targets before the backward pass, many would be too small for it (then 0.014 of a gradient is lost)."""
    write_rows(tmp_path / "many.jsonl", 600)
    changes = {"data.train.path": str(tmp_path / "many.jsonl"), "train.batch_size": 600, "train.micro_batch_size": 50, "train.max_steps": 1}
    changes |= {"optim.eps": 1.0, "optim.lr": 1.0, "optim.max_grad_norm": None, "optim.warmup_steps": 0}  # a step along the gradient
    single, half = (trained(dtype, **changes, **{"student.dtype": dtype}) for dtype in ("float32", "float16"))
    assert max(((half[n] - w).norm() / w.norm()).item() for n, w in single.items() if "lora_B" in n) < 7e-3


def test_a_tied_head_trains_in_full(world, trained, tmp_path):
    tensors = tie(world, tmp_path / "tied")
    runs = [
        trained(str(n), student__model=str(tmp_path / "tied"), student__method="full", train__micro_batch_size=n, **SHORT) for n in (8, 3)
    ]
    assert "lm_head.weight" not in runs[0] and distance(*runs) < 1e-12
    assert not torch.equal(runs[0]["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def head_adapter(base: Path, to: Path, *targets: str) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets), init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(to)
    return str(to)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("embed_tokens", "up_proj")])
def test_a_teachers_adapter_on_head_or_embedding_counts(world, make_recipe, tmp_path, targets):
    """PEFT saves the base's own tensor beside such an adapter; it is no left-over, and the adapter is not ignored."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    path = head_adapter(world / "teacher", tmp_path / "adapter", *targets)
    teacher = load_teacher(Teacher(model=path), LoadContext(640, "cpu"))
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "teacher"), path).eval()
    batch = collate(prepare(make_recipe()).train, [0, 3], pad=1)
    with torch.no_grad():
        expected = reference(**batch.teacher.inputs).logits.flatten(0, 1)[batch.teacher.rows_N].log_softmax(-1)
    torch.testing.assert_close(LiveTeacher(teacher)(batch).log_probs(slice(None)), expected, rtol=0, atol=1e-12)


def test_a_launch_that_starts_fewer_processes_is_refused(command, monkeypatch):
    """What accelerate launch --cpu --num_processes 2 leaves in the environment of its one process."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code, lines = command()
    assert code == 2 and "--multi_gpu" in lines[0]


def test_a_launch_with_port_0_is_refused_instead_of_waiting(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    code, lines = command()
    assert code == 2 and "--standalone" in lines[0]


def test_a_kill_while_the_folder_was_claimed_can_be_resumed(make_recipe, tmp_path):
    recipe = make_recipe(**SHORT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.yaml.tmp-123-0123abcd").write_text("seed")
    run(recipe)
    for name in ("identity.json", "summary.json"):
        (tmp_path / "out" / name).unlink()
    assert run(recipe, resume=True)["steps"] == 2


def test_a_folder_of_the_users_own_is_never_touched(command, tmp_path):
    (tmp_path / "out/adapter").mkdir(parents=True)
    (tmp_path / "out/adapter/precious.txt").write_text("mine")
    code, lines = command()
    assert code == 2 and "holds no run" in lines[0]
    assert command("--resume")[0] == 2 and (tmp_path / "out/adapter/precious.txt").read_text() == "mine"


def test_pieces_of_a_held_out_text_are_not_trained_on(make_recipe, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(10)))
    source = {"path": str(tmp_path / "t.jsonl"), "format": "text"}
    prepared = prepare(make_recipe(data__train=source, data__too_long="split", data__max_length=16, data__validation_fraction=0.2))
    assert set(prepared.validation.row) and not set(prepared.validation.row) & set(prepared.train.row)
    assert len(set(prepared.validation.row)) == 2 and len(prepared.validation) > 2


def test_the_teacher_check_warns(make_recipe, world, capsys):
    run(make_recipe(data__validation__path=str(world / "held.jsonl"), **SHORT))
    assert "tune the teacher on the data first" in said(capsys)


def test_two_runs_do_not_share_a_folder(command, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.lock", "w") as held:
        held.write("process 1 on elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        code, lines = command()
    assert code == 2 and "in use by process 1 on elsewhere" in lines[0]


@pytest.mark.slow
def test_a_pipeline_compares_its_students(world, tmp_path, capsys):
    recipe = plain_recipe(world, tmp_path / "unused")
    recipe["data"]["validation"] = [{"path": str(world / "held.jsonl")}, {"path": "builtin:skills", "format": "chat", "limit": 3}]
    rows = [{"instruction": f"Say {i}", "choices": ["Yes.", "No!", "It is so."], "answer": i % 3} for i in range(10)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe["data"]["choices"] = {"path": str(tmp_path / "choices.jsonl")}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    pipeline = {
        "output_dir": str(tmp_path / "pipeline"),
        "teacher": "teacher",
        "students": ["sft", "kd"],
        "stages": {
            "teacher": {"recipe": "r.yaml", "set": {"teacher": None, "student.model": str(world / "teacher")}},
            "sft": {"recipe": "r.yaml", "set": {"teacher": None}},
            "kd": {"recipe": "r.yaml", "set": {"teacher.model": "{output_dir}/teacher/adapter"}},
        },
    }
    (tmp_path / "pipeline.yaml").write_text(json.dumps(pipeline))
    assert main(["train", "--config", str(tmp_path / "pipeline.yaml"), "--train.epochs", "2"]) == 0, said(capsys)
    results = json.loads((tmp_path / "pipeline/summary.json").read_text())
    assert list(results) == ["teacher", "sft", "kd"]
    assert all(set(f) == {"ce", "kl_to_teacher", "top1_agreement", "accuracy", "accuracy_stderr"} for f in results.values())
    assert results["teacher"]["kl_to_teacher"] == 0 and results["teacher"]["top1_agreement"] == 1
    own = json.loads((tmp_path / "pipeline/kd/summary.json").read_text())["validation"]
    assert results["kd"]["kl_to_teacher"] == pytest.approx(own["forward_kl"], rel=1e-9) and results["kd"]["accuracy"] == own["accuracy"]
    assert main(["train", "--config", str(tmp_path / "pipeline.yaml")]) == 2
    assert main(["train", "--config", str(tmp_path / "pipeline.yaml"), "--train.epochs", "2", "--resume"]) == 0


@pytest.mark.slow
def test_a_real_signal_to_the_command(world, tmp_path):
    """The process itself: SIGTERM gives 75 and a checkpoint, the same command with --resume ends with 0."""
    write_rows(tmp_path / "rows.jsonl", 200)
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    command = [
        sys.executable,
        "-m",
        "llmkd.train",
        "--config",
        str(tmp_path / "r.yaml"),
        "--data.train.path",
        str(tmp_path / "rows.jsonl"),
        "--train.epochs",
        "40",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 75 and "continue with --resume" in rest and "Traceback" not in rest
    assert list((tmp_path / "out/checkpoints").glob("step-*"))


def test_positions_that_depend_on_the_longest_example_are_told_of(capsys):
    from llmkd.config.recipe import Data
    from llmkd.data.dataset import refuse_too_few_positions

    one = {"max_position_embeddings": 4096, "original_max_position_embeddings": 64, "rope_parameters": {"rope_type": "longrope"}}
    refuse_too_few_positions(Data(max_length=64), {"student.model": one})
    assert not said(capsys)
    refuse_too_few_positions(Data(max_length=65), {"student.model": one})
    assert "note: student.model: its rotary embeddings (longrope) change" in said(capsys)


def test_a_signal_that_ends_a_compiler_is_a_stop(make_recipe, monkeypatch):
    from llmkd.training.shutdown import ShutdownRequest

    stop = ShutdownRequest()

    def load(*args):
        stop.asked = True
        raise UserError("train.compile: C++ compile error")

    monkeypatch.setattr(build, "load", load)
    with pytest.raises(Stopped, match="before the first step"):
        run(make_recipe(), stop=stop)
    with pytest.raises(UserError, match="compile error"):
        monkeypatch.setattr(build, "load", lambda *args: (_ for _ in ()).throw(UserError("train.compile: C++ compile error")))
        run(make_recipe())
