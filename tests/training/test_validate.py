"""Held-out metrics and multiple choice by hand: sums over all tokens, and the binomial standard error."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llmkd.models.language_model import LanguageModel
from llmkd.teachers.live import LiveTeacher
from llmkd.training import validate
from llmkd.training.prepare import prepare
from llmkd.training.validate import Evaluator


def test_accuracy_is_that_of_the_models_own_logits(make_recipe, world, tmp_path):
    from transformers import LlamaForCausalLM

    choices = [
        ["Yes.", "No, it is so.", "Perhaps"],
        ["The owl.", "It"],
        ["Nobody knows", "robin", "garden", "night"],
        ["crow", "wren"],
        ["a", "The answer is that nobody knows what a robin does"],
    ]
    rows = [{"instruction": f"Say {i}", "choices": one, "answer": 0} for i, one in enumerate(choices)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(make_recipe(data__choices={"path": str(tmp_path / "q.jsonl")}))
    model, questions = LlamaForCausalLM.from_pretrained(world / "student").eval(), prepared.questions
    sums, sizes = [], []
    for i in range(len(questions.examples)):
        ids, mask = (torch.from_numpy(x.copy()) for x in questions.examples.example(i))
        with torch.no_grad():
            log_q = model(ids[None].long()).logits[0, :-1].log_softmax(-1)
        sizes.append(int(mask.sum()))
        sums.append(-log_q[mask[1:]].gather(1, ids[1:][mask[1:]].long()[:, None]).sum().item())
    assert questions.counts == [3, 2, 4, 2, 2]
    ends = [3, 5, 9, 11, 13]
    best = [min(range(n), key=lambda j: sums[end - n + j]) for n, end in zip(questions.counts, ends, strict=True)]
    means = [x / n for x, n in zip(sums, sizes, strict=True)]
    assert best != [min(range(n), key=lambda j: means[end - n + j]) for n, end in zip(questions.counts, ends, strict=True)]
    for wrong in (0, 2, 5):  # so many of the five answers are another choice than the model's
        questions.answers[:] = [(b + 1) % n if i < wrong else b for i, (b, n) in enumerate(zip(best, questions.counts, strict=True))]
        found = Evaluator(Accelerator(cpu=True), 4).accuracy(LanguageModel(model, prepared.vocab), questions)
        share = 1 - wrong / 5
        assert found == {"accuracy": share, "accuracy_stderr": pytest.approx(math.sqrt(share * (1 - share) / 4)), "questions": 5}


def test_held_out_metrics_are_sums_over_chunks_and_ranks(make_recipe, world, monkeypatch):
    """Beside a loop over examples and targets in numpy; the second rank adds what the first one has measured."""
    from transformers import LlamaForCausalLM

    models = [LlamaForCausalLM.from_pretrained(world / name).eval() for name in ("student", "teacher")]
    prepared = prepare(make_recipe(data__validation={"path": str(world / "held.jsonl")}, teacher__model=str(world / "teacher")))
    data = prepared.validation
    expected: dict[str, list[float]] = {name: [] for name in ("ce", "forward_kl", "reverse_kl", "top1_agreement", "teacher_ce")}
    for i in range(len(data)):
        ids, mask = data.example(i)
        with torch.no_grad():
            logits = [model(torch.from_numpy(ids.copy())[None].long()).logits[0, :-1].numpy()[mask[1:]] for model in models]
        log_q, log_p = (x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) for x in logits)
        labels = ids[1:][mask[1:]]
        at = np.arange(len(labels))
        expected["ce"].append(-log_q[at, labels].sum())
        expected["teacher_ce"].append(-log_p[at, labels].sum())
        expected["forward_kl"].append((np.exp(log_p) * (log_p - log_q)).sum())
        expected["reverse_kl"].append((np.exp(log_q) * (log_q - log_p)).sum())
        expected["top1_agreement"].append((log_q.argmax(1) == log_p.argmax(1)).sum())
    monkeypatch.setattr(validate, "default_chunk", lambda vocab, device: 4 * 5)  # five rows at a time
    student, teacher = (LanguageModel(model, prepared.vocab) for model in models)
    measured: list[torch.Tensor] = []

    def reduce(sums, how):
        assert how == "sum"
        measured.append(sums.clone())
        return sum(measured)

    for rank in (0, 1):
        here = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"), reduce=reduce)
        (found,) = Evaluator(here, 2).validate([student], LiveTeacher(teacher), data)
    for name, values in expected.items():
        np.testing.assert_allclose(found.sums[name], values, rtol=1e-10, atol=1e-10, err_msg=name)
    assert found.metrics()["forward_kl"] == pytest.approx(sum(expected["forward_kl"]) / found.targets.sum(), rel=1e-10)


def test_every_student_is_measured_in_eval_mode_and_left_as_it_was(make_recipe, world):
    prepared = prepare(make_recipe(data__validation={"path": str(world / "held.jsonl")}))
    modes: list[bool] = []

    class Student(torch.nn.Module):
        head = SimpleNamespace(vocab=prepared.vocab, logits=lambda hidden: hidden)

        def hidden(self, view):
            modes.append(self.training)
            return torch.zeros(len(view.rows_N), prepared.vocab)

    students = [Student(), Student(), Student().eval()]
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    Evaluator(alone, 4).validate(students, None, prepared.validation)
    assert modes and not any(modes) and [student.training for student in students] == [True, True, False]
