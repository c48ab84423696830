"""Runs with a context for the teacher alone: their loss is that of two inputs built by hand, however batches are cut."""

import json

import pytest
import torch

from llmkd import cli
from llmkd.commands import cost
from llmkd.data.encoding.formats import ALPACA
from llmkd.model_folder.files import find
from llmkd.models.size import model_size
from llmkd.training.run import run
from tests.conftest import distance
from tests.kit.data import skills_tokenizer
from tests.kit.sources import write

TOLD = "Think of the owl, who flies at night."


def by_hand(world, rows, told) -> dict[str, float]:
    """Means over the answers' tokens, computed from two separately built inputs of each row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = skills_tokenizer()
    student = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    teacher = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "teacher"), world / "adapter").eval()
    ce = kl = teacher_ce = count = 0
    for row in rows:
        asked = ALPACA.format(instruction=row["instruction"])
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        log_probs = []
        for model, prompt in ((student, asked), (teacher, f"{told}\n\n{asked}")):
            ids = torch.tensor([[*tokenizer(prompt)["input_ids"], *answer]])
            with torch.no_grad():
                log_probs.append(model(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1))
        log_q, log_p = log_probs
        y = torch.tensor(answer)[:, None]
        ce, teacher_ce = ce - float(log_q.gather(1, y).sum()), teacher_ce - float(log_p.gather(1, y).sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(answer)
    return {"ce": ce / count, "forward_kl": kl / count, "teacher_ce": teacher_ce / count, "targets": count}


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_a_run_is_that_of_two_inputs_built_by_hand(make_recipe, world, tmp_path, packing):
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:8]]
    write(tmp_path / "t.jsonl", rows)
    data = {"path": str(tmp_path / "t.jsonl")}
    recipe = make_recipe(
        data__train=data,
        data__validation=data,
        data__teacher_context=TOLD,
        data__packing=packing,
        loss__kd_ratio=0.5,
        optim__warmup_steps=0,
    )
    run(recipe)
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    expected = by_hand(world, rows, TOLD)
    (step,) = (record for record in records if "loss" in record)
    assert (step["ce"], step["kd"]) == pytest.approx((expected["ce"], expected["forward_kl"]), rel=1e-9)
    assert step["loss"] == pytest.approx(0.5 * expected["ce"] + 0.5 * expected["forward_kl"], rel=1e-9)
    before = next(record["validation"] for record in records if "validation" in record)
    assert {name: before[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert expected["forward_kl"] != pytest.approx(by_hand(world, rows, "Else.")["forward_kl"], rel=1e-3)


def test_padded_packed_and_accumulated_runs_end_alike(trained, world, tmp_path):
    lines = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    write(tmp_path / "t.jsonl", [line | {"teacher_context": "It is so. " * (n % 3)} for n, line in enumerate(lines)])
    told = {"data__train__path": str(tmp_path / "t.jsonl"), "loss__kd_ratio": 0.7, "train__max_steps": 4}
    padded = trained("padded", **told)
    for name, changes in {
        "packed": {"data__packing": True},
        "accumulated": {"train__micro_batch_size": 1},
    }.items():
        apart = distance(padded, trained(name, **told, **changes))
        assert apart < 1e-12, name
    assert distance(padded, trained("untold", **told | {"data__train__path": str(world / "train.jsonl")})) > 1e-6


def test_the_batches_of_a_stream_may_be_cut_in_any_way(trained):
    told = {"data__teacher_context": TOLD, "data__streaming": True, "data__shuffle_buffer": 5, "loss__kd_ratio": 0.7, "train__max_steps": 4}
    whole = trained("whole", **told)
    assert distance(whole, trained("batches", **told, train__micro_batch_size=2, data__packing=True)) < 1e-12
    assert distance(whole, trained("other", **told | {"data__teacher_context": "Else."})) > 1e-6


def test_the_cost_counts_what_the_teacher_reads(make_recipe, world, monkeypatch):
    monkeypatch.setattr(cost, "matmul_flops", lambda device: 1.0)
    recipes = make_recipe(), make_recipe(data__teacher_context=TOLD)
    plain, told = (cost.estimate([recipe], {}).seconds for recipe in recipes)
    more = 37 * len(skills_tokenizer()(TOLD + "\n\n")["input_ids"])
    body = model_size(find(str(world / "teacher"), "teacher.model")).body
    assert told - plain == pytest.approx(2 * body * more * recipes[0].train.epochs / cost.EFFICIENCY)


def test_the_data_command_shows_what_the_teacher_reads(world, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    rows = [{"instruction": "q", "output": "It is so."}, {"instruction": "r", "output": "No.", "teacher_context": "Say no."}]
    write(tmp_path / "t.jsonl", rows)
    recipe = {
        "output_dir": "o",
        "student": {"model": str(world / "student")},
        "data": {"train": {"path": str(tmp_path / "t.jsonl")}, "max_length": 256},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert cli.main(["data", "--config", str(tmp_path / "r.yaml")]) == 0
    plain, told = capsys.readouterr().out.split("\nexample ")[1:]
    assert "teacher's input" not in plain
    own, read = told.split("teacher's input  ")
    assert read.split("\n", 1)[1].strip() == "Say no.\n\n" + own.split("\n", 1)[1].strip() and "⟦No.<|end|>⟧" in read
