"""Configurations of models that the shipped recipes and their readers use, for machines without the hub: each repository's config.json on
huggingface.co, without entries that do not affect shapes and dtypes. They are used only if that file cannot be read."""

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "max_position_embeddings": 32768, "dtype": "bfloat16"}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True, "dtype": "bfloat16"}
_GEMMA3 = {"head_dim": 256, "max_position_embeddings": 32768}


def _sizes(family: dict, hidden: int, mlp: int, layers: int, tied: bool | None = None, **more) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return family | sizes | ({} if tied is None else {"tie_word_embeddings": tied}) | more


def _gpt2(hidden: int, layers: int, heads: int) -> dict:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": hidden, "n_layer": layers, "n_head": heads}


KNOWN: dict[str, dict] = {
    "meta-llama/Llama-3.2-1B-Instruct": _sizes(_LLAMA3, 2048, 8192, 16, True, head_dim=64),
    "meta-llama/Llama-3.2-3B-Instruct": _sizes(_LLAMA3, 3072, 8192, 28, True, num_attention_heads=24, head_dim=128),
    "meta-llama/Llama-3.1-8B-Instruct": _sizes(_LLAMA3, 4096, 14336, 32, False),
    "meta-llama/Llama-3.1-70B-Instruct": _sizes(_LLAMA3, 8192, 28672, 80, False, num_attention_heads=64),
    "Qwen/Qwen2.5-0.5B-Instruct": _sizes(_QWEN2, 896, 4864, 24, True, num_attention_heads=14),
    "Qwen/Qwen2.5-1.5B-Instruct": _sizes(_QWEN2, 1536, 8960, 28, True, num_attention_heads=12),
    "Qwen/Qwen2.5-7B-Instruct": _sizes(
        _QWEN2 | {"vocab_size": 152064, "num_key_value_heads": 4}, 3584, 18944, 28, False, num_attention_heads=28
    ),
    "Qwen/Qwen3-0.6B": _sizes(_QWEN3, 1024, 3072, 28, True, num_attention_heads=16),
    "Qwen/Qwen3-4B": _sizes(_QWEN3, 2560, 9728, 36, True, num_attention_heads=32),
    "Qwen/Qwen3-8B": _sizes(_QWEN3, 4096, 12288, 36, False, num_attention_heads=32),
    "Qwen/Qwen3-32B": _sizes(_QWEN3, 5120, 25600, 64, False, num_attention_heads=64),
    "Qwen/Qwen3-0.6B-Base": _sizes(_QWEN3, 1024, 3072, 28, True, num_attention_heads=16),
    "Qwen/Qwen3-8B-Base": _sizes(_QWEN3, 4096, 12288, 36, False, num_attention_heads=32),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _sizes(_SMOLLM2, 576, 1536, 30, num_attention_heads=9, num_key_value_heads=3),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _sizes(_SMOLLM2, 960, 2560, 32, num_attention_heads=15, num_key_value_heads=5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _sizes(_SMOLLM2, 2048, 8192, 24, num_attention_heads=32, num_key_value_heads=32),
    "google/gemma-3-1b-it": _sizes(
        _GEMMA3 | {"model_type": "gemma3_text", "vocab_size": 262144, "sliding_window": 512, "dtype": "bfloat16"},
        1152,
        6912,
        26,
        num_attention_heads=4,
        num_key_value_heads=1,
    ),
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "mm_tokens_per_image": 256,
        "text_config": _sizes(
            _GEMMA3 | {"model_type": "gemma3_text", "vocab_size": 262208, "sliding_window": 1024, "max_position_embeddings": 131072},
            2560,
            10240,
            34,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
}
