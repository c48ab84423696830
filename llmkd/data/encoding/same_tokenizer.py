"""Checks that a model's tokenizer is the run's own: the same ids for the same texts, and the same end token where texts get one.

Two tokenizers of one vocabulary may name different tokens as the start and the end of a text: an instruct model ends a turn with <|im_end|>,
its base ends a text with <|endoftext|>. That matters only if a text gets the named token.
"""

import re
from collections.abc import Sequence

from ...config.data import Source
from ...config.formats import FORMATS
from ...console import info
from ...errors import UserError
from ..reading.sources import Rows
from .tokenizer import named_differences, token_differences

_WORDS = {"eos_token": "end-of-text token", "bos_token": "start-of-text token"}


def refuse_other_tokens(ours, theirs, setting: str, our_name: str, their_name: str, shared: int | None = None) -> None:
    """UserError if an id stands for another token, or a text has other ids. Named tokens may differ. `shared`: see `token_differences`."""
    differences = token_differences(ours, theirs, shared)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise UserError(
            f"{setting}: {our_name} and {their_name} are not the same: {'; '.join(differences[:3])}{more}; token ids must mean the same to all models; "
            "use a teacher and a student of one tokenizer family"
        )


def report_chosen(tokenizer, own, base) -> None:
    """Reports if student.tokenizer ends or starts texts with other tokens than the base's own tokenizer."""
    for name, (one, two) in named_differences(tokenizer, own).items():
        if name in _WORDS:
            info(f"student.tokenizer: its {_WORDS[name]} is {one}, which is used, and that of {base}'s own tokenizer is {two}")


def refuse_other_ends(tokenizer, theirs, setting: str, folder, sources: Sequence[tuple[str, Source, Rows | None]]) -> None:
    """UserError if a text would get the student's start or end token, and the teacher's tokenizer has another one.

    folder   the folder of the teacher's tokenizer
    sources  (setting, source, rows) of every source; the rows are None if they are not known
    """
    sources = [one for one in sources if FORMATS[one[1].format].is_text]  # rows of tokens get no token added
    different = {name: pair for name, pair in named_differences(tokenizer, theirs).items() if name in _WORDS}
    if not different:
        return
    template = tokenizer.get_chat_template() if isinstance(tokenizer.chat_template, dict) else tokenizer.chat_template
    plain = next((one for one in sources if _is_plain(*one[1:])), None)
    for name, (ours, other) in different.items():
        if template and re.search(rf"\b{name}\b", template) and not all(_is_plain(*one[1:]) for one in sources):
            where, fix = f"the student's chat template writes {name}", ""
        elif plain and name == "eos_token":
            where = f"texts of {plain[0]} (format: {plain[1].format}) end with it"
            fix = ", or chat_template: true" if FORMATS[plain[1].format].template == "optional" else ""
        else:
            continue
        raise UserError(
            f"{setting}: the {_WORDS[name]} of the student's tokenizer is {ours}, that of {folder} is {other}, and {where}, which this teacher "
            f"does not expect there; set student.tokenizer: {folder}{fix}"
        )
    named = " and ".join(f"{_WORDS[name]} is {other} (the student's: {ours})" for name, (ours, other) in different.items())
    info(f"{setting}: its tokenizer's {named}; nothing depends on it, since the chat template writes every conversation without it")


def _is_plain(source: Source, rows: Rows | None) -> bool:
    """Whether rows of the source are encoded without the chat template. This is assumed of a stream of prompt_completion."""
    if source.chat_template or FORMATS[source.format].template == "always":
        return False
    return rows is None or source.format != "prompt_completion" or any(isinstance(row["prompt"], str) for row in rows.rows)
