"""Whole runs from a teacher on a server: as those from a cache, resumed, repeated, in a mixture and on a stream."""

import json
from pathlib import Path

import pytest
import yaml

from llmkd.cli import main
from llmkd.commands.cache import cache
from llmkd.config import loader
from llmkd.data.batch_source import ExampleSource
from llmkd.errors import UserError
from llmkd.servers import client
from llmkd.teachers.served import ServedTeacher
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.kit.cache import trained_by
from tests.kit.processes import train_on_two
from tests.kit.served import FakeServer

K = 8
HELD_OUT = {"data__validation_fraction": 0.2, "train__max_steps": 4, "validation__teacher_check": 0}


@pytest.fixture(autouse=True)
def _own_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.02)


def asking(make_recipe, server, out: str = "out", teacher: dict | None = None, **changes):
    one = {"server": server.url, "model": "adapter", "top_k": K, "patience": 0.0} | (teacher or {})
    return make_recipe(out, **(HELD_OUT | {"teacher": one} | changes))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_a_server_is_that_from_a_cache_of_the_same_top_k(make_recipe, server, world, tmp_path):
    written = make_recipe("w", **(HELD_OUT | {"teacher__cache__path": str(tmp_path / "topk"), "teacher__cache__k": K}))
    cache(written)
    from_cache = trained_by(make_recipe("a", **(HELD_OUT | {"teacher": {"cache": {"path": str(tmp_path / "topk")}}})))
    from_server = trained_by(asking(make_recipe, server, "b"))
    assert distance(from_cache, from_server) < 1e-6
    (a, b) = ([one["validation"] for one in records(tmp_path / out) if "validation" in one] for out in ("a", "b"))
    for one, other in zip(a, b, strict=True):
        for name in ("ce", "forward_kl", "teacher_ce", "top1_agreement"):
            assert abs(one[name] - other[name]) < 1e-5, name


def test_each_example_is_asked_once_over_epochs_validation_resume_and_runs(make_recipe, server, tmp_path, capsys):
    recipe = asking(make_recipe, server, train__max_steps=None, train__epochs=2, validation__every=3, validation__teacher_check=4)
    first = trained_by(recipe)
    assert len({json.dumps(one["prompt"]) for one in server.asked}) == 37 and len(server.asked) == 38  # one of them also at the base
    server.stop()
    again = trained_by(
        asking(make_recipe, server, "again", train__max_steps=None, train__epochs=2, validation__every=3, validation__teacher_check=4)
    )
    assert distance(first, again) == 0 and "all 37 answers are in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_a_server_ends_goes_on_where_it_was(make_recipe, server, tmp_path):
    whole = trained_by(asking(make_recipe, server, "whole", {"cache": {"path": str(tmp_path / "one")}}))
    server.asked.clear()
    server.misbehave = lambda answer, number: answer if number < 30 else 503
    recipe = asking(make_recipe, server, "cut", {"cache": {"path": str(tmp_path / "two")}})
    with pytest.raises(UserError, match="answers 503"):
        run(recipe)
    saved = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert saved and saved[0] != "step-0"
    server.misbehave = lambda answer, number: answer
    moved = FakeServer(server.models, server.decode)  # at another address
    moved.parents = server.parents
    run(asking(make_recipe, moved, "cut", {"cache": {"path": str(tmp_path / "two")}}), resume=True)
    moved.stop()
    assert distance(whole, weights(tmp_path / "cut")) == 0


@pytest.mark.parametrize(("name", "value"), [("model", "base"), ("top_k", 9)])
def test_another_teacher_is_no_resumed_run(make_recipe, server, tmp_path, name, value):
    run(asking(make_recipe, server, train__max_steps=2))
    with pytest.raises(UserError, match=f"teacher.{name}"):
        run(asking(make_recipe, server, teacher={name: value}, train__max_steps=2), resume=True)


def test_the_next_steps_answers_are_asked_for_while_this_one_trains(make_recipe, server, monkeypatch):
    """What each call of the teacher finds lacking: after the first step nothing, once the source is a step ahead."""
    waited, expect, announced = [], ServedTeacher.__call__, []

    def call(self, batch):
        waited.append([one.content_hash in self._pending or not self.answers.missing([one.content_hash]) for one in batch.examples])
        return expect(self, batch)

    built = ExampleSource._built
    monkeypatch.setattr(ServedTeacher, "__call__", call)
    monkeypatch.setattr(ExampleSource, "_built", lambda self, done: (announced.append(1), built(self, done))[1])
    run(asking(make_recipe, server, data__validation_fraction=0.0))
    assert announced and all(all(one) for one in waited)


@pytest.mark.slow
def test_llmkd_cache_asks_a_server_and_the_run_then_needs_none(make_recipe, server, tmp_path, capsys):
    whole = trained_by(asking(make_recipe, server, "whole"))
    kept = {"cache": {"path": str(tmp_path / "kept")}}
    server.asked.clear()
    (folder,) = cache(asking(make_recipe, server, "cached", kept))
    assert len(server.asked) == 38 and (folder / "cache.json").exists()
    assert cache(asking(make_recipe, server, "cached", kept)) == [folder] and len(server.asked) == 38
    server.stop()
    assert distance(whole, trained_by(asking(make_recipe, server, "a", kept))) == 0
    alone = trained_by(make_recipe("b", **(HELD_OUT | {"teacher": {"cache": {"path": str(folder)}}})))
    assert distance(whole, alone) == 0
    with pytest.raises(UserError, match=r"teacher.top_k: found 5, and .* was made with 8"):
        run(asking(make_recipe, server, "c", kept | {"top_k": 5}))


def test_a_server_beside_a_live_teacher_and_rows_of_each(make_recipe, server, world, tmp_path):
    """Two sources, one asked at the server; as the same two with its cache."""
    sources = [{"path": str(world / "train.jsonl"), "teacher": "far"}, {"path": str(world / "held.jsonl")}]
    near = {"name": "near", "model": str(world / "teacher")}
    far = {"name": "far", "server": server.url, "model": "adapter", "top_k": K}
    common = {"data__train": sources, "train__max_steps": 3, "validation__teacher_check": 0}
    written = make_recipe(
        "w",
        **(common | {"teacher": [near, {"name": "far", "model": str(world / "adapter"), "cache": {"path": str(tmp_path / "k"), "k": K}}]}),
    )
    cache(written)
    from_cache = trained_by(make_recipe("a", **(common | {"teacher": [near, {"name": "far", "cache": {"path": str(tmp_path / "k")}}]})))
    assert distance(from_cache, trained_by(make_recipe("b", **(common | {"teacher": [near, far]})))) < 1e-6


@pytest.mark.slow
def test_a_stream_and_packed_rows_are_asked_one_example_at_a_time(make_recipe, server, tmp_path):
    plain = trained_by(asking(make_recipe, server, "plain", data__validation_fraction=0.0))
    asked = {json.dumps(one["prompt"]) for one in server.asked}
    server.asked.clear()
    other = {"cache": {"path": str(tmp_path / "other")}}
    packed = trained_by(asking(make_recipe, server, "packed", other, data__validation_fraction=0.0, data__packing=True))
    assert distance(plain, packed) < 1e-5 and {json.dumps(one["prompt"]) for one in server.asked} == asked
    run(asking(make_recipe, server, "stream", data__validation_fraction=0.0, data__streaming=True, train__max_steps=2))


@pytest.mark.slow
def test_two_processes_each_ask_for_their_own_and_end_as_one(server, world, tmp_path):
    ends = {}
    for name, start in (("one", lambda words: main(["train", *words])), ("two", lambda words: train_on_two(words).returncode)):
        server.asked.clear()
        teacher = {"server": server.url, "model": "adapter", "top_k": K, "cache": {"path": str(tmp_path / f"{name}-answers")}}
        recipe = plain_recipe(world, tmp_path / name) | {"teacher": teacher, "validation": {"teacher_check": 0}}
        recipe["data"]["validation_fraction"], recipe["train"]["epochs"] = 0.2, 2
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        assert start(["--config", str(tmp_path / f"{name}.yaml")]) == 0
        ends[name] = weights(tmp_path / name)
        assert len(server.asked) == 38 and len({json.dumps(one["prompt"]) for one in server.asked}) == 37
    assert distance(ends["one"], ends["two"]) < 1e-9 and len(list((tmp_path / "two-answers").glob("*.bin"))) == 2


@pytest.mark.slow
def test_what_the_student_writes_is_asked_too(make_recipe, server):
    run(asking(make_recipe, server, "data", data__validation_fraction=0.0, train__max_steps=5))
    of_the_data = {json.dumps(one["prompt"]) for one in server.asked}
    server.asked.clear()
    written = {"on_policy": {"share": 1.0, "max_new_tokens": 3}, "data__validation_fraction": 0.0, "train__max_steps": 2}
    run(asking(make_recipe, server, "written", **written))
    new = {json.dumps(one["prompt"]) for one in server.asked} - of_the_data
    assert len(of_the_data) == 37 and 0 < len(new) <= 16


def test_the_recipe_that_is_written_down_reads_back_and_holds_the_servers_name_as_it_is(make_recipe, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OF_TESTS", "sk-very-secret")
    server.key = "sk-very-secret"
    recipe = asking(make_recipe, server, teacher={"api_key_env": "OF_TESTS"}, train__max_steps=2)
    run(recipe)
    assert loader.load_recipe(tmp_path / "out" / "recipe.yaml") == recipe
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["teacher"]["model"] == "adapter"
    for path in (*tmp_path.rglob("*"),):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes(), path


def test_a_name_that_is_also_a_folder_beside_the_recipe_stays_a_name(world, tmp_path):
    (tmp_path / "adapter").mkdir()
    data = plain_recipe(world, tmp_path / "out") | {"teacher": {"server": "http://127.0.0.1:9", "model": "adapter"}}
    (tmp_path / "r.yaml").write_text(json.dumps(data))
    assert loader.load_recipe(tmp_path / "r.yaml", check_inputs=True).teacher.model == "adapter"


REFUSED = {
    "server: 'ftp://x'": "teacher.server: found ftp://x, expected http://host:port",
    "server: 'localhost:8000'": "teacher.server: found localhost:8000, expected http://host:port",
    "server: 'http://me:secret@x:1'": "teacher.server: holds a name or a password (not shown)",
    "server: 'http://x:1/?key=secret'": "teacher.server: has a ? or a # (what follows it is not shown)",
    "server: 'http://x:99999'": "teacher.server: has no right port or host",
    "api: vllm, model: m": "teacher.api: set without a server; name the server (teacher.server: http://host:port), or leave this out",
    "top_k: 8, model: m": "teacher.top_k: set without a server; name the server (teacher.server: http://host:port), or leave this out; of a cache it is cache.k",
    "server: 'http://x:1', api: tgi": "teacher.api: found 'tgi', expected vllm or sglang",
    "server: 'http://x:1', top_k: 0": "teacher.top_k: found 0",
    "server: 'http://x:1', api_key_env: sk-secret": "teacher.api_key_env: is no name of an environment variable (what was found is not shown)",
    "server: 'http://x:1', dtype: float32": "teacher.dtype: set with a server, which loads the model itself",
    "server: 'http://x:1', merge_adapter: true": "teacher.merge_adapter: set with a server",
    "server: 'http://x:1', quantization: {}": "teacher.quantization: set with a server",
    "server: 'http://x:1', cache: {path: c, kind: hidden}": "teacher.cache.kind: found hidden, and a server gives its most likely tokens only",
    "server: 'http://x:1', top_k: 8, cache: {path: c, k: 9}": "teacher.cache.k: found 9, and teacher.top_k is 8",
    "server: 'http://x:1', cache: {path: c, seed: 1}": "teacher.cache.seed: set with a server",
}
REFUSED_WITH = {
    "features: {}": "teacher.server: a server gives no hidden states of inner layers",
    "attention: {}": "loss.attention: set with teacher.server, and a server gives nothing of the teacher's attention",
    "target_weights: {by: divergence}": "loss.target_weights.by: found divergence, which needs the teacher's whole distribution, and a server gives",
    "target_weights: {by: teacher_entropy}": "loss.target_weights.by: found teacher_entropy, which needs the teacher's whole distribution",
}


@pytest.mark.parametrize("teacher", REFUSED)
def test_settings_of_a_server_that_are_wrong_are_refused(world, tmp_path, teacher):
    data = plain_recipe(world, tmp_path / "out") | {"teacher": yaml.safe_load(f"{{{teacher}}}")}
    (tmp_path / "r.yaml").write_text(json.dumps(data))
    with pytest.raises(UserError) as info:
        loader.load_recipe(tmp_path / "r.yaml")
    assert REFUSED[teacher] in str(info.value) and "secret" not in str(info.value)


@pytest.mark.parametrize("loss", REFUSED_WITH)
def test_what_a_server_cannot_give_is_refused_by_name(world, tmp_path, loss):
    data = plain_recipe(world, tmp_path / "out") | {"teacher": {"server": "http://x:1"}, "loss": yaml.safe_load(f"{{{loss}}}")}
    (tmp_path / "r.yaml").write_text(json.dumps(data))
    with pytest.raises(UserError) as info:
        loader.load_recipe(tmp_path / "r.yaml")
    assert REFUSED_WITH[loss] in str(info.value)
