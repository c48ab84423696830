"""The data card, README.md of the folder: the writer, seeds, prompts, licence and dates of the data. No torch."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import __version__
from ..config.fields import as_tuple
from ..config.make import MakeSettings
from .answers import Answers
from .prompts import Prompts
from .writers.writer import Writer

if TYPE_CHECKING:
    from .pipeline import StageCount


def data_card(
    settings: MakeSettings,
    writer: Writer,
    counts: "Sequence[StageCount]",
    prompts: Sequence[tuple[str, Prompts]],
    answers: Answers,
    rows: int,
) -> str:
    """The card as Markdown, with the hub's metadata. A function of the settings and the answers, so a second run writes the same."""
    make = settings.make
    what, row_format = ("Transcripts", "speech") if settings.sounds else ("Text", "chat")
    own, title = make.writer, f"{what} by {writer.label}" if make.writer else "Rows that were selected"
    header = {"pretty_name": title, "tags": ["synthetic", "llmkd"] if own else ["llmkd"]}
    lines = ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items()), "---", ""]
    lines += [f"# {_plain(title)}", ""]
    lines += [
        f"{rows:,} rows that `llmkd make` (llmkd {__version__}) {'made' if own else 'kept'}, of format {row_format}. `rejected.jsonl` has what was left out, and why.",
        "",
    ]
    lines += ["| | |", "|---|---|"]
    if own:
        limits = f"top_p {own.top_p:g}, top_k {own.top_k or 'off'}, min_p {own.min_p:g}"
        sampling = f"temperature {own.temperature:g}, {limits}, at most {own.max_new_tokens} tokens, seed {make.seed}"
        lines += [f"| writer | {_plain(writer.label)} ({own.kind}) |", f"| sampling | {sampling} |"]
        lines.append(f"| licence of what it writes | {_plain(own.license) if own.license else 'not given (`writer.license`)'} |")
    if served := Counter(one.model for one in answers.known.values() if one.model):
        lines.append(
            f"| names that the server gave | {', '.join(f'{_plain(name)} ({number:,})' for name, number in served.most_common())} |"
        )
    if answers.dates:
        lines.append(f"| answers written | {min(answers.dates)} to {max(answers.dates)} |")
    for source in as_tuple(make.seeds):
        lines.append(f"| seeds | {_plain(source.path)}{f', split {_plain(source.split)}' if source.split != 'train' else ''} |")
    for label, one in prompts:
        lines.append(f"| prompts of {label} | {_plain(one.name)}, SHA-256 {one.sha256} |")
    lines += ["", "| stage | rows in | passed on | candidates | rejected | rows out |", "|---|---|---|---|---|---|"]
    for one in counts:
        reasons = f" ({', '.join(f'{reason} {number}' for reason, number in one.reasons.items())})" if one.reasons else ""
        lines.append(f"| {one.stage} | {one.rows} | {one.passed} | {one.candidates} | {one.rejected}{reasons} | {one.out} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
