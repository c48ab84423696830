"""Packed rows: the same logits, losses and gradients as the same examples apart, in training mode too."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.batch import View
from llmkd.data.collate import collate
from llmkd.data.examples import TokenExamples
from llmkd.errors import UserError
from llmkd.losses.divergences import reverse_kl
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import checked
from llmkd.models.packing_detection import no_packing_detection
from llmkd.signals import Dense
from tests.conftest import distance
from tests.kit.families import tiny

LENGTHS = [9, 2, 14, 5, 1, 7]
FAMILIES = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 gpt_neox gpt2 cohere granite olmo2 smollm3 stablelm nanochat".split()


def examples() -> TokenExamples:
    rng = np.random.default_rng(0)
    lengths = [n + 1 for n in LENGTHS]
    marks = rng.random(sum(lengths)) < 0.6
    offsets = np.cumsum([0, *lengths])
    marks[offsets[:-1]] = False
    marks[offsets[1:] - 1] = True  # the last token of each
    return TokenExamples(rng.integers(0, 90, sum(lengths), np.int32), marks, offsets, np.arange(len(lengths)))


def test_a_packed_batch_holds_the_same_examples_without_padding():
    encoded, which = examples(), [3, 0, 4, 2]
    apart, packed = collate(encoded, which, 0), collate(encoded, which, 0, packing=True)
    assert packed.student.inputs["input_ids"].shape == (1, sum(LENGTHS[i] for i in which))
    assert packed.student.inputs["position_ids"].tolist() == [[p for i in which for p in range(LENGTHS[i])]]
    assert packed.labels_N.tolist() == apart.labels_N.tolist() and packed.example_N.tolist() == apart.example_N.tolist()
    ids = packed.student.inputs["input_ids"].flatten()[packed.student.rows_N]
    assert ids.tolist() == apart.student.inputs["input_ids"].flatten()[apart.student.rows_N].tolist()
    nothing = collate(encoded, [], 7, packing=True)
    assert nothing.num_targets == 0 and nothing.student.inputs["input_ids"].tolist() == [[7]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_equal_unpacked_ones(family, checkpointing):
    """In training mode and with the model's own default of use_cache, which would leak if it were not switched off."""
    single = {"gemma2", "gemma3_text", "cohere"}  # attention or norms in float32
    model = LanguageModel(tiny(family, attention_dropout=0.0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=True), 90)
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    encoded, results = examples(), []
    teacher = LanguageModel(tiny("llama"), 90).requires_grad_(False).eval()
    for packing in (False, True):
        model.zero_grad(set_to_none=True)
        batch = collate(encoded, list(range(len(LENGTHS))), 0, packing)
        with torch.no_grad():
            signal = Dense(teacher.hidden(batch.teacher), teacher.head)
        hidden_NH = model.hidden(batch.student)
        total, rows = fused_loss(hidden_NH, model.head, batch.labels_N, Objective(0.5, 2.0, reverse_kl), signal, chunk=5)
        total.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((model.head.logits(hidden_NH.detach()), rows["ce"], rows["kd"], grads))
    (apart, packed), tolerance = results, 1e-4 if family in single else 1e-10
    for a, b in zip(apart[:3], packed[:3], strict=True):
        assert_close(b, a, rtol=tolerance, atol=tolerance)
    assert apart[3].keys() == packed[3].keys()
    largest = max(g.abs().max().item() for g in apart[3].values())
    for name, grad in apart[3].items():
        assert_close(packed[3][name], grad, rtol=tolerance, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}")


def test_a_packed_run_ends_with_the_weights_of_an_unpacked_one(trained):
    assert distance(trained("packed", **{"data.packing": True}), trained("apart")) < 1e-12


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_run_whose_model_leaks_is_refused_before_it_writes(world, make_recipe, tmp_path, who):
    from llmkd.data.reading.skills import tokenizer
    from llmkd.training.run import run

    tiny("bloom", vocab_size=640).save_pretrained(tmp_path / "bloom")
    tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match=rf"data.packing: in {who}.model \(bloom\) packed examples see one another"):
        run(make_recipe(**{"data.packing": True, f"{who}.model": str(tmp_path / "bloom")}))
    assert not (tmp_path / "out").exists()


def test_a_packed_row_is_no_longer_than_a_model_takes():
    """GPT-Neo's mask is a table of 128 x 128 here; where positions start again is of no concern to it."""

    for family, tokens in (("gpt_neo", 128), ("llama", 512)):
        checked(LanguageModel(tiny(family), 90), "student.model", tokens)
    with pytest.raises(UserError, match=r"\(gpt_neo\) a packed row may hold 128 tokens, but this run's rows may have 129 .*; lower that"):
        checked(LanguageModel(tiny("gpt_neo"), 90), "student.model", 129)


def test_a_pass_of_another_thread_does_not_change_what_transformers_is_told():
    """Passes that overlap: neither ends the other's, and packed rows are found while and after rows of one example are read."""
    from transformers import masking_utils

    rows, packed = (
        View({"input_ids": torch.ones(1, 2)} | more, torch.tensor([0])) for more in ({}, {"position_ids": torch.tensor([[0, 0]])})
    )
    found = lambda: masking_utils.find_packed_sequence_indices(torch.tensor([[0, 0]]))  # noqa: E731
    first, second = no_packing_detection(rows), no_packing_detection(rows)
    with ThreadPoolExecutor(1) as pool:
        first.__enter__()
        pool.submit(second.__enter__).result()
        with no_packing_detection(packed):
            assert found() is not None
        assert found() is None and pool.submit(found).result() is None
        first.__exit__(None, None, None)
        assert found() is not None
        pool.submit(second.__exit__, None, None, None).result()
        assert found() is not None and pool.submit(found).result() is not None
