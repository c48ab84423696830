"""Metrics of encoder-decoder models: perplexity, and the word and character error rates of the texts that they generate."""

import functools
import importlib.util
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.recipe import ErrorRates as Settings
from ..console import warn
from ..errors import UserError
from .metrics.transcripts import Errors, character_errors, word_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.sequences import SequenceExamples
    from ..models.encoder_decoder import EncoderDecoder


class ErrorRates:
    """See `Measures`. An error rate is the edits of all texts divided by the words, or characters, of all references. UserError if jiwer is missing."""

    rows = kept = ()

    def __init__(self, processor: Any, settings: Settings | None, micro_batch_size: int):
        self.processor, self.settings, self.micro_batch_size = processor, settings, micro_batch_size
        self.shown = ("wer",) if settings else ()
        self._warn_once = functools.cache(warn)
        if settings and importlib.util.find_spec("jiwer") is None:
            raise UserError('validation.error_rates: needs jiwer, which is not installed; pip install "llmkd[audio]"')

    def of_rows(self, log_q_nV: "Tensor", labels_n: "Tensor") -> "dict[str, Tensor]":
        return {}

    def metrics(self, means: dict[str, float], sums: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        return {"perplexity": math.exp(min(means["ce"], 700))}

    def of_texts(self, model: "EncoderDecoder", data: "SequenceExamples", accelerator: Any) -> dict[str, float]:
        """Word and character error rate of the first `limit` examples, whose texts are generated greedily, shared out among the processes."""
        if not self.settings:
            return {}
        import torch

        count = min(len(data), self.settings.limit or len(data))
        longer = int((data.num_targets[:count] - 1 > self.settings.max_tokens).sum())  # without the end token
        if longer and accelerator.is_main_process:
            self._warn_once(
                f"note: validation.error_rates.max_tokens: found {self.settings.max_tokens}, and {longer:,} of {count:,} held-out targets are longer: "
                "the rest of each counts as errors; raise it"
            )
        mine = np.arange(accelerator.process_index, count, accelerator.num_processes)
        texts = transcripts(model, data, mine, self.processor, self.settings.max_tokens, self.micro_batch_size, accelerator.device)
        references = [data.texts[i] for i in mine]
        found = [measure(references, texts, self.settings.normaliser) for measure in (word_errors, character_errors)]
        sums = torch.tensor([list(vars(one).values()) for one in found], dtype=torch.float64, device=accelerator.device)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        words, characters = (Errors(*map(int, row)) for row in sums.tolist())
        return {"wer": words.rate, "cer": characters.rate}


def transcripts(
    model: "EncoderDecoder", data: "SequenceExamples", indices: np.ndarray, processor: Any, most: int, micro_batch_size: int, device: Any
) -> list[str]:
    """The texts that a model generates for the examples `indices`, in eval mode, at most `most` tokens each, without control tokens."""
    from ..models.greedy import greedy

    training, out, frame = model.training, [], processor.frame
    model.eval()
    try:
        for at in range(0, len(indices), micro_batch_size):
            read = data.inputs.batch([int(i) for i in indices[at : at + micro_batch_size]], None)
            inputs = {name: x.to(device) for name, x in read.items()}
            for ids in greedy(model, inputs, frame.given, frame.end, most):
                out.append(processor.reader.decode(ids, skip_special_tokens=True).strip())
    finally:
        model.train(training)
    return out
