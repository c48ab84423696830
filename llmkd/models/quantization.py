"""Quantisation of the base of a student or teacher to 4 or 8 bit, with bitsandbytes."""

from pathlib import Path

import torch
from torch import nn

from ..config.recipe import Quantization
from ..console import warn
from ..model_folder.files import loaded_dtype
from ..model_folder.weights import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def note_share(model: nn.Module, setting: str) -> None:
    """Print a note if little of a model is quantised: only linear layers are, and a mixture of experts may have most weights elsewhere."""
    size = {p: p.numel() * p.element_size() for p in model.parameters()}
    quantised = sum(bytes_ for p, bytes_ in size.items() if p.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn))
    if quantised < 0.2 * (total := sum(size.values())):
        warn(
            f"note: {setting}: quantised linear layers are {quantised / total:.0%} of its memory; embeddings, head and "
            "experts that are not linear layers are not quantised"
        )


def bitsandbytes_config(settings: Quantization, dtype: str, folder: Path, setting: str):
    """transformers' BitsAndBytesConfig for a base in 4 or 8 bit."""
    from transformers import BitsAndBytesConfig

    if settings.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    weights = loaded_dtype(read_json(folder / "config.json", setting), dtype)
    compute = weights if settings.compute_dtype == "auto" else settings.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=DTYPES[compute],
    )
