"""A model that `llmkd make` loads, as a writer or to score rows. Its files and tokenizer are read at once, its weights when they are needed."""

import gc
from typing import TYPE_CHECKING, Any

from ..config.teacher import Teacher
from ..data.encoding.token_rows import vocabulary_hash
from ..data.encoding.tokenizer import load_tokenizer
from ..model_folder.files import find, loaded_dtype
from ..model_folder.identity import verify, weights_of

if TYPE_CHECKING:
    from ..models.kinds import ModelKind


class ModelToLoad:
    """A model by its settings. UserError if its files are missing or damaged, or an adapter's base is not the one that it was trained on.

    setting       of the model, for messages: writer, student, ...
    fingerprint   of weights, configuration, dtype and tokenizer, on which all results of the model depend
    """

    def __init__(self, settings: Teacher, setting: str):
        self.settings, self.setting = settings, setting
        self.files = find(settings.model, f"{setting}.model", settings.revision, settings.base)
        verify(self.files.base, self.files.adapter, f"{setting}.model")
        self.tokenizer = load_tokenizer(str(self.files.with_tokenizer), f"{setting}.model")
        self.fingerprint: dict[str, Any] = {
            "weights": weights_of(self.files.base, self.files.adapter, f"{setting}.model"),
            "dtype": loaded_dtype(self.files.config, settings.dtype),
            "quantization": settings.quantization and settings.quantization.type,
            "tokenizer": vocabulary_hash(self.tokenizer),
            "template": self.tokenizer.chat_template,
        }

    def load(self, device: Any, vocab: int, kind: "ModelKind | None" = None):
        """The model, frozen and in eval mode, with `vocab` logits. `kind`: what it is, if not a causal language model."""
        from ..models.kinds import CAUSAL
        from ..models.load import LoadContext, load_teacher

        return load_teacher(self.settings, LoadContext(vocab, device, kind=lambda setting: kind or CAUSAL), self.setting, self.files)


def forget() -> None:
    """Give back the memory of models that nothing refers to."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
