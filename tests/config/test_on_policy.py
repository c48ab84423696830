"""on_policy: what contradicts it, in one line each."""

import pytest

from llmkd.config import loader
from llmkd.errors import UserError

SERVER = {"on_policy.engine.server": "http://h:1"}
LONG = {"on_policy.long_horizon": {}, "loss.divergence": "reverse_kl"}
EXACT = {"on_policy.long_horizon.rewards": "exact"}
SEVERAL = {"teacher": [{"model": "a"}, {"model": "b"}]}
TEXT = {"path": "t.jsonl", "format": "text"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "on_policy.share: the student is to write, but there is no teacher for what is written; give teacher.model"),
        ({"loss.kd_ratio": 0.0}, "on_policy.share: .*loss.kd_ratio 0 the student learns nothing from that; raise kd_ratio"),
        (
            {"teacher.cache": {"kind": "hidden", "path": "c"}},
            "on_policy.share: .* teacher is a cache, which knows the data's answers alone",
        ),
        ({"data.streaming": True, "train.max_steps": 3}, "on_policy.share: .*data.streaming is true"),
        ({"data.train_on_input": True}, "on_policy.share: .*with data.train_on_input prompts are not known"),
        ({"on_policy.max_new_tokens": 256}, r"on_policy.max_new_tokens: found 256, which leaves no room for a prompt within .*\(256\)"),
        (
            {"data.max_length": 128},
            r"on_policy.max_new_tokens: not given, and the default is 128, which leaves no room .*\(128\); set it to 64, say, or raise data.max_length",
        ),
        ({"data.train.loss": {"kd": 0.0}}, "on_policy.share: .*loss.kd of every source is 0"),
        ({"data.train": TEXT}, "on_policy.prompt_tokens: not given, but data.train has format text"),
        ({"data.train": [TEXT, TEXT]}, "on_policy.prompt_tokens: not given, but data.train.0 has format text"),
        ({"on_policy.prompt_tokens": 8}, "on_policy.prompt_tokens: found 8, but no source has format text or tokens"),
        ({"on_policy.temperature": 0.0, "on_policy.top_k": 3}, "on_policy.top_k: set with temperature 0"),
        ({"on_policy.temperature": 0.0, "on_policy.top_p": 0.9}, "on_policy.top_p: set with temperature 0"),
        ({"on_policy.temperature": 0.0, "on_policy.min_p": 0.1}, "on_policy.min_p: set with temperature 0"),
        ({"on_policy.temperature": 0.0, "on_policy.samples": 2}, "on_policy.samples: found 2 with temperature 0"),
        ({"on_policy.share": 1.5}, "on_policy.share: found 1.5, expected"),
        ({"on_policy.share": {"from": 0, "to": 2}}, "on_policy.share.to: found 2, expected a number 0 to 1"),
        ({"on_policy.share": {"from": 0, "to": 1, "steps": 9}, "train.max_steps": 5}, "on_policy.share.steps: found 9, more than"),
        ({"on_policy.top_p": 0.0}, "on_policy.top_p: found 0.0, expected"),
        (
            {"on_policy.long_horizon": {}},
            "on_policy.long_horizon: set with forward_kl, .*use reverse_kl, or set on_policy.long_horizon.rewards: exact",
        ),
        (LONG | {"loss.temperature": 2.0}, "on_policy.long_horizon: set with another loss.temperature than 1, .*rewards: exact"),
        (LONG | {"on_policy.top_p": 0.9}, "on_policy.long_horizon: set with another sampling than from the student itself"),
        (LONG | {"on_policy.temperature": 0.5}, "on_policy.long_horizon: set with another sampling"),
        (
            LONG | {"on_policy.long_horizon": {"teacher_mix": 0.2, "mix_weights": "product"}, "loss.normalize": "weights"},
            "on_policy.long_horizon.mix_weights: found product with loss.normalize weights",
        ),
        (LONG | {"loss.target_weights": {"by": "position"}}, "on_policy.long_horizon: set with loss.target_weights, .*rewards: exact"),
        (EXACT | {"loss.target_weights": {"by": "confidence"}}, "on_policy.long_horizon: set with confidence, which may read the token"),
        (EXACT | {"loss.keep": 0.5}, "on_policy.long_horizon: set with loss.keep, which chooses targets by the whole answer"),
        (EXACT | SEVERAL | {"mixture.weights": "confidence"}, "on_policy.long_horizon: set with confidence, which weighs the teachers"),
        (LONG | SEVERAL | {"mixture.combine": "divergences"}, "on_policy.long_horizon: set with a sum of divergences, .*rewards: exact"),
        (
            LONG | {"teacher": {"server": "http://h:1"}},
            "on_policy.long_horizon: set with teacher.server, which lists the most likely tokens alone, .*rewards: exact",
        ),
        (
            EXACT | {"teacher": {"server": "http://h:1"}, "on_policy.long_horizon.teacher_mix": 0.2},
            "on_policy.long_horizon.teacher_mix: set with teacher.server",
        ),
        (LONG | {"data.train.divergence": "forward_kl"}, "on_policy.long_horizon: set with forward_kl in data.train"),
        (LONG | {"loss.keep": 0.5}, "on_policy.long_horizon: set with loss.keep"),
        (LONG | {"on_policy.share": 0.0}, "on_policy.long_horizon: set, but on_policy.share is 0"),
        (LONG | {"on_policy.long_horizon": {"gamma": 0.0}}, "on_policy.long_horizon.gamma: found 0.0, expected"),
        (LONG | {"on_policy.long_horizon.teacher_mix": 1.0}, "on_policy.long_horizon.teacher_mix: found 1.0, expected"),
        (LONG | {"on_policy.long_horizon.mix_weights": "product"}, "on_policy.long_horizon.mix_weights: found product without teacher_mix"),
        (
            LONG | {"on_policy.long_horizon.teacher_mix": 0.2, "teacher": [{"model": "a", "name": "a"}, {"model": "b"}]},
            "on_policy.long_horizon.teacher_mix: set with teacher.0.name, and tokens are drawn from one mixture for all",
        ),
        ({"on_policy.teacher_writes": 0.6}, "on_policy.teacher_writes: found 0.6 with a share of 0.5, and together they are more than all"),
        ({"on_policy.share": {"from": 1, "to": 0.2}, "on_policy.teacher_writes": 0.1}, "found 0.1 with a share of 1, and together"),
        (
            SEVERAL | {"on_policy.teacher_writes": 0.1, "mixture.weights": "confidence"},
            "on_policy.teacher_writes: set with confidence, which weighs the teachers by the token that is yet to be written",
        ),
        ({"on_policy.teacher_writes": 0.1, "teacher": {"server": "http://a:1"}}, "on_policy.teacher_writes: set with teacher.server"),
        (
            {"on_policy.share": 0.0, "on_policy.teacher_writes": 0.1, "teacher": None},
            "on_policy.teacher_writes: the teacher is to write, but there is no",
        ),
        (LONG | {"on_policy.replay": {}}, "on_policy.long_horizon: set with on_policy.replay; .*leave one of them out"),
        ({"on_policy.replay": {}, "on_policy.share": 0.0}, "on_policy.replay: set, but on_policy.share is 0"),
        (SERVER | {"on_policy.share": 0.0}, "on_policy.engine: set, but on_policy.share is 0"),
        ({"on_policy.share": {"adaptive": {}}}, "on_policy.share.adaptive: set without validation.every, and it rises at validations"),
        ({"on_policy.share": {"adaptive": {"step": 0.0}}}, "on_policy.share.adaptive.step: found 0.0, expected"),
        ({"on_policy.share": {"adaptive": {"eps": 0.1}}}, "on_policy.share.adaptive.eps: unknown setting"),
        ({"on_policy.share": {"adaptive": {}, "from": 0}}, "on_policy.share.from: unknown setting"),
        ({"on_policy.replay.ratio": "falling"}, "on_policy.replay.ratio: found 'falling', expected"),
        ({"on_policy.replay.ratio": 1.5}, "on_policy.replay.ratio: found 1.5, expected"),
        ({"on_policy.replay.ratio": {"from": 1, "to": 2}}, "on_policy.replay.ratio.to: found 2, expected a number 0 to 1"),
        ({"on_policy.replay.capacity": 0}, "on_policy.replay.capacity: found 0, expected"),
        ({"on_policy.replay.ratio": 1.0}, "on_policy.replay.ratio: found 1, at which no answer is drawn from the buffer; lower it, or"),
        (
            {"on_policy.share": {"adaptive": {"start": 0.8}}, "on_policy.teacher_writes": 0.5},
            "on_policy.teacher_writes: found 0.5 with a share of 0.8, and together they are more than all",
        ),
        ({"on_policy.share": {"adaptive": {"start": 1}}}, "on_policy.share.adaptive: set with nothing left to rise to: start or"),
        ({"on_policy.share": {"adaptive": {}}, "on_policy.teacher_writes": 1.0}, "on_policy.share.adaptive: set with nothing left to rise"),
        ({"on_policy.engine": "vllm"}, "on_policy.engine: found 'vllm', expected local, or a mapping of settings"),
        ({"on_policy.engine": {}}, "on_policy.engine.server: not given"),
        ({"on_policy.engine.server": "h:1"}, "on_policy.engine.server: found h:1, expected http://host:port"),
        ({"on_policy.engine.server": "http://me:secret@h:1"}, r"on_policy.engine.server: holds a name or a password \(not shown\)"),
        (SERVER | {"on_policy.engine.api": "sglang"}, "on_policy.engine.api: found 'sglang', expected vllm"),
        (SERVER | {"on_policy.engine.api_key_env": "sk-1"}, "on_policy.engine.api_key_env: is no name of an environment variable"),
        (SERVER | {"on_policy.engine.importance": 0.5}, "on_policy.engine.importance: found 0.5, expected a number >= 1"),
        (
            SERVER | {"on_policy.engine.push_evry": 2},
            "on_policy.engine.push_evry: unknown setting; did you mean on_policy.engine.push_every",
        ),
        (SERVER | {"student.method": "full"}, "on_policy.engine.server: set with student.method: full, which has no adapter"),
        (SERVER | {"student.layers": [0]}, "on_policy.engine.server: set with student.layers, whose base no server has"),
        (SERVER | {"student.lora.dora": True}, "on_policy.engine.server: set with student.lora.dora, which vLLM does not load"),
        (SERVER | {"student.lora.modules_to_save": ["lm_head"]}, "on_policy.engine.server: set with student.lora.modules_to_save"),
        (SERVER | {"on_policy.engine.importance": 2.0, "on_policy.top_p": 0.9}, "on_policy.engine.importance: set with another sampling"),
        (SERVER | LONG | {"on_policy.engine.importance": 2.0}, "on_policy.engine.importance: set with on_policy.long_horizon"),
        (SERVER | {"on_policy.engine.importance": 2.0, "on_policy.replay": {}}, "on_policy.engine.importance: set with on_policy.replay"),
        (SERVER | {"on_policy.share": 0.0, "on_policy.teacher_writes": 0.5}, "on_policy.engine.server: set, but on_policy.share is 0"),
        (
            SERVER | LONG | {"on_policy.long_horizon": {"teacher_mix": 0.2}},
            "on_policy.engine.server: set with on_policy.long_horizon.teacher_mix, and a server writes as the student alone",
        ),
        (SERVER | LONG | {"on_policy.engine.push_every": 2}, "on_policy.engine.push_every: found 2 with on_policy.long_horizon"),
        ({"on_policy.lmbda": 0.5}, "on_policy.lmbda: unknown setting; did you mean on_policy.share?"),
        ({"on_policy.lambda": 0.5}, "on_policy.lambda: unknown setting"),
    ],
)
def test_settings_that_contradict_are_refused(make_recipe, tmp_path, changes, message):
    make_recipe()
    with pytest.raises(UserError, match=message):
        loader.load_recipe(tmp_path / "recipe.yaml", {"on_policy.share": 0.5} | changes)


def test_a_share_of_0_takes_what_any_run_does(make_recipe):
    for changes in ({"teacher": None}, {"data__streaming": True, "train__max_steps": 3}, {"loss__kd_ratio": 0.0}):
        assert make_recipe(on_policy__share=0.0, **changes).on_policy.share == 0


@pytest.mark.parametrize("changes", [{"loss__kd_ratio": 0.0}, {"data__train__loss__kd": 0.0}])
def test_hidden_states_and_attention_teach_without_a_divergence(make_recipe, changes):
    for reads in ("loss__features", "loss__attention"):
        assert make_recipe(on_policy={}, **changes, **{reads: {"weight": 1.0}}).on_policy.share == 0.5


def test_the_long_horizon_goes_with_the_reverse_kl(make_recipe):
    found = make_recipe(on_policy={"long_horizon": {}}, loss__divergence="reverse_kl").on_policy.long_horizon
    assert found.gamma == 0.95 and found.length_normalized and found.rewards == "sampled"


def test_exact_rewards_go_with_what_the_divergence_goes_with(make_recipe):
    exact = {"long_horizon": {"rewards": "exact", "teacher_mix": 0.2}, "teacher_writes": 0.2}
    several = {"mixture__combine": "divergences", "loss__divergence": "generalized_jsd", "loss__normalize": "weights"}
    changing = {"loss__temperature": {"from": 4, "to": 1}, "loss__kd_ratio": {"from": 1, "to": 0.5}}
    weights = {"loss__target_weights": {"by": "student_entropy"}}
    teachers = [{"model": "a"}, {"model": "b", "weight": 2}]
    assert make_recipe(on_policy=exact, teacher=teachers, **several, **changing, **weights).loss.temperature["from"] == 4


def test_the_section_alone_is_half_of_the_examples(make_recipe):
    assert make_recipe(on_policy={}).on_policy.share == 0.5 and make_recipe().on_policy is None
