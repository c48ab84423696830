"""A model's log-probabilities of the tokens of given answers at temperature 1, and the entropy of its distribution there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.examples import TokenExamples
from ..losses.fused import default_chunk
from ..models.language_model import LanguageModel
from .draw import entropy
from .generate import eval_mode


@dataclass(frozen=True)
class Scores:
    """Log-probabilities and entropies at an answer's T tokens, in nats, float64 [T]."""

    log_p_T: np.ndarray
    entropy_T: np.ndarray


@torch.no_grad()
def scores(model: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = 8) -> list[Scores]:
    """The scores of each answer (one token or more) after its prompt, with the model in eval mode; its training mode is left as it was."""
    if not answers:
        return []
    texts = [np.array([*prompt, *answer], np.int32) for prompt, answer in zip(prompts, answers, strict=True)]
    masks = [np.arange(len(text)) >= len(prompt) for text, prompt in zip(texts, prompts, strict=True)]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    examples = TokenExamples(np.concatenate(texts), np.concatenate(masks), offsets, np.arange(len(texts)))
    order, found = sorted(range(len(texts)), key=lambda i: -len(texts[i])), {}
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            values_NS = _of_batch(model, examples, chosen)
            for i, own in zip(chosen, values_NS.split([len(answers[i]) for i in chosen]), strict=True):
                found[i] = Scores(*own.T.numpy())
    return [found[i] for i in range(len(texts))]


def _of_batch(model: LanguageModel, examples: TokenExamples, chosen: list[int]) -> torch.Tensor:
    """Log-probability and entropy of every target of some examples, float64 [N, 2] on the CPU."""
    batch = examples.batch(chosen).to(model.device)
    hidden_NH, rows = model.hidden(batch.student), []
    for first in range(0, batch.num_targets, default_chunk(model.head.vocab, model.device.type)):
        part = slice(first, first + default_chunk(model.head.vocab, model.device.type))
        logits_nV = model.head.logits(hidden_NH[part])
        log_p_n = torch.log_softmax(logits_nV, -1).gather(-1, batch.labels_N[part, None])[:, 0]
        rows.append(torch.stack([log_p_n.double(), entropy(logits_nV).double()], -1))
    return torch.cat(rows).cpu()
