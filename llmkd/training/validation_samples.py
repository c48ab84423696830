"""The answers in samples.jsonl: to the same held-out prompts at every validation, and some of those that an on-policy student trains on."""

from collections.abc import Sequence
from pathlib import Path

from ..config.recipe import Validation
from ..data.batch_source import WrittenText
from ..data.prompts import closing, decoded, held_out_prompts
from ..models.language_model import LanguageModel
from ..output.samples import add_samples
from ..rollouts.generate import Completion, generate, stops_of
from ..rollouts.sampling import Sampling
from .prepare import Prepared


def write_samples(
    folder: Path, step: int, model: LanguageModel, prepared: Prepared, settings: Validation, first: bool = True
) -> str | None:
    """Add this step's greedy answers to held-out prompts. Returns the file's hash.

    first   whether this process writes; another one only takes part in the passes of a sharded model, and returns None
    """
    tokenizer = prepared.tokenizer
    prompts = held_out_prompts(prepared.validation, prepared.validation_places, settings.samples, tokenizer)
    ends = {tokenizer.eos_token_id, *stops_of(model), *prepared.end_tokens}
    sampling = Sampling(max_new_tokens=settings.sample_tokens)
    found = generate(model, [prompt.ids for prompt in prompts], sampling, ends, settings.micro_batch_size)
    records = [
        _record(step, prompt.place, prompt.ids, prompt.reference, one, tokenizer) for prompt, one in zip(prompts, found, strict=True)
    ]
    return add_samples(folder, step, records) if first else None


def write_training_samples(folder: Path, step: int, texts: Sequence[WrittenText], tokenizer) -> str:
    """Add answers on which this step trained. Returns the file's hash."""
    references = [decoded(one.reference[: closing(one.reference, tokenizer)], tokenizer) for one in texts]
    records = [
        _record(step, one.place, one.prompt, reference, one, tokenizer) | {"training": True}
        for one, reference in zip(texts, references, strict=True)
    ]
    return add_samples(folder, step, records)


def _record(step: int, place: str, prompt: Sequence[int], reference: str | None, answer: Completion | WrittenText, tokenizer) -> dict:
    return {
        "step": step,
        "place": place,
        "prompt": decoded(prompt, tokenizer),
        "reference": reference,
        "text": decoded(answer.ids[: len(answer.ids) - answer.finished], tokenizer),
        "tokens": len(answer.ids),
        "finished": answer.finished,
    }
