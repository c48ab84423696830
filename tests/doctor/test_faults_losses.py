"""Faults planted in the loss: each is caught by the check that is for it."""

import dataclasses

import pytest
import torch

from llmkd.batch import View
from llmkd.doctor import plain
from llmkd.head import Head
from llmkd.losses import fused, terms
from llmkd.losses.divergences import DIVERGENCES
from llmkd.losses.objective import Objective
from llmkd.models.language_model import LanguageModel
from llmkd.signals import Dense
from llmkd.teachers.mixture import Mixed
from llmkd.teachers.sparse import Sampled, TopK

ITSELF, TEXTBOOK, ONE, LATER, WIDE = "distilled from itself", "textbook", "logits at one position", "a token moves", "wider than"


@pytest.fixture
def changed(monkeypatch):
    """Replace a function by one that gets the original first."""

    def go(owner, name: str, other) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: other(original, *args, **more))

    return go


@pytest.mark.parametrize("check", [ITSELF, TEXTBOOK])
def test_the_teachers_vocabulary_is_shifted(setup, caught, changed, check):
    changed(fused, "teacher_log_probs", lambda whole, *args, **more: whole(*args, **more).roll(1, -1))
    caught(setup, check)


def test_the_teachers_head_is_scaled(setup, caught, changed):
    changed(fused, "teacher_log_probs", lambda whole, *args, **more: whole(*args, **more) * 1.1)
    caught(setup, ITSELF)


def of_terms(change):
    def other(whole, self, *args, **more):
        return change(self, whole(self, *args, **more), *args)

    return other


def test_a_divergence_that_does_not_begin_at_0(setup, caught, changed):
    changed(Objective, "loss_and_grad", of_terms(lambda self, found, *args: found | ({"kd": found["kd"] + 0.01} if "kd" in found else {})))
    caught(setup, ITSELF)


def without_t_squared(objective, found, *args):
    return found | ({"kd": found["kd"] / objective.temperature**2} if "kd" in found else {})


def gradient_without_ce(objective, found, logits, labels, tile, grad, *more):
    if grad is not None:
        grad.scatter_add_(-1, labels[:, None], grad.new_full((len(labels), 1), 0.01))
    return found


@pytest.mark.parametrize("fault", [without_t_squared, gradient_without_ce])
def test_value_and_gradient_that_no_textbook_has(setup, caught, changed, fault):
    changed(Objective, "loss_and_grad", of_terms(fault))
    caught(setup, TEXTBOOK)


def test_a_float32_record_is_compared_as_float32_with_a_float64_student(make_setup, caches, asked, caught, changed):
    path = {"teacher.cache.path": str(caches / "narrow"), "teacher.dtype": "float32", "data.validation_fraction": 0.2}
    setup = make_setup(**path)
    assert asked(setup, TEXTBOOK).status == "passed"
    assert plain.precisions(setup.signal(setup.batch()), setup.batch().labels_N) == {torch.float32}
    changed(TopK, "events", lambda whole, *args: whole(*args) * 1.0005)
    caught(setup, TEXTBOOK)


def test_what_to_do_depends_on_whether_rounding_may_be_the_cause(setup, monkeypatch):
    assert "--student.dtype" not in setup.cause
    monkeypatch.setattr(setup.student, "autocast", torch.bfloat16)
    assert "ask again with float32 weights (--student.dtype" in setup.cause


def test_labels_of_the_next_target(setup, caught, changed):
    changed(
        terms,
        "fused_parts",
        lambda whole, hidden, head, labels, *more: whole(hidden, head, labels.roll(1), *more),
    )
    caught(setup, TEXTBOOK)


def test_a_term_that_is_not_weighted(setup, caught, changed):
    changed(Objective, "combine", lambda whole, self, found: sum(found.values()))
    caught(setup, TEXTBOOK)


def test_the_teacher_is_left_out(setup, caught, changed):
    changed(
        terms,
        "fused_parts",
        lambda whole, hidden, head, labels, objective, signal, *more: whole(hidden, head, labels, objective, None, *more),
    )
    assert "the terms ce" in caught(setup, TEXTBOOK)


def test_targets_that_share_their_terms(setup, caught, changed):
    changed(Objective, "loss_and_grad", of_terms(lambda self, found, *args: {k: v + v.mean() for k, v in found.items()}))
    assert "move ce at target" in caught(setup, ONE)


def test_a_total_that_counts_a_target_twice(setup, caught, changed):
    def twice(whole, *args):
        total, rows, by_rule = whole(*args)
        return total + rows["ce"][0], rows, by_rule

    changed(terms, "fused_parts", twice)
    assert "the whole loss" in caught(setup, ONE)


def test_labels_in_the_input(setup, caught, changed):
    def one_later(whole, self, view):
        return whole(self, View(view.inputs, (view.rows_N + 1).clamp_max(view.inputs["input_ids"].numel() - 1), view.packed))

    changed(LanguageModel, "hidden", one_later)
    assert "must not depend on it" in caught(setup, LATER)


def test_a_model_that_reads_nothing(setup, caught, changed):
    changed(LanguageModel, "hidden", lambda whole, self, view: whole(self, view) * 0)
    assert "does not move the logits after it" in caught(setup, LATER)


def test_narrow_logits(setup, caught, changed):
    changed(Head, "logits", lambda whole, self, *args, **more: whole(self, *args, **more).bfloat16().double())
    assert "would turn the loss's gradient" in caught(setup, WIDE)


# ---- the textbook itself


def log_rows(seed: int, vocab: int = 11) -> torch.Tensor:
    return torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).log_softmax(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_textbook_agrees_with_the_divergences(name):
    q, p = log_rows(1), log_rows(2)
    options = {
        "alpha_beta": [{}, {"alpha": 0.0, "beta": 0.7}, {"alpha": 1.2, "beta": 0.0}],
        "generalized_jsd": [{}, {"beta": 0.0}, {"beta": 1.0}],
    }
    for some in options.get(name, [{}]):
        torch.testing.assert_close(plain.DIVERGENCES[name](q, p, **some), DIVERGENCES[name](q, p, **some), rtol=1e-10, atol=1e-12)


def signals() -> dict[str, object]:
    labels = torch.arange(6)
    head = Head(torch.nn.Linear(5, 11, bias=True, dtype=torch.float64), 11, 0.7, 3.0)
    parts = [Dense(torch.randn(6, 5, dtype=torch.float64), head), Dense(torch.randn(6, 5, dtype=torch.float64), head)]
    weights = [float(torch.tensor(w).log()) for w in (0.25, 0.75)]
    found = {
        f"{combine} {confidence}": Mixed(parts, weights, labels, combine, confidence)
        for combine in ("probabilities", "log_probabilities", "divergences")
        for confidence in (False, True)
    }
    drawn = torch.randint(0, 11, (6, 9))
    return found | {"dense": parts[0], "topk": TopK.of(log_rows(3), 4, labels), "sampled": Sampled(drawn, 11, 1.0, *torch.rand(3, 6))}


@pytest.mark.parametrize("name", signals())
def test_the_textbook_agrees_with_every_kind_of_teacher(name):
    torch.manual_seed(0)
    signal, rows = signals()[name], torch.tensor([0, 2, 3])
    log_q = log_rows(5)[rows]
    for temperature in (1.0,) if name == "sampled" else (1.0, 2.0):
        ours = signal.divergence(DIVERGENCES["forward_kl"], rows, torch.log_softmax(log_q / temperature, -1), temperature)
        found = plain.distance(log_q, plain.take(signal, rows), "forward_kl", {}, temperature)
        torch.testing.assert_close(found, temperature**2 * ours.double(), rtol=1e-6, atol=1e-9)


def test_a_tail_at_a_temperature_that_it_is_not_kept_for_has_no_textbook_form():
    with pytest.raises(TypeError, match="TopK"):
        plain.distance(log_rows(1), dataclasses.replace(signals()["topk"]), "forward_kl", {}, 1.5)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_record_whose_distribution_is_mixed_has_no_textbook_form(kind):
    every = signals()
    mixed = dataclasses.replace(every["probabilities False"], parts=[every["dense"], every[kind]])
    with pytest.raises(TypeError, match="mixed"):
        plain.distance(log_rows(1), mixed, "forward_kl", {}, 1.0)


def test_a_mixture_is_as_precise_as_its_parts():
    every, labels = signals(), torch.arange(6)
    mixed = dataclasses.replace(every["divergences False"], parts=[every["dense"], every["sampled"]])
    assert plain.precisions(mixed, labels) == {torch.float64, torch.float32}
