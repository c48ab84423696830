"""The number and the memory of a model's parameters, read from its files without loading it."""

from dataclasses import dataclass

import numpy as np

from ..config.recipe import Lora
from ..model_folder.files import ModelFiles, loaded_dtype
from ..model_folder.layers import COUNTS, NUMBERED
from ..model_folder.weights import headers

_BYTES = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0, "fp8": 1.0}


@dataclass(frozen=True)
class ModelSize:
    """The numbers that determine the cost of a step: weights outside embedding and head (`body`), vocabulary size, hidden size, layers."""

    body: int
    vocab: int
    hidden: int
    layers: int

    @property
    def parameters(self) -> int:
        return self.body + self.vocab * self.hidden


def model_size(files: ModelFiles, kept: int | None = None) -> ModelSize:
    """The size of a model, read from the headers of its weight files; with `kept` that of a model with so many of its layers, which are alike."""
    config = files.config.get("text_config", files.config)
    sizes = {name: int(np.prod(t["shape"])) for name, t in headers(files.base, "plan").items()}
    hidden = next(config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config)
    layers = _layers(files.config)
    vocab = config["vocab_size"]
    body = {
        name: size for name, size in sizes.items() if not (size == vocab * hidden and ("embed" in name or "head" in name or "wte" in name))
    }
    return ModelSize(_of_layers(body, layers, kept), vocab, hidden, kept or layers)


def _layers(config: dict) -> int:
    config = config.get("text_config", config)
    return next((config[name] for name in COUNTS if name in config), 1)


def _of_layers(sizes: dict[str, int], layers: int, kept: int | None) -> int:
    """The sum of the tensors' sizes, without those of the layers that are not kept."""
    in_layers = sum(size for name, size in sizes.items() if NUMBERED.fullmatch(name))
    return sum(sizes.values()) - (layers - (kept or layers)) * in_layers // layers


def adapter_parameters(files: ModelFiles, lora: Lora, kept: int | None = None) -> int:
    """The number of parameters of a LoRA adapter: rank x (inputs + outputs) of each matrix with an adapter. `kept`: see `model_size`."""
    sizes, named = {}, lora.target_modules if isinstance(lora.target_modules, tuple) else None
    for name, t in headers(files.base, "plan").items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if len(t["shape"]) == 2 and (module in named if named else not any(word in name for word in ("embed", "head", "wte"))):
            sizes[name] = lora.rank * sum(t["shape"])
    return _of_layers(sizes, _layers(files.config), kept)


def weight_bytes(files: ModelFiles, dtype: str, quantization) -> float:
    """Bytes of memory per weight, in a dtype of the recipe or a quantisation."""
    if quantization:
        return _BYTES[quantization.type]
    return {"float64": 8, "float32": 4}.get(loaded_dtype(files.config, dtype), 2)
