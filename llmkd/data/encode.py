"""From rows to token ids and which of them are supervised. One function per format; no torch here.

A whole text is encoded at once and its supervised part found by character offsets, so that a token is the same token
that the model would meet in that text; a token across the border of prompt and answer counts as answer. Text that people wrote never becomes a control token: in alpaca and text it
is encoded as plain characters, in chat a row that contains one is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..recipe import Data
from .sources import Problems, Rows

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Text:
    """A text and the character spans of it that are supervised; bare text still wants the tokenizer's start and end tokens."""

    text: str
    spans: list[tuple[int, int]]
    bare: bool = True


def alpaca(row: dict, tokenizer) -> list[Text]:
    """instruction, input (may be empty or absent), output: Stanford Alpaca's prompt; the output is supervised, if there is one."""
    prompt = (ALPACA_WITH_INPUT if row.get("input") else ALPACA).format(instruction=row["instruction"], input=row.get("input", ""))
    text = prompt + row["output"]
    return [Text(text, [(len(prompt), len(text))] if row["output"].strip() else [])]


def text(row: dict, tokenizer) -> list[Text]:
    """text: all of it is supervised."""
    return [Text(row["text"], [(0, len(row["text"]))] if row["text"].strip() else [])]


def chat(row: dict, tokenizer) -> list[Text]:
    """messages: the tokenizer's own template; the assistant's turns with their end tokens are supervised.

    A template that shows earlier turns differently once later ones follow (thinking that is dropped, say) gives one
    example for each assistant turn, just as the model meets it when it answers. ValueError if the template raises or
    does not put the answer behind its own generation prompt.
    """
    messages = row["messages"]
    everything = "\n".join(_strings(messages))
    control = next((t for t in _control_tokens(tokenizer) if t in everything), None)
    if control:
        raise ValueError(f"a message contains the control token {control!r}; remove it from the text")

    def render(n: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)

    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
    whole, parts = render(len(messages), False), []
    for i in turns:
        after = render(i + 1, False)
        if i:
            before = render(i, True)
        else:  # templates refuse an empty conversation, so its header is found by the prompt that would come next
            prompt = render(len(messages), True)[len(whole) :]
            before = after[: after.find(prompt) + len(prompt)] if prompt in after else ""
        if not after.startswith(before):
            raise ValueError("the chat template does not put the assistant's answer behind its generation prompt")
        parts.append((after, (len(before), len(after.rstrip()))))
    if all(whole.startswith(after) for after, _ in parts):
        return [Text(whole, [span for _, span in parts], bare=False)]
    return [Text(after, [span], bare=False) for after, span in parts]


FORMATS = {"alpaca": alpaca, "text": text, "chat": chat}


def with_answer(row: dict, format: str, answer: str) -> dict:
    """A multiple-choice row with one of its choices as the answer."""
    if format == "chat":
        return {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
    return {**row, "output": answer}


@dataclass
class Encoded:
    """Examples as flat arrays, and what became of the rows."""

    ids: np.ndarray  # int32, all examples one after another
    supervised: np.ndarray  # bool, alike
    offsets: np.ndarray  # int64, [examples + 1]
    row: np.ndarray  # int64, [examples]: the row each example came from
    counts: dict[str, int] = field(default_factory=dict)  # rows, examples, tokens, targets, unsupervised, too_long

    def __len__(self) -> int:
        return len(self.row)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.supervised[part]

    def subset(self, keep: np.ndarray) -> "Encoded":
        """The examples where the boolean `keep` is true."""
        chosen = np.repeat(keep, self.lengths)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[keep])])
        return Encoded(self.ids[chosen], self.supervised[chosen], offsets, self.row[keep])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def encode(rows: Rows, format: str, data: Data, tokenizer, progress=iter) -> Encoded:
    """Encode rows; drop, cut, split or refuse what is too long; drop and count what has nothing supervised."""
    problems, texts, origin = Problems(), [], []
    for i, row in enumerate(rows.rows):
        try:
            new = FORMATS[format](row, tokenizer)
        except Exception as error:  # a chat template raises what it likes
            problems.add(f"{rows.places[i]}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        texts += new
        origin += [i] * len(new)
    problems.raise_if_any()
    start, end = _edges(tokenizer)
    all_ids, all_marks, all_rows = [], [], []
    counts = {"rows": len(rows.rows), "unsupervised": 0, "too_long": 0}
    for first in progress(range(0, len(texts), 512)):
        batch = texts[first : first + 512]
        encoded = tokenizer(
            [t.text for t in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=batch[0].bare,
            verbose=False,
        )
        for t, ids, places, row in zip(batch, encoded["input_ids"], encoded["offset_mapping"], origin[first:], strict=False):
            marks = [any(a < stop and b > begin for begin, stop in t.spans) for a, b in places]
            if t.bare:
                ids, marks = start + ids + end, [False] * len(start) + marks + [bool(t.spans)] * len(end)
            ids, marks = np.array(ids, np.int32), np.array(marks, bool)
            if data.train_on_input and t.spans:
                marks[:] = True
            marks[:1] = False  # nothing predicts the first token
            pieces = [(ids, marks)]
            if len(ids) > data.max_length:
                counts["too_long"] += 1
                if data.too_long == "refuse":
                    problems.add(
                        f"{rows.places[row]}: {len(ids)} tokens, more than data.max_length ({data.max_length}); raise it, or set data.too_long"
                    )
                pieces = _shorten(ids, marks, data)
            for piece, piece_marks in pieces:
                if piece_marks.any():
                    all_ids.append(piece)
                    all_marks.append(piece_marks)
                    all_rows.append(row)
                else:
                    counts["unsupervised"] += 1
    problems.raise_if_any()
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in all_ids], dtype=np.int64)]).astype(np.int64)
    flat = np.concatenate(all_ids) if all_ids else np.zeros(0, np.int32)
    marks = np.concatenate(all_marks) if all_marks else np.zeros(0, bool)
    counts |= {"examples": len(all_ids), "tokens": len(flat), "targets": int(marks.sum())}
    return Encoded(flat, marks, offsets, np.array(all_rows, np.int64), counts)


def _shorten(ids, marks, data: Data) -> list:
    most = data.max_length
    if data.too_long == "truncate":
        return [(ids[:most], marks[:most])]
    if data.too_long == "split":  # pieces share one token, so that every token is predicted exactly once
        pieces = [(ids[i : i + most], marks[i : i + most].copy()) for i in range(0, len(ids) - 1, most - 1)]
        for _, piece_marks in pieces:
            piece_marks[0] = False
        return pieces
    return []


def _edges(tokenizer) -> tuple[list[int], list[int]]:
    """The start token, where the tokenizer itself puts one, and the end token."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
    return ([bos] if starts else []), [tokenizer.eos_token_id]


def _strings(value) -> Iterator[str]:
    """Every text in messages, whatever key a template may show it from."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _control_tokens(tokenizer) -> list[str]:
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
