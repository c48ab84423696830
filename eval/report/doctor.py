"""The page of `llmkd doctor`: what each check found, as one HTML file."""

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
    """What is to be done first, then every check under its group."""
    out: list = [Para(summary(results) + ".")]
    todo = [one for one in results if one.status in ("failed", "warned")]
    if todo:
        out += [
            Heading("To do", "todo"),
            Items([(_status(one), f" {one.check}: {one.found}. To do: {one.fix}") for one in todo], "summary"),
        ]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    for name, mine in groups.items():
        out.append(Heading(name, name.lower()))
        rows = [[_status(one), one.check, one.found, f"{one.seconds:.1f} s"] for one in mine]
        out.append(Table([" ", "Check", "Found", "Time"], rows, left=1, words=3))
        for one in mine:
            if one.shown and one.status == "failed":
                out.append(Fold(f"{one.check}: what was looked at", [Items(_lines(one.shown))]))
            elif one.shown:
                out += [Para("Supervised is what stands in colour:", "small"), Items(_lines(one.shown))]
    return out


def _status(result: Result) -> Span:
    return Span(result.status, _KINDS[result.status])


def _lines(shown: tuple[str, ...]) -> list:
    """Each example, its supervised parts in colour."""
    out = []
    for example in "\n".join(shown).split("\n\n"):
        parts = []
        for n, piece in enumerate(example.replace("⟧", "⟦").split("⟦")):
            parts.append(Span(piece, "better") if n % 2 else piece)
        if example.strip():
            out.append(tuple(parts))
    return out
