"""Tiny random models of every causal family in transformers: 2 layers, 32 wide, 96 entries, with peculiar heads switched on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

V = 96
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), V),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "mamba_d_ssm"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **{"linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 8),
    **{"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_expand": 1},
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "num_kv_shared_layers": 0, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "dim_model_base": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MLA = {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16}
#: What makes a family's head different from a plain matrix product, with values that show when it is forgotten.
PECULIAR = {
    "final_logit_softcapping": 0.3,
    "logits_soft_cap": 0.3,
    "output_logit_soft_cap": 0.3,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.4,
    "logits_mup_width_multiplier": 2.5,
}
OVERRIDES = {
    "axk1": MLA,
    "axk2": MLA,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "longcat_flash": MLA,
    "minicpm3": MLA,
    "youtu": MLA,
    "falcon": {"num_kv_heads": 4},
    "gemma3": {"final_logit_softcapping": None},  # only the text-only class applies it
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "ernie4_5_moe": {"use_bias": True},
    "mamba2": {"num_heads": 8, "head_dim": 8},
}


def tiny(family: str, dtype=torch.float64, **changes):
    """A model with random weights. Raises what transformers raises where the sizes do not suit the family."""
    torch.manual_seed(0)
    config = configuration(family, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6:
        raise ValueError(f"{family} stays large: {size} parameters")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        try:  # grouped matrix products have no float64
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        except Exception:
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)  # initialised at 0.02, heads of so narrow a model would hardly say anything
    return model.eval()


def configuration(family: str, **changes):
    kind = type(AutoConfig.for_model(family))
    default = kind()

    def fitting(config) -> dict:
        wanted = SMALL | PECULIAR | OVERRIDES.get(family, {}) | changes
        out = {}
        for name, value in wanted.items():
            try:
                known = hasattr(config, name) and getattr(getattr(type(config), name, None), "fset", True)
            except Exception:  # a setting that varies by layer
                continue
            if known:
                out[name] = value
        return out

    if getattr(default, "text_config", None) is not None:
        text, parts = type(default.text_config), {}
        if getattr(default, "vision_config", None) is not None:
            eyes = type(default.vision_config)
            parts["vision_config"] = {**fitting(eyes()), "image_size": 16, "patch_size": 8}
        return kind(text_config=text(**fitting(text())).to_dict(), **parts)
    return kind(**fitting(default))
