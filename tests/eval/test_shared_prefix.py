"""What all prompts of a task begin with is read once, and every log-likelihood is that of the prompt as a whole."""

import pytest
import torch

pytest.importorskip("lm_eval")
from llmkd_eval.harness.evaluate import evaluate
from llmkd_eval.harness.shared_prefix import LEAST, SharedPrefix

from tests.kit.families import V, tiny
from tests.kit.questions import likelihoods


def gap(model, most: int = 1000) -> float | None:
    """Largest difference of logits between prompts of several lengths after a shared prefix and the same prompts as a whole; None if it is not shared."""
    generator = torch.Generator().manual_seed(1)
    drawn = lambda n: torch.randint(3, V, (n,), generator=generator).tolist()  # noqa: E731
    same = drawn(LEAST + 8)
    prompts = [same + drawn(n) for n in (5, 9, 12)]
    prefix = SharedPrefix.of(model, prompts, 60, most)
    if prefix is None:
        return None
    assert prefix.tokens == same
    rest = [prompt[len(same) :] for prompt in prompts]
    found = prefix.logits(model, torch.tensor([one + [0] * (12 - len(one)) for one in rest]))
    with torch.no_grad():
        whole = [model(torch.tensor([prompt])).logits[0, len(same) :] for prompt in prompts]
    return max(float((found[i, : len(one)] - one).abs().max()) for i, one in enumerate(whole))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bloom", "gemma3_text", "mistral", "opt"])
def test_logits_after_a_shared_prefix_are_those_of_the_whole_prompt(family):
    """Windows of 8 tokens, shorter than the prefix, where the family has windows."""
    assert gap(tiny(family, sliding_window=8).eval()) < 1e-9


@pytest.mark.slow
def test_they_are_in_further_families():
    families = "qwen2 qwen3_moe phi phi3 gemma gemma2 falcon olmo2 smollm3 stablelm starcoder2 gpt_neox gptj mpt cohere2 granite deepseek_v3 mixtral"
    for family in [*families.split(), "llama4_text", "gpt_oss"]:
        assert gap(tiny(family).eval()) < 1e-5, family


def test_recurrent_states_long_prompts_and_short_beginnings_are_not_shared():
    llama, prompts = tiny("llama").eval(), [[5] * LEAST + [6, 7], [5] * LEAST + [8]]
    assert gap(tiny("mamba2").eval()) is None and gap(tiny("cpmant").eval()) is None
    assert gap(llama, most=59) is None and gap(llama, most=60) < 1e-9
    assert len(SharedPrefix.of(llama, prompts, 40, 60).tokens) == LEAST
    assert SharedPrefix.of(llama, [prompt[1:] for prompt in prompts], 40, 60) is None
    assert SharedPrefix.of(llama, prompts[:1], 40, 60) is None
    assert len(SharedPrefix.of(llama, [prompts[0], prompts[0]], 40, 60).tokens) == LEAST + 1  # a token of each is left


def test_models_that_encode_positions_by_the_length_of_what_they_read_share_nothing():
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0, "partial_rotary_factor": 1.0}
    for family, rope in (("phi3", {"rope_type": "longrope"} | factors), ("llama", {"rope_type": "dynamic", "factor": 2.0})):
        assert gap(tiny(family, rope_parameters=rope | {"rope_theta": 1e4}, original_max_position_embeddings=45).eval()) is None


def test_examples_of_a_task_are_read_once_with_the_same_log_likelihoods(base, tasks_dir, tmp_path, monkeypatch):
    """TruthfulQA's prompt begins with six examples. The log-likelihoods are those of the harness on whole prompts to 1e-9, in float64."""
    from llmkd_eval.harness.live_model import LiveModel

    widths, models, own = [], set(), LiveModel._model_call

    def call(self, inps, *more):
        widths.append(inps.shape[1])
        models.add(self)
        return own(self, inps, *more)

    monkeypatch.setattr(LiveModel, "_model_call", call)
    evaluate(base, ["truthfulqa_mc2"], tasks_dir=tasks_dir, out=tmp_path / "shared")
    shared = max(widths)
    assert [model.prefix for model in models] == [None], "the cache is not kept for longer than its task"
    widths.clear()
    monkeypatch.setattr(SharedPrefix, "of", lambda *_: None)
    evaluate(base, ["truthfulqa_mc2"], tasks_dir=tasks_dir, out=tmp_path / "whole")
    assert shared < max(widths) / 4
    for a, b in zip(likelihoods(tmp_path / "shared", "truthfulqa_mc2"), likelihoods(tmp_path / "whole", "truthfulqa_mc2"), strict=True):
        assert a == pytest.approx(b, abs=1e-9)
