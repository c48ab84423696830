"""The number and the memory of a model's parameters, from its files alone: nothing is loaded."""

from dataclasses import dataclass

import numpy as np

from ..config.recipe import Lora
from ..model_folder.files import ModelFiles, loaded_dtype
from ..model_folder.weights import headers

_BYTES = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0, "fp8": 1.0}


@dataclass(frozen=True)
class ModelSize:
    """Numbers that determine the cost of a step: weights outside embedding and head, vocabulary size, hidden size, layers."""

    body: int
    vocab: int
    hidden: int
    layers: int

    @property
    def parameters(self) -> int:
        return self.body + self.vocab * self.hidden


def model_size(files: ModelFiles) -> ModelSize:
    """The size of a model, read from the headers of its weight files."""
    config = files.config.get("text_config", files.config)
    sizes = {name: int(np.prod(t["shape"])) for name, t in headers(files.base, "plan").items()}
    hidden = next(config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config)
    layers = next((config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), 1)
    vocab = config["vocab_size"]
    body = sum(
        size for name, size in sizes.items() if not (size == vocab * hidden and ("embed" in name or "head" in name or "wte" in name))
    )
    return ModelSize(body, vocab, hidden, layers)


def adapter_parameters(files: ModelFiles, lora: Lora) -> int:
    """The parameters of a LoRA adapter: rank x (inputs + outputs) of each matrix that it is put on."""
    total, named = 0, lora.target_modules if isinstance(lora.target_modules, tuple) else None
    for name, t in headers(files.base, "plan").items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if len(t["shape"]) == 2 and (module in named if named else not any(word in name for word in ("embed", "head", "wte"))):
            total += lora.rank * sum(t["shape"])
    return total


def weight_bytes(files: ModelFiles, dtype: str, quantization) -> float:
    """Bytes of memory for each weight, in a dtype of the recipe or a quantisation."""
    if quantization:
        return _BYTES[quantization.type]
    return {"float64": 8, "float32": 4}.get(loaded_dtype(files.config, dtype), 2)
