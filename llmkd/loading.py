"""Weights from a folder into transformers, strictly: what it would load without a word is refused here."""

from pathlib import Path

import torch
from torch import nn

from .console import say
from .errors import UserError, brief
from .model_files import read_json
from .recipe import Quantization
from .recipe import Student as StudentSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

#: Masks and tables that older versions of transformers saved with the weights and newer ones compute.
_OLD_BUFFERS = (".masked_bias", ".attn.bias", ".rotary_emb.inv_freq")


def base(
    folder: Path, setting: str, dtype: str = "auto", attention: str = "auto", device="cpu", quantization: Quantization | None = None
) -> nn.Module:
    """A model as its folder holds it, on `device`. UserError unless every tensor fits its configuration."""
    from transformers import AutoModelForCausalLM

    options = {}
    if quantization:
        if "quantization_config" in read_json(folder / "config.json", setting):
            raise UserError(
                f"{setting.removesuffix('.model')}.quantization: {folder} is quantised already; leave it out, or name the unquantised model"
            )
        options = {"quantization_config": bitsandbytes_config(quantization, dtype, folder, setting), "device_map": {"": device}}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise UserError(f"{setting}: {folder} cannot be loaded ({brief(error)})") from error
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("holds, beyond its architecture,", [k for k in report["unexpected_keys"] if not str(k).endswith(_OLD_BUFFERS)]),
        ("has wrong shapes of", report["mismatched_keys"]),
    ):
        if keys:
            raise UserError(
                f"{setting}: {folder} {what} {len(keys)} tensors, such as {sorted(map(str, keys))[0]}; its config.json and weights do not belong together"
            )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # in eval mode it would repack the weights into a form without a gradient
            module.support_avx512bf16_for_cpu = False
    if quantization:
        note_share(model, setting)
    return model if getattr(model, "is_loaded_in_8bit", False) else model.to(device)


def note_share(model: nn.Module, setting: str) -> None:
    """Only linear layers are quantised; a mixture of experts may hold most of its weights otherwise."""
    size = {p: p.numel() * p.element_size() for p in model.parameters()}
    quantised = sum(bytes_ for p, bytes_ in size.items() if p.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn))
    if quantised < 0.2 * (total := sum(size.values())):
        say(
            f"note: {setting}: quantised linear layers are {quantised / total:.0%} of what it still takes in memory; embeddings, head and "
            "experts that are no linear layers are as they were"
        )


def bitsandbytes_config(settings: Quantization, dtype: str, folder: Path, setting: str):
    """What transformers wants to hear for a base in 4 or 8 bit."""
    from transformers import BitsAndBytesConfig

    if settings.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    config = read_json(folder / "config.json", setting)
    saved = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype") or "float32"
    compute = next(name for name in (settings.compute_dtype, dtype, saved) if name != "auto")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=DTYPES[compute],
    )


def new_model(settings: StudentSettings, vocab: int) -> nn.Module:
    """Random weights of `settings.architecture`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = {"vocab_size": vocab, **settings.architecture}
    try:
        config = AutoConfig.for_model(**wanted)
        ignored = [k for k in wanted if k != "model_type" and not hasattr(type(config)(), k)]
        if ignored:
            raise UserError(f"student.architecture.{ignored[0]}: unknown to {wanted['model_type']}")
        dtype = DTYPES.get(settings.dtype, torch.float32)
        attention = None if settings.attention == "auto" else settings.attention
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"student.architecture: transformers refuses it ({brief(error)})") from error
