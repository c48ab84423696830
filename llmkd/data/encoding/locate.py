"""Finds the assistant's turns in the text that a chat template writes. Runs in the process of `template_worker.py`.

A template is a program: it may trim, merge or insert text, drop earlier thinking, or ignore its arguments. So this relies neither on its
source nor on its generation tags. The template is rendered a second time with a marker in place of every answer and every thought; the text around the
markers is the template's own.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .bound import Bound
from .template import REASONING

Span = tuple[int, int]

#: Empty thinking that a template puts before an answer without any, or only its end if the prompt begins it. It is the template's text, not
#: the assistant's.
_EMPTY_THINKING = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
_THINKING = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)(.*)", re.DOTALL)
_HEADER = 100  # characters: longer text before a turn is not taken for its header
#: (text, supervised spans, whether each ends with a control token). A text that is known to be too long is replaced by its length.
Located = tuple[str | int, list[Span], bool]


class NotShown(ValueError):
    """The template does not show a message."""


@dataclass(frozen=True)
class TemplateProbe:
    """Locates answers in rendered text by a template, a marker that occurs nowhere in the conversation, and the control tokens."""

    render: Callable[..., str]  # (messages, prompt=False)
    marker: str
    control: re.Pattern
    end: str  # the end-of-text token
    found: set[tuple[int, str]] = field(default_factory=set)  # (message, key) pairs that the template has shown

    def neutral(self, messages: list[dict], text: str) -> tuple[str, list[tuple[int, str]]]:
        """The rendered conversation with a marker in place of every text and after the name of every call, and the (message, key) pairs whose
        marker is missing in it.

        ValueError if its control tokens differ from those of `text`, the rendered conversation itself.
        """
        marked, places = list(messages), []

        def mark(i: int, key: str) -> str:
            places.append((i, key))
            return f"{self.marker}{len(places) - 1}{self.marker}"

        for i, message in enumerate(messages):
            texts = [key for key in ("content", *REASONING) if isinstance(message.get(key), str) and message[key].strip()]
            marked[i] = message | {key: mark(i, key) for key in texts}
            if calls := message.get("tool_calls"):
                marked[i]["tool_calls"] = [_with_name(call, lambda name, i=i: name + mark(i, "tool_calls")) for call in calls]
        neutral = self.render(marked)
        if self.control.findall(text) != self.control.findall(neutral):
            raise ValueError("the chat template turns a message's text into control tokens; fix the row or the template")
        one = rf"(?:{self.marker}|\\u{ord(self.marker):04x})"  # the latter is what `tojson(ensure_ascii=True)` writes
        shown = {int(n) for n in re.findall(rf"{one}(\d+){one}", neutral)}
        lacking = [place for n, place in enumerate(places) if n not in shown]
        self.found.update(set(places) - set(lacking))
        return neutral, lacking

    def ends_with_control(self, text: str, stop: int) -> bool:
        return any(m.end() == stop for m in self.control.finditer(text, max(0, stop - 64), stop))


def _with_name(call: dict, name: Callable[[str], str]) -> dict:
    """A tool call with another name. The call is {function: {name, arguments}} or {name, arguments}."""
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_name(call["function"], name)}
    return call | {"name": name(str(call.get("name", "")))}


def texts(
    messages: list[dict], turns: list[int], probe: TemplateProbe, text: str, bound: Bound | None = None, guard: str = ""
) -> list[Located]:
    """The conversation's `text` with the spans of `turns`; or a text for each turn, if later turns change the text before them.

    Turns in texts that exceed the bound are not located. The guard characters do not count for the bound.
    """
    ends = _ends(messages, turns, probe, text)
    if ends is not None:
        if bound and not bound.cut and bound.exceeded(text.replace(guard, "")):
            return [(len(text), [], True)]
        _refuse_hidden_calls(messages, turns, probe)
        plain = [i for i in turns if messages[i]["content"].strip() and not any(messages[i].get(key) for key in (*REASONING, "tool_calls"))]
        places = _locate(text, messages, [(i, "content", "{}", [messages[i]["content"]]) for i in plain], probe)
        known = dict(zip(plain, places, strict=True)) if places and all(places) else {}
        spans = [_with_end(text, _span(messages, i, text[:end], probe, known.get(i)), probe) for i, end in zip(turns, ends, strict=True)]
        return [(text, spans, all(probe.ends_with_control(text, stop) for _, stop in spans))]
    out: list[Located] = []
    for i in turns:
        after = probe.render(messages[: i + 1])
        if bound and bound.exceeded((_before(messages[: i + 1], after, probe) if bound.cut else after).replace(guard, "")):
            out.append((len(after), [], True))
            continue
        probe.neutral(messages[: i + 1], after)
        _refuse_hidden_calls(messages, [i], probe)
        span = _span(messages, i, after, probe)
        out.append((after, [span], probe.ends_with_control(after, span[1])))
    return out


def _ends(messages: list[dict], turns: list[int], probe: TemplateProbe, text: str) -> list[int] | None:
    """The position where each turn ends in the conversation's text; None if later turns change the text before them."""
    out = []
    for i in turns:
        after = text if i == len(messages) - 1 else probe.render(messages[: i + 1])
        if not text.startswith(after):
            return None
        out.append(len(after))
    return out


def _before(head: list[dict], after: str, probe: TemplateProbe) -> str:
    """The text before the last turn of `head` if `after` begins with it, else an empty text."""
    before = probe.render(head[:-1]) if len(head) > 1 else ""
    return before if after.startswith(before) else ""


def _refuse_hidden_calls(messages: list[dict], turns: list[int], probe: TemplateProbe) -> None:
    for i in turns:
        if messages[i].get("tool_calls") and (i, "tool_calls") not in probe.found:
            raise ValueError(f"the chat template does not show the tool calls of messages[{i}]; use a tokenizer whose template does")
        if messages[i].get("tool_calls") and messages[i]["content"].strip() and (i, "content") not in probe.found:
            raise ValueError(
                f"the chat template does not show the content of messages[{i}] next to its tool calls; remove it, or use a tokenizer whose template does"
            )


# ---- where a turn ends


def _span(messages: list[dict], i: int, after: str, probe: TemplateProbe, known: Span | None = None) -> Span:
    """The span of turn i in `after`, the text that ends with it: from its first character to the end of its end token.

    The end token is the first control token after the answer, together with an end-of-text token right after it. If the turn calls tools, or
    no control token follows, the span ends with the text.
    """
    head, calls = messages[: i + 1], bool(messages[i].get("tool_calls"))
    start, stop = known or _locate_turn(head, after, probe)
    end = None if calls else probe.control.search(after, stop)
    if not end:
        stop = _without_prompt(head, after, stop, probe, calls)
        if calls:
            _refuse_two_turns(head, after, start, stop, probe)
        return start, stop
    further = probe.control.match(after, end.end())
    return start, further.end() if further and further[0] == probe.end != end[0] else end.end()


def _refuse_two_turns(head: list[dict], after: str, start: int, stop: int, probe: TemplateProbe) -> None:
    """ValueError if the template ends the last turn of `head`, which calls tools, and begins another inside it: that header is not the answer's."""
    without = probe.render(head[:-1]) if len(head) > 1 else ""
    header = after[len(os.path.commonprefix([without, after])) : start].strip()
    ends = [m for m in probe.control.finditer(after, start, stop) if after.endswith(m[0], start, stop)]
    if header and ends and header in after[ends[0].end() : stop]:
        raise ValueError(
            f"the chat template writes the tool calls of messages[{len(head) - 1}] and the rest of it as turns of their own; make two messages of it, "
            "or use a tokenizer whose template shows them in one"
        )


def _without_prompt(head: list[dict], after: str, stop: int, probe: TemplateProbe, calls: bool) -> int:
    """The end of the text without a generation prompt: some templates always append one. It is recognised because it stands before the turn too."""
    tail = after[stop:].rstrip()
    last = stop + len(tail)
    if len(head) < 2 or probe.render(head, True) != after:
        return last
    prompt = last - len(os.path.commonprefix([probe.render(head[:-1]).rstrip()[::-1], tail[::-1]]))
    end = next((m.end() for m in probe.control.finditer(after, stop, last) if m.end() > prompt), None)
    return end or (last if calls else prompt)


def _with_end(text: str, span: Span, probe: TemplateProbe) -> Span:
    """The span with an end-of-text token that the template writes only once another turn follows: it belongs to the turn."""
    gap = "" if probe.ends_with_control(text, span[1]) else r"\s*"
    end = re.compile(gap + re.escape(probe.end)).match(text, span[1])
    return (span[0], end.end()) if end and not text.endswith(probe.end, *span) else span


# ---- where a turn begins and ends, without its end token


def _locate_turn(head: list[dict], after: str, probe: TemplateProbe) -> Span:
    """The span of the last turn of `head` in `after`, the text that ends with it, without its end token."""
    i, message = len(head) - 1, head[-1]
    content = message["content"].strip()
    thoughts = [(i, key, "{}", [str(message[key])]) for key in REASONING if message.get(key)]
    before = _turn_start(head, after, probe.render)
    for answer in _answer_forms(i, message["content"]):
        slots = [*answer, *thoughts]
        found = _locate(after, head, slots, probe) if slots else None
        if found and all(found[: sum(len(slot[3]) for slot in answer)]):
            places = [place for place in found if place]
            if not places:
                continue
            start, stop = min(places)[0], max(place[1] for place in places)
            thinks = len(places) > len(answer) or (answer and answer[0][2] != "{}")
            if thinks and before is not None and before <= start:
                return before, stop
            return _before_calls(head, after, start, before, probe), stop
    if before is not None:
        empty = None if content.startswith(("<think>", "</think>")) or thoughts else _EMPTY_THINKING.match(after, before)
        start = empty.end() if empty else before
        if not content:
            return start, start
        behind = probe.render([*head[:-1], {**message, "content": probe.marker}]).rpartition(probe.marker)[2]
        stop = len(after) - len(behind)
        answer = after[start:stop]
        if after.endswith(behind) and no_spaces(answer).endswith(no_spaces(content)) and not probe.control.search(answer):
            return start, stop
    elif not content:  # the template always appends its prompt, or has none
        start = _start_of_calls(head, after, probe)
        if start is not None:
            return start, start
    thinking = _THINKING.fullmatch(message["content"])
    if thinking and thinking[2].strip() and thinking[2].strip() not in after:
        raise ValueError(
            f"the chat template leaves out the thinking in messages[{i}] (up to </think>), also in an answer that is the last; remove it, or use a "
            "tokenizer whose template shows it"
        )
    raise ValueError(
        f"the chat template changes the assistant's answer in messages[{i}], so its tokens cannot be located; fix the row or the template"
    )


def _before_calls(head: list[dict], after: str, start: int, before: int | None, probe: TemplateProbe) -> int:
    """The start of the last turn of `head`: `start`, where its content begins, or earlier if its calls come first (Gemma 4)."""
    names = [str((call.get("function") or call).get("name")) for call in head[-1].get("tool_calls") or ()]
    if not names:
        return start
    lead = _start_of_calls(head, after, probe) if before is None else before
    return lead if lead is not None and any(name in after[lead:start] for name in names) else start


def _start_of_calls(head: list[dict], after: str, probe: TemplateProbe) -> int | None:
    """Where the calls of the last turn of `head` begin: where the text first differs from that of a turn with an answer.

    The turn's header is before both. Some templates have no header, and begin answers, but not calls, with a space (Mistral). Others always
    append a prompt, with which calls begin and answers do not (Command R7B).
    """
    header = probe.render([*head[:-1], {"role": "assistant", "content": probe.marker}]).partition(probe.marker)[0]
    start = len(os.path.commonprefix([header, after]))
    without = probe.render(head[:-1]) if len(head) > 1 else ""
    if len(without) > start and after.startswith(without):
        return len(without)
    before = os.path.commonprefix([without, after])
    return start if start >= len(before) and len(header) - start <= _HEADER else None


#: A part of a message to be replaced by markers: (message number, key, new text with {} for each marker, replaced texts).
Slot = tuple[int, str, str, list[str]]


def _answer_forms(i: int, content: str) -> list[list[Slot]]:
    """The ways in which a template may show an answer: as one text, or the thinking and the rest separately."""
    if not content.strip():
        return [[]]
    forms: list[list[Slot]] = [[(i, "content", "{}", [content])]]
    parts = _THINKING.fullmatch(content)
    if parts:
        shown = [part for part in (parts[2], parts[4]) if part.strip()]
        form = "".join("{}" if n in (2, 4) and parts[n].strip() else parts[n].replace("{", "{{").replace("}", "}}") for n in (1, 2, 3, 4))
        forms += [[(i, "content", form, shown)]] if shown else []
    return forms


def _locate(text: str, messages: list[dict], slots: list[Slot], probe: TemplateProbe) -> list[Span | None] | None:
    """The spans in `text` of the slots' texts (whole or trimmed), if the rest of `text` is the same with markers in the slots.

    None in the list for a text that the template does not show. None instead of a list if it shows one twice, or its own text depends on one.
    """
    marked, replaced = list(messages), []
    for i, key, form, texts in slots:
        markers = [f"{probe.marker}{len(replaced) + n}{probe.marker}" for n in range(len(texts))]
        marked[i] = {**marked[i], key: form.format(*markers)}
        replaced += texts
    fixed = re.split(f"{probe.marker}(\\d+){probe.marker}", probe.render(marked))
    order = [int(n) for n in fixed[1::2]]
    if len(set(order)) < len(order) or not text.startswith(fixed[0]):
        return None
    found: list[Span | None] = [None] * len(replaced)
    at = len(fixed[0])
    for place, (n, behind) in enumerate(zip(order, fixed[2::2], strict=True), 1):
        for form in _trimmed(replaced[n]):
            stop = at + len(form)
            if text.startswith(form, at) and (text[stop:] == behind if place == len(order) else text.startswith(behind, stop)):
                found[n], at = (at, stop), stop + len(behind)
                break
        else:
            return None
    return found


def _trimmed(text: str) -> dict[str, None]:
    return dict.fromkeys(strip(text, *of) for of in ((), ("\n",)) for strip in (lambda t, *_: t, str.strip, str.lstrip, str.rstrip))


def _turn_start(head: list[dict], after: str, render: Callable[..., str]) -> int | None:
    """Where the last turn of `head` begins: right after the generation prompt. None if the template has no prompt or puts the turn elsewhere."""
    try:
        if len(head) > 1:
            without, prompt = render(head[:-1]), render(head[:-1], True)
            return len(prompt) if prompt != without and after.startswith(prompt) else None
        prompt = render(head, True)[len(after) :]  # the prompt for the next turn, as templates refuse an empty conversation
        return after.find(prompt) + len(prompt) if prompt and prompt in after else None
    except ValueError:
        return None


def no_spaces(text: str) -> str:
    """The text without white space, which templates change."""
    return "".join(text.split())
