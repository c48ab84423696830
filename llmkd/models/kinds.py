"""Kinds of models: how transformers and PEFT load each, what runs it, and what is tried on it before it is used."""

from pathlib import Path
from typing import Protocol

from torch import nn

from ..errors import UserError
from . import attention, norms, startup_checks
from .language_model import LanguageModel
from .model import Model


class ModelKind(Protocol):
    """
    auto      the name of transformers' class that loads the models
    peft      PEFT's name of what their adapters are for
    wrapper   what runs them
    """

    auto: str
    peft: str | None
    wrapper: type[Model]

    def architecture(self, vocab: int) -> dict:
        """What the configuration of a model with new weights says, unless the recipe does."""

    def copies(self, model: nn.Module, base: Path) -> tuple[str, ...]:
        """The modules that train in full beside an adapter, whatever the recipe says, of a model from its base's folder."""

    def started(self, model: nn.Module, base: Path, seed: int) -> None:
        """A student was loaded from its base's folder, and is to be trained: give what is new in it random weights by seed."""

    def refuse_misfit(self, model: nn.Module, vocab: int, setting: str) -> None:
        """UserError for a loaded model that has not so many events."""

    def checked(self, model: Model, setting: str, packing: int = 0, implementation: str = "auto") -> Model:
        """The model with what a small batch tells of it put to use. UserError where it cannot be used.

        packing, implementation   see `startup_checks.check`
        """

    def without_gradient(self, model: Model, setting: str) -> list[str]:
        """Trainable parameters that get no gradient from a small batch. UserError where there is no backward pass."""


class Causal:
    """Causal language models; `vocab` is the tokenizer's size."""

    auto, peft, wrapper = "AutoModelForCausalLM", "CAUSAL_LM", LanguageModel

    def architecture(self, vocab: int) -> dict:
        return {"vocab_size": vocab}

    def copies(self, model: nn.Module, base: Path) -> tuple[str, ...]:
        return ()

    def started(self, model: nn.Module, base: Path, seed: int) -> None:
        pass

    def refuse_misfit(self, model: nn.Module, vocab: int, setting: str) -> None:
        refuse_few_rows(model, vocab, setting)

    def checked(self, model: LanguageModel, setting: str, packing: int = 0, implementation: str = "auto") -> LanguageModel:
        return checked(model, setting, packing, implementation)

    def without_gradient(self, model: LanguageModel, setting: str) -> list[str]:
        return startup_checks.parameters_without_gradient(model, setting)


CAUSAL = Causal()


def checked(model: LanguageModel, setting: str, packing: int = 0, implementation: str = "auto") -> LanguageModel:
    """A causal language model with what the startup checks find of it put to use; see `startup_checks.check`."""
    norms.fuse(model.base_model)
    found = startup_checks.check(model, setting, packing, implementation)
    if found.packed_attention:
        attention.enable(model.base_model)
    return model.replaced(capabilities=found)


def refuse_few_rows(model: nn.Module, tokens: int, setting: str) -> None:
    """UserError where the tokenizer has more entries than the model's embedding has rows."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise UserError(f"{setting}: the tokenizer has {tokens} entries and the model's embedding {rows}; they do not belong together")
