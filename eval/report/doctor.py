"""The page of `llmkd doctor`: the result of each check, as one HTML file."""

from pathlib import Path

from llmkd import __version__
from llmkd.commands.doctor import summary
from llmkd.doctor.check import Result

from .document import Fold, Heading, Items, Para, Span, Table, as_html

_KINDS = {"passed": "better", "failed": "worse", "warned": "worse", "not asked": "quiet"}


def doctor_page(results: list[Result], config: str) -> str:
    foot = f"Written by llmkd {__version__}: llmkd doctor --config {config}"
    return as_html(f"llmkd doctor: {Path(config).name}", blocks(results), foot)


def blocks(results: list[Result]) -> list:
    """First what to fix, then every check under its group."""
    out: list = [Para(summary(results) + ".")]
    todo = [one for one in results if one.status in ("failed", "warned")]
    if todo:
        out += [
            Heading("To do", "todo"),
            Items(
                [(_status(one), f" {one.stage + ': ' if one.stage else ''}{one.check}: {one.found}. To do: {one.fix}") for one in todo],
                "summary",
            ),
        ]
    for stage in dict.fromkeys(one.stage for one in results):
        of_stage = [one for one in results if one.stage == stage]
        out += [Heading(stage, f"stage-{stage}")] if stage else []
        for group in dict.fromkeys(one.group for one in of_stage):
            out.append(Heading(group, "" if stage else group.lower()))
            out += _group([one for one in of_stage if one.group == group])
    return out


def _group(results: list[Result]) -> list:
    rows = [[_status(one), one.check, one.found, f"{one.seconds:.1f} s"] for one in results]
    out: list = [Table([" ", "Check", "Found", "Time"], rows, left=1, words=3)]
    for one in results:
        if one.shown and one.status == "failed":
            out.append(Fold(f"{one.check}: what was looked at", [Items(_lines(one.shown))]))
        elif one.shown:
            out += [Para("In colour, between ⟦ and ⟧, is what the student learns to write:", "small"), Items(_lines(one.shown))]
    return out


def _status(result: Result) -> Span:
    return Span(result.status, _KINDS[result.status])


def _lines(shown: tuple[str, ...]) -> list:
    """Each text, its supervised parts in colour."""
    out = []
    for text in shown:
        pieces = text.replace("\n", " ⏎ ").replace("⟧", "⟦").split("⟦")
        out.append(tuple(Span(f"⟦{piece}⟧", "better") if n % 2 else piece for n, piece in enumerate(pieces)))
    return out
