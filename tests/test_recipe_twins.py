"""Both stages of every recipe run for two steps, with tiny random models of the same architectures and a few local rows.

What a recipe says stays as it is, except where its models and data lie and how long it runs.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from llmkd.config import loader
from llmkd.config.fields import as_tuple
from llmkd.data.reading.skills import tokenizer
from llmkd.training.run import run
from tests.test_recipes import REPO, STAGED

FOLDERS = sorted({path.parent for path in STAGED})
TINY = {
    "vocab_size": 672,  # padded: transformers gives some families' tokenizers an entry more
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def twin(model: str, folder: Path) -> Path:
    """A tiny random model of the architecture that a hub id has."""
    width = 128 if any(size in model for size in ("8B", "1.5B", "1.7B", "4b", "-360M")) else 64
    shape = TINY | {"hidden_size": width}
    if model.startswith("google/gemma-3-4b"):  # text and images, with a few ids more than the small one
        image = {"image_token_index": 700, "boi_token_index": 698, "eoi_token_index": 699, "mm_tokens_per_image": 4}
        config = tf.Gemma3Config(text_config=shape | {"vocab_size": 704}, vision_config=VISION, **image)
        made = tf.Gemma3ForConditionalGeneration(config)
    else:
        kind = {"Qwen/Qwen2.5": tf.Qwen2Config, "Qwen/Qwen3": tf.Qwen3Config, "google/gemma-3": tf.Gemma3TextConfig}
        config = next((k for name, k in kind.items() if model.startswith(name)), tf.LlamaConfig)(**shape)
        made = tf.AutoModelForCausalLM.from_config(config)
    path = folder / model.replace("/", "--")
    made.to(torch.bfloat16).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def rows(format: str, path: Path) -> str:
    texts = [(f"Say {i}", "Yes. It is so. " * (1 + i % 3)) for i in range(24)]
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a.strip()}]} for q, a in texts]
    made = chats if format == "chat" else [{"instruction": q, "input": "", "output": a.strip()} for q, a in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_both_stages_run_on_a_twin(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipes write to runs/
    for stage in ("1_teacher", "2_distill"):
        recipe = loader.load_recipe(folder / f"{stage}.yaml")
        short = {"train.max_steps": 2, "train.epochs": None, "optim.warmup_steps": None, "optim.warmup_ratio": None}
        changes = short | {"student.model": str(twin(recipe.student.model, tmp_path)), "train.batch_size": 8}
        for name in ("train", "validation"):
            for source in as_tuple(getattr(recipe.data, name)):
                path = rows(source.format, tmp_path / f"{name}.jsonl")
                changes |= {f"data.{name}.path": path, f"data.{name}.revision": None, f"data.{name}.split": "train"}
        if recipe.data.validation_fraction:
            changes["data.validation_fraction"] = 0.25
        summary = run(loader.load_recipe(folder / f"{stage}.yaml", changes))
        assert summary["steps"] == 2 and (Path(recipe.output_dir) / "adapter/adapter_model.safetensors").exists()
        assert (stage == "2_distill") == ("kd" in summary["train"])
        assert REPO not in Path(recipe.output_dir).resolve().parents
