"""Runs whose kd_ratio and temperature change by step (their numbers are in test_by_hand.py): resumed, side by side, and in what is written of them."""

import json

import pytest

from llmkd.cli import main
from llmkd.commands.sweep import run_sweep
from llmkd.config import loader
from llmkd.config.recipe import distils
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm
from llmkd.training.build import build_terms
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


def test_side_by_side_and_in_the_report(world, tmp_path):
    base = plain_recipe(world, tmp_path / "unused") | {"train": {"max_steps": 3, "batch_size": 8, "micro_batch_size": 4}}
    base["data"]["validation"] = {"path": str(world / "held.jsonl")}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    arms = {"plain": {"loss.kd_ratio": 0.5}, "falling": {"loss.kd_ratio": FALLING, "loss.temperature": {"from": 2.0, "to": 1.0}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "arms": arms}))
    run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    assert main(["report", str(tmp_path / "sweep")]) == 0
    folder = tmp_path / "sweep/arms/falling"
    run(loader.load_recipe(folder / "recipe.yaml", {"output_dir": str(tmp_path / "alone")}))
    assert distance(weights(folder), weights(tmp_path / "alone")) == 0
    page = (tmp_path / "sweep/report.html").read_text()
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
