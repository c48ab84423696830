"""Conversations through the tokenizer's own chat template, and which characters of them the assistant said.

A template is a program: it may trim, merge, insert, drop earlier thinking, ignore what it is asked for. So nothing is
taken from its source or its generation marks. It is rendered once more with every answer replaced by a mark, and what
stands before and behind the mark is the template's own.
"""

import os
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]

#: Thinking that a template puts before an answer that has none. It is the template's word, not the assistant's.
_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
_PATTERNS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # a tokenizer's list of added tokens is slow to ask for
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Text:
    """A text and the character spans of it that are supervised."""

    text: str
    spans: list[Span]
    bare: bool = True  # still wants the tokenizer's start and end tokens, and holds no control token
    ends: bool = True  # a control token ends what is supervised
    #: Where the characters of a control token are to stay characters: (begin, stop, the control token's id or None).
    pieces: tuple[tuple[int, int, int | None], ...] = ()


def conversation(messages: list[dict], tokenizer, tools: list[dict] | None = None, first: int = 0) -> list[Text]:
    """The assistant's turns from message `first` on are supervised, with their end tokens.

    A template that shows earlier turns differently once later ones follow (thinking that is dropped, say) gives one
    example for each assistant turn, just as the model meets it when it answers. ValueError if the template raises, or
    if it cannot be told which part of its text is the answer.
    """
    control = _pattern(tokenizer)
    guard, mark = _unused(messages, tools)
    plain = messages, tools
    messages, tools = _broken(messages, control, guard), _broken(tools, control, guard)

    def render(messages: list[dict], prompt: bool = False, tools: list[dict] | None = tools) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template does not take this conversation: {reason}") from None

    turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))]
    texts = [_ended(text, control) for text in _texts(messages, turns, Look(render, mark, control, tokenizer.eos_token))]
    if plain != (messages, tools):
        if render(messages).replace(guard, "") != render(plain[0], tools=plain[1]):
            raise ValueError("a message contains a control token that the chat template acts on; remove it from the text")
        texts = [_whole(text, guard, control, tokenizer) for text in texts]
    return texts


# ---- where the answers stand


@dataclass(frozen=True)
class Look:
    """How a conversation is looked at: rendered, with a mark that occurs nowhere in it, and where a turn may end."""

    render: Callable[..., str]  # (messages, prompt=False)
    mark: str
    control: re.Pattern
    end: str  # the end of text


def _texts(messages: list[dict], turns: list[int], look: Look) -> list[Text]:
    render, whole = look.render, look.render(messages)
    afters = [whole if i == len(messages) - 1 else render(messages[: i + 1]) for i in turns]
    for i, after in zip(turns, afters, strict=True):
        if messages[i].get("tool_calls") and after == render([*messages[:i], {k: v for k, v in messages[i].items() if k != "tool_calls"}]):
            raise ValueError(f"the chat template does not show the tool calls of messages[{i}]; use a tokenizer whose template does")
    if all(whole.startswith(after) for after in afters):
        starts = _between(whole, messages, [i for i in turns if _only_says(messages[i])], look) or {}
        spans = [_span(messages, i, after, look, starts.get(i)) for i, after in zip(turns, afters, strict=True)]
        return [Text(whole, spans, bare=False)]
    return [Text(after, [_span(messages, i, after, look)], bare=False) for i, after in zip(turns, afters, strict=True)]


def _span(messages: list[dict], i: int, after: str, look: Look, known: Span | None = None) -> Span:
    """Turn i in `after`, the text that ends with it: from its first character to its end token.

    The end is the control tokens that stand directly behind it, up to the end of text; where tools are called, or where
    there is none, the end of the text.
    """
    start, stop = known or _turn(messages[: i + 1], after, look)
    end = None if messages[i].get("tool_calls") else look.control.search(after, stop)
    if not end:
        return start, max(stop, len(after.rstrip()))
    while end[0] != look.end and (further := look.control.match(after, end.end())):
        end = further
    return start, end.end()


def _turn(head: list[dict], after: str, look: Look) -> Span:
    """The last turn of `head` in `after`, the text that ends with it, without its end token."""
    content, thinks = head[-1]["content"].strip(), [key for key in _REASONING if head[-1].get(key)]
    thinks = [key for key in thinks if _bones(head[-1][key]) in _bones(after)]
    if content and not thinks and (found := _between(after, head, [len(head) - 1], look)):
        return found[len(head) - 1]
    before = _prompted(head, after, look.render)
    if before is not None:
        empty = None if content.startswith("<think>") else _EMPTY_THINKING.match(after, before)
        start = empty.end() if empty and not thinks else before
        if said := re.compile(r"\s*".join(map(re.escape, _bones(content)))).search(after, start):
            return start, said.end() if content else start
    if content:  # the template takes thinking apart and its prompt shows it differently: what depends on the message is the message
        marked = look.render([*head[:-1], {**head[-1], **dict.fromkeys(["content", *thinks], look.mark)}])
        behind = marked.rpartition(look.mark)[2]
        start, stop = len(os.path.commonprefix([after, marked])), len(after) - len(behind)
        if start <= stop and after.endswith(behind) and _bones(after[:stop]).endswith(_bones(content)):
            return start, stop
    raise ValueError(
        f"the chat template changes the assistant's answer in messages[{len(head) - 1}], so its tokens cannot be told; mend the row or the template"
    )


def _between(text: str, messages: list[dict], turns: list[int], look: Look) -> dict[int, Span] | None:
    """Where `text` has those turns' contents (whole or trimmed), if all the rest of it does not depend on them."""
    if not turns:
        return {}
    marked = [{**m, "content": look.mark} if i in turns else m for i, m in enumerate(messages)]
    fixed = look.render(marked).split(look.mark)
    if len(fixed) != len(turns) + 1 or not text.startswith(fixed[0]):
        return None
    found, at = {}, len(fixed[0])
    for n, i in enumerate(turns):
        content, behind = messages[i]["content"], fixed[n + 1]
        for said in (content, content.strip(), content.lstrip(), content.rstrip()):
            stop = at + len(said)
            if text.startswith(said, at) and (text[stop:] == behind if n == len(turns) - 1 else text.startswith(behind, stop)):
                found[i], at = (at, stop), stop + len(behind)
                break
        else:
            return None
    return found


def _prompted(head: list[dict], after: str, render: Callable[..., str]) -> int | None:
    """Where the last turn of `head` begins by the generation prompt, if the template has one and puts the turn behind it."""
    try:
        if len(head) > 1:
            without, prompt = render(head[:-1]), render(head[:-1], True)
            return len(prompt) if prompt != without and after.startswith(prompt) else None
        prompt = render(head, True)[len(after) :]  # templates refuse an empty conversation: the prompt that would come next
        return after.find(prompt) + len(prompt) if prompt and prompt in after else None
    except ValueError:
        return None


def _only_says(message: dict) -> bool:
    return bool(message["content"].strip()) and not any(message.get(key) for key in _REASONING)


def _bones(text: Any) -> str:
    """A text without its white space, which templates rearrange."""
    return "".join(str(text).split())


def _ended(text: Text, control: re.Pattern) -> Text:
    """Says whether every span ends with a control token, without which a student does not learn to stop."""
    ends = all(any(m.end() == stop for m in control.finditer(text.text, max(0, stop - 64), stop)) for _, stop in text.spans)
    return text if ends else Text(text.text, text.spans, text.bare, False)


# ---- control tokens in what people wrote


def _pattern(tokenizer) -> re.Pattern:
    """Matches the tokenizer's control tokens, longest first as the tokenizer itself does."""
    known = _PATTERNS.get(tokenizer)
    if known is None:
        tokens = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content} | {tokenizer.eos_token}
        known = _PATTERNS[tokenizer] = re.compile("|".join(re.escape(t) for t in sorted(tokens, key=lambda t: (-len(t), t))))
    return known


def _unused(*values) -> tuple[str, str]:
    """Two characters for private use that occur nowhere in the values."""
    used = set().union(*(set(text) for text in _strings(values)))
    free = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used)
    return next(free), next(free)


def _strings(value) -> Iterator[str]:
    """Every text in messages, whatever key a template may show it from."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _broken(value, control: re.Pattern, guard: str):
    """The same with every control token in a text broken by the guard, so that those the template makes are told from them."""
    if isinstance(value, str):
        while control.search(value):
            before = value
            value = control.sub(lambda m: m[0][:1] + guard + m[0][1:], value)
            if len(value) > 4 * len(before) + 64 or any(len(m[0]) < 2 for m in control.finditer(before)):
                raise ValueError("a message contains a control token of one character; remove it from the text")
        return value
    if isinstance(value, dict):
        return {_broken(k, control, guard): _broken(v, control, guard) for k, v in value.items()}
    return [_broken(v, control, guard) for v in value] if isinstance(value, list) else value


def _whole(text: Text, guard: str, control: re.Pattern, tokenizer) -> Text:
    """The text without its guards, in pieces that keep people's characters characters and the template's tokens tokens.

    That this is how the tokenizer treats a whole text is checked on the guarded one; where it is not (tokenizers that
    put a space before every piece), the row is refused.
    """
    pieces, at = [], 0
    for m in control.finditer(text.text):
        pieces += [(at, m.start(), None), (m.start(), m.end(), tokenizer.convert_tokens_to_ids(m[0]))]
        at = m.end()
    pieces = [p for p in [*pieces, (at, len(text.text), None)] if p[1] > p[0]]
    guarded = Text(text.text, [], False, True, tuple(pieces))
    if piecewise(guarded, tokenizer)[0] != tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]:
        token = control.search(text.text.replace(guard, ""))
        raise ValueError(
            f"a message contains a control token (the text has {token[0]!r}), which this tokenizer cannot keep as characters; remove it"
        )

    def moved(position: int) -> int:
        return position - text.text.count(guard, 0, position)

    return Text(
        text.text.replace(guard, ""),
        [(moved(a), moved(b)) for a, b in text.spans],
        False,
        text.ends,
        tuple((moved(a), moved(b), token) for a, b, token in pieces),
    )


def piecewise(text: Text, tokenizer) -> tuple[list[int], list[Span]]:
    """Ids and character offsets of a text in pieces."""
    ids, offsets = [], []
    for begin, stop, token in text.pieces:
        if token is not None:
            ids.append(token)
            offsets.append((begin, stop))
            continue
        made = tokenizer(
            text.text[begin:stop], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        ids += made["input_ids"]
        offsets += [(begin + a, begin + b) for a, b in made["offset_mapping"]]
    return ids, offsets
