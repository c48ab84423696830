"""Adapters out of folders and into them: what was trained is what everyone reads back, or there is a refusal."""

import json
import shutil

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

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
