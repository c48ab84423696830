"""The blocks of a document (headings, paragraphs, tables, charts), written as one HTML file or as Markdown with all text escaped."""

import html
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from llmkd.output import markdown

from . import svg

_TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Span:
    """Text of a kind: "code" (a name), "better", "worse", "quiet", or "text", whose lines are kept."""

    text: str
    kind: str = "code"


Text = str | Span | tuple[str | Span, ...]


@dataclass(frozen=True)
class Heading:
    text: str
    anchor: str = ""  # of a section; a heading without one is a smaller one


@dataclass(frozen=True)
class Para:
    text: Text
    kind: str = ""  # or "small", "warn"


@dataclass(frozen=True)
class Items:
    items: list[Text]
    kind: str = ""  # or "summary"


@dataclass(frozen=True)
class Table:
    """A table. Cells after the first `left` and before the last `words` columns are numbers, which are aligned to the right."""

    head: list[Text]
    rows: list[list[Text]]
    left: int = 1
    words: int = 0
    caption: str = ""

    def column(self, i: int) -> str:
        """The class of column i: "name", "number" or "words"."""
        return "name" if i < self.left else "words" if i >= len(self.head) - self.words else "number"


@dataclass(frozen=True)
class Chart:
    """A chart; in Markdown its table or, if it has none, a link to the chart in the HTML file."""

    name: str
    title: str
    picture: svg.Svg
    caption: Text = ""
    table: Table | None = None


@dataclass(frozen=True)
class Gallery:
    charts: list[Chart]
    legend: list[tuple[Text, int | None]] = field(default_factory=list)  # label and number of a series; None for those in grey


@dataclass(frozen=True)
class Fold:
    summary: str
    inside: list


def as_html(title: str, blocks: list, foot: Text) -> str:
    """One file that loads nothing: style, charts and text. report.html.jinja lays it out; all text is escaped there."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"kind": lambda block: type(block).__name__, "parts": _parts, "plain": as_plain}
    return environment.get_template("report.html.jinja").render(
        title=title, blocks=blocks, foot=foot, light=svg.LIGHT, dark=svg.DARK, series_key=svg.key
    )


def _parts(text: Text) -> tuple:
    return text if isinstance(text, tuple) else (text,)


def as_plain(text: Text) -> str:
    return "".join(part if isinstance(part, str) else part.text for part in _parts(text))


def as_markdown(title: str, blocks: list, foot: Text, page: str) -> str:
    """`page`: the HTML file next to it, to which charts are linked."""
    return "\n\n".join([f"# {markdown.escape(title)}", *(_md(block, page) for block in blocks), f"*{_md_inline(foot)}*"]) + "\n"


def _md(block, page: str) -> str:
    match block:
        case Heading(text, anchor):
            return ("## " if anchor else "### ") + markdown.escape(text)
        case Para(text, kind):
            return ("> " if kind == "warn" else "") + _md_inline(text)
        case Items(items):
            return "\n".join(f"- {_md_inline(item)}" for item in items)
        case Table():
            return _md_table(block)
        case Chart(name, heading, _, caption, table):
            link = f"[{markdown.escape(heading)}]({page}#{name})" + (f" {_md_inline(caption)}" if caption else "")
            return link + (f"\n\n{_md_table(table)}" if table else "")
        case Gallery(charts):
            split = "\n\n" if any(chart.table for chart in charts) else "\n"
            return split.join(("" if chart.table else "- ") + _md(chart, page) for chart in charts)
        case Fold(summary, inside):
            return "\n\n".join([f"<details><summary>{html.escape(summary)}</summary>", *(_md(b, page) for b in inside), "</details>"])
    raise TypeError(block)


def _md_table(table: Table) -> str:
    count = len(table.head)
    rule = [":--" if i < table.left or i >= count - table.words else "--:" for i in range(count)]
    head, *body = [markdown.table_row([_md_inline(cell) for cell in row]) for row in (table.head, *table.rows)]
    caption = f"{markdown.escape(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join([head, markdown.table_row(rule), *body])


def _md_inline(text: Text) -> str:
    return "".join(
        markdown.code_span(p.text) if isinstance(p, Span) and p.kind == "code" else markdown.escape(p if isinstance(p, str) else p.text)
        for p in _parts(text)
    )
