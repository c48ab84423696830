"""Tokenizers, and the one place that judges whether two of them are the same."""

from typing import Any

from ..errors import UserError
from ..model_files import locate
from . import skills


def load_tokenizer(name: str, setting: str, revision: str | None = None) -> Any:
    """The tokenizer in a model's, adapter's or tokenizer's folder (or of a hub id), or builtin:skills."""
    if name == "builtin:skills":
        return skills.tokenizer()
    from transformers import AutoTokenizer

    folder = locate(name, setting, revision)
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


_PROBES = ("Hello, world!\n\n### Response:\n", "  indented\tcode = f(x) + 12345.678e-9;", "naïve café — 你好 \U0001f600", "A\u00a0B\r\nC")


def tokenizer_differences(ours, theirs) -> list[str]:
    """Why two tokenizers are not the same: the first entries, special tokens or encodings that differ. Empty if equal."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    out = [
        f"{token!r} is {a.get(token, 'absent')} here and {b.get(token, 'absent')} there"
        for token in sorted(a.keys() | b.keys())
        if a.get(token) != b.get(token)
    ]
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(ours, name) != getattr(theirs, name):
            out.append(f"{name} is {getattr(ours, name)} here and {getattr(theirs, name)} there")
    for text in _PROBES:
        if ours.encode(text, add_special_tokens=False) != theirs.encode(text, add_special_tokens=False):
            out.append(f"{text!r} is encoded differently")
    return out
