"""The local writer: a completion is a function of the weights, the prompt, its key and the sampling, and the model is left as it was."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmkd.models.language_model import LanguageModel
from llmkd.rollouts import writer as module
from llmkd.rollouts.sampling import Sampling
from llmkd.rollouts.writer import LocalWriter, text_key
from tests.kit.families import V, tiny

SAMPLING = Sampling(1.0, 8, 3)
PROMPTS = [[5], [4, 9, 3, 7, 8], [11, 12], [6, 6, 6, 9]]
KEYS = [text_key(1, name, 0) for name in "abcd"]


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return LanguageModel(tiny("llama"), V).eval()


def by_hand(model: LanguageModel, prompt: list[int], key: int, sampling: Sampling, ends: set[int]) -> list[int]:
    """A completion, one whole forward pass a token and explicit loops over the vocabulary."""
    ids = list(prompt)
    while len(ids) < len(prompt) + sampling.max_new_tokens and (len(ids) == len(prompt) or ids[-1] not in ends):
        with torch.no_grad():
            logits = model.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        bits = np.random.Philox(
            key=np.array([sampling.seed, key], np.uint64), counter=np.array([0, len(ids) - len(prompt), 0, 0], np.uint64)
        )
        weight = np.exp(logits / sampling.temperature)
        left = float(np.random.Generator(bits).random()) * weight.sum()
        token = 0
        while left >= weight[token]:
            left -= weight[token]
            token += 1
        ids.append(token)
    return ids[len(prompt) :]


def test_a_completion_is_that_of_loops_and_ends_with_its_end_token(llama):
    free = by_hand(llama, PROMPTS[1], KEYS[1], SAMPLING, set())
    ends = {free[3]}
    found = LocalWriter(llama, ends).write(PROMPTS, KEYS, SAMPLING)
    assert [list(one.ids) for one in found] == [by_hand(llama, *one, SAMPLING, ends) for one in zip(PROMPTS, KEYS, strict=True)]
    assert [one.finished for one in found] == [one.ids[-1] in ends for one in found] and found[1].finished


def test_it_depends_on_neither_order_nor_batch_nor_on_the_other_prompts(llama):
    whole = LocalWriter(llama, {7}).write(PROMPTS, KEYS, SAMPLING)
    for size, order in ((1, [2, 0, 3, 1]), (3, [3, 1]), (2, [1])):
        part = LocalWriter(llama, {7}, size).write([PROMPTS[i] for i in order], [KEYS[i] for i in order], SAMPLING)
        assert part == [whole[i] for i in order]
    again = LocalWriter(llama, {7}).write(PROMPTS, [text_key(2, name, 0) for name in "abcd"], SAMPLING)
    assert all(a != b for a, b in zip(again, whole, strict=True)), "another step writes another text"
    assert LocalWriter(llama, {7}).write([], [], SAMPLING) == []


def test_two_keys_of_one_prompt_are_two_samples(llama):
    keys = [text_key(1, "a", sample) for sample in range(3)]
    assert len(set(keys)) == 3 and all(0 <= key < 2**64 for key in keys)
    assert len({one.ids for one in LocalWriter(llama, ()).write([PROMPTS[0]] * 3, keys, SAMPLING)}) == 3
    with pytest.raises(ValueError, match="1 keys for 2 prompts"):
        LocalWriter(llama, ()).write(PROMPTS[:2], keys[:1], SAMPLING)


def test_the_entropy_is_the_mean_over_the_tokens_that_were_written(llama):
    sampling = Sampling(0.7, 4, 3)
    free = LocalWriter(llama, ()).write([PROMPTS[3]], [5], sampling)[0].ids
    long, short = LocalWriter(llama, {free[1]}).write([PROMPTS[0], PROMPTS[3]], [7, 5], sampling)
    assert len(short.ids) == 2 < len(long.ids), "one ends before the other"
    for prompt, one in ((PROMPTS[0], long), (PROMPTS[3], short)):
        with torch.no_grad():
            logits = llama.model(torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1].double()
        p = torch.softmax(logits, -1)
        assert one.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-5)


def test_the_adapter_that_trains_is_the_one_that_writes(llama):
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(llama.model), settings)
    ours = LanguageModel(peft, V).train()
    peft.gradient_checkpointing_enable()
    calls = []
    handle = peft.get_base_model().model.register_forward_hook(lambda m, args, kwargs, out: calls.append(kwargs), with_kwargs=True)
    found = LocalWriter(ours, {7}).write(PROMPTS, KEYS, SAMPLING)
    handle.remove()
    widths = [one["input_ids"].shape[1] for one in calls]
    assert widths.count(1) >= 6, "keys and values of earlier tokens are kept, also where layers are checkpointed"
    merged = LanguageModel(copy.deepcopy(peft).merge_and_unload(), V).eval()
    assert found == LocalWriter(merged, {7}).write(PROMPTS, KEYS, SAMPLING) != LocalWriter(llama, {7}).write(PROMPTS, KEYS, SAMPLING)
    assert ours.training and all(p.requires_grad == ("lora" in name) and p.grad is None for name, p in peft.named_parameters())


def test_out_of_memory_halves_the_batch_and_changes_no_text(llama, monkeypatch):
    expected, real, sizes = LocalWriter(llama, {7}).write(PROMPTS, KEYS, SAMPLING), module.generate, []

    def narrow(model, prompts, sampling, ends, size, **more):
        sizes.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, sampling, ends, size, **more)

    monkeypatch.setattr(module, "generate", narrow)
    assert LocalWriter(llama, {7}, 64).write(PROMPTS, KEYS, SAMPLING) == expected and sizes == [64, 2, 1]
    monkeypatch.setattr(module, "generate", lambda *args, **more: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        LocalWriter(llama, {7}, 64).write(PROMPTS, KEYS, SAMPLING)
