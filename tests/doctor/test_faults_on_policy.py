"""Faults planted in on-policy distillation: each is caught by the check that is for it."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from llmkd.doctor import on_policy
from llmkd.rollouts import draw, generate, source
from llmkd.rollouts.way import Inputs
from llmkd.rollouts.writer import LocalWriter

SAYS, STANDS = "the student writes what it says", "its answers stand behind"
SETTINGS = {"share": {"from": 0.0, "to": 1.0, "ratio": 0.5}, "max_new_tokens": 8, "temperature": 1.3, "replay": {"capacity": 20}}


@pytest.fixture(scope="module")
def writing(make_setup):
    """With dropout, which must not be there while the student writes."""
    return make_setup(on_policy=SETTINGS, student__lora__dropout=0.3, data__packing=True)


@pytest.mark.parametrize("cut", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 40, "min_p": 0.01}])
def test_a_sound_student_passes(writing, asked, monkeypatch, cut):
    own = dataclasses.replace(writing.small.on_policy, **cut)
    monkeypatch.setattr(writing, "small", dataclasses.replace(writing.small, on_policy=own))
    for check in (SAYS, STANDS):
        result = asked(writing, check)
        assert result.status in ("passed", "warned"), result
        assert "ended by themselves within 8 tokens" in result.found or "alone are targets; answers end with '<|end|>'" in result.found
        assert check == STANDS or (len(result.shown) == 4 and "Say" in result.shown[0] and "⟦" in result.shown[0])
    assert not writing.student.training and writing.small.on_policy.replay is None


def test_without_the_section_nothing_is_asked(setup, asked):
    assert [asked(setup, check).status for check in (SAYS, STANDS)] == ["not asked"] * 2


@contextlib.contextmanager
def _in_training_mode(model):
    yield


def test_answers_with_dropout(writing, caught, monkeypatch):
    monkeypatch.setattr(generate, "eval_mode", _in_training_mode)
    assert "is not what the student says there" in caught(writing, SAYS)


def test_a_student_that_is_left_in_eval_mode(writing, caught, monkeypatch):
    @contextlib.contextmanager
    def left(model):
        model.eval()
        yield

    monkeypatch.setattr(generate, "eval_mode", left)
    assert "no longer in training mode" in caught(writing, SAYS)


@pytest.mark.parametrize("fault", ["temperature", "position", "seed"])
def test_tokens_that_are_not_the_students(writing, caught, monkeypatch, fault):
    if fault == "temperature":
        monkeypatch.setattr(draw, "probabilities", lambda logits_BV, settings: torch.softmax(logits_BV.double(), -1))
    elif fault == "position":
        with_next = Inputs.with_next

        def stays(self, token_B, most):
            return dataclasses.replace(
                with_next(self, token_B, most), position_BT=torch.cat([self.position_BT, self.position_BT[:, -1:]], -1)
            )

        monkeypatch.setattr(Inputs, "with_next", stays)
    else:
        monkeypatch.setattr(draw, "uniform", lambda seed, key, place: 0.5)
    caught(writing, SAYS)


@pytest.mark.parametrize("fault", ["no end of the data", "no end at all"])
def test_answers_that_do_not_end(writing, caught, monkeypatch, fault):
    if fault == "no end of the data":
        monkeypatch.setattr(on_policy, "local_writer", lambda student, prepared, size: LocalWriter(student, {639}, size))
        assert "end with '<|end|>', at which the student's answers do not end" in caught(writing, STANDS)
    else:
        completions = generate._completions
        monkeypatch.setattr(generate, "_completions", lambda *given: completions(*given[:-1], frozenset()))
        assert "goes on after its end token" in caught(writing, STANDS)


@pytest.mark.parametrize("fault", ["prompt is too long", "cross-entropy", "end is no target", "another's answer"])
def test_answers_that_stand_elsewhere(writing, caught, monkeypatch, fault):
    real = source.answered

    def changed(examples, prompts, chosen, answers, *more, **which):
        if fault == "prompt is too long":
            prompts = dataclasses.replace(prompts, own=prompts.own + 1, theirs=prompts.theirs + 1)
        if fault == "another's answer":
            answers = [answers[0]] * len(answers)
        found = real(examples, prompts, chosen, answers, *more, **which)
        if fault == "cross-entropy":
            found.weights["ce"] = np.ones(len(found), np.float32)
        if fault == "end is no target":
            found.loss_mask[found.offsets[1:] - 1] = False
        return found

    monkeypatch.setattr(source, "answered", changed)
    said = {
        "prompt is too long": "the targets do not begin where a row's prompt ends",
        "cross-entropy": "counts in the cross-entropy",
        "end is no target": "some tokens of the answer are no targets",
        "another's answer": "what follows the prompt is not what the student has written to it",
    }
    assert said[fault] in caught(writing, STANDS)
