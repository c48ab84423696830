"""Faults planted in the data's way into batches: each is caught by the check that is for it."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from llmkd.data import collate
from llmkd.data.encoding import encode
from llmkd.doctor.examine import CHECKS, ask_all

TEXT, PLACE = "the answers are supervised", "each target is"


@pytest.fixture
def read(make_setup, tmp_path, monkeypatch):
    """A setup whose data are read, with a token cache of its own: what a planted fault encodes is nobody else's."""
    monkeypatch.setenv("LLMKD_CACHE", str(tmp_path / "cache"))

    def go(**changes):
        setup = make_setup(loaded=False, **changes)
        setup.read()
        return setup

    return go


def test_a_prompt_that_is_supervised(read, caught, monkeypatch):
    whole = encode.with_loss_mask
    monkeypatch.setattr(encode, "with_loss_mask", lambda text, ids, places, start, end, _: whole(text, ids, places, start, end, True))
    assert "the prompt 'Say" in caught(read(), TEXT)


def test_an_answer_that_is_not_all_supervised(read, caught, monkeypatch):
    whole = encode.with_loss_mask

    def without_the_first(*args):
        ids, mask = whole(*args)
        mask[np.flatnonzero(mask)[:2]] = False
        return ids, mask

    monkeypatch.setattr(encode, "with_loss_mask", without_the_first)
    assert "is not all supervised" in caught(read(), TEXT)


@pytest.mark.parametrize("form", ["chat", "prompt_completion", "text"])
def test_other_formats_pass_and_a_prompt_that_is_meant_to_train(read, asked, tmp_path, form):
    talk = [{"role": "user", "content": "Say this"}, {"role": "assistant", "content": "Yes."}]
    row = {"chat": {"messages": talk}, "prompt_completion": {"prompt": "Say this", "completion": " Yes."}, "text": {"text": "Yes. No."}}[
        form
    ]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    setup = read(data__train__path=str(tmp_path / "rows.jsonl"), data__train__format=form)
    assert asked(setup, TEXT).status == "passed"
    assert any("⟦" in line for line in asked(setup, TEXT).shown)
    trained = read(data__train__path=str(tmp_path / "rows.jsonl"), data__train__format=form, data__train_on_input=True)
    assert "as well" in asked(trained, TEXT).found


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_beside_their_positions(setup, caught, monkeypatch, shift):
    whole = collate.build_view

    def moved(*args):
        view = whole(*args)
        return dataclasses.replace(view, rows_N=(view.rows_N + shift).clamp_min(0))

    monkeypatch.setattr(collate, "build_view", moved)
    assert "padded micro-batch for the student" in caught(setup, PLACE)


@pytest.mark.parametrize("fault", ["labels", "twice"])
def test_labels_of_other_targets_and_a_target_that_is_there_twice(setup, caught, monkeypatch, fault):
    whole = collate.collate

    def other(*args):
        batch = whole(*args)
        order = torch.arange(batch.num_targets)
        order[:2] = order[:2].flip(0) if fault == "labels" else 0
        if fault == "labels":
            return dataclasses.replace(batch, labels_N=batch.labels_N[order])
        view = dataclasses.replace(batch.student, rows_N=batch.student.rows_N[order])
        return dataclasses.replace(batch, labels_N=batch.labels_N[order], student=view)

    monkeypatch.setattr(collate, "collate", other)
    assert ("predicts" if fault == "labels" else "1 targets are missing, and 1 are there twice") in caught(setup, PLACE)


def test_labels_in_the_packed_rows_alone(setup, caught, monkeypatch):
    whole = collate.packed_view
    monkeypatch.setattr(collate, "packed_view", lambda *args: dataclasses.replace(found := whole(*args), rows_N=found.rows_N.roll(1)))
    assert "packed micro-batch" in caught(setup, PLACE)


def test_a_row_that_cannot_be_read_is_named_and_nothing_else_is_asked(make_setup, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say", "output": "Yes"}\n{"instruction": "Say"}\n')
    setup = make_setup(loaded=False, data__train__path=str(tmp_path / "rows.jsonl"))
    first, *others = ask_all(setup, CHECKS, lambda check, result: None)
    assert first.status == "failed" and "rows.jsonl:2" in first.found and first.fix
    assert {one.status for one in others} == {"not asked"}
    assert all(CHECKS[0].name in one.found for one in others)


def test_an_exception_is_a_failure_and_the_others_go_on(setup, monkeypatch):
    monkeypatch.setattr(collate, "build_view", lambda *args: 1 / 0)
    results = ask_all(setup, CHECKS[1:3], lambda check, result: None)
    assert [one.status for one in results] == ["passed", "failed"]
    assert "ZeroDivisionError" in results[1].found and results[1].fix
