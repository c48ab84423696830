"""`llmkd cache`, and runs that learn from what it wrote: as from the live teacher, or refused with what differs."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from llmkd.cli import main
from llmkd.commands.cache import cache
from llmkd.commands.cache_check import check
from llmkd.config import loader
from llmkd.config.fields import as_tuple
from llmkd.errors import UserError
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.kit.cache import FLOAT32, from_cache, trained_by
from tests.kit.processes import launch


def steps(recipe) -> list[dict]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


VARIANTS = {
    "as it is": {},
    "shuffled otherwise": {"seed": 5},
    "packed": {"data__packing": True},
    "accumulated": {"train__micro_batch_size": 1},
    "softened": {"loss__temperature": 2.0, "loss__divergence": "generalized_jsd"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("hidden", 2e-5), ("topk", 2e-3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_from_a_cache_is_the_run_from_the_live_teacher(make_recipe, caches, kind, bound, variant):
    """hidden: but for float32's rounding. topk with all of V: but for the rounding of its values."""
    live = make_recipe("live", **(FLOAT32 | VARIANTS[variant]))
    stored = from_cache(make_recipe, caches, kind, "stored", **VARIANTS[variant])
    assert distance(trained_by(live), trained_by(stored)) < bound * 50
    for a, b in zip(steps(live), steps(stored), strict=True):
        assert b["kd"] == pytest.approx(a["kd"], rel=bound, abs=bound / 10)
        assert b["ce"] == pytest.approx(a["ce"], rel=bound)


def test_the_held_out_metrics_come_from_the_cache_too(make_recipe, caches):
    held = {"data__validation_fraction": 0.2, "train__max_steps": 2}
    live = run(make_recipe("live", **(FLOAT32 | held)))["validation"]
    for kind, names, bound in (
        ("hidden", ("forward_kl", "reverse_kl", "top1_agreement", "teacher_ce", "teacher_entropy"), 1e-4),
        ("topk", ("forward_kl", "reverse_kl", "top1_agreement", "teacher_ce", "teacher_entropy"), 3e-3),
        ("narrow", ("top1_agreement", "teacher_ce", "teacher_entropy"), 3e-3),
        ("sampled", ("teacher_ce", "teacher_entropy"), 3e-3),
    ):
        recipe = from_cache(make_recipe, caches, kind, kind, **held)
        found = run(recipe)["validation"]
        assert {name: found[name] for name in names} == pytest.approx({name: live[name] for name in names}, rel=bound, abs=bound), kind
        assert (kind == "sampled") == ("reverse_kl" not in found)
        held_out = map(json.loads, Path(recipe.output_dir, "held_out.jsonl").read_text().splitlines())
        parts = {"narrow": "top 8 tokens", "sampled": "64 samples"}  # topk: all of V
        assert {row.get("teacher_part") for row in held_out} == {parts.get(kind)}, kind
    narrow = run(from_cache(make_recipe, caches, "narrow", "again", **held))["before"]
    dense = run(make_recipe("dense", **(FLOAT32 | held)))["before"]
    assert 0 < narrow["forward_kl"] < dense["forward_kl"]  # merging tokens into one bucket can only lower it


def test_a_cache_is_the_same_bytes_however_it_was_written(world, caches, make_recipe, tmp_path):
    """In other micro-batches, and by an attempt that was stopped."""
    again = make_recipe(
        teacher__dtype="float32",
        teacher__cache={"path": str(tmp_path / "again"), "kind": "sampled", "num_samples": 64},
        data__validation_fraction=0.2,
        validation__micro_batch_size=3,
    )

    class Soon:
        calls = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self):
            self.calls += 1
            return self.calls > 4

    from llmkd.errors import Stopped

    with pytest.raises(Stopped, match="the same command continues it"):
        cache(again, stop=Soon())
    with pytest.raises(UserError, match="not complete"):
        run(from_cache(make_recipe, tmp_path, "again", "early"))
    cache(again)
    a, b = (sorted(path.name for path in root.iterdir()) for root in (tmp_path / "again", caches / "sampled"))
    assert a == b
    for name in a:
        if name.endswith(".safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (caches / "sampled" / name).read_bytes()


# ---- together with others


def test_cached_and_live_teachers_mix(world, caches, make_recipe):
    """Two halves of one teacher, one of them live, are the teacher."""
    half = [{"cache": {"path": str(caches / "hidden")}}, {"model": str(world / "adapter"), "dtype": "float32"}]
    changes = {name: value for name, value in FLOAT32.items() if not name.startswith("teacher")}
    mixed = trained_by(make_recipe("mixed", teacher=half, mixture__combine="log_probabilities", **changes))
    assert distance(mixed, trained_by(make_recipe("live", **FLOAT32))) < 1e-3


def test_streams_learn_from_a_cache(make_recipe, caches):
    stream = {"data__streaming": True, "train__max_steps": 4, "data__shuffle_buffer": 16}
    live = trained_by(make_recipe("live", **(FLOAT32 | stream)))
    assert distance(live, trained_by(from_cache(make_recipe, caches, "hidden", "stored", **stream))) < 1e-3


def test_the_arms_of_a_sweep_learn_from_a_cache_as_they_would_alone(world, caches, tmp_path):
    base = plain_recipe(world, tmp_path / "none") | {"teacher": {"cache": {"path": str(caches / "narrow")}}}
    base["student"]["dtype"] = "float32"
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    sweep = {"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "grid": {"loss.kd_ratio": [0.3, 0.9]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert main(["train", "--config", str(tmp_path / "sweep.yaml")]) == 0
    alone = loader.load_recipe(tmp_path / "base.yaml", {"output_dir": str(tmp_path / "alone"), "loss.kd_ratio": 0.9})
    assert distance(trained_by(alone), weights(tmp_path / "sweep/arms/kd_ratio-0.9")) < 1e-6


def test_check_says_what_a_cache_and_a_quantised_teacher_lose(world, caches, make_recipe, capsys):
    cached = {"teacher__cache__path": str(caches / "narrow"), "teacher__dtype": "float32"}
    numbers = check(make_recipe(**cached))["teacher"]
    out = capsys.readouterr().out
    assert "live" in out and "narrow" in out and "forward_kl" in out
    assert numbers["targets"] > numbers["examples"] == 37 and [row["teacher"] for row in numbers["cached"]] == [
        "live",
        str(caches / "narrow"),
    ]
    assert all(f"{row['forward_kl']:.4f}" in out and row["forward_kl"] != round(row["forward_kl"], 4) for row in numbers["cached"])
    pytest.importorskip("bitsandbytes")
    check(make_recipe(teacher__quantization={"type": "nf4"}, teacher__dtype="float32"))
    out = capsys.readouterr().out
    assert "unquantised" in out and "nf4" in out and "top1_agreement" in out


def test_teachers_that_have_rows_of_their_own_are_checked_on_them(world, make_recipe, tmp_path, capsys):
    """A teacher without any is refused."""
    adapter = {"model": str(world / "adapter"), "dtype": "float32"}
    both = [{"name": name, "cache": {"path": str(tmp_path / name), "k": 8}} | adapter for name in ("a", "b")]
    parted = [{"path": str(world / f"{file}.jsonl"), "teacher": name} for file, name in (("train", "a"), ("held", "b"))]
    recipe = make_recipe(teacher=both, data__train=parted)
    cache(recipe)
    check(recipe)
    said = capsys.readouterr()
    assert "on 37 training examples" in said.err and "on 9 training examples" in said.err and said.out.count("live") == 2
    with pytest.raises(UserError, match=r"teacher.1: no data source uses this teacher"):
        cache(make_recipe(teacher=both, data__train=parted[:1]))


def test_check_refuses_a_cache_that_is_not_this_teachers_or_not_there(world, caches, make_recipe, tmp_path):
    for folder, words in (
        (caches / "narrow", "was made by a teacher with dtype float32"),
        (tmp_path / "none", "no teacher cache"),
    ):
        with pytest.raises(UserError, match=words):
            check(make_recipe(teacher__cache__path=str(folder), teacher__dtype="float64"))


# ---- processes


def test_a_process_that_finds_damage_in_its_share_says_so(damaged, make_recipe, capsys, monkeypatch):
    """Processes share the checking: the first one may have seen nothing."""
    folder = damaged("hidden")
    head = folder / "head.safetensors"  # the last of the files
    head.write_bytes(head.read_bytes()[:-1])
    config = Path(make_recipe(teacher={"cache": {"path": str(folder)}}).output_dir).parent / "recipe.yaml"
    launched = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29999",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", str(config), "--teacher", json.dumps({"cache": {"path": str(folder)}})]) == 2
    assert "head.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_same_cache_and_learn_from_it_as_one_does(world, caches, make_recipe, tmp_path):
    recipe = plain_recipe(world, tmp_path / "two") | {"validation": {"teacher_check": 0}}
    recipe["student"]["dtype"] = "float32"
    recipe["teacher"] |= {"dtype": "float32", "cache": {"path": str(tmp_path / "cache"), "kind": "hidden"}}
    recipe["data"]["validation_fraction"] = 0.2
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    written = launch(2, main, ["cache", "--config", "two.yaml"], cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    for name in sorted(path.name for path in (caches / "hidden").glob("*.safetensors")):
        assert (tmp_path / "cache" / name).read_bytes() == (caches / "hidden" / name).read_bytes()
    words = ["train", "--config", "two.yaml", "--data.validation_fraction", "0", "--data.packing", "true"]
    trained = launch(2, main, words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert distance(weights(tmp_path / "two"), trained_by(make_recipe("live", **FLOAT32))) < 1e-3


def killed_when_it_exists(file: Path, words: list[str]) -> int:
    def watch() -> None:
        while not file.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return main(words)


@pytest.mark.slow
def test_a_killed_attempt_goes_on(world, tmp_path):
    recipe = plain_recipe(world, tmp_path / "out")
    recipe["teacher"] |= {"dtype": "float32", "cache": {"path": str(tmp_path / "cache"), "kind": "topk", "k": 8}}
    recipe["data"]["validation_fraction"] = 0.2
    recipe["validation"] = {"micro_batch_size": 1}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    words = ["cache", "--config", str(tmp_path / "r.yaml")]
    assert launch(1, killed_when_it_exists, tmp_path / "cache/unfinished.json", words).returncode == -signal.SIGKILL
    assert not (tmp_path / "cache/cache.json").exists()
    assert main(words) == 0
    cache(loader.load_recipe(tmp_path / "r.yaml", {"teacher.cache.path": str(tmp_path / "whole")}))
    name = "shard-00000.safetensors"
    assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- answers from elsewhere


def answers_of(recipe, k: int, held_out: bool = True) -> list[dict]:
    """What another program would give: the k likeliest tokens of the live teacher at every target, by row."""
    from llmkd.data.collate import collate
    from llmkd.models.load import LoadContext, load_teacher
    from llmkd.teachers.live import LiveTeacher
    from llmkd.training.prepare import prepare

    prepared = prepare(recipe, open_caches=False)
    live, lines = LiveTeacher(load_teacher(as_tuple(recipe.teacher)[0], LoadContext(prepared.vocab, "cpu"))), []
    for encoded in (prepared.train, prepared.validation) if held_out else (prepared.train,):
        for i in range(len(encoded)):
            batch = collate(encoded, [i], 0)
            values, ids = live(batch).log_probs(slice(None)).topk(k)
            top = [list(map(list, zip(a, b, strict=True))) for a, b in zip(ids.tolist(), values.tolist(), strict=True)]
            lines.append({"row": int(encoded.row[i]) + 1, "labels": batch.labels_N.tolist(), "top": top})
    return lines


def test_answers_from_elsewhere_are_read_by_rows_and_trained_on(caches, make_recipe, tmp_path, capsys):
    """Held-out rows among them; at temperature 1 they are what llmkd's own cache of as many tokens is."""
    held = {"data__validation_fraction": 0.2, "train__max_steps": 2}
    live = make_recipe("live", **(FLOAT32 | held))
    file, recipe = tmp_path / "answers.jsonl", tmp_path / "recipe.yaml"
    lines = answers_of(live, 8)
    file.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    own = loader.load_recipe(recipe, {"data.validation_fraction": 0.2, "teacher": {"cache": {"path": str(tmp_path / "told"), "k": 8}}})
    assert cache(own, str(file)) == [tmp_path / "told"] and "is complete: 37 examples" in capsys.readouterr().err
    told = run(make_recipe("run", **(FLOAT32 | held | {"teacher": {"cache": {"path": str(tmp_path / "told")}}, "teacher__dtype": "auto"})))
    kept = run(from_cache(make_recipe, caches, "narrow", "kept", **held))
    for name in ("forward_kl", "reverse_kl", "top1_agreement"):
        assert told["validation"][name] == pytest.approx(kept["validation"][name], rel=2e-3)
    assert told["train"]["kd"] == pytest.approx(kept["train"]["kd"], rel=2e-3)


def test_answers_of_other_rows_are_refused_by_line_and_nothing_is_written(make_recipe, tmp_path):
    recipe = make_recipe(**FLOAT32)
    lines = answers_of(recipe, 3, held_out=False)
    lines[4]["labels"][0] += 1
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["cache", "--config", str(tmp_path / "recipe.yaml"), "--teacher.cache.path", str(tmp_path / "told"), "--import", str(file)]
    with pytest.raises(UserError, match="answers.jsonl:5: target 1 is"):
        cache(loader.load_recipe(tmp_path / "recipe.yaml", {"teacher.cache.path": str(tmp_path / "told")}), str(file))
    assert main(words) == 2 and not (tmp_path / "told").exists()
    assert main([*words[:-1], str(tmp_path / "none.jsonl")]) == 2
    assert main([*words, "--check"]) == 2
    assert main([*words, "--teacher.cache.kind", "hidden"]) == 2
