"""The doctor on sound runs: every check passes, or says why it is not asked."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmkd.cli import main
from llmkd.commands.doctor import with_stand_ins
from llmkd.doctor import examine, on_policy, plain, terms
from llmkd.doctor.examine import CHECKS, ask_all
from llmkd.losses.keep import Keep
from tests.conftest import plain_recipe
from tests.doctor.conftest import named

#: Of the small world's random models neither knows the rows better, so that check is asked in test_faults_models.py.
BETTER = "the teacher knows the rows better than the student"


def statuses(results) -> dict[str, str]:
    return {one.check: one.status for one in results if one.check != BETTER}


def test_a_sound_run_passes_every_check(setup):
    results = ask_all(setup, CHECKS[:3], lambda check, result: None) + ask_all(setup, CHECKS[4:], lambda check, result: None)
    found = statuses(results)
    for not_there in ("the teacher cache holds what the live teacher says", *(check.name for check in (*terms.CHECKS, *on_policy.CHECKS))):
        assert found.pop(not_there) == "not asked"
    assert set(found.values()) == {"passed"}, [one for one in results if one.status != "passed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"loss__kd_ratio": 0.0, "student__method": "full", "student__lora": None},
        {"teacher": [{"model": "{world}/adapter"}, {"model": "{world}/teacher", "weight": 2.0}], "mixture__combine": "divergences"},
        {"data__teacher_context": "Think.", "loss__divergence": "generalized_jsd", "student__lora__dropout": 0.5},
        {"data__streaming": True, "train__max_steps": 4, "student__lora__modules_to_save": ["lm_head"]},
        {"on_policy": {"max_new_tokens": 8}, "loss__divergence": "reverse_kl"},
    ],
)
def test_other_kinds_of_runs_pass(make_setup, world, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("LLMKD_CACHE", str(tmp_path))
    if "teacher" in changes:
        changes = changes | {"teacher": json.loads(json.dumps(changes["teacher"]).replace("{world}", str(world)))}
    setup = make_setup(loaded=False, **changes)
    found = statuses(results := ask_all(setup, CHECKS, lambda check, result: None))
    of_its_ends = found.pop("the student writes what it says at each token")  # a model that is random ends none of its answers
    assert of_its_ends == ("warned" if "on_policy" in changes else "not asked")
    assert set(found.values()) <= {"passed", "not asked"}, [one for one in results if one.status not in ("passed", "not asked")]
    assert list(found.values()).count("not asked") <= 11


def test_schedules_of_on_policy_are_not_held_to_the_few_rows(make_setup):
    own = {"share": {"from": 0, "to": 1, "steps": 200}, "replay": {"capacity": 100}, "max_new_tokens": 8}
    setup = make_setup(loaded=False, on_policy=own, train__max_steps=None, train__epochs=50)
    assert ask_all(setup, CHECKS[:1], lambda check, result: None)[0].status == "passed"
    assert setup.small.on_policy.share == 1 and setup.small.on_policy.replay is None


def test_targets_that_a_rule_weighs_are_weighed_as_in_the_textbook(make_setup, monkeypatch):
    """And a run that weighs them otherwise than it says is found."""
    rule = {"by": "divergence", "power": 0.5, "terms": ["ce", "kd"]}
    setup = make_setup(loss__target_weights=rule, loss__temperature=2.0, loss__normalize="weights")
    checks = [named("the textbook"), named("two splits")]
    assert {one.status for one in ask_all(setup, checks, lambda check, result: None)} == {"passed"}
    monkeypatch.setattr(plain, "target_weights", lambda settings, logits_NV, signal, labels_N, position_N: torch.ones(len(labels_N)))
    assert {one.status for one in ask_all(setup, checks, lambda check, result: None)} == {"failed"}


@pytest.mark.parametrize("keep", [0.3, {"share": 0.3, "by": "divergence", "invert": True}], ids=str)
def test_the_targets_that_count_are_the_textbooks(make_setup, monkeypatch, keep):
    """And others, or another number of them, are found."""
    setup, checks = make_setup(loss__keep=keep), [named("the textbook")]
    (result,) = ask_all(setup, checks, lambda check, result: None)
    assert result.status == "passed" and re.search(r"; \d+ count, those with the (highest|lowest) scores", result.found), result
    for changes, words in (({"invert": not setup.keep.invert}, "does not"), ({"share": 0.6}, "")):
        whole = setup.keep
        monkeypatch.setattr(setup, "keep", dataclasses.replace(whole, **changes))
        real = Keep.__call__
        monkeypatch.setattr(Keep, "__call__", lambda self, *more, whole=whole, real=real: real(whole, *more))
        (result,) = ask_all(setup, checks, lambda check, result: None)
        assert result.status == "failed" and words in result.found, changes
        monkeypatch.undo()


def test_the_command_prints_a_page_and_writes_json_and_html(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    torch.manual_seed(123)
    before, state = sorted(tmp_path.rglob("*")), torch.random.get_rng_state()
    code = main(["doctor", "--config", "r.yaml", "--rows", "20", "--json", "d.json", "--to", "d.html", "--teacher", "null"])
    out, said = capsys.readouterr()
    assert code == 0, said
    assert "28 checks: " in out and "not asked  the teacher's adapter changes it" in out and "⟦Yes." in out
    assert "20 examples with" in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["passed"] and len(found["checks"]) == len(CHECKS) and {"check", "status", "found", "fix"} <= found["checks"][0].keys()
    page = (tmp_path / "d.html").read_text()
    assert all(one["check"].replace("'", "&#39;") in page for one in found["checks"])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "d.json", tmp_path / "d.html"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_failed_check_ends_the_command_with_2(world, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say"}\n')
    words = ["--data.train.path", str(tmp_path / "rows.jsonl"), "--json", str(tmp_path / "d.json")]
    code = main(["doctor", "--config", str(tmp_path / "r.yaml"), *words])
    out, said = capsys.readouterr()
    assert code == 2 and "llmkd: doctor: 1 check failed" in said.splitlines()[-1]
    assert "FAILED     the recipe's files and rows are read" in out and "rows.jsonl:1" in out
    assert json.loads((tmp_path / "d.json").read_text())["passed"] is False


@pytest.mark.parametrize("words", [["--json", "."], ["--to", "."], ["--rows", "1"], ["--config", "sweep.yaml"]])
def test_mistakes_are_found_before_anything_is_read(world, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "r.yaml", "grid": {"seed": [0, 1]}, "output_dir": "s"}))
    config = [] if "--config" in words else ["--config", "r.yaml"]
    assert main(["doctor", *config, *words]) == 2
    said = capsys.readouterr().err
    assert words[0] in said
    if "sweep.yaml" in words:
        assert "examines a recipe or a pipeline" in said and "(--config r.yaml)" in said


def test_every_stage_of_a_pipeline_is_examined_before_the_first_is_run(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examine, "CHECKS", [one for one in CHECKS if one.group in ("Data", "Models") or "knows the rows" in one.name])
    recipe = plain_recipe(world, tmp_path / "none")
    held = {"validation": {"path": str(world / "held.jsonl")}}
    first = recipe | {"student": {"model": str(world / "teacher"), "lora": {"rank": 4}}, "data": recipe["data"] | held, "teacher": None}
    (tmp_path / "first.yaml").write_text(json.dumps(first))
    (tmp_path / "second.yaml").write_text(json.dumps(recipe | {"data": recipe["data"] | held}))
    stages = {
        "first": {"recipe": "first.yaml"},
        "second": {"recipe": "second.yaml", "set": {"teacher.model": "{output_dir}/first/adapter"}},
    }
    (tmp_path / "p.yaml").write_text(json.dumps({"output_dir": "p", "stages": stages, "teacher": "first", "students": ["second"]}))
    assert main(["doctor", "--config", "p.yaml", "--json", "d.json", "--to", "d.html"]) == 0
    out, said = capsys.readouterr()
    assert "first: Data" in out and "second: Data" in out and "second: teacher is trained by the stage first" in said
    found = json.loads((tmp_path / "d.json").read_text())["checks"]
    assert [one["stage"] for one in found] == ["first"] * 7 + ["second"] * 7
    assert found[-1]["status"] == "not asked" and "stands in" in found[-1]["found"]
    assert '<h2 id="stage-second">second</h2>' in (tmp_path / "d.html").read_text() and not (tmp_path / "p").exists()


@pytest.mark.parametrize("layers, kept", [([1], 1), ({"count": 1, "by": "block_influence"}, 0)])
def test_a_student_of_fewer_layers_is_stood_in_for_by_as_few(make_recipe, world, layers, kept):
    """Where they are to be measured, by as many, evenly spaced."""
    first = make_recipe("first", student__model=str(world / "teacher"), student__layers=layers, teacher=None)
    second = make_recipe("second", teacher__model=first.output_dir + "/adapter")
    recipe, found = with_stand_ins(second, {"first": first, "second": second})
    assert found == {"teacher": "first"} and recipe.student == second.student
    few, whole = (load_file(Path(folder) / "model.safetensors") for folder in (recipe.teacher.model, world / "teacher"))
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(few[name.format(0)], whole[name.format(kept)]) and name.format(1) not in few


def test_the_page_of_the_documents_names_every_check():
    page = (Path(__file__).parents[2] / "docs/doctor.md").read_text()
    for check in CHECKS:
        assert f"\n| {check.name} | " in page
    assert {check.name for check in CHECKS} == set(re.findall(r"^\| ([a-z][^|]+?) \| ", page, re.M)) - {"passed", "warned", "not asked"}
