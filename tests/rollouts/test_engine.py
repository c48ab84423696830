"""A server that writes in training: the run is that of the model in this process, and every way in which a server may be another one is noticed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmkd.config.engine import Engine
from llmkd.errors import UserError
from llmkd.rollouts.engine import EngineWriter, prefix_weights
from llmkd.rollouts.own_log_probs import scores
from llmkd.rollouts.pushed_adapter import PushedAdapter
from llmkd.rollouts.sampling import Sampling
from llmkd.servers import client
from llmkd.servers.client import Server
from llmkd.servers.logprobs import ServedModel
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.kit.models import load_student
from tests.kit.processes import train_on_two
from tests.kit.served import AdapterHost, serving

PROMPTS, SAMPLING = [[5, 9, 70], [8, 8, 12, 40], [7, 30]], Sampling(1.0, 5, 3)
ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.02)


@pytest.fixture(scope="module")
def host(world):
    return AdapterHost(world / "student")


@pytest.fixture
def engine(host):
    with serving({"base": host.base}) as server:
        server.load = host
        yield server


def asking(server, engine: dict | None = None, on_policy: dict | None = None, **more) -> dict:
    """Settings of a run whose answers that server writes."""
    own = {"share": 1.0, "max_new_tokens": 4, "engine": {"server": server.url, "patience": 0.0} | (engine or {})} | (on_policy or {})
    return {"on_policy": own, "train__max_steps": 4, "validation__teacher_check": 0, "checkpoint__every": 1} | more


def steps(out: Path) -> list[dict]:
    return [one for one in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "written" in one]


def test_a_run_is_that_of_the_model_in_this_process_and_leaves_nothing_behind(trained, engine, tmp_path):
    """With the most likely tokens, which both write; the server is started anew in the middle."""
    greedy = {"on_policy": {"temperature": 0.0}, "student__lora__dropout": 0.2, "train__max_steps": 2}

    def once(answer, number):
        if number == 16 + 8 + 3:  # after the check's two times 8 in the second step
            engine.restart()
        return answer

    engine.misbehave = once
    served = trained("served", **asking(engine, {"patience": 60.0}, **greedy))
    local = trained("local", **asking(engine, **(greedy | {"on_policy": greedy["on_policy"] | {"engine": "local"}})))
    assert distance(served, local) < 1e-9
    found = steps(tmp_path / "served")
    assert [one["written_staleness"] for one in found] == [0, 0] and max(one["written_apart"] for one in found) < 1e-9
    assert [(a["written"], a["kd"]) for a in found] == [(b["written"], pytest.approx(b["kd"])) for b in steps(tmp_path / "local")]
    assert len(engine.loaded) == 5 and len({*engine.loaded}) == 4, "two of the check, one a step, and one after the server was started anew"
    assert [*engine.models] == ["base"] and not (tmp_path / "served" / "engine").exists()
    asked = engine.asked[16:]
    assert all(one["add_special_tokens"] is False and one["return_token_ids"] and one["logprobs"] == 1 for one in asked)
    assert {one["model"] for one in asked} == {*engine.loaded[2:]} and len({one["seed"] for one in asked}) == 2 * 8


def test_an_older_student_writes_between_two_pushes_and_is_corrected_where_asked(trained, engine, tmp_path):
    trained("out", **asking(engine, {"push_every": 2, "importance": 1.5}, train__micro_batch_size=8, train__max_steps=3))
    found = steps(tmp_path / "out")
    assert [one["written_staleness"] for one in found] == [0, 1, 0]
    assert [one["written_apart"] > 1e-6 for one in found] == [False, True, False]
    assert [one["written_weight"] == pytest.approx(1, abs=1e-9) for one in found] == [True, False, True]
    assert all("kd_weight" not in one and one["written_weight"] <= 1.5 for one in found)
    with pytest.raises(UserError, match=r"on_policy.engine.push_every: 2 in the run"):
        trained("out", True, **asking(engine, {"push_every": 3, "importance": 1.5}, train__max_steps=3))


@pytest.mark.slow
def test_what_a_killed_run_has_left_is_taken_away_and_the_next_goes_on(trained, make_recipe, engine, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(EngineWriter, "close", lambda self: None)
        engine.misbehave = lambda answer, number: answer if number < 16 + 8 + 5 else 503
        with pytest.raises(UserError, match=r"on_policy.engine.server: http.* answers 503"):
            trained("out", **asking(engine, train__max_steps=2))
    left = [name for name in engine.models if name != "base"]
    assert len(left) == 1 and (tmp_path / "out" / "engine" / left[0] / "adapter_config.json").exists()
    engine.misbehave, engine.models["llmkd-of-another-run"] = lambda answer, number: answer, engine.models["base"]
    engine.parents["llmkd-of-another-run"] = "base"
    trained("out", True, **asking(engine, train__max_steps=2))
    assert [*engine.models] == ["base", "llmkd-of-another-run"] and len(steps(tmp_path / "out")) == 2


# ---- a server that is not what it should be: before the first step


@pytest.fixture
def student(make_recipe):
    recipe = make_recipe()
    return load_student(recipe.student, 640, "cpu", recipe.seed)


def writer(server, student, folder: Path, **settings) -> EngineWriter:
    adapter = PushedAdapter(Server(server.url, "on_policy.engine.server", patience=0.0), student, folder, "run")
    return EngineWriter(Engine(server=server.url, **settings), adapter, ServedModel("base"), {1}, 640, ALONE)


def changed_choice(**changes):
    return lambda answer, number: {**answer, "choices": [answer["choices"][0] | changes]}


def reading_others(answer, number):
    first, *rest = answer["choices"][0]["prompt_token_ids"]
    return changed_choice(prompt_token_ids=[first + 1, *rest])(answer, number)


def warmer(models):
    """The same, as if another temperature or other weights were served."""
    return lambda ids: (models(ids) / 2).log_softmax(-1)


BEFORE = {
    "gives its answers other log-probabilities than the student": lambda s: (
        s.models.update(base=warmer(s.models["base"])) or setattr(s, "load", lambda path, load=s.load: warmer(load(path)))
    ),
    "does not write with the adapter that is pushed to it": lambda s: setattr(s, "load", lambda path: s.models["base"]),
    "gives no log-probability of each token that it wrote": lambda s: setattr(s, "misbehave", changed_choice(logprobs=None)),
    "gives what are no log-probabilities of what it wrote": lambda s: setattr(
        s, "misbehave", changed_choice(logprobs={"token_logprobs": [0.5] * 5})
    ),
    "leaves the end token 1 out of the ids that it wrote": lambda s: setattr(
        s, "misbehave", changed_choice(token_ids=[7], finish_reason="stop", stop_reason=1, logprobs={"token_logprobs": [-1.0]})
    ),
    r"read the token \d+ at place 1, and \d+ was asked": lambda s: setattr(s, "misbehave", reading_others),
    "start it with --max-lora-rank 4 or more": lambda s: setattr(s, "load", refusing("LoRA rank 4 is greater than max_lora_rank 2.")),
    "name a folder that it sees under the same path as on_policy.engine.adapters": lambda s: setattr(
        s, "load", refusing("Loading lora failed: No adapter found for /x")
    ),
}


def refusing(text: str):
    def load(path):
        raise ValueError(text)

    return load


@pytest.mark.parametrize("said", BEFORE)
def test_another_server_than_the_students_is_refused_before_the_first_step(engine, student, tmp_path, said):
    before = {name: p.clone() for name, p in student.trainable().items()}
    BEFORE[said](engine)
    with pytest.raises(UserError, match=f"on_policy.engine.server: .*{said}"):
        writer(engine, student, tmp_path).check(PROMPTS, SAMPLING, 0)
    assert all((p == before[name]).all() for name, p in student.trainable().items()), "the adapter is as it was"


def test_the_right_one_is_not_refused_and_the_students_adapter_is_as_it_was(engine, student, tmp_path, capsys):
    before = {name: p.clone() for name, p in student.trainable().items()}
    one = writer(engine, student, tmp_path)
    one.check(PROMPTS, SAMPLING, 0)
    assert "writes as base with the student's adapter" in capsys.readouterr().err
    assert all((p == before[name]).all() for name, p in student.trainable().items()) and one.pushed is None
    one.close()


def test_what_it_says_later_is_watched_too(engine, student, tmp_path):
    one = writer(engine, student, tmp_path, push_every=2)
    one.start_step(1)
    right = one.write(PROMPTS, [1, 2, 3], SAMPLING)
    assert [answer.staleness for answer in right] == [0, 0, 0] and all(answer.apart < 1e-9 for answer in right)
    name = one.model.name
    engine.models[name] = warmer(engine.models[name])
    with pytest.raises(UserError, match=r"by \S+ nats on average \(on_policy.engine.tolerance: 0.1\)"):
        one.write(PROMPTS, [1, 2, 3], SAMPLING)
    one.start_step(2)  # no push: text of an older student is expected to be apart
    assert one.model.name == name and min(answer.apart for answer in one.write(PROMPTS, [1, 2, 3], SAMPLING)) > 0.1
    one.start_step(3)
    assert one.model.name != name and one.write(PROMPTS, [1, 2, 3], SAMPLING)[0].apart < 1e-9
    one.close()


REFUSED_AT_ONCE = {
    r"refuses the connection; start it": lambda s: s.stop(),
    r"loads no adapters while it runs; start vLLM with --enable-lora": lambda s: setattr(s, "load", None),
    r"serves base with 20 tokens, but the longest prompt with its answer may have \d+; start it with a larger --max-model-len": lambda s: (
        setattr(s, "positions", 20)
    ),
    r"and \S+ serves several models; name one of: base, other": lambda s: s.models.update(other=None),
}


@pytest.mark.parametrize("said", REFUSED_AT_ONCE)
def test_a_server_that_cannot_do_it_is_refused_before_a_model_is_loaded(make_recipe, engine, said, monkeypatch):
    REFUSED_AT_ONCE[said](engine)
    monkeypatch.setattr("llmkd.training.build.load_models", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=rf"on_policy.engine\.\w+: .*{said}"):
        run(make_recipe(**asking(engine)))


# ---- numbers


def test_importance_weights_are_the_ratio_of_the_tokens_before():
    """By hand: ratios 2, 1/4, 3 of the first three of four tokens."""
    log_ratio = np.log([2.0, 0.25, 3.0, 7.0])
    assert prefix_weights(log_ratio, 100.0) == pytest.approx((1.0, 2.0, 0.5, 1.5))
    assert prefix_weights(log_ratio, 1.25) == pytest.approx((1.0, 1.25, 0.5, 1.25)), (
        "each is cut, and what follows goes on from what it was"
    )
    assert prefix_weights(np.array([800.0, -800.0]), 3.0) == pytest.approx((1.0, 3.0))


def test_the_students_own_scores_are_those_of_a_plain_forward_pass(student):
    import torch

    answers = [(3, 1), (4, 5, 6, 7, 8), (1,)]
    student.train()
    found = scores(student, PROMPTS, answers, 2)
    assert student.training
    student.eval()
    for prompt, answer, own in zip(PROMPTS, answers, found, strict=True):
        with torch.no_grad():
            q = student.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert own.log_p_T == pytest.approx(q[range(len(answer)), list(answer)].numpy(), abs=1e-12)
        assert own.entropy_T == pytest.approx(-(q.exp() * q).sum(-1).numpy(), abs=1e-12)


@pytest.mark.slow
def test_two_processes_ask_for_a_part_each_and_end_at_what_one_does(trained, engine, world, tmp_path):
    greedy = {"on_policy": {"temperature": 0.0}, "train__max_steps": 2, "train__micro_batch_size": 1}
    alone = trained("one", **asking(engine, **greedy))
    recipe = plain_recipe(world, tmp_path / "two") | {"on_policy": asking(engine, **greedy)["on_policy"]}
    recipe["train"] |= {"max_steps": 2, "micro_batch_size": 1}
    recipe["validation"], recipe["teacher"]["shard"] = {"teacher_check": 0}, "full"
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    done = train_on_two(["--config", str(tmp_path / "two.yaml")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(weights(tmp_path / "two"), alone) < 1e-12 and [*engine.models] == ["base"]
