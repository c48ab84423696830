"""Control tokens in user text are kept as characters, or the row is refused.

Most control tokens are marked special, and a tokenizer can encode their characters as characters. In some tokenizers the role tokens are
ordinary added tokens, which are always encoded as tokens: a text with one of these is refused.
"""

import itertools
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import UserError
from .locate import Span
from .stretches import Encoder, stretches
from .template_process import rendered

_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # reading a tokenizer's list of added tokens is slow
_END_OF_PIECE = 1 << 14  # characters
_NEUTRAL = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]


@dataclass(frozen=True)
class Text:
    """A text and its supervised spans, in characters."""

    text: str
    spans: list[Span]
    raw: bool = True  # not from a template: start and end tokens are added, and all of the text is characters
    ends_with_control: bool = True  # each supervised span ends with a control token
    #: Only for texts with the characters of a control token: (begin, stop, id of a control token or None for characters).
    pieces: tuple[tuple[int, int, int | None], ...] = ()
    unshown: tuple[str, ...] = ()  # keys of messages that the chat template does not show
    left_out: int = 0  # the length in characters of a text that is left out because it is known to be too long


@dataclass(frozen=True)
class Control:
    """Patterns of a tokenizer's control tokens, longest first, as the tokenizer itself matches them."""

    any: re.Pattern
    unmarked: re.Pattern | None  # role tokens that are not marked special
    strips_spaces: dict[int, str]  # {id: token} of added tokens whose match includes the white space around them


def controls(tokenizer) -> Control:
    """The patterns of the tokens marked special, and of added tokens that the chat template names or writes around messages."""
    template = _template(tokenizer)
    known = _KNOWN.get(tokenizer)
    if known and known[0] == template:
        return known[1]
    added = tokenizer.added_tokens_decoder
    marked = {t.content for t in added.values() if t.special and t.content} | {tokenizer.eos_token}
    every = {t.content for t in added.values() if t.content}
    written = template + "".join(_written(tokenizer, _NEUTRAL[first:]) for first in (0, 1)) if template else ""
    unmarked = {t for t in every - marked if t in written and not _is_markup(t, every)}
    strips_spaces = {i: t.content for i, t in added.items() if t.lstrip or t.rstrip}
    control = Control(_pattern(marked | unmarked), _pattern(unmarked) if unmarked else None, strips_spaces)
    _KNOWN[tokenizer] = template, control
    return control


def _template(tokenizer) -> str:
    template = tokenizer.chat_template
    return "".join(template.values()) if isinstance(template, dict) else template or ""


def _written(tokenizer, messages: list[dict]) -> str:
    try:
        return rendered(tokenizer.get_chat_template(), tokenizer.special_tokens_map, messages)
    except ValueError:  # it refuses a system turn, say, or there is no default template
        return ""
    except UserError as error:  # its process was ended, before any row that could be named
        raise UserError(f"{tokenizer.name_or_path}: {error}") from None


def _is_markup(token: str, every: set[str]) -> bool:
    """Whether the token is one of a pair of tags, such as <think> and </think>, which the assistant writes itself."""
    name = re.fullmatch(r"</?(\w+)>", token)
    return bool(name) and {f"<{name[1]}>", f"</{name[1]}>"} <= every


def _pattern(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=lambda t: (-len(t), t))))


def refuse_unmarked(value, control: Control) -> None:
    """ValueError if a text contains a role token that the tokenizer would encode as a token."""
    found = next((m for text in _strings(value) if (m := control.unmarked.search(text))), None) if control.unmarked else None
    if found:
        raise ValueError(
            f"the text has {found[0]!r}, a role token of the chat template that this tokenizer cannot encode as characters; remove it from the text"
        )


def private_use_chars(*values) -> tuple[str, str]:
    """Two private-use characters (U+E000 to U+F8FF) that occur nowhere in the values."""
    texts = list(_strings(values))
    free = list(itertools.islice((c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in text for text in texts)), 2))
    if len(free) < 2:
        raise ValueError("a conversation uses every private-use character (U+E000 to U+F8FF), and two must be free; remove some")
    return free[0], free[1]


def _strings(value) -> Iterator[str]:
    """Every text in the messages, keys included: a template may show any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def insert_guards(value, control: re.Pattern, guard: str):
    """The messages with a guard character inside every control token, which tells these from the control tokens that the template writes."""
    if isinstance(value, str):
        while control.search(value):
            before = value
            value = control.sub(lambda m: m[0][:1] + guard + m[0][1:], value)
            if len(value) > 4 * len(before) + 64 or any(len(m[0]) < 2 for m in control.finditer(before)):
                raise ValueError("a message contains a control token of one character; remove it from the text")
        return value
    if isinstance(value, dict):
        return {insert_guards(k, control, guard): insert_guards(v, control, guard) for k, v in value.items()}
    return [insert_guards(v, control, guard) for v in value] if isinstance(value, list) else value


def remove_guards(text: Text, guard: str, control: re.Pattern, tokenizer) -> Text:
    """The text without guards, in pieces: the template's control tokens are tokens, and all the rest is characters.

    Encoding the pieces must give the same tokens as encoding the whole text. This is checked on the guarded text; ValueError if it does not
    hold, as with tokenizers that put a space before every piece.
    """
    pieces, at = [], 0
    for m in control.finditer(text.text):
        pieces += [(at, m.start(), None), (m.start(), m.end(), tokenizer.convert_tokens_to_ids(m[0]))]
        at = m.end()
    pieces = [p for p in [*pieces, (at, len(text.text), None)] if p[1] > p[0]]
    guarded = ends_of_pieces(text.text, pieces)
    if piecewise(guarded, tokenizer)[0] != tokenizer(guarded.text, add_special_tokens=False, verbose=False)["input_ids"]:
        token = control.search(text.text.replace(guard, ""))
        raise ValueError(
            f"a message contains a control token (the text has {token[0]!r}) that this tokenizer cannot encode as characters; remove it"
        )

    def moved(position: int) -> int:
        return position - text.text.count(guard, 0, position)

    return Text(
        text.text.replace(guard, ""),
        [(moved(a), moved(b)) for a, b in text.spans],
        False,
        text.ends_with_control,
        tuple((moved(a), moved(b), token) for a, b, token in pieces),
        text.unshown,
    )


def ends_of_pieces(text: str, pieces: list[tuple[int, int, int | None]]) -> Text:
    """The text in pieces, long ones without their middle: only at its ends may a tokenizer treat a piece differently."""
    parts, kept, at = [], [], 0
    for begin, stop, token in pieces:
        whole = stop - begin <= 2 * _END_OF_PIECE
        part = text[begin:stop] if whole else text[begin : begin + _END_OF_PIECE] + text[stop - _END_OF_PIECE : stop]
        parts.append(part)
        kept.append((at, at + len(part), token))
        at += len(part)
    return Text("".join(parts), [], False, True, tuple(kept))


def piecewise(text: Text, tokenizer) -> tuple[list[int], list[Span]]:
    """Token ids and character offsets of a text that is in pieces."""
    ids, offsets, encode = [], [], one_encoder(tokenizer, True)
    for begin, stop, token in text.pieces:
        if token is not None:
            ids.append(token)
            offsets.append((begin, stop))
            continue
        for own, places in stretches(text.text[begin:stop], encode):
            ids += own.tolist()
            offsets += (places + begin).tolist()
    return ids, offsets


def one_encoder(tokenizer, raw: bool) -> Encoder:
    """A function from a text to its token ids and their character offsets. `raw`: control tokens in the text stay characters."""

    def encode(text: str) -> tuple[list[int], list[Span]]:
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=raw, verbose=False)
        return made["input_ids"], made["offset_mapping"]

    return encode
