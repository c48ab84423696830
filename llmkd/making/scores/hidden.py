"""A model's mean last hidden states of texts, for clustering."""

from collections.abc import Sequence

import numpy as np
import torch

from ...console import progress_bar
from ...data.batching import make_micro_batches
from ...data.examples import TokenExamples
from ...errors import UserError
from ...model_folder.files import positions
from ...training.launch import start
from ..model import forget
from .scorer import Scorer, vocabulary
from .views import start_token

_MOST = 512  # tokens of a text that are read


def mean_states(scorer: Scorer, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """The mean of the last hidden states over the tokens of each text, scaled to length 1: float32 [texts, H]. Texts are read after a start token, and
    truncated to 512 tokens."""
    accelerator = start()
    model = scorer.load(accelerator.device, vocabulary({"model": scorer}))
    if model.capabilities.own_forward:
        raise UserError(f"{scorer.setting}.model: llmkd does not find the last hidden states of {scorer.settings.model}; use on: words")
    data = _examples(scorer.tokenizer, texts, min(_MOST, positions(scorer.files.config) or _MOST))
    sums = torch.zeros(len(texts), model.base_model.get_input_embeddings().weight.shape[1], dtype=torch.float64)
    bar = progress_bar("hidden states")
    for chosen in bar(make_micro_batches(list(range(len(data))), data.lengths, batch_size, 0, 1)):
        batch = data.batch(chosen).to(accelerator.device)
        with torch.no_grad():
            sums.index_add_(0, batch.example_N.cpu(), model.hidden(batch.student).double().cpu())
    del model
    forget()
    return torch.nn.functional.normalize(sums, dim=1).float().numpy()


def _examples(tokenizer, texts: Sequence[str], most: int) -> TokenExamples:
    """Examples of the texts after a start token. One more token follows each, since the state at a text's last token predicts it; it is not read."""
    made = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ids = [np.array([start_token(tokenizer), *own[: most - 1], tokenizer.eos_token_id], np.int32) for own in made]
    masks = [np.arange(len(own)) > 0 for own in ids]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return TokenExamples(np.concatenate(ids), np.concatenate(masks), offsets, np.arange(len(ids)))
