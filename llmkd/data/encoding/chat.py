"""Conversations in the tokenizer's chat template, and which characters of the text are the assistant's.

A template is a program: it may trim, merge or insert text, drop earlier thinking, or ignore its arguments. So neither its source nor its
generation tags are relied on. It is rendered a second time with a marker in place of every answer and every thought; the text around the
markers is the template's own.
"""

import datetime
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from .control_tokens import Span, Text, controls, insert_guards, private_use_chars, refuse_unmarked, remove_guards

#: A template that asks for today's date gets the default date of Llama 3.1's template, so that a run can be repeated.
_DAY = {f"%{letter}": datetime.datetime(2024, 7, 26).strftime(f"%{letter}") for letter in "aAbBcdDeFHIjlmMpSTuUwxXyYZ"}
_DATED = (
    "{% macro strftime_now(format) %}{{ format | replace('%-', '%')"
    + "".join(f" | replace({code!r}, {value!r})" for code, value in _DAY.items())
    + " }}{% endmacro %}\n"
)
#: Thinking that a template puts before an answer that has none: it is the template's text, not the assistant's.
_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
_THINKING = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)(.*)", re.DOTALL)
_REASONING = ("reasoning_content", "reasoning", "thinking")


def conversation(messages: list[dict], tokenizer, tools: list[dict] | None = None, first: int = 0) -> list[Text]:
    """The conversation as text. The assistant's turns from message `first` on are supervised, with their end tokens; not those with `train: False`.

    Where a template shows earlier turns differently once later ones follow (it drops their thinking, say), there is one text for each
    assistant turn, as the model sees it when it generates that turn. ValueError if the template raises, or if the answer cannot be
    located in its text.
    """
    context_only = {i for i, message in enumerate(messages) if message.get("train") is False}
    messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    control = controls(tokenizer)
    refuse_unmarked([messages, tools], control)
    guard, marker = private_use_chars(messages, tools, tokenizer.chat_template)
    plain = messages, tools
    messages, tools = insert_guards(messages, control.any, guard), insert_guards(tools, control.any, guard)

    template = tokenizer.get_chat_template(tools=tools)
    template = _DATED + template if "strftime_now" in template else template

    def render(messages: list[dict], prompt: bool = False, tools: list[dict] | None = tools) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template rejects this conversation: {reason}") from None

    answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant" and i not in context_only]
    turns = [i for i in answers if messages[i]["content"].strip() or messages[i].get("tool_calls")]
    texts = _texts(messages, turns, TemplateProbe(render, marker, control.any, tokenizer.eos_token))
    if plain != (messages, tools):
        if render(messages).replace(guard, "") != render(plain[0], tools=plain[1]):
            raise ValueError("a message contains a control token that the chat template acts on; remove it from the text")
        texts = [remove_guards(text, guard, control.any, tokenizer) for text in texts]
    return texts


@dataclass(frozen=True)
class TemplateProbe:
    """What locates answers in rendered text: the template, a marker that occurs nowhere in the conversation, the control tokens."""

    render: Callable[..., str]  # (messages, prompt=False)
    marker: str
    control: re.Pattern
    end: str  # the end-of-text token

    def example(self, messages: list[dict]) -> str:
        """The rendered conversation. ValueError if it has other control tokens than the same conversation with "x" for every text."""
        text, keys = self.render(messages), ("content", *_REASONING)
        neutral = [m | {key: "x" for key in keys if isinstance(m.get(key), str) and m[key].strip()} for m in messages]
        if self.control.findall(text) != self.control.findall(self.render(neutral)):
            raise ValueError("the chat template turns a message's text into control tokens; fix the row or the template")
        return text

    def ends_with_control(self, text: str, stop: int) -> bool:
        return any(m.end() == stop for m in self.control.finditer(text, max(0, stop - 64), stop))


def _texts(messages: list[dict], turns: list[int], probe: TemplateProbe) -> list[Text]:
    render, last = probe.render, len(messages) - 1
    text = probe.example(messages)
    afters = [text if i == last else render(messages[: i + 1]) for i in turns]
    for i, after in zip(turns, afters, strict=True):
        if messages[i].get("tool_calls") and after == render([*messages[:i], {k: v for k, v in messages[i].items() if k != "tool_calls"}]):
            raise ValueError(f"the chat template does not show the tool calls of messages[{i}]; use a tokenizer whose template does")
    if all(text.startswith(after) for after in afters):
        plain = [i for i in turns if messages[i]["content"].strip() and not any(messages[i].get(key) for key in _REASONING)]
        places = _locate(text, messages, [(i, "content", "{}", [messages[i]["content"]]) for i in plain], probe)
        known = dict(zip(plain, places, strict=True)) if places and all(places) else {}
        spans = [_with_end(text, _span(messages, i, after, probe, known.get(i)), probe) for i, after in zip(turns, afters, strict=True)]
        return [Text(text, spans, False, all(probe.ends_with_control(text, stop) for _, stop in spans))]
    out = []
    for i in turns:
        after = probe.example(messages[: i + 1])
        span = _span(messages, i, after, probe)
        out.append(Text(after, [span], False, probe.ends_with_control(after, span[1])))
    return out


# ---- where a turn ends


def _span(messages: list[dict], i: int, after: str, probe: TemplateProbe, known: Span | None = None) -> Span:
    """Where turn i is in `after`, the text that ends with it: from its first character to the end of its end token.

    The end token is the first control token after the answer, with the end-of-text token where that follows at once. Where the turn
    calls tools, or no control token follows, the span ends with the text.
    """
    head, calls = messages[: i + 1], bool(messages[i].get("tool_calls"))
    start, stop = known or _locate_turn(head, after, probe)
    end = None if calls else probe.control.search(after, stop)
    if not end:
        return start, _without_prompt(head, after, stop, probe, calls)
    further = probe.control.match(after, end.end())
    return start, further.end() if further and further[0] == probe.end != end[0] else end.end()


def _without_prompt(head: list[dict], after: str, stop: int, probe: TemplateProbe, calls: bool) -> int:
    """The end of the text without a generation prompt: some templates always append one. It is recognised by standing before the turn too."""
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
    """Where the last turn of `head` is in `after`, the text that ends with it; without its end token."""
    i, message = len(head) - 1, head[-1]
    content = message["content"].strip()
    thoughts = [(i, key, "{}", [str(message[key])]) for key in _REASONING if message.get(key)]
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
            return (before if thinks and before is not None and before <= start else start), stop
    if before is not None:
        empty = None if content.startswith("<think>") or thoughts else _EMPTY_THINKING.match(after, before)
        start = empty.end() if empty else before
        if not content:
            return start, start
        behind = probe.render([*head[:-1], {**message, "content": probe.marker}]).rpartition(probe.marker)[2]
        stop = len(after) - len(behind)
        answer = after[start:stop]
        if after.endswith(behind) and no_spaces(answer).endswith(no_spaces(content)) and not probe.control.search(answer):
            return start, stop
    elif not content:  # the template always appends its prompt, or has none: the turn's header is the text before any answer
        header = probe.render([*head[:-1], {"role": "assistant", "content": probe.marker}]).partition(probe.marker)[0]
        if after.startswith(header):
            return len(header), len(header)
    raise ValueError(
        f"the chat template changes the assistant's answer in messages[{i}], so its tokens cannot be located; fix the row or the template"
    )


#: A part of a message that is replaced by markers: the message's number, the key, the new text with {} for each marker, the replaced texts.
Slot = tuple[int, str, str, list[str]]


def _answer_forms(i: int, content: str) -> list[list[Slot]]:
    """The forms in which a template may show an answer: as one text, or its thinking and the rest each on its own."""
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
    """Where `text` has the text of each slot (whole or trimmed), if the rest of `text` stays the same with markers in the slots.

    None in the list for a slot that the template does not show. None for all where it shows one twice, or its other text depends on one.
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
    """Where the last turn of `head` begins, right after the generation prompt; None if the template has no prompt or puts the turn elsewhere."""
    try:
        if len(head) > 1:
            without, prompt = render(head[:-1]), render(head[:-1], True)
            return len(prompt) if prompt != without and after.startswith(prompt) else None
        prompt = render(head, True)[len(after) :]  # templates refuse an empty conversation: the prompt that would come next
        return after.find(prompt) + len(prompt) if prompt and prompt in after else None
    except ValueError:
        return None


def no_spaces(text: str) -> str:
    """A text without its white space, which templates change."""
    return "".join(text.split())
