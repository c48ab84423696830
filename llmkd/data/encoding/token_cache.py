"""Rows are tokenised once. The cache is keyed by what they are made from and checked by what it holds.

Key: content of the source, tokenizer, chat template and the settings that shape examples. A damaged entry is named and
made again. One safetensors file and one JSON file an entry; written under another name and renamed when whole. The
processes of a launch make an entry once: the first one does, the others wait and read.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from ...config.fields import shaping
from ...config.recipe import Data, Source
from ...console import info, progress_bar
from ...errors import UserError
from ...files import lock_file, remove_leftovers, write_folder
from ..examples import Examples
from ..reading.sources import Rows
from .encode import encode
from .formats import refuse_without_template

VERSION = (
    7  # raise it when encoding makes other tokens of the same rows, or an entry holds them otherwise (7: arrays are named as in Examples)
)

_READ = ("ids", "loss_mask", "offsets")  # what a model reads of examples


def folder(data: Data) -> Path:
    return Path(data.cache_dir or os.environ.get("LLMKD_CACHE") or Path.home() / ".cache" / "llmkd").expanduser() / "tokens"


def tokenizer_hash(tokenizer, template: bool = True) -> str:
    """Vocabulary, merges, special tokens and their names (a template may use any) and template; not the padding state that a tokenizer carries about."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, template and tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps([state, named], sort_keys=True, default=str).encode()).hexdigest()


def load_or_encode(rows: Rows, source: Source, data: Data, tokenizer, setting: str, info=info, encode=encode) -> Examples:
    """The source's examples, from the cache or made now. UserError when nothing is left to train on."""
    shaped_by = [*shaping(source, "tokens").values(), *shaping(data, "tokens").values()]
    made_from = [VERSION, rows.content, *shaped_by, tokenizer_hash(tokenizer)]  # the content tells the columns' names as well
    entry = folder(data) / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    with _lock(entry):
        result = _load(entry, info)
        if result is None:
            refuse_without_template(source, rows.rows, tokenizer, setting)
            result = encode(rows, source, data, tokenizer, progress_bar("tokenising"))
            if len(result):
                _store(entry, result, info)
    if not len(result):
        c = result.counts
        raise UserError(
            f"{setting}: none of {source.path}'s {c['rows']} rows has a supervised token left ({c['too_long']} are longer than data.max_length = "
            f"{data.max_length}, {c['unsupervised']} have no answer); raise data.max_length, or look at the rows and {setting}.format"
        )
    return result


@contextlib.contextmanager
def _lock(entry: Path):
    """Held by one process of this machine at a time, and by none that was killed. Without a place to lock there is no cache either."""
    try:
        place = entry.parent.with_name("locks")
        place.mkdir(parents=True, exist_ok=True)
        file = lock_file(place / entry.name, wait=True)
    except OSError:  # such as a file system without locks: every process then makes its own entry
        yield
        return
    with file:
        remove_leftovers(entry.parent, entry.name)
        yield


def _load(entry: Path, info) -> Examples | None:
    if not os.path.exists(entry / "manifest.json"):  # unlike Path.exists, false for a name that is too long
        return None
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        raw = (entry / "tokens.safetensors").read_bytes()
        if _hash(raw, manifest["counts"]) != manifest["sha256"]:
            raise ValueError("its content does not match its hash")
        from safetensors.numpy import load

        arrays = load(raw)
        theirs = {name: arrays.pop(f"teacher_{name}") for name in _READ if f"teacher_{name}" in arrays}
        teacher = Examples(**theirs, row=arrays["row"]) if theirs else None
        return Examples(**arrays, counts=manifest["counts"], teacher_view=teacher)
    except (OSError, ValueError, KeyError, TypeError) as error:
        info(f"llmkd: the token cache {entry} is damaged ({error}); tokenising again")
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _hash(raw: bytes, counts: dict) -> str:
    return hashlib.sha256(raw + json.dumps(counts, sort_keys=True).encode()).hexdigest()


def _store(entry: Path, result: Examples, info) -> None:
    """A cache that cannot be written is not worth a failed run: say so and go on."""
    from safetensors.numpy import save

    arrays = {name: getattr(result, name) for name in (*_READ, "row")}
    if result.teacher_view is not None:
        arrays |= {f"teacher_{name}": getattr(result.teacher_view, name) for name in _READ}
    raw = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    try:
        with write_folder(entry, replace=not os.path.exists(entry / "manifest.json")) as part:
            (part / "tokens.safetensors").write_bytes(raw)
            (part / "manifest.json").write_text(json.dumps({"sha256": _hash(raw, result.counts), "counts": result.counts}))
    except OSError as error:
        if not os.path.exists(entry / "manifest.json"):  # another process may have been first
            info(f"llmkd: the token cache {entry.parent} cannot be written ({error.strerror}); going on without")
