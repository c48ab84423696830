"""Names of an adapter's tensors as other programs write them."""

import pytest

from llmkd.models.adapter_names import regular_names, without_wrappers

TEXT = ["", "model", "model.embed_tokens", "model.layers", "model.layers.0", "model.layers.0.self_attn.q_proj", "model.norm", "lm_head"]
LARGER = [name.replace("model", "model.language_model", 1) if name.startswith("model.") else name for name in TEXT] + [
    "model.visual",
    "model.visual.layers.0.self_attn.q_proj",
]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name",
    [
        Q,
        "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
        "_fsdp_wrapped_module._orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
        "module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.module.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.maths.weight",
        "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "student.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "module._orig_mod.language_model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.default.weight",
    ],
)
def test_names_that_differ_in_parts_that_name_no_layer_are_understood(name):
    assert regular_names([name], TEXT, "lora_") == {name: Q}
    larger = Q.replace("model.model.layers", "model.model.language_model.layers")
    assert regular_names([name], LARGER, "lora_") == {name: larger}


@pytest.mark.parametrize(
    ("name", "regular"),
    [
        ("base_model.model.lm_head.weight", "base_model.model.lm_head.weight"),
        ("_orig_mod.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight"),
        ("embed_tokens.lora_embedding_A.default", "base_model.model.model.embed_tokens.lora_embedding_A"),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta.default",
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
        ("norm.weight", "base_model.model.model.norm.weight"),
        ("base_model.vera_A", "base_model.vera_A"),
        ("base_model.model.model.blocks.0.q_proj.lora_A.weight", "base_model.model.model.blocks.0.q_proj.lora_A.weight"),
    ],
)
def test_other_parts_of_an_adapter(name, regular):
    assert regular_names([name], TEXT, "lora_") == {name: regular}


def test_where_two_tensors_would_get_one_name_none_is_changed():
    names = ["model.layers.0.self_attn.q_proj.lora_A.default.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert regular_names(names, TEXT, "lora_") == {name: name for name in names}
    both = [*TEXT, "language_model.layers.0.self_attn.q_proj"]  # two layers whose names differ in such a part alone
    name = "layers.0.self_attn.q_proj.lora_A.weight"
    assert regular_names([name], both, "lora_") == {name: f"base_model.model.{name}"}


def test_wrappers_of_a_whole_checkpoint():
    assert without_wrappers("module._orig_mod.model.layers.0._fsdp_wrapped_module.mlp.weight") == "model.layers.0.mlp.weight"
    assert without_wrappers("model.module.weight") == "model.module.weight"
