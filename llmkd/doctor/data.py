"""Checks of the data: whether they can be read, what is supervised, and where each target stands; and the tokens that end answers."""

from collections import Counter

import numpy as np

from ..batch import Batch
from ..console import printable
from ..data.encoding.control_tokens import controls
from ..data.encoding.supervised_text import supervised_spans
from ..data.examples import TokenExamples
from .check import BUG, Check, Result, failed, passed
from .setup import Setup

SHOWN = 3  # examples
_LONG = 400  # characters of a part of an example; longer ones are shown without their middle


def read(setup: Setup) -> Result:
    """The checks that a run makes before it loads a model. UserError says what is wrong."""
    setup.read()
    train = setup.prepared.train
    whole = setup.small.data
    more = " of a stream's first step" if whole.streaming else ""
    return passed(
        f"{len(train)} examples{more} with {int(train.loss_mask.sum())} targets were read; "
        f"{len(setup.few)} of them with {int(setup.few.num_targets.sum())} targets are computed with"
    )


def supervised_text(setup: Setup) -> Result:
    """In each row the answer must be supervised, and the prompt must not. Shows decoded examples."""
    few, data = setup.few, setup.small.data
    shown = tuple(_shown(few, i, setup.prepared.tokenizer) for i in range(min(SHOWN, len(few))))
    if setup.rows is None:
        return passed("decoded below; the rows of a stream are not compared with what is supervised of them", shown)
    problems, cut = [], 0
    numbers = sorted(set(few.row.tolist()))
    for number in numbers:
        form = setup.formats[int(few.source[few.row == number][0])]
        text = _supervised_of_row(setup, number, form)
        if text is None:
            cut += 1
            continue
        answers, prompts = answers_and_prompts(setup.rows[number], form, setup.prepared.tokenizer)
        lacking = next((answer for answer in answers if squeezed(answer) not in text), None)
        if lacking:
            problems.append(f"the answer {lacking[:60]!r} is not all supervised: that is {text[:60]!r}")
        learnt = squeezed("".join(answers))
        extra = next((p for p in prompts if len(squeezed(p)) >= 4 and squeezed(p) in text and squeezed(p) not in learnt), None)
        if extra and not data.train_on_input:
            problems.append(f"the prompt {extra[:60]!r} is supervised too")
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        fix = (
            "look at llmkd data --show 3; the chat template may write the answer otherwise, or data.train.fields may name the wrong column"
        )
        return failed(problems[0] + more, fix, shown)
    prompts = "and the prompts as well (data.train_on_input)" if data.train_on_input else "and the prompts are not"
    skipped = f"; {cut} fill data.max_length and were not compared" if cut else ""
    return passed(f"in {len(numbers) - cut} rows the answers are supervised, {prompts}{skipped}", shown)


def _supervised_of_row(setup: Setup, number: int, form: str) -> str | None:
    """The supervised text of all examples of a row, squeezed; None if one of them may be cut."""
    every, tokenizer = setup.prepared.train, setup.prepared.tokenizer
    texts = []
    for i in np.flatnonzero(every.row == number):
        ids, mask = every.example(i)
        if len(ids) >= setup.small.data.max_length:
            return None
        mask = mask.copy()
        mask[0] = mask[0] or form == "text"  # nothing predicts the first token
        texts.append(tokenizer.decode(ids[mask].tolist()))
    return squeezed("".join(texts))


def answers_and_prompts(row: dict, form: str, tokenizer) -> tuple[list[str], list[str]]:
    """(answers, prompts) of a row: the texts that are to be learnt, and those that are not. A row of tokens has answers only."""
    if row.get("train") is False or (form == "tokens" and row["loss_mask"] is None):
        return [], []
    if form == "tokens":
        stops = np.cumsum(row["lengths"]).tolist()
        spans = [range(start + 1, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        return [tokenizer.decode([int(row["input_ids"][t]) for t in span if row["loss_mask"][t]]) for span in spans], []
    if form == "text":
        return [row["text"]], []
    if form == "alpaca":
        return [row["output"]], [row["instruction"], row.get("input") or ""]
    if form == "prompt_completion" and not isinstance(row["prompt"], list):
        return [row["completion"]], [row["prompt"]]
    messages = row["messages"] if form == "chat" else [*row["prompt"], *row["completion"]]
    first = 0 if form == "chat" else len(row["prompt"])
    learnt = [n >= first and one["role"] == "assistant" and one.get("train") is not False for n, one in enumerate(messages)]
    texts = [one.get("content") if isinstance(one.get("content"), str) else "" for one in messages]
    answers = [text for text, yes in zip(texts, learnt, strict=True) if yes and text]
    return answers, [text for text, yes in zip(texts, learnt, strict=True) if not yes and text]


def squeezed(text: str) -> str:
    """The text without white space, which tokenizers and templates change."""
    return "".join(text.split())


def _shown(examples: TokenExamples, i: int, tokenizer) -> str:
    ids, mask = examples.example(i)
    spans = supervised_spans(ids.tolist(), mask.tolist(), tokenizer)
    parts = []
    for text, yes in spans:
        text = printable(text)
        text = text if len(text) <= _LONG else f"{text[: _LONG // 2]} [...] {text[-_LONG // 2 :]}"
        parts.append(f"⟦{text}⟧" if yes else text)
    return f"example {i}, {len(ids)} tokens, {int(mask.sum())} of them supervised:\n{''.join(parts)}"


def targets(setup: Setup) -> Result:
    """In a padded and in a packed micro-batch, for student and teacher, each target must be the token after its position, and occur once."""
    few, views = setup.few, 0
    for packed in (False, True):
        batch = setup.batch(packing=packed)
        for reader, examples in (("student", few), ("teacher", few.teacher_view or few)):
            if problem := misplaced(batch, getattr(batch, reader), examples):
                how = "a packed" if packed else "a padded"
                return failed(f"in {how} micro-batch for the {reader} {problem}", "a model would learn to predict the wrong tokens: " + BUG)
            views += 1
    return passed(f"{int(few.num_targets.sum())} targets are the tokens after their positions, padded and packed, for student and teacher")


def misplaced(batch: Batch, view, examples: TokenExamples) -> str:
    """A description of the first fault in a view's targets; empty if there is none."""
    ids = view.inputs["input_ids"].cpu().numpy()
    width, places = ids.shape[1], view.rows_N.cpu().numpy()
    at = view.inputs["position_ids"].cpu().numpy().reshape(-1)[places] if "position_ids" in view.inputs else places % width
    labels, owners = batch.labels_N.cpu().numpy(), batch.example_N.cpu().numpy()
    found = Counter()
    for label, owner, t, place in zip(labels.tolist(), owners.tolist(), at.tolist(), places.tolist(), strict=True):
        own, mask = examples.example(owner)
        if t + 1 >= len(own) or not mask[t + 1]:
            return f"target {label} of example {owner} stands after position {t}, whose next token is not supervised"
        if own[t + 1] != label or own[t] != ids.reshape(-1)[place]:
            return (
                f"position {t} of example {owner} (token {own[t]}, then {own[t + 1]}) reads {ids.reshape(-1)[place]} and predicts {label}"
            )
        found[owner, t] += 1
    wanted = Counter((i, int(t) - 1) for i in range(len(examples)) for t in np.flatnonzero(examples.example(i)[1]))
    if found != wanted:
        return f"{sum((wanted - found).values())} targets are missing, and {sum((found - wanted).values())} are there twice"
    return ""


def last_tokens(setup: Setup) -> Counter:
    """How many whole examples have each control token, or None, as the last one among their last three supervised tokens."""
    tokenizer, train = setup.prepared.tokenizer, setup.prepared.train
    known, found = controls(tokenizer).any, Counter()
    for i in range(len(train)):
        ids, mask = train.example(i)
        if len(ids) >= setup.small.data.max_length and setup.small.data.too_long != "drop":
            continue
        tail = ids[mask][-3:].tolist()
        ends = [token for token in tail if known.fullmatch(tokenizer.convert_ids_to_tokens(token) or "")]
        found[ends[-1] if ends else None] += 1
    return found


CHECKS = (
    Check("the recipe's files and rows are read", "Data", "nothing", "correct that, and start llmkd doctor again", read),
    Check("the answers are supervised, and not the prompts", "Data", "data", "look at llmkd data --show 3", supervised_text),
    Check("each target is the token after its position", "Data", "data", BUG, targets),
)
