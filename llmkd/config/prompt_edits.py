"""Settings of edits of prompts, and their contradictions."""

import difflib
from collections.abc import Iterator
from typing import Any

from .fields import as_tuple
from .formats import FORMATS_OF
from .on_policy import writes

#: The edits of `data/prompt_edits.py`.
PROMPT_EDITS = ("swap", "delete", "typo")
#: Formats that tell texts that are not targets: the user's texts, and those of rows with a class.
PROMPT_FORMATS = ("chat", "alpaca", "prompt_completion", "labelled")


def prompt_contradictions(recipe: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of edits, in the form of `contradictions.contradictions`. `recipe`: the whole recipe."""
    data, setting = recipe.data, "data.augment.prompt"
    if not data.augment or not data.augment.prompt:
        return
    for i, edit in enumerate(data.augment.prompt):
        for name, probability in edit.items():
            if name not in PROMPT_EDITS:
                near = difflib.get_close_matches(str(name), PROMPT_EDITS, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(PROMPT_EDITS)}"
                yield (f"{setting}.{i}",), f"found {name!r}, which is no edit; {hint}"
            elif isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
                yield (f"{setting}.{i}.{name}",), f"found {probability!r}, expected the share of words that it changes, from 0 to 1"
    others = {one.format for one in as_tuple(data.train)} & {*FORMATS_OF[recipe.task]} - {*PROMPT_FORMATS}
    if other := next(iter(sorted(others)), None):
        yield (
            (setting, "data.train"),
            f"set with format: {other}, which does not say which text is no target; use {', '.join(PROMPT_FORMATS)}",
        )
    if data.train_on_input:
        yield (
            (setting, "data.train_on_input"),
            "set, but prompts are trained on (train_on_input: true), and targets may not change; use false",
        )
    if data.streaming:
        yield (setting, "data.streaming"), "set with data.streaming, where rows are not edited; set data.streaming to false"
    if writes(recipe.on_policy):
        yield (setting, "on_policy"), "set with on_policy, where the student writes from the prompts as they are; leave one of them out"
