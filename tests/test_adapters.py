"""Adapters out of folders and into them: what was trained is what everyone reads back, or there is a refusal."""

import pytest
import torch
from families import tiny

from llmkd import models
from llmkd.data.skills import tokenizer
from llmkd.errors import UserError
from llmkd.export import export
from llmkd.recipe import Lora
from llmkd.recipe import Student as StudentSettings
from llmkd.recipe import Teacher as TeacherSettings

IDS = torch.arange(40).reshape(4, 10) * 13 % 640


def base(folder, family="llama", dtype=torch.float32, **changes):
    tiny(family, dtype=dtype, vocab_size=640, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def student(path, **changes) -> models.LanguageModel:
    return models.load_student(StudentSettings(model=str(path), **changes), 640, "cpu", 0)


def teacher(path) -> models.LanguageModel:
    return models.load_teacher(TeacherSettings(model=str(path)), 640, "cpu")


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Its trainable weights changed, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return getattr(model, "plain", model)(input_ids=IDS, use_cache=False).logits


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def by_peft(base_folder, config, folder):
    """An adapter that PEFT made, its values changed and saved; the logits that PEFT gives when it loads it again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config)
    torch.manual_seed(1)
    moved(get_peft_model(plain(base_folder), config)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return logits(PeftModel.from_pretrained(plain(base_folder), folder).eval())


def test_an_adapter_whose_tensors_peft_renames_is_read_back_in_full_by_all(tmp_path):
    """Laguna's checkpoints say shared_expert where its modules are shared_experts: PEFT would lose the adapters there."""
    from peft import PeftModel

    model = moved(student(base(tmp_path / "base", "laguna"), lora=Lora(rank=4)))
    expected = logits(model)
    models.save(model, tokenizer(), tmp_path / "ours", StudentSettings())
    model.model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "ours").eval()), expected)
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(teacher(tmp_path / folder)), expected)
        assert torch.equal(logits(student(tmp_path / folder).eval()), expected)
        assert not torch.allclose(expected, logits(plain(tmp_path / "base")), atol=0.1)
    torch.testing.assert_close(logits(plain(export(tmp_path / "ours"))), expected, rtol=1e-4, atol=1e-4)


TIED = {
    "trained tokens": ({"trainable_token_indices": [3, 5, 26, 39]}, True),
    "one copy of the embedding": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "one adapter on the embedding": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "one adapter on the head": ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, True),
    "two adapters": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "two copies": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "neither": ({}, True),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_is_merged_as_it_was_trained_and_stays_tied_where_it_may(tmp_path, kind):
    config, tied = TIED[kind]
    expected = by_peft(base(tmp_path / "base", tie_word_embeddings=True), config, tmp_path / "adapter")
    merged = plain(export(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings is tied
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is tied


def test_parameters_that_are_held_wider_than_the_rest_stay_so_when_merged(tmp_path):
    """DeepSeek-V3's router chooses experts by a bias around 5 in float32, whose differences bfloat16 would round away."""
    from transformers import AutoModelForCausalLM

    base(tmp_path / "wide", "deepseek_v3", n_routed_experts=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    bias = next(t for name, t in model.state_dict().items() if name.endswith("e_score_correction_bias"))
    assert bias.dtype == torch.float32
    bias.copy_(5 + torch.randn_like(bias) * 0.01)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    untrained = student(tmp_path / "base", lora=Lora(rank=4, target_modules=("o_proj",)))
    models.save(untrained, tokenizer(), tmp_path / "adapter", StudentSettings())
    merged, held = plain(export(tmp_path / "adapter")), plain(tmp_path / "base")
    assert torch.equal(logits(merged), logits(held))
    assert {n: t.dtype for n, t in merged.state_dict().items()} == {n: t.dtype for n, t in held.state_dict().items()}
    assert {n: t.dtype for n, t in merged.named_buffers()} == {n: t.dtype for n, t in held.named_buffers()}


def test_an_adapter_that_cannot_be_merged_is_a_refusal(tmp_path):
    by_peft(base(tmp_path / "base"), {"lora_bias": True}, tmp_path / "adapter")
    with pytest.raises(UserError, match="export: .* cannot be merged .*bias.*; use the adapter unmerged"):
        export(tmp_path / "adapter")


def test_a_folder_that_does_not_hold_what_was_saved_is_refused(tmp_path):
    from llmkd.merge import read_back

    model = plain(base(tmp_path / "base"))
    read_back(model, tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    with pytest.raises(UserError, match=r"export: 1 tensors, such as \['lm_head.weight'\], are not saved as they are"):
        read_back(model, tmp_path / "base")
