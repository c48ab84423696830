"""`llmkd plan` on the command line."""

import json

import pytest

from llmkd.cli import main
from llmkd.commands.plan_runs import runs_of
from tests.conftest import plain_recipe


@pytest.fixture
def planned(world, tmp_path, capsys):
    """The command on a recipe of the small world: exit code, what it printed, and its JSON."""

    def go(*words: str) -> tuple[int, str, dict | None]:
        (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
        code = main(["plan", "--config", str(tmp_path / "r.yaml"), "--json", str(tmp_path / "plan.json"), *words])
        out, path = capsys.readouterr(), tmp_path / "plan.json"
        return code, out.out + out.err, json.loads(path.read_text()) if path.exists() else None

    return go


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_is_told_what_would_save_memory(planned, monkeypatch):
    changed = {"student.gradient_checkpointing", "train.micro_batch_size", "teacher.cache"}
    monkeypatch.setattr("llmkd.planning.fit.changes", _some(changed))
    code, said, numbers = planned("--memory", "8MB", "--gpu", "none", "--tflops", "0.5")
    assert code == 0 and "it does not fit" in said and "as given by --tflops" in said
    memory = numbers["memory"]
    assert memory["peak"] == pytest.approx(sum(memory["parts"].values())) == memory["needed"]
    assert not numbers["fits"] and {path for one in numbers["changes"] for path in one["settings"]} <= changed
    first, *rest = numbers["changes"]
    assert all(one["saves"] <= first["saves"] for one in rest if len(one["settings"]) == 1)
    smaller = next(one for one in numbers["changes"] if one["settings"] == {"train.micro_batch_size": 1})
    assert smaller["fits"] and smaller["saves"] == pytest.approx(memory["peak"] - smaller["needed"])
    assert numbers["run"]["steps"] == 5 and numbers["run"]["targets"] == 1180
    (here,) = numbers["devices"]
    assert here["device"] == "this machine" and here["seconds"] > 0


@pytest.mark.slow
def test_a_sweep_is_planned_group_by_group_as_its_arms_train(world, tmp_path, capsys):
    """Two adapters on one base before one teacher, then a full student alone, twice; the teacher is what a stage is still to train, one stage writes
    its cache, and one makes data that nothing reads."""
    recipe = plain_recipe(world, tmp_path / "out")
    (tmp_path / "teacher.yaml").write_text(json.dumps(recipe | {"student": {"model": str(world / "teacher")}, "teacher": None}))
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    sweep = {"output_dir": str(tmp_path / "sweep"), "recipe": "r.yaml", "stages": {"first": {"recipe": "teacher.yaml"}}}
    cached = {"teacher.model": "{output_dir}/stages/first/adapter", "teacher.cache.path": str(tmp_path / "cache")}
    sweep["stages"] |= {"made": {"make": "make.yaml"}, "kept": {"cache": "r.yaml", "set": cached}}
    make = {
        "output_dir": str(tmp_path / "made"),
        "seeds": {"path": str(world / "train.jsonl"), "format": "chat"},
        "stages": [{"do": "keep"}],
    }
    (tmp_path / "make.yaml").write_text(json.dumps(make))
    sweep["set"] = {"teacher.model": "{output_dir}/stages/first/adapter"}
    sweep["arms"] = {"kd": {}, "ce": {"loss.kd_ratio": 0}, "full": {"student.method": "full", "student.lora": None}}
    sweep["arms"]["slow"] = sweep["arms"]["full"] | {"optim.lr": 1e-6}
    sweep["arms"]["from_cache"] = sweep["arms"]["full"] | {"teacher.cache.path": str(tmp_path / "cache")}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    code = main(["plan", "--config", str(tmp_path / "sweep.yaml"), "--gpu", "none", "--json", str(tmp_path / "plan.json")])
    numbers, said = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert code == 0 and "which has not run yet" in said and "2 stages and 4 groups one after another" in said
    assert (
        "not planned: the rows that stages write (made)" in said and "one arm (slow): as " in said and said.count("llmkd cache writes") == 1
    )
    first, kept = numbers["stages"]
    assert first["stage"] == "first" and kept["caches"][0]["targets"] == 1180 and numbers["made"] == ["made"]
    both, alone, slow, from_cache = numbers["groups"]
    assert from_cache["arms"] == ["from_cache"] and "caches" not in from_cache
    assert both["arms"] == ["kd", "ce"] and alone["arms"] == ["full"] and slow == alone | {"arms": ["slow"]}
    adapter = 8 * 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))  # float64, two layers, rank 4 on seven matrices
    assert both["memory"]["parts"]["trained"] == 2 * adapter
    assert both["memory"]["parts"]["teacher's weights"] == pytest.approx(alone["memory"]["parts"]["teacher's weights"])
    (of_all,) = numbers["devices"]
    each = [one["devices"][0]["seconds"] for one in (first, kept, both, alone, slow, from_cache)]
    assert of_all["seconds"] == pytest.approx(sum(each)) and all(each)


def test_a_pipeline_is_planned_stage_by_stage_and_data_that_a_stage_makes_is_assumed(world, tmp_path, capsys):
    recipe = plain_recipe(world, tmp_path / "out") | {"teacher": None, "loss": {"kd_ratio": 0}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    make = {
        "output_dir": str(tmp_path / "made"),
        "seeds": {"path": str(world / "train.jsonl"), "format": "chat"},
        "stages": [{"do": "keep"}],
    }
    (tmp_path / "make.yaml").write_text(json.dumps(make))
    held_out = {"data.validation": {"path": str(world / "held.jsonl"), "format": "chat"}}
    later = {"recipe": "r.yaml", "set": held_out | {"data.train.path": "{output_dir}/rows/train.jsonl", "data.max_length": 40}}
    stages = {"rows": {"make": "make.yaml"}, "one": {"recipe": "r.yaml"}, "two": later}
    (tmp_path / "all.yaml").write_text(
        json.dumps({"output_dir": str(tmp_path / "all"), "stages": stages, "teacher": "one", "students": ["two"]})
    )
    smaller = runs_of(str(tmp_path / "all.yaml"), {}).runs[1].recipes({"train.micro_batch_size": 1})[0]
    assert (smaller.train.micro_batch_size, smaller.data.max_length) == (1, 40)
    code = main(["plan", "--config", str(tmp_path / "all.yaml"), "--gpu", "none", "--json", str(tmp_path / "plan.json")])
    numbers, said = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert (
        code == 0
        and "rows/train.jsonl is made by the stage rows, which has not run yet: every example is assumed to have 40 tokens" in said
    )
    one, two = numbers["stages"]
    assert one["run"]["targets"] == 1180 and two["run"]["targets"] is None and two["micro_batch"]["targets"] == 4 * 39
    assert "the time of 1 part whose data is not known" in said and numbers["devices"][0]["unknown"] == 1


def test_real_steps_are_printed_with_the_plan(planned):
    code, said, numbers = planned("--gpu", "none", "--measure", "--data.train.limit", "8", "--teacher", "null", "--train.epochs", "2")
    assert code == 0, said
    measured = numbers["measured"]
    assert "measured" in said and measured["peak"] == pytest.approx(measured["planned_peak"], rel=0.05)
    assert measured["planned_peak"] == numbers["memory"]["peak"] and measured["seconds"] > 0


def _some(wanted: set[str]):
    from llmkd.planning.fit import changes

    return lambda recipe, students: (one for one in changes(recipe, students) if one.settings.keys() <= wanted)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "5090"], "--gpu: found 5090, expected one of l4, 4090, a100-40gb, a100, h100, h200, none"),
        (["--memory", "lots"], "--memory: found lots, expected an amount of memory, such as 24GB"),
        (["--share", "1.5"], "--share: found 1.5, expected a number above 0, at most 1"),
        (["--tflops", "-1"], "--tflops: found -1, expected a number above 0"),
        (["--student.model", "nobody/nothing"], "is not in the hub's cache, could not be downloaded"),
    ],
)
def test_mistakes_are_told_in_a_line(planned, words, expected):
    code, said, numbers = planned(*words)
    assert code == 2 and expected in said and numbers is None
