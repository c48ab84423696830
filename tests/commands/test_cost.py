"""What a run is expected to cost."""

import dataclasses
import math

import pytest

from llmkd.commands import cost
from llmkd.config.recipe import Lora
from llmkd.model_folder.files import find
from llmkd.model_folder.weights import headers
from llmkd.models.size import ModelSize, adapter_parameters, model_size


def test_a_small_model_costs_what_its_layers_take_to_be_called(make_recipe, monkeypatch):
    """Two layers each: the teacher's forward pass, and three passes of every student, for each of 37 / 4 micro-batches an epoch."""
    monkeypatch.setattr(cost, "matmul_flops", lambda device: 1e30)
    one, plain = make_recipe(train__epochs=3), make_recipe("plain", loss__kd_ratio=0.0, train__epochs=3)
    for recipes, passes in (([one], 1 + 3), ([one, plain], 1 + 2 * 3), ([plain], 3)):
        assert cost.estimate(recipes, {}).seconds == pytest.approx(3 * 37 / 4 * 2 * passes * cost.PER_LAYER)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_student_of_fewer_layers_costs_what_those_cost(make_recipe, world, monkeypatch, method):
    """However they are chosen: by number or evenly, where the smaller model is there, or by a measurement that is still to be made."""
    monkeypatch.setattr(cost, "matmul_flops", lambda device: 1e9)
    sizes, files = {}, find(str(world / "student"), "student.model")
    whole, layers = model_size(files), {"student__method": method, "train__epochs": 1}
    costs = [
        cost.estimate([make_recipe(**layers, **{f"student__{name}": value for name, value in how.items()})], sizes)
        for how in ({}, {"layers": [1]}, {"layers": {"count": 1}}, {"layers": {"count": 1, "by": "block_influence"}})
    ]
    assert costs[1] == costs[2] == costs[3] and costs[1].seconds < costs[0].seconds and costs[1].bytes < costs[0].bytes
    in_layers = sum(math.prod(t["shape"]) for name, t in headers(files.base, "x").items() if ".layers." in name)
    assert model_size(files, 1) == ModelSize(whole.body - in_layers // 2, whole.vocab, whole.hidden, 1)
    assert 2 * adapter_parameters(files, Lora(rank=3), 1) == adapter_parameters(files, Lora(rank=3))


def test_sizes_are_those_of_the_loaded_model_and_of_pefts_adapter(world):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    files, model = find(str(world / "student"), "student.model"), LlamaForCausalLM.from_pretrained(world / "student")
    body = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("model.embed_tokens", "lm_head")))
    assert model_size(files) == ModelSize(body, *model.lm_head.weight.shape, 2)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert adapter_parameters(files, Lora(rank=3)) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_micro_batches_are_counted_as_they_are_made(make_recipe):
    train = make_recipe(train__batch_size=8, train__micro_batch_size=4).train
    assert cost.micro_batches(100, 5000, train) == 25
    for tokens, expected in ((500, 12.5), (200, 25), ("auto", 12.5)):
        by_tokens = dataclasses.replace(train, micro_batch_size=None, micro_batch_tokens=tokens)
        assert cost.micro_batches(100, 5000, by_tokens) == expected
