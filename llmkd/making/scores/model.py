"""A model that scores rows: its files and its tokenizer at once, its weights when they are needed."""

import gc
from typing import Any

from ...config.make_score import ScoringModel
from ...data.encoding.same_tokenizer import refuse_other_tokens
from ...data.encoding.token_rows import vocabulary_hash
from ...data.encoding.tokenizer import load_tokenizer, shared_vocab
from ...errors import UserError
from ...model_folder.files import find, loaded_dtype, positions, rows_of
from ...model_folder.identity import verify, weights_of


class Scorer:
    """A model by its settings. UserError where its files are missing, damaged or not what an adapter was trained on.

    fingerprint  of weights, configuration, type and tokenizer: what its scores depend on
    """

    def __init__(self, settings: ScoringModel, setting: str):
        self.settings, self.setting = settings, setting
        self.files = find(settings.model, f"{setting}.model", settings.revision, settings.base)
        verify(self.files.base, self.files.adapter, f"{setting}.model")
        own = self.files.adapter and (self.files.adapter / "tokenizer.json").exists()
        self.tokenizer = load_tokenizer(str(self.files.adapter if own else self.files.base), f"{setting}.model")
        self.fingerprint: dict[str, Any] = {
            "weights": weights_of(self.files.base, self.files.adapter, f"{setting}.model"),
            "dtype": loaded_dtype(self.files.config, settings.dtype),
            "quantization": settings.quantization and settings.quantization.type,
            "tokenizer": vocabulary_hash(self.tokenizer),
            "template": self.tokenizer.chat_template,
        }

    def check(self, row_format: str, max_length: int) -> None:
        """UserError where it cannot read rows of this format and length."""
        if row_format == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f"{self.setting}.model: {self.settings.model} has no chat template; use format: alpaca, or a model that has one"
            )
        most = positions(self.files.config)
        if most and max_length > most:
            raise UserError(f"{self.setting}.model: {self.settings.model} has {most} positions, and max_length is {max_length}; lower it")

    def refuse_other(self, other: "Scorer") -> None:
        """UserError where another model's tokens are not this one's."""
        refuse_other_tokens(self.tokenizer, other.tokenizer, f"{other.setting}.model", self.settings.model, other.settings.model)

    def load(self, device: Any, vocab: int):
        """The model, frozen and in eval mode."""
        from ...models.load import LoadContext, load_teacher

        return load_teacher(self.settings.loaded, LoadContext(vocab, device), self.setting, self.files)


def vocabulary(scorers: dict[str, Scorer]) -> int:
    """The entries that all models have rows for."""
    first = next(iter(scorers.values()))
    return shared_vocab(first.tokenizer, {f"{one.setting}.model": rows_of(one.files.config) for one in scorers.values()})


def forget() -> None:
    """Give back the memory of models that nothing refers to."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
