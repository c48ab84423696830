"""`llmkd cache --import`: a teacher cache from log-probabilities that were computed elsewhere."""

import hashlib
from pathlib import Path

from ..config.recipe import Recipe
from ..config.teacher import CACHE_KINDS
from ..console import info, progress_bar
from ..errors import UserError, fix_of
from ..files import sha256_file
from ..teachers import resolve
from ..teachers.cache.import_lines import rows_in
from ..teachers.resolve import TeacherSource
from ..training.prepare import Prepared
from .cache_selection import shard_plan, teacher_examples


def import_cache(recipe: Recipe, prepared: Prepared, sources: list[TeacherSource], file: str, accelerator) -> Path:
    """Check the whole file, then write the cache and return its folder. `teachers/cache/import_logprobs.py` describes the file."""
    from ..teachers.cache import import_logprobs
    from ..teachers.cache.shards import Writer

    if accelerator.num_processes > 1:
        raise UserError("--import: writes a cache in one process; leave the others out")
    (source,) = sources
    cache, setting = source.settings.cache, f"{source.setting}.cache"
    examples, defaults = teacher_examples(prepared, source, recipe.data.validation_fraction), CACHE_KINDS["topk"]
    record_format = import_logprobs.make_format(prepared.vocab, cache.k or defaults["k"], cache.value_bits or defaults["value_bits"])
    provenance = resolve.provenance(recipe.data, source, prepared.processor.provenance, resolve.data_hashes(prepared)) | {
        "imported from": _hash_of(file)
    }
    folder = Path(cache.path).expanduser()
    writer = Writer(folder, record_format, provenance, shard_plan(examples, record_format.bytes), f"{setting}.path")
    counts = import_logprobs.write(file, examples, prepared.tokenizer, writer, progress_bar("reading"))
    notes = {
        "unknown_tokens": "strings match no single token and were counted as tail mass",
        "unknown_targets": "last targets have no log-probabilities and add nothing to the loss",
        "unused": "lines are about rows that have no example",
        "rounded": "targets have probabilities that add up to more than 1, by at most 5 %, and were scaled to 1",
    }
    told = [f"{counts[name]:,} {words}" for name, words in notes.items() if counts.get(name)]
    info("; ".join([f"{folder} is complete: {len(examples):,} examples", *told]))
    return folder


def _hash_of(file: str) -> str:
    try:
        hashes = [sha256_file(one) for one in rows_in(Path(file)).parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"--import: {file}: {error.strerror}; {fix_of(error, 'name the file of log-probabilities')}") from error
