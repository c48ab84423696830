"""samples.jsonl: what a student writes to the same held-out prompts at every validation."""

import hashlib
import json
from pathlib import Path

from ..config.recipe import Validation
from ..console import warn
from ..data.prompts import decoded, held_out_prompts
from ..files import write_atomic
from ..models.language_model import LanguageModel
from ..output.samples import read_samples
from ..rollouts.generate import generate, stops_of
from ..rollouts.sampling import Sampling
from .prepare import Prepared


def write_samples(folder: Path, step: int, model: LanguageModel, prepared: Prepared, settings: Validation) -> str:
    """Write the answers at this step behind those of the steps before it; answers of this step or a later one, of another attempt, are replaced.
    Returns the file's hash.

    A line holds step, place, prompt, reference, text (without its end token), tokens, and whether it finished by itself.
    """
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
    before = [record for record in read_samples(folder, warn) if record["step"] < step]
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in before + records)
    write_atomic(folder / "samples.jsonl", content)
    return hashlib.sha256(content.encode()).hexdigest()
