"""Generation: transformers' own greedy text, sampling that is a function of seed, prompt and position alone, and a model left as it was."""

import math

import numpy as np
import pytest
import torch

from llmkd.errors import UserError
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import checked
from llmkd.rollouts.generate import Completion, generate, stops_of
from llmkd.rollouts.sampling import Sampling
from llmkd.rollouts.way import Way, way_of
from tests.kit.families import V, tiny

LENGTHS = (1, 2, 5, 9, 17, 3)
FAMILIES = {
    "llama": {},
    "gpt2": {"n_positions": 24, "max_position_embeddings": 24},  # learnt positions: none past the last one
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 30.0, "sliding_window": 6},
    "mamba": {},  # keeps no cache of keys and values
}


def prompts(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return LanguageModel(tiny("llama"), V).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers_on_each_prompt_alone(family):
    model, asked, whole = tiny(family, **FAMILIES[family]), prompts(), []
    for prompt in asked:
        room = min(14, (24 if family == "gpt2" else 128) - len(prompt))
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=room, do_sample=False, eos_token_id=-1, pad_token_id=0)
        whole.append(alone[0, len(prompt) :].tolist())
    ends = {whole[1][4], whole[3][6]}
    found = generate(LanguageModel(model, V).eval(), asked, Sampling(max_new_tokens=14), ends, batch_size=4)
    for text, one in zip(whole, found, strict=True):
        stop = next((n + 1 for n, token in enumerate(text) if token in ends), len(text))
        assert one == Completion(tuple(text[:stop]), text[stop - 1] in ends)
    assert sum(one.finished for one in found) >= 2


def test_each_model_is_run_in_the_best_way_in_which_it_is_right(llama, monkeypatch):
    assert way_of(llama) == Way(padded=True, cached=True)
    assert way_of(LanguageModel(tiny("mamba"), V).eval()) == Way(padded=True, cached=False)
    assert way_of(LanguageModel(tiny("gemma2"), V).eval()) == Way(padded=False, cached=True), (
        "eager attention makes NaN of a padded float64 row"
    )
    asked, greedy = prompts(), Sampling(max_new_tokens=6)
    expected = generate(llama, asked, greedy, {7})
    deaf = LanguageModel(tiny("llama"), V).eval()
    real = deaf.model.model.forward
    monkeypatch.setattr(deaf.model.model, "forward", lambda input_ids, use_cache: real(input_ids=input_ids, use_cache=False))
    assert generate(deaf, asked, greedy, {7}) == expected and way_of(deaf) == Way(padded=False, cached=False), (
        "it takes neither mask nor cache"
    )


def test_a_head_that_is_not_known_and_padding_columns_go_the_models_own_way(llama):
    asked, greedy = prompts(), Sampling(max_new_tokens=6)
    own = checked(LanguageModel(tiny("llama"), V).eval(), "student.model")
    own_forward = own.replaced(capabilities=type(own.capabilities)(own_forward=True))
    assert generate(own_forward, asked, greedy, {7}) == generate(llama, asked, greedy, {7})
    for narrow in (LanguageModel(llama.model, 20).eval(), LanguageModel(llama.model, 20).replaced(capabilities=own_forward.capabilities)):
        assert max(token for one in generate(narrow, asked, greedy, ()) for token in one.ids) < 20


def test_a_sample_depends_on_seed_prompt_and_position_and_not_on_the_batch(llama):
    sampling = Sampling(1.0, 10, 3)
    asked = [*prompts(), prompts()[2]]
    found = [generate(llama, asked, sampling, {7}, batch_size=size) for size in (1, 3, 7)]
    assert found[0] == found[1] == found[2]
    assert found[0][2] != found[0][6], "one prompt twice is two samples"
    assert generate(llama, asked, Sampling(1.0, 10, 4), {7}) != found[0]
    assert generate(llama, asked[:3], sampling, {7}) == found[0][:3], "later prompts change nothing"


def test_tokens_are_drawn_from_the_softmax_at_the_temperature(llama):
    asked = [prompts()[2]] * 3000
    with torch.no_grad():
        logits = llama.model(torch.tensor(asked[:1])).logits[0, -1]
    for temperature in (0.5, 2.0):
        expected = torch.softmax(logits / (temperature * 4), -1).numpy()  # flat enough to be counted
        drawn = generate(llama, asked, Sampling(temperature * 4, 1), (), batch_size=3000)
        share = np.bincount([one.ids[0] for one in drawn], minlength=V) / 3000
        assert np.abs(share - expected).max() < 4 * (0.25 / 3000) ** 0.5


def test_the_model_its_mode_and_the_random_state_are_as_before(llama):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    states = torch.random.get_rng_state(), np.random.get_state()[1].tobytes()
    llama.train()
    try:
        generate(llama, prompts(), Sampling(1.0, 3), ())
        assert llama.training and llama.model.training
    finally:
        llama.eval()
    assert torch.equal(states[0], torch.random.get_rng_state()) and states[1] == np.random.get_state()[1].tobytes()
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert not any(parameter.grad is not None for parameter in llama.parameters())


def test_dropout_is_off_and_checkpointed_layers_keep_their_cache():
    model = tiny("llama", attention_dropout=0.5)
    ours = LanguageModel(model, V).eval()
    quiet = generate(ours, prompts(), Sampling(max_new_tokens=6), ())
    model.gradient_checkpointing_enable()
    assert generate(ours.train(), prompts(), Sampling(max_new_tokens=6), ()) == quiet


def test_every_one_of_several_end_tokens_ends_an_answer_and_is_its_last(llama):
    free = generate(llama, prompts()[:2], Sampling(max_new_tokens=8), ())
    assert [len(one.ids) for one in free] == [8, 8] and not any(one.finished for one in free)
    ends = {free[0].ids[3], free[1].ids[5]}
    for one, whole in zip(generate(llama, prompts()[:2], Sampling(max_new_tokens=8), ends), free, strict=True):
        place = next(n for n, token in enumerate(whole.ids) if token in ends)
        assert one == Completion(whole.ids[: place + 1], True)


def test_generation_settings_of_the_model_do_not_leak_in(llama):
    free = generate(llama, prompts(), Sampling(max_new_tokens=6), ())
    settings = llama.model.generation_config
    settings.update(do_sample=True, temperature=9.0, top_k=2, repetition_penalty=9.0, eos_token_id=[int(free[0].ids[0]), 5])
    try:
        assert stops_of(llama) == {int(free[0].ids[0]), 5}
        assert generate(llama, prompts(), Sampling(max_new_tokens=6), ()) == free
    finally:
        settings.update(do_sample=False, temperature=1.0, top_k=50, repetition_penalty=1.0, eos_token_id=2)
    assert stops_of(llama) == {2}


def test_prompts_without_tokens_and_weights_that_are_nan_are_refused():
    model = LanguageModel(tiny("llama"), V).eval()
    with pytest.raises(ValueError, match="no token"):
        generate(model, [[3], []], Sampling(), ())
    model.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="logits are NaN"):
        generate(model, [[3]], Sampling(), ())
