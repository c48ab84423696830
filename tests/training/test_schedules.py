"""Runs whose kd_ratio and temperature change by step (their numbers are in test_by_hand.py): resumed, side by side, and in what is written of them."""

import json

import pytest
import torch

from llmkd.batch import Batch, View
from llmkd.cli import main
from llmkd.commands.sweep import run_sweep
from llmkd.config import loader
from llmkd.config.recipe import distils
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm, RowTerm
from llmkd.training.build_student import build_terms
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.training.test_resume import comparable, unfinish

FALLING = {"from": 1.0, "to": 0.25, "shape": "cosine"}
SHORT = {"train__epochs": None, "train__max_steps": 4, "validation__teacher_check": 0, "loss__kd_ratio": FALLING}


def test_it_goes_on_to_the_last_bit(make_recipe, tmp_path):
    recipe = make_recipe(
        **SHORT, loss__temperature={"from": 3, "to": 1, "steps": 3}, checkpoint__every=1, checkpoint__keep=9, train__log_every=3
    )
    run(recipe)
    straight, records = weights(tmp_path / "out"), comparable(tmp_path / "out")
    logged = [(record["step"], round(record["kd_ratio"], 12), record["temperature"]) for record in records if "loss" in record]
    assert logged == [(3, 0.4375, 1.0), (4, 0.25, 1.0)]
    unfinish(tmp_path / "out", 2)
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "out"), straight) == 0 and comparable(tmp_path / "out") == records
    with pytest.raises(UserError, match=r"loss\.kd_ratio"):
        run(
            make_recipe(**SHORT | {"loss__kd_ratio": FALLING | {"shape": "linear"}}, loss__temperature={"from": 3, "to": 1, "steps": 3}),
            resume=True,
        )


def test_weights_of_hidden_states_and_attention(make_recipe, tmp_path):
    """One from 0, one that falls; the loss of each step is that of the weights that are logged with it, also where it is read a step later."""
    settings = SHORT | {"loss__kd_ratio": 0.5, "checkpoint__every": 1, "checkpoint__keep": 9, "optim__warmup_steps": None}
    rising = {"layers": "middle", "weight": {"from": 0, "to": 3, "shape": "linear"}}
    falling = {"layers": "last", "weight": {"from": 2.0, "to": 1.0, "shape": "cosine", "steps": 3}}
    recipe = make_recipe(**settings, loss__features=rising, loss__attention=falling)
    run(recipe)
    straight, records = weights(tmp_path / "out"), comparable(tmp_path / "out")
    steps = [record for record in records if "loss" in record]
    assert [record["features.weight"] for record in steps] == pytest.approx([0, 1, 2, 3])
    assert [record["attention.weight"] for record in steps] == pytest.approx([2, 1.5, 1, 1])
    for one, f, a in zip(steps, (0, 1, 2, 3), (2, 1.5, 1, 1), strict=True):
        inner = f * one["features"] + a * one["attention"]
        assert one["loss"] == pytest.approx(0.5 * one["ce"] + 0.5 * one["kd"] + inner, rel=1e-12) and one["features"] > 0
    card = (tmp_path / "out/adapter/README.md").read_text()
    assert "hidden states 0 to 3 (linear), attention maps 2 to 1 (cosine, 3 steps)" in card
    unfinish(tmp_path / "out", 2)
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "out"), straight) == 0 and comparable(tmp_path / "out") == records
    for name, section in (("features", rising), ("attention", falling)):
        other = {"features": rising, "attention": falling} | {name: section | {"weight": 1.0}}
        with pytest.raises(UserError, match=rf"loss\.{name}\.weight"):
            run(make_recipe(**settings, **{f"loss__{key}": value for key, value in other.items()}), resume=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss__features": {"weight": {"from": -1, "to": 1}}}, "loss.features.weight.from: found -1, expected a number 0 to 1e+06"),
        ({"loss__attention": {"weight": {"from": 1}}}, "loss.attention.weight.to: not given; a schedule has from and to"),
        ({"loss__attention": {"weight": {"from": 0, "to": 0}}}, "loss.attention.weight.to: found 0 for both"),
        ({"loss__attention": {"weight": 0}}, "loss.attention.weight: found 0, expected a number > 0, <= 1e+06 or a mapping"),
        ({"loss__temperature": {"from": 0, "to": 1}}, "loss.temperature.from: found 0, expected a number 0.001 to 1000"),
    ],
    ids=str,
)
def test_schedules_that_are_refused(make_recipe, changes, words):
    with pytest.raises(UserError) as error:
        make_recipe(**changes)
    assert words in str(error.value)


def test_a_term_of_weight_0_is_nothing():
    """Its gradient too, and what is not finite of it is not in what is shown."""

    class Squares(RowTerm):
        def rows(self, student, signal, batch, targets):
            return student[targets] ** 2

    view, x_N, term = View({}, torch.arange(3)), torch.tensor([1.0, 2.0, 3.0], requires_grad=True), Squares("squares", 0.25)
    term.follow({"from": 0.0, "to": 4.0}, 5, "weights")
    for step, weight in ((1, 0.0), (3, 2.0), (5, 4.0)):
        term.start_step(step, {"squares": 1.5})
        of_step, x_N.grad = term.combiner(), None
        loss = term(x_N, None, Batch(torch.arange(3), torch.arange(3), view, view))
        loss.total.backward()
        assert loss.total.item() == 1.5 * weight * 14 and x_N.grad.tolist() == [2 * 1.5 * weight * x for x in (1, 2, 3)]
        term.start_step(2, {})
        assert term.combine({"squares": 2.0}) == 2.0 and of_step({"squares": 2.0}) == 3 * weight
    term.start_step(1, {})
    assert term.combine({"squares": float("inf")}) == 0.0


@pytest.mark.slow
def test_side_by_side_and_in_the_report(world, tmp_path):
    base = plain_recipe(world, tmp_path / "unused") | {"train": {"max_steps": 3, "batch_size": 8, "micro_batch_size": 4}}
    base["data"]["validation"] = {"path": str(world / "held.jsonl")}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    arms = {"plain": {"loss.kd_ratio": 0.5}, "falling": {"loss.kd_ratio": FALLING, "loss.temperature": {"from": 2.0, "to": 1.0}}}
    arms["states"] = {"loss.features": {"weight": {"from": 0.0, "to": 1.0}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "arms": arms}))
    run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    assert main(["report", str(tmp_path / "sweep")]) == 0
    folder = tmp_path / "sweep/arms/falling"
    run(loader.load_recipe(folder / "recipe.yaml", {"output_dir": str(tmp_path / "alone")}))
    assert distance(weights(folder), weights(tmp_path / "alone")) == 0
    page = (tmp_path / "sweep/report.html").read_text()
    assert "Schedule: weight of hidden states" in page and "Schedule: weight of attention" not in page
    assert "Schedule: weight of the KD loss" in page and "Schedule: temperature" in page and "T 2 to 1 (linear)" in page
    card = (folder / "adapter/README.md").read_text()
    assert "kd_ratio 1 to 0.25 (cosine), temperature 2 to 1 (linear)" in card
    records = [record for record in read_jsonl(tmp_path / "sweep/arms/plain/metrics.jsonl") if "loss" in record]
    assert records and not [record for record in records if "kd_ratio" in record]


def test_the_teacher_is_needed_if_any_step_needs_it(make_recipe):
    for setting in ({"from": 0, "to": 1}, {"from": 1, "to": 0}):
        recipe = make_recipe(loss__kd_ratio=setting)
        (term,) = build_terms(recipe.loss, None, 5)
        assert distils(recipe) and term.needs_teacher
        for step in (1, 5):
            term.start_step(step, {})
            assert term.objective.kd_ratio == (setting["from"] if step == 1 else setting["to"]) and term.needs_teacher
    (term,) = build_terms(make_recipe(loss__kd_ratio=0.0).loss, None, 5)
    assert not term.needs_teacher


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss__temperature": {"from": 2, "to": 1, "steps": 9}}, "loss.temperature.steps: found 9, and the whole run has 5 steps"),
        ({"optim__warmup_steps": 9}, "optim.warmup_steps: found 9, but the whole run has 5 steps; lower it, or use optim.warmup_ratio"),
    ],
)
def test_what_is_longer_than_the_run_is_refused_before_a_model_is_loaded(make_recipe, monkeypatch, changes, words):
    monkeypatch.setattr("llmkd.training.build.build_setup", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=words):
        run(make_recipe(train__max_steps=None, train__epochs=1, **changes))


def test_a_schedule_longer_than_the_run_is_refused(make_recipe):
    with pytest.raises(UserError, match=r"loss\.temperature\.steps: found 9, and the whole run has 5 steps"):
        build_terms(make_recipe(loss__temperature={"from": 2, "to": 1, "steps": 9}).loss, None, 5)


def test_a_steps_metrics_are_combined_as_that_step_was():
    term = HeadTerm(Objective(0.5), at_step=lambda step: Objective(1 / step))
    term.start_step(1, {})
    of_first = term.combiner()
    term.start_step(4, {})
    values = {"ce": 3.0, "kd": 5.0}
    assert (of_first(values), term.combiner()(values), term.combine(values)) == (5.0, 0.75 * 3 + 0.25 * 5, 3.5)
