"""Kinds of models: how transformers and PEFT load each, the class that runs it, and the checks before its use."""

from pathlib import Path
from typing import Protocol

from torch import nn

from ..errors import UserError
from . import attention, norms, startup_checks
from .language_model import LanguageModel
from .model import Model


class ModelKind(Protocol):
    """How one kind of model is loaded, checked and run.

    auto      the name of the transformers class that loads it
    peft      PEFT's task type of its adapters
    wrapper   the class that runs it
    """

    auto: str
    peft: str | None
    wrapper: type[Model]

    def architecture(self, vocab: int) -> dict:
        """Defaults for the configuration of a model with new weights."""

    def copies(self, model: nn.Module, base: Path) -> tuple[str, ...]:
        """The modules that train in full next to an adapter, whatever the recipe says. `base`: the folder of the adapter's base."""

    def started(self, model: nn.Module, base: Path, seed: int) -> None:
        """Called for a student that was loaded from its base's folder: give new parameters random weights, by `seed`."""

    def refuse_misfit(self, model: nn.Module, vocab: int, setting: str) -> None:
        """UserError for a loaded model whose outputs do not fit `vocab` entries."""

    def checked(self, model: Model, setting: str, packing: int = 0, implementation: str = "auto") -> Model:
        """The model, with the results of its startup checks on a small batch applied. UserError if it cannot be used.

        packing, implementation   see `startup_checks.check`
        """

    def without_gradient(self, model: Model, setting: str) -> list[str]:
        """Trainable parameters that get no gradient from a small batch. UserError if the backward pass fails."""


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
    """A causal language model, with the results of `startup_checks.check` applied."""
    norms.fuse(model.base_model)
    found = startup_checks.check(model, setting, packing, implementation)
    if found.packed_attention:
        attention.enable(model.base_model)
    return model.replaced(capabilities=found)


def refuse_few_rows(model: nn.Module, tokens: int, setting: str) -> None:
    """UserError if the tokenizer has more entries than the model's embedding has rows."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise UserError(f"{setting}: the tokenizer has {tokens} entries and the model's embedding {rows}; they do not belong together")
