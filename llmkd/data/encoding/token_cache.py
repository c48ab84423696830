"""The token cache: it keeps the tokens of a source, so that rows are tokenised once.

An entry's key is a hash of the source's content, the tokenizer, its chat template and the settings that shape examples. An entry is a
folder with a safetensors and a JSON file, the latter with a hash of the content; a damaged entry is reported and made again. The first process
of a launch makes an entry, while the others wait and then read it.
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
from ...console import progress_bar, warn
from ...errors import UserError
from ...files import lock_file, read_file, read_object, remove_leftovers, write_folder
from ..examples import TokenExamples
from ..reading.sources import Rows
from .encode import collator_of, encode
from .formats import refuse_without_template

#: Raise it when the same files give other tokens, or an entry's files change. 12: null as the arguments of a tool call means no arguments.
VERSION = 12

_READ = ("ids", "loss_mask", "offsets")  # the arrays of TokenExamples that a model reads


def folder(data: Data) -> Path:
    return Path(data.cache_dir or os.environ.get("LLMKD_CACHE") or Path.home() / ".cache" / "llmkd").expanduser() / "tokens"


def answers_root(data: Data) -> Path:
    """The folder under which the answers of servers are kept, unless a teacher names another."""
    return folder(data).parent / "answers"


def tokenizer_hash(tokenizer, template: bool = True) -> str:
    """A hash of the vocabulary, merges, special tokens and their names and, with `template`, the chat template, but not of the settings for padding
    and truncation."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, template and tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps([state, named], sort_keys=True, default=str).encode()).hexdigest()


def load_or_encode(rows: Rows, source: Source, data: Data, tokenizer, setting: str, warn=warn, encode=encode) -> TokenExamples:
    """The source's examples, read from the cache, or encoded and stored there. UserError if no example has a supervised token."""
    shaped_by = [*shaping(source, "tokens").values(), *shaping(data, "tokens").values()]
    made_from = [VERSION, rows.content, *shaped_by, tokenizer_hash(tokenizer)]  # the content includes the columns' names
    entry = folder(data) / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    with _lock(entry):
        result = _load(entry, warn)
        if result is not None:
            result.collator = collator_of(data, tokenizer)
        else:
            refuse_without_template(source, rows.rows, tokenizer, setting)
            result = encode(rows, source, data, tokenizer, progress_bar("tokenising"))
            if len(result):
                _store(entry, result, warn)
    if not len(result):
        c = result.counts
        marked = f", {c['marked']} are marked as not trained on" if c["marked"] else ""
        fix = f"raise data.max_length, or check the rows and {setting}.format"
        if marked:
            fix = "remove the marks, or list their keys under ignore" + f"; {fix}" * (c["too_long"] + c["unsupervised"] > 0)
        raise UserError(
            f"{setting}: none of {source.path}'s {c['rows']} rows gives a supervised token ({c['too_long']} are longer than data.max_length = "
            f"{data.max_length}, {c['unsupervised']} have no answer{marked}); {fix}"
        )
    return result


@contextlib.contextmanager
def _lock(entry: Path):
    """A lock for one process of this machine at a time, released if the process is killed. Without effect if files cannot be locked."""
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


def _load(entry: Path, warn) -> TokenExamples | None:
    if not os.path.exists(entry / "manifest.json"):  # false for a name that is too long, for which Path.exists raises
        return None
    try:
        manifest = read_object(entry / "manifest.json")
        raw = read_file(entry / "tokens.safetensors")
        if _hash(raw, manifest["counts"]) != manifest["sha256"]:
            raise ValueError("its content does not match its hash")
        from safetensors.numpy import load

        arrays = load(raw)
        theirs = {name: arrays.pop(f"teacher_{name}") for name in _READ if f"teacher_{name}" in arrays}
        teacher = TokenExamples(**theirs, row=arrays["row"]) if theirs else None
        return TokenExamples(**arrays, counts=manifest["counts"], teacher_view=teacher)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"warning: the token cache's {entry} is damaged ({error}); tokenising again")
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _hash(raw: bytes, counts: dict) -> str:
    return hashlib.sha256(raw + json.dumps(counts, sort_keys=True).encode()).hexdigest()


def _store(entry: Path, result: TokenExamples, warn) -> None:
    """Write an entry. If it cannot be written, a warning is printed and the run continues."""
    from safetensors.numpy import save

    arrays = {name: getattr(result, name) for name in (*_READ, "row")}
    if result.teacher_view is not None:
        arrays |= {f"teacher_{name}": getattr(result.teacher_view, name) for name in _READ}
    raw = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with write_folder(entry, replace=not os.path.exists(entry / "manifest.json")) as part:
            (part / "tokens.safetensors").write_bytes(raw)
            (part / "manifest.json").write_text(json.dumps({"sha256": _hash(raw, result.counts), "counts": result.counts}))
    except OSError as error:
        if not os.path.exists(entry / "manifest.json"):  # another process may have been first
            warn(f"warning: the token cache {entry.parent} cannot be written ({error.strerror}); continuing without it")
