"""The answers of `llmkd sample` as text: side by side, or one below the other on a narrow terminal."""

from ..console import count, in_columns, table, wrap
from .sample import Answer, Asked, Samples

NARROWEST = 24  # least width of an answer side by side with others


def as_text(samples: Samples, width: int) -> str:
    """Every prompt with the answers to it, then a table of the models."""
    blocks = [f"{one.place}  ({i} of {len(samples.asked)})\n{_asked(one, width)}" for i, one in enumerate(samples.asked, 1)]
    models = [row | {"mean tokens": f"{row['mean tokens']:.1f}"} for row in samples.summary()]
    return "\n\n".join([*blocks, table(models)])


def _asked(one: Asked, width: int) -> str:
    texts = columns(one)
    prompts = {"prompt": one.prompt} | ({} if one.teacher_prompt is None else {"the teacher's prompt": one.teacher_prompt})
    lines = [line for name, text in prompts.items() for line in (f"-- {name}", *wrap(text, width))]
    if (width + 3) // len(texts) - 3 >= NARROWEST:
        each = [f"-- {name}\n{text}" for name, text in texts.items()]
        return "\n".join([*lines, *in_columns(each, width)])
    return "\n".join([*lines, *(line for name, text in texts.items() for line in (f"-- {name}", *wrap(text, width)))])


def columns(one: Asked) -> dict[str, str]:
    """The texts that are shown side by side, by their headings."""
    out = {} if one.reference is None else {"reference": one.reference}
    return out | {f"{name}, {said(answer)}": answer.text for name, answer in one.answers.items()}


def said(answer: Answer) -> str:
    return count(answer.tokens, "token") + ("" if answer.finished else ", cut off")
