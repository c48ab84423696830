"""Multiple choice by hand: the choice with the least cross-entropy over all its tokens, and the binomial standard error."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from llmkd.models.language_model import LanguageModel
from llmkd.training.prepare import prepare
from llmkd.training.validate import Evaluator


def test_accuracy_is_that_of_the_models_own_logits(make_recipe, world, tmp_path):
    from transformers import LlamaForCausalLM

    choices = [
        ["Yes.", "No, it is so.", "Perhaps"],
        ["The owl.", "It"],
        ["Nobody knows", "robin", "garden", "night"],
        ["crow", "wren"],
        ["a", "b"],
    ]
    rows = [{"instruction": f"Say {i}", "choices": one, "answer": 0} for i, one in enumerate(choices)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(make_recipe(data__choices={"path": str(tmp_path / "q.jsonl")}))
    model, questions = LlamaForCausalLM.from_pretrained(world / "student").eval(), prepared.questions
    sums = []
    for i in range(len(questions.examples)):
        ids, mask = (torch.from_numpy(x.copy()) for x in questions.examples.example(i))
        with torch.no_grad():
            log_q = model(ids[None].long()).logits[0, :-1].log_softmax(-1)
        sums.append(-log_q[mask[1:]].gather(1, ids[1:][mask[1:]].long()[:, None]).sum().item())
    assert questions.counts == [3, 2, 4, 2, 2]
    ends = [3, 5, 9, 11, 13]
    best = [min(range(n), key=lambda j: sums[end - n + j]) for n, end in zip(questions.counts, ends, strict=True)]
    for wrong in (0, 2, 5):  # so many of the five answers are another choice than the model's
        questions.answers[:] = [(b + 1) % n if i < wrong else b for i, (b, n) in enumerate(zip(best, questions.counts, strict=True))]
        found = Evaluator(Accelerator(cpu=True), 0, 4).accuracy(LanguageModel(model, prepared.vocab), questions)
        share = 1 - wrong / 5
        assert found == {"accuracy": share, "accuracy_stderr": pytest.approx(math.sqrt(share * (1 - share) / 4)), "questions": 5}
