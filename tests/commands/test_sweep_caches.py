"""A stage of a sweep that writes the teacher's cache, and arms that read it."""

import json
from types import SimpleNamespace

import pytest

from llmkd.commands.cache_selection import check_stage_caches
from llmkd.commands.pipeline import stage_recipes
from llmkd.commands.sweep import run_sweep
from llmkd.config.loader import load_pipeline
from llmkd.config.teacher import Cache, Teacher
from llmkd.errors import UserError
from tests.conftest import distance, weights
from tests.kit.sweeps import state


def test_a_stage_writes_the_cache_that_the_arms_read(world, sweep, tmp_path, capsys):
    """Exact states: an arm that reads them ends where one with the live teacher does. A second time nothing is written."""
    (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "Say it again.", "input": "", "output": "It again."}))
    held, other = {"path": str(world / "held.jsonl")}, {"path": str(tmp_path / "other.jsonl")}
    cache = {"path": "{output_dir}/stages/cached", "kind": "hidden", "hidden_dtype": "float32"}
    live = {"teacher.dtype": "float32", "data.validation": held}
    at, steps = live | {"teacher.cache": cache}, {"train.max_steps": 2}
    stages = {"cached": {"cache": "base.yaml", "set": at}}
    arms = {
        "kd": {},
        "text": {"loss.kd_ratio": 0, "data.train": other},
    }  # the cache has no training rows of an arm that learns from no teacher
    folder = run_sweep(sweep(stages=stages, arms=arms, grid={}, set=at), steps, False)
    assert "(estimates) for 2 arms\n" in capsys.readouterr().err  # and no pass of the teacher
    alone = run_sweep(sweep(arms={"kd": {}}, grid={}, set=live, output_dir=str(tmp_path / "live")), steps, False)
    assert distance(weights(folder / "arms/kd"), weights(alone / "arms/kd")) < 1e-5
    assert state(folder)["stages"]["cached"]["seconds"] > 0 and "forward_kl" in (folder / "arms/text/summary.json").read_text()

    def written():
        return {one.name: one.stat().st_mtime_ns for one in (folder / "stages/cached").glob("*.safetensors")}

    before = written()
    with pytest.raises(UserError, match="lacks 1 of 1 examples of data.train"):
        run_sweep(sweep(stages=stages, arms=arms | {"lacking": {"data.train": other}}, grid={}, set=at), steps, True)
    assert written() == before
    for stage, message in (
        ({"cache": "base.yaml"}, "stage cached: teacher.cache.path: not given"),
        ({"cache": "base.yaml", "set": at | {"loss.kd_ratio": 0}}, "stage cached: loss.kd_ratio: found 0, with which no teacher is used"),
        ({"cache": "base.yaml", "recipe": "base.yaml"}, "stages.cached: .*; keep one"),
        ({"cache": "bose.yaml"}, "stages.cached.cache: there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            run_sweep(sweep(stages={"cached": stage}, output_dir=str(tmp_path / "no")), steps, False)
    other = {
        "kd": {},
        "topk": {"teacher.cache": {"path": cache["path"], "kind": "topk", "k": 8}},
        "states": {"teacher.cache.hidden_dtype": "bfloat16"},
    }
    with pytest.raises(UserError) as error:
        run_sweep(sweep(stages=stages, arms=other, grid={}, set=at, output_dir=str(tmp_path / "no")), steps, False)
    path = tmp_path / "no/stages/cached"
    assert list(error.value.problems) == [
        f"arm topk: teacher.cache.kind: found topk, and stage cached writes {path} with hidden; leave it out, or change one of them",
        f"arm topk: teacher.cache.k: found 8, and stage cached writes {path} with kind hidden; leave it out, or change one of them",
        f"arm states: teacher.cache.hidden_dtype: found bfloat16, and stage cached writes {path} with float32; leave it out, or change one of them",
    ]
    pipeline = {"output_dir": str(tmp_path / "no"), "teacher": "first", "students": ["kd"]}
    pipeline["stages"] = {"first": {"recipe": "base.yaml"}, "cached": {"cache": "base.yaml", "set": at}}
    pipeline["stages"]["kd"] = {"recipe": "base.yaml", "set": at | {"teacher.cache.hidden_dtype": "int8"}}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(pipeline))
    with pytest.raises(
        UserError, match="stage kd: teacher.cache.hidden_dtype: found int8, and stage cached writes .* with float32; leave it out"
    ):
        stage_recipes(load_pipeline(str(tmp_path / "pipeline.yaml"), None), tmp_path / "pipeline.yaml", {})
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("task", "writes", "reads", "found"),
    [
        ("causal_lm", {}, {"kind": "topk", "k": 64}, []),  # the defaults
        ("causal_lm", {}, {"k": 32}, ["k: found 32, and stage cached writes there with 64"]),
        ("causal_lm", {}, {"kind": "hidden"}, ["kind: found hidden, and stage cached writes there with topk"]),
        ("classification", {}, {"kind": "hidden"}, []),
        ("causal_lm", {"kind": "hidden"}, {"hidden_dtype": "int8"}, []),  # auto is the teacher's own, whatever that is
        ("causal_lm", {"kind": "hidden", "hidden_dtype": "int8"}, {"hidden_dtype": "auto"}, []),
        ("causal_lm", {"kind": "sampled", "seed": 1}, {"seed": 0}, ["seed: found 0, and stage cached writes there with 1"]),
        ("causal_lm", {"path": "elsewhere"}, {"k": 32}, []),
    ],
)
def test_what_a_stage_writes_has_the_defaults_of_its_kind(task, writes, reads, found):
    recipes = [SimpleNamespace(task=task, teacher=Teacher(model="m", cache=Cache(**{"path": "there"} | one))) for one in (writes, reads)]
    try:
        check_stage_caches(recipes[1], {"cached": recipes[0]})
        assert not found
    except UserError as error:
        assert [problem.removeprefix("teacher.cache.").split(";")[0] for problem in error.problems] == found
