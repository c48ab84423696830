"""Tokenizers, and the one place that judges whether two of them are the same."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model_files import TOKENIZER, locate, read_json
from ..recipe import Student
from . import skills


def load_tokenizer(name: str, setting: str, revision: str | None = None) -> Any:
    """The tokenizer in a model's, adapter's or tokenizer's folder (or of a hub id), or builtin:skills."""
    if name == "builtin:skills":
        return skills.tokenizer()
    from transformers import AutoTokenizer

    folder = locate(name, setting, revision, TOKENIZER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{setting}: no tokenizer could be loaded from {name} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]})"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{setting}: {name} has no tokenizer.json; only fast tokenizers are supported")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{setting}: the tokenizer in {name} has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer


def student_tokenizer(student: Student) -> Any:
    """The tokenizer a run would train with, without the weights: the student's own, or its base's where it is an adapter."""
    if student.tokenizer:
        return load_tokenizer(student.tokenizer, "student.tokenizer")
    return load_tokenizer(str(student_base(student)), "student.model")


def student_base(student: Student) -> Path:
    """The folder of the student's model, or of its base where it is an adapter; of the hub's, without the weights."""
    folder, revision = locate(student.model, "student.model", student.revision, TOKENIZER), None
    if (folder / "adapter_config.json").exists():
        adapter = read_json(folder / "adapter_config.json", "student.model")
        name, revision = student.base or adapter.get("base_model_name_or_path"), adapter.get("revision")
        if not name:
            raise UserError(f"student.model: {student.model}/adapter_config.json names no base model; set student.base to it")
        folder = locate(name, "student.model", revision, TOKENIZER)
    return folder


_PROBES = (
    "Hello, world!\n\n### Response:\n",
    "  indented\tcode = f(x) + 12345.678e-9;\n\n\n",
    "naïve café cafe\u0301 — 你好 \U0001f600 ﬁ Ⅷ",
    "A\u00a0B\r\nC   D",
    "UPPER lower İı ß",
)


def vocab_size(tokenizer) -> int:
    """One more than the highest id: what a model's head must have. More than the count of tokens where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def shared_vocab(tokenizer, rows: dict[str, int | None]) -> int:
    """How many entries all models have of the tokenizer's: `rows` are those of each setting's model, None where unknown.

    Some tokenizers have more entries than their model: Gemma 3's names an image token that the 1B model has no row for.
    Such added tokens are left out, and examples that hold one are refused by `prepare`; any other lack is a wrong tokenizer.
    """
    size = vocab_size(tokenizer)
    for setting, count in rows.items():
        lacking = [i for i in tokenizer.get_vocab().values() if count is not None and i >= count]
        if any(i not in tokenizer.added_tokens_decoder for i in lacking):
            raise UserError(f"{setting}: the tokenizer has {size} entries and the model {count} rows for them; they do not belong together")
        if lacking:
            size = min(size, count)
    return size


def tokenizer_differences(ours, theirs) -> list[str]:
    """Why two tokenizers are not the same: the first entries, special tokens or encodings that differ. Empty if equal.

    The token they pad with may differ: padding is masked, so nothing is learnt from it. Chat templates may, too: the student's
    is the one used.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    names = {i: token for vocabulary in (b, a) for token, i in vocabulary.items()}
    out = [
        f"{token!r} is {a.get(token, 'absent')} here and {b.get(token, 'absent')} there"
        for token in sorted(
            (t for t in a.keys() | b.keys() if a.get(t) != b.get(t)), key=lambda t: (min(a.get(t, 1 << 40), b.get(t, 1 << 40)), t)
        )
    ]
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        one, two = getattr(ours, name), getattr(theirs, name)
        if one != two:
            out.append(f"{name} is {_token(one, names)} here and {_token(two, names)} there")
    control, also = ({t.content for t in tok.added_tokens_decoder.values() if t.special} - {tok.pad_token} for tok in (ours, theirs))
    paddings = {ours.pad_token, theirs.pad_token}
    out += [f"{token!r} is a control token {'here' if token in control else 'there'} only" for token in sorted((control ^ also) - paddings)]
    out += _merges_differ(ours, theirs)
    probes = [*_PROBES, *(f"a {token}b{token} {token}" for token in sorted(control & also)[:64])]
    for text in probes:
        one, two = ours.encode(text, add_special_tokens=False), theirs.encode(text, add_special_tokens=False)
        if one != two:
            i = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
            out.append(f"{text!r} is encoded differently (from token {i}: {_some(one, i, names)} here, {_some(two, i, names)} there)")
    return out


def _merges_differ(ours, theirs) -> list[str]:
    """Of two vocabularies built by merging, the first merge that differs: no probe text would meet each of them."""
    one, two = (
        [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in json.loads(tok.backend_tokenizer.to_str())["model"].get("merges", [])
        ]
        for tok in (ours, theirs)
    )
    first = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), None)
    if first is not None:
        return [f"merge {first} joins {one[first]!r} here and {two[first]!r} there"]
    return [f"merges are {len(one)} here and {len(two)} there"] if len(one) != len(two) else []


def _token(i: int | None, names: dict[int, str]) -> str:
    return "none" if i is None else f"{names.get(i, '?')!r} ({i})"


def _some(ids: list[int], at: int, names: dict[int, str]) -> str:
    return " ".join(repr(names.get(i, "?")) for i in ids[at : at + 3]) or "nothing"
