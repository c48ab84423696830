"""A stage of a sweep that writes the teacher's cache, and arms that read it."""

import json

import pytest

from llmkd.commands.sweep import run_sweep
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
    assert not (tmp_path / "no").exists()
