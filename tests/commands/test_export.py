"""What llmkd export makes of a run: plain transformers and lm-eval load it, and it says the same as the adapter."""

import json
from pathlib import Path

import pytest
import torch

from llmkd.cli import main
from llmkd.commands.export import checkpoint_folder
from llmkd.errors import UserError
from llmkd.model_folder.files import student_folder
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import said, tie

SHORT = {"train__max_steps": 2}


def assert_merged_is_adapted(out: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-12)


def test_export_loads_in_plain_transformers_and_says_the_same(make_recipe, world, tmp_path, capsys):
    from transformers import AutoTokenizer

    run(make_recipe(**SHORT))
    assert main(["export", str(tmp_path / "out")]) == 0
    assert_merged_is_adapted(tmp_path / "out", world / "student")
    for folder in ("merged", "adapter"):
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / folder).chat_template
        assert (tmp_path / "out" / folder / "generation_config.json").exists()
    capsys.readouterr()
    modules = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules) and len(modules) == 14  # PEFT's own order is another one in every process
    again = "merged exists, and all of its files are as an export wrote them: use it, choose another folder, or remove it"
    assert main(["export", str(tmp_path / "out")]) == 2 and again in said(capsys)
    (tmp_path / "out/merged/config.json").write_text("{}")
    assert main(["export", str(tmp_path / "out")]) == 2 and "merged exists; choose another folder, or remove it" in said(capsys)


def test_lm_eval_takes_adapter_and_merged_folder(make_recipe, world, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from llmkd_eval.harness.evaluate import without_asides
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    run(make_recipe(**SHORT))
    assert main(["export", str(tmp_path / "out")]) == 0
    rows = [{"q": f"Say {i}.", "choices": ["It is so.", "No!", "Perhaps the owl."], "gold": i % 3} for i in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.yaml").write_text(
        json.dumps(
            {
                "task": "own",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    scores = []
    for arguments in (
        {"pretrained": str(world / "student"), "peft": str(tmp_path / "out/adapter")},
        {"pretrained": str(tmp_path / "out/merged")},
    ):
        model = HFLM(**arguments, device="cpu", dtype="float64", batch_size=4)
        tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        with without_asides():
            results = lm_eval.simple_evaluate(model, tasks=["own"], task_manager=tasks, log_samples=True, bootstrap_iters=0)
        scores.append([float(choice[0][0]) for sample in results["samples"]["own"] for choice in sample["resps"]])
    assert len(scores[0]) == 36 and scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_an_adapter_on_a_tied_head_merges_into_the_head_alone(world, trained, tmp_path):
    tie(world, tmp_path / "tied")
    trained("out", student__model=str(tmp_path / "tied"), student__lora__target_modules=("q_proj", "lm_head"), **SHORT)
    assert main(["export", str(tmp_path / "out")]) == 0
    assert_merged_is_adapted(tmp_path / "out", tmp_path / "tied")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_export_of_the_best_checkpoint(world, trained, make_recipe, tmp_path, method, capsys):
    from transformers import AutoModelForCausalLM

    held = {
        "data__validation__path": str(world / "held.jsonl"),
        "validation__every": 1,
        "checkpoint__best_by": "ce",
        "student__method": method,
    }
    trained("out", train__max_steps=4, optim__lr=0.3, **held)
    best = json.loads((tmp_path / "out/summary.json").read_text())["best"]
    assert main(["export", str(tmp_path / "out"), "--checkpoint", "best"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged-best").eval()
    data = prepare(make_recipe(data__validation__path=str(world / "held.jsonl"))).validation
    total = 0.0
    for i in range(len(data)):
        ids, marks = (torch.from_numpy(x.copy()) for x in data.example(i))
        with torch.no_grad():
            log_q = model(ids[None].long()).logits[0, :-1].log_softmax(-1)
        total -= log_q[marks[1:]].gather(1, ids[1:][marks[1:]].long()[:, None]).sum().item()
    assert total / int(data.loss_mask.sum()) == pytest.approx(best["value"], rel=1e-9)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), "--checkpoint", "99"]) == 2 and "has no checkpoint 99" in said(capsys)
    for step in (100, 20):
        (tmp_path / f"out/checkpoints/step-{step}").mkdir()
    assert main(["export", str(tmp_path / "out"), "--checkpoint", "99"]) == 2 and "20, 100\n" in said(capsys)


def test_a_folder_of_several_runs_is_refused_with_one_of_them(tmp_path):
    for name in ("arms/b", "arms/a"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path}: holds 2 runs and is none itself; name one of them, such as {tmp_path}/arms/a"):
        student_folder(tmp_path)
    (tmp_path / "kd_student/model").mkdir(parents=True)
    with pytest.raises(UserError, match=f"holds 1 run and is none itself; name it: {tmp_path}/kd_student"):
        student_folder(tmp_path)


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    folder = tmp_path / "checkpoints/step-7"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="identity.json: cannot be read .*restore it"):
        checkpoint_folder(tmp_path, "7")
    (tmp_path / "identity.json").write_text('{"the training data": ""}')
    with pytest.raises(UserError, match=r"^--checkpoint: .*step-7 cannot be used \(manifest.json: no such file"):
        checkpoint_folder(tmp_path, "7")
