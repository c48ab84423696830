"""Loading, saving and comparing tokenizers."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

from ...config.recipe import Student
from ...console import warn
from ...errors import UserError
from ...files import read_file
from ...model_folder.files import TOKENIZER, locate
from ...model_folder.identity import TOKENIZER_FILES, verify_small_files
from ...model_folder.weights import read_json
from ..reading import skills


def _refuse_other_than_text(path: Path, setting: str) -> None:
    try:
        read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}: {path} cannot be read ({error}); copy it again") from None


def load_tokenizer(name: str, setting: str, revision: str | None = None, ends: bool = True) -> Any:
    """The tokenizer of a local folder (of a model, adapter or tokenizer), of a hub id, or of builtin:skills. UserError names `setting`.

    ends   whether it must have an end token: texts are to be generated
    """
    if name == "builtin:skills":
        return skills.tokenizer()
    from transformers import AutoTokenizer

    folder = locate(name, setting, revision, TOKENIZER)
    verify_small_files(folder, setting)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        for one in ("config.json", *TOKENIZER_FILES):
            if one.endswith(".json") and (folder / one).is_file():
                read_json(folder / one, setting)  # names a damaged file
            elif one.endswith(".jinja") and (folder / one).is_file():
                _refuse_other_than_text(folder / one, setting)
        where = folder / "tokenizer.json" if type(error) is Exception else name  # as all errors of the package tokenizers are
        raise UserError(
            f"{setting}: no tokenizer could be loaded from {where} ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}); name a folder that has one"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{setting}: {name} has no tokenizer.json, and only fast tokenizers are supported; use another one")
    if ends and tokenizer.eos_token_id is None:
        raise UserError(f"{setting}: the tokenizer in {name} has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer


def student_tokenizer(student: Student) -> Any:
    """The tokenizer that a run trains with: that of student.tokenizer, or of the student's model, or of its base if it is an adapter. No weights
    are loaded."""
    if student.tokenizer:
        return load_tokenizer(student.tokenizer, "student.tokenizer")
    return load_tokenizer(str(student_base(student)), "student.model")


def student_base(student: Student) -> Path:
    """The folder of the student's model, or of its base if it is an adapter. From the hub only the tokenizer's files are fetched."""
    folder, revision = locate(student.model, "student.model", student.revision, TOKENIZER), None
    if (folder / "adapter_config.json").exists():
        adapter = read_json(folder / "adapter_config.json", "student.model")
        name, revision = student.base or adapter.get("base_model_name_or_path"), adapter.get("revision")
        if not name or not isinstance(name, str):
            raise UserError(f"student.model: {student.model}/adapter_config.json names no base model; set student.base")
        folder = locate(name, "student.model", revision, TOKENIZER)
    return folder


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save a tokenizer and check that transformers loads the same: for some (Mistral, Llama 2) it loses a setting of their class."""
    tokenizer.save_pretrained(folder)
    path, ends = folder / "tokenizer_config.json", tokenizer.eos_token_id is not None
    for kind in (None, "PreTrainedTokenizerFast"):  # the latter loads tokenizer.json as it is
        if kind:
            path.write_text(json.dumps(read_json(path, str(folder)) | {"tokenizer_class": kind}, indent=2, ensure_ascii=False) + "\n")
        if not (differences := tokenizer_differences(tokenizer, load_tokenizer(str(folder), str(folder), ends=ends))):
            return
    warn(f"note: {folder}: transformers loads this tokenizer with a difference ({differences[0]}); use the base model's tokenizer")


_PROBES = (
    "Hello, world!\n\n### Response:\n",
    "  indented\tcode = f(x) + 12345.678e-9;\n\n\n",
    "naïve café cafe\u0301 — 你好 \U0001f600 ﬁ Ⅷ",
    "A\u00a0B\r\nC   D",
    "UPPER lower İı ß",
)


def vocab_size(tokenizer) -> int:
    """The highest id plus one: the number of rows that a model's head needs. It exceeds the number of tokens if ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def shared_vocab(tokenizer, rows: dict[str, int | None]) -> int:
    """The size of the vocabulary that the tokenizer and all models share. `rows`: {setting: rows of its model's head, None if unknown}.

    Some tokenizers have more entries than their model: Gemma 3's has an image token without a row in the 1B model. Such added tokens are
    left out, and `refuse_unknown_tokens` refuses examples that contain one. UserError if another entry has no row: it is the wrong tokenizer.
    """
    size = vocab_size(tokenizer)
    for setting, count in rows.items():
        lacking = [i for i in tokenizer.get_vocab().values() if count is not None and i >= count]
        if any(i not in tokenizer.added_tokens_decoder for i in lacking):
            raise UserError(
                f"{setting}: the tokenizer has {size} entries and the model {count} rows for them; use the model's own tokenizer"
            )
        if lacking:
            size = min(size, count)
    return size


def tokenizer_differences(ours, theirs) -> list[str]:
    """The differences between two tokenizers, except in padding tokens and chat templates. Empty if they are equal."""
    named = [f"{name}_id is {one} here and {two} there" for name, (one, two) in named_differences(ours, theirs).items()]
    return named + token_differences(ours, theirs)


def named_differences(ours, theirs) -> dict[str, tuple[str, str]]:
    """The names, such as eos_token, that stand for different tokens in two tokenizers: {name: (ours, theirs)}."""
    names = {i: token for vocabulary in (theirs.get_vocab(), ours.get_vocab()) for token, i in vocabulary.items()}
    pairs = {name: (getattr(ours, f"{name}_id"), getattr(theirs, f"{name}_id")) for name in ("bos_token", "eos_token", "unk_token")}
    return {name: (_token(one, names), _token(two, names)) for name, (one, two) in pairs.items() if one != two}


def token_differences(ours, theirs, shared: int | None = None) -> list[str]:
    """The entries, control tokens, rules and encodings that differ, so that an id or a text does not mean the same to both.

    Everything that the encoding of a text depends on is compared: entries, merges, scores, normaliser, pre-tokenizer, the matching of
    added tokens. Padding tokens may differ or be missing, since padding is masked. Chat templates may differ too: the student's is used.

    shared   compare only ids below it, and encodings without the tokens around a text: models are compared on no others
    """
    a, b = ({token: i for token, i in tok.get_vocab().items() if shared is None or i < shared} for tok in (ours, theirs))
    names = {i: token for vocabulary in (b, a) for token, i in vocabulary.items()}
    only_padding = _padding_alone(ours, b) | _padding_alone(theirs, a)
    out = [
        f"{token!r} is {a.get(token, 'absent')} here and {b.get(token, 'absent')} there"
        for token in sorted(
            (t for t in a.keys() | b.keys() if a.get(t) != b.get(t) and t not in only_padding),
            key=lambda t: (min(a.get(t, 1 << 40), b.get(t, 1 << 40)), t),
        )
    ]
    control, also = (
        {t.content for i, t in tok.added_tokens_decoder.items() if t.special and (shared is None or i < shared)} - {tok.pad_token}
        for tok in (ours, theirs)
    )
    paddings = {ours.pad_token, theirs.pad_token}
    named = {getattr(tok, name) for tok in (ours, theirs) for name in ("bos_token", "eos_token", "unk_token")}
    out += [
        f"{token!r} is a control token {'here' if token in control else 'there'} only"
        for token in sorted((control ^ also) - paddings - named)
    ]
    out += _rules_differ(*(json.loads(tok.backend_tokenizer.to_str()) for tok in (ours, theirs)), paddings)
    probes = [*_PROBES, *(f"a {token}b{token} {token}" for token in sorted(control & also)[:64])]
    around = [(_PROBES[0], True)] if shared is None else []  # the first also with the special tokens around a text
    for text, special in [*around, *((text, False) for text in probes)]:
        one, two = ours.encode(text, add_special_tokens=special), theirs.encode(text, add_special_tokens=special)
        if one != two:
            i = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
            out.append(f"{text!r} is encoded differently (from token {i}: {_some(one, i, names)} here, {_some(two, i, names)} there)")
    return out


def _padding_alone(tokenizer, other: dict[str, int]) -> set[str]:
    """The padding token of a tokenizer, if the other vocabulary has neither it nor its id, and it has no other use."""
    token, others = tokenizer.pad_token, (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    return set() if token is None or token in others or token in other or tokenizer.pad_token_id in other.values() else {token}


def _rules_differ(ours: dict, theirs: dict, paddings: set) -> list[str]:
    """The first merge, score and rule of each kind in which two tokenizers, as JSON, differ. Probe texts would not find all of these."""
    out = []
    one, two = ([m if isinstance(m, str) else " ".join(m) for m in tok["model"].get("merges", [])] for tok in (ours, theirs))
    first = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), None)
    if first is not None:
        out.append(f"merge {first} joins {one[first]!r} here and {two[first]!r} there")
    elif len(one) != len(two):
        out.append(f"merges are {len(one)} here and {len(two)} there")
    if ours["model"]["type"] == theirs["model"]["type"] == "Unigram":
        pairs = zip(ours["model"]["vocab"], theirs["model"]["vocab"], strict=False)
        different = ((t, x, y) for (t, x), (u, y) in pairs if t == u and not math.isclose(x, y, rel_tol=1e-6))
        out += [f"{token!r} has score {x:g} here and {y:g} there" for token, x, y in itertools.islice(different, 1)]
    rules = [{"model": _model(tok), **{k: _plain(tok[k]) for k in ("normalizer", "pre_tokenizer")}} for tok in (ours, theirs)]
    added = [{t["content"]: t for t in tok["added_tokens"]} for tok in (ours, theirs)]
    flags = ["lstrip", "rstrip", "single_word"] + (["normalized"] if ours["normalizer"] else [])
    for tokens, rule in zip(added, rules, strict=True):
        rule |= {repr(t): {f: tokens[t][f] for f in flags} for t in added[0].keys() & added[1].keys() - paddings}
    for name in rules[0]:
        if found := _first_difference(rules[0][name], rules[1][name], name):
            out.append("{} is {} here and {} there".format(*found))
    return out


def _model(tokenizer: dict) -> dict:
    """The settings of a tokenizer's model, without its entries and merges."""
    out = {name: value or None for name, value in tokenizer["model"].items() if name not in ("vocab", "merges")}
    if out["type"] == "BPE" and (out.get("byte_fallback") or "ByteLevel" in json.dumps(tokenizer["pre_tokenizer"])):
        out["unk_token"] = out["fuse_unk"] = None  # with a fallback to bytes there are no unknown tokens
    return out


def _plain(rule):
    """A rule without settings that only change offsets, and without sequences of one rule or none."""
    if not isinstance(rule, dict):
        return [_plain(each) for each in rule] if isinstance(rule, list) else rule
    rule = {name: _plain(value) for name, value in rule.items() if name != "trim_offsets"}
    parts = next((value for value in rule.values() if isinstance(value, list)), None) if rule.get("type") == "Sequence" else None
    return rule if parts is None or len(parts) > 1 else (parts or [None])[0]


def _first_difference(one, two, where: str) -> tuple[str, str, str] | None:
    """(path, one, two) of the first value that differs, the values as text."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        pairs = [(f"{where}.{name}", one[name], two[name]) for name in one]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = [(f"{where}.{i}", x, y) for i, (x, y) in enumerate(zip(one, two, strict=True))]
    else:
        return None if one == two else (where, *(json.dumps(x, ensure_ascii=False)[:80] for x in (one, two)))
    return next((found for path, x, y in pairs if (found := _first_difference(x, y, path))), None)


def _token(i: int | None, names: dict[int, str]) -> str:
    return "none" if i is None else f"{names.get(i, '?')!r} ({i})"


def _some(ids: list[int], at: int, names: dict[int, str]) -> str:
    return " ".join(repr(names.get(i, "?")) for i in ids[at : at + 3]) or "nothing"
