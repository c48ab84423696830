"""What goes into samples.jsonl: answers to the same held-out prompts at every validation, and some of those that an on-policy student trains on."""

from collections.abc import Sequence
from pathlib import Path

from ..config.recipe import Validation
from ..data.batch_source import WrittenText
from ..data.prompts import closing, decoded, held_out_prompts
from ..models.language_model import LanguageModel
from ..output.samples import add_samples
from ..rollouts.generate import generate, stops_of
from ..rollouts.sampling import Sampling
from .prepare import Prepared


def write_samples(folder: Path, step: int, model: LanguageModel, prepared: Prepared, settings: Validation) -> str:
    """Add the answers at this step, always the most likely tokens. Returns the file's hash."""
    tokenizer = prepared.tokenizer
    prompts = held_out_prompts(prepared.validation, prepared.validation_places, settings.samples, tokenizer)
    ends = {tokenizer.eos_token_id, *stops_of(model), *prepared.end_tokens}
    sampling = Sampling(max_new_tokens=settings.sample_tokens)
    found = generate(model, [prompt.ids for prompt in prompts], sampling, ends, settings.micro_batch_size)
    records = [
        {
            "step": step,
            "place": prompt.place,
            "prompt": decoded(prompt.ids, tokenizer),
            "reference": prompt.reference,
            "text": decoded(one.ids[: len(one.ids) - one.finished], tokenizer),
            "tokens": len(one.ids),
            "finished": one.finished,
        }
        for prompt, one in zip(prompts, found, strict=True)
    ]
    return add_samples(folder, step, records)


def write_training_samples(folder: Path, step: int, texts: Sequence[WrittenText], tokenizer) -> str:
    """Add answers that were trained on in this step. Returns the file's hash."""
    records = [
        {
            "step": step,
            "place": one.place,
            "prompt": decoded(one.prompt, tokenizer),
            "reference": decoded(one.reference[: closing(one.reference, tokenizer)], tokenizer),
            "text": decoded(one.ids[: len(one.ids) - one.finished], tokenizer),
            "tokens": len(one.ids),
            "finished": one.finished,
            "training": True,
        }
        for one in texts
    ]
    return add_samples(folder, step, records)
