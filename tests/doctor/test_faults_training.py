"""Faults planted in a step, in what trains, and in padding, packing and ranks: each is caught by the check that is for it."""

import dataclasses
import time

import pytest
import torch

from llmkd.batch import View
from llmkd.data import collate
from llmkd.doctor import training, two_processes
from llmkd.losses.terms import HeadTerm
from llmkd.models.language_model import LanguageModel
from llmkd.training import loop

TRAINS, SPLITS, PADDING, PACKING, RANKS = "exactly what is meant", "two splits", "padding leaves", "packing leaves", "ranks agree"


@pytest.fixture
def changed(monkeypatch):
    """Replace a function by one that gets the original first."""

    def go(owner, name: str, other) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: other(original, *args, **more))

    return go


def test_a_mean_over_the_micro_batch(setup, caught, changed):
    def mean(whole, self, student, signal, batch):
        found = whole(self, student, signal, batch)
        return dataclasses.replace(found, total=found.total / batch.num_targets)

    changed(HeadTerm, "forward", mean)
    caught(setup, SPLITS)


def test_gradients_that_the_environment_divides(setup, caught, monkeypatch):
    """As with gradient_accumulation_steps: 4 in Accelerate's config file: the two splits agree, and both are a quarter."""
    monkeypatch.setattr(setup.accelerator, "gradient_accumulation_steps", 4)
    assert "autograd's of the mean over targets of a plain loss by 7.5e-01" in caught(setup, SPLITS)


def test_the_last_micro_batch_is_forgotten(setup, caught, changed):
    changed(training, "accumulate_gradients", lambda whole, *args: whole(*args[:-1], args[-1][: max(1, len(args[-1]) - 1)]))
    caught(setup, SPLITS)


def test_padding_that_is_seen(setup, caught, changed):
    def longer(whole, self, view, *taps):
        found = whole(self, view, *taps)
        return dataclasses.replace(found, hidden_NH=found.hidden_NH * (1 + 0.01 * view.inputs["input_ids"].shape[1]))

    changed(LanguageModel, "outputs", longer)
    caught(setup, PADDING)


def test_positions_that_go_on_in_a_packed_row(setup, caught, changed):
    def going_on(whole, *args):
        view = whole(*args)
        inputs = view.inputs | {"position_ids": torch.arange(view.inputs["input_ids"].shape[1])[None]}
        return View(inputs, view.rows_N, view.packed)

    changed(collate, "packed_view", going_on)
    assert "packing" in caught(setup, PACKING)


def test_examples_that_see_one_another(setup, caught, monkeypatch):
    whole = LanguageModel.model_inputs
    one = torch.ones(1, 1, dtype=torch.long)

    def seen(self, view):
        found = dict(whole(self, view))
        if view.packed:
            found["attention_mask"] = one.expand_as(view.inputs["input_ids"])
            found["position_ids"] = torch.arange(view.inputs["input_ids"].shape[1])[None]
        return found

    monkeypatch.setattr(LanguageModel, "model_inputs", seen)
    caught(setup, PACKING)


def test_ranks_that_add_where_they_average(setup, caught, changed):
    def half(whole, micro, active, teacher, seed, factor, accelerator, sync):
        return whole(micro, active, teacher, seed, factor / accelerator.num_processes, accelerator, sync)

    changed(loop, "forward_backward", half)
    caught(setup, RANKS)


def test_ranks_that_exchange_too_early(setup, caught, changed):
    """With the first micro-batch alone: what the others add stays with each process."""

    def early(whole, micro, active, teacher, seed, factor, accelerator, sync):
        return whole(micro, active, teacher, seed, factor, accelerator, not sync)

    changed(loop, "forward_backward", early)
    assert "exchanged over gloo" in caught(setup, RANKS)


def test_what_a_process_meets_and_processes_that_do_not_end(setup, asked, monkeypatch):
    monkeypatch.setattr(two_processes, "run_rank", lambda setup, rank, *more: (setup.folder / "error").write_text("OSError: no network"))
    result = asked(setup, RANKS)
    assert result.status == "failed" and "OSError: no network" in result.found
    monkeypatch.setattr(two_processes, "SECONDS", 0.1)
    monkeypatch.setattr(two_processes, "run_rank", lambda *more: time.sleep(30))
    assert asked(setup, RANKS).status == "warned"


def test_with_a_gpu_no_process_is_started(setup, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(two_processes, "exchanged_gradients", None)
    result = asked(setup, RANKS)
    assert result.status == "passed" and "no second one was started" in result.found


def test_an_example_on_both_ranks(setup, caught, changed):
    changed(training, "make_micro_batches", lambda whole, examples, lengths, size, rank, ranks: whole(examples, lengths, size, rank, 1))
    assert "two ranks get" in caught(setup, RANKS)


# ---- what trains


def test_a_base_weight_that_trains(setup, caught, monkeypatch):
    name, weight = next((n, p) for n, p in setup.student.model.named_parameters() if not p.requires_grad)
    monkeypatch.setattr(setup.state, "parameters", setup.state.parameters | {name: weight})
    assert "1 train unasked, such as base_model" in caught(setup, TRAINS)


def test_an_adapter_weight_that_does_not_train(setup, caught, monkeypatch):
    monkeypatch.setattr(setup.state, "parameters", dict(list(setup.state.parameters.items())[1:]))
    assert "1 do not train" in caught(setup, TRAINS)


def test_an_adapter_with_another_scale(setup, caught, monkeypatch):
    module = next(module for module in setup.student.model.modules() if hasattr(module, "lora_A"))
    monkeypatch.setitem(module.scaling, "default", 1.0)
    assert "a scale of 1, " in caught(setup, TRAINS) and "the recipe rank 4, a scale of 8" in caught(setup, TRAINS)


def test_a_weight_that_the_optimizer_does_not_have(setup, caught, monkeypatch):
    group = setup.state.optimizer.param_groups[0]
    monkeypatch.setitem(group, "params", group["params"][1:])
    assert "the optimizer has" in caught(setup, TRAINS)


def test_a_step_that_changes_what_is_frozen(setup, caught, changed):
    frozen = next(p for p in setup.student.model.parameters() if not p.requires_grad)
    before = frozen.detach().clone()

    def step_and_decay(whole, *args):
        whole()
        frozen.data.mul_(0.999)

    changed(setup.state.optimizer, "step", step_and_decay)
    try:
        assert "1 tensors that do not train" in caught(setup, TRAINS)
    finally:
        frozen.data.copy_(before)


def test_a_step_that_changes_nothing(setup, caught, changed):
    changed(setup.state.optimizer, "step", lambda whole, *args: None)
    assert "a step does not change" in caught(setup, TRAINS)


def test_a_student_that_gets_no_gradient(setup, caught, changed):
    layer = setup.student.base_model.model.layers[0]
    changed(layer, "forward", lambda whole, hidden, *args, **more: whole(hidden.detach(), *args, **more).detach())
    found = caught(setup, TRAINS)
    assert "14 get no gradient" in found, found


def test_a_new_adapter_on_the_embedding_is_no_reason_to_warn(make_setup, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKD_CACHE", str(tmp_path))
    setup = make_setup(teacher=None, student__lora__target_modules=["q_proj", "embed_tokens"])
    result = asked(setup, TRAINS)
    assert result.status == "passed" and "gradient of 3 matrices is 0" in result.found, result


def test_the_weights_are_as_before(setup, asked):
    before = {name: p.detach().clone() for name, p in setup.state.parameters.items()}
    assert asked(setup, TRAINS).status == "passed"
    assert all(torch.equal(before[name], p) for name, p in setup.state.parameters.items())
    assert all(p.grad is None for p in setup.state.parameters.values()) and not setup.state.optimizer.state
