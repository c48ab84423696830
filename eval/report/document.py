"""A document of headings, sentences, tables and charts, written as one HTML file and as Markdown. All text is escaped here."""

import html
import re
from dataclasses import dataclass, field

from . import svg as ink

CSS = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 74rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p, li { max-width: 62rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
li { margin: .25rem 0; }
a { color: var(--s0); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .92rem; margin: .8rem 0; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--panel); padding: .05em .3em; border-radius: 3px; }
.small { font-size: .87rem; color: var(--quiet); }
.warn { border-left: 4px solid var(--worse); background: var(--panel); padding: .5rem .8rem; }
.summary { background: var(--panel); border-radius: 6px; padding: .3rem 1rem .4rem; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.quiet { color: var(--quiet); }
.scroll { overflow-x: auto; margin: .6rem 0; max-width: 100%; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
table.wide { font-size: .79rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td { padding: .28rem .55rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; border-bottom-color: var(--quiet); }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
td.name { min-width: 8.5rem; overflow-wrap: anywhere; }
td.name code { white-space: nowrap; }
td.name code.long { white-space: normal; }
td.name:has(code.long) { min-width: 18rem; }
td.words { min-width: 9rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1rem; margin: .8rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .84rem; color: var(--quiet); overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; font-size: .87rem; }
.legend svg { width: 34px; height: 12px; vertical-align: middle; margin-right: .35rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--quiet); }
footer { margin-top: 3rem; font-size: .84rem; color: var(--quiet); }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .legend { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding-right: .4rem; }
  .gallery { grid-template-columns: 1fr 1fr; }
}
"""


@dataclass(frozen=True)
class Span:
    """Text of a kind: "code" (a name), "better", "worse" or "quiet"."""

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
    """Cells beyond the first `left` and before the last `words` columns are numbers and stand to the right."""

    head: list[Text]
    rows: list[list[Text]]
    left: int = 1
    words: int = 0
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart, or in Markdown its table; where it has none, a link to it in the HTML."""

    name: str
    title: str
    svg: ink.Svg
    caption: Text = ""
    table: Table | None = None


@dataclass(frozen=True)
class Gallery:
    charts: list[Chart]
    legend: list[tuple[Text, int]] = field(default_factory=list)  # label and number of the series


@dataclass(frozen=True)
class Fold:
    summary: str
    inside: list


def as_html(title: str, blocks: list, foot: Text) -> str:
    """One file that loads nothing: styles, charts and text."""
    links = "".join(f'<a href="#{b.anchor}">{html.escape(b.text)}</a>' for b in blocks if isinstance(b, Heading) and b.anchor)
    body = "\n".join(_block(block) for block in blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{ink.variables()}{ink.CSS}{CSS}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<footer>{_inline(foot)}</footer>
</body>
</html>
"""


def _block(block) -> str:
    match block:
        case Heading(text, ""):
            return f"<h3>{html.escape(text)}</h3>"
        case Heading(text, anchor):
            return f'<h2 id="{anchor}">{html.escape(text)}</h2>'
        case Para(text, kind):
            return f"<p{_class(kind)}>{_inline(text)}</p>"
        case Items(items, kind):
            return f"<ul{_class(kind)}>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _table(block)
        case Chart():
            return _figure(block)
        case Gallery(charts, legend):
            keys = "".join(f"<li>{ink.key(number)}{_inline(label)}</li>" for label, number in legend)
            return (f'<ul class="legend">{keys}</ul>' if keys else "") + f'<div class="gallery">{"".join(map(_figure, charts))}</div>'
        case Fold(summary, inside):
            return f"<details><summary>{html.escape(summary)}</summary>{''.join(map(_block, inside))}</details>"
    raise TypeError(block)


def _figure(figure: Chart) -> str:
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure id="{figure.name}">{figure.svg}{caption}</figure>'


def _table(table: Table) -> str:
    def kind(i: int) -> str:
        return "name" if i < table.left else "words" if i >= len(table.head) - table.words else "number"

    head = "".join(f'<th scope="col"{_class(kind(i))}>{_inline(cell)}</th>' for i, cell in enumerate(table.head))
    rows = ("".join(f"<td{_class(kind(i))}>{_inline(cell)}</td>" for i, cell in enumerate(row)) for row in table.rows)
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    top = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="scroll"><table{_class("wide" * (len(table.head) > 9))}>{caption}{top}\n<tbody>\n{body}</tbody></table></div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _parts(text: Text) -> tuple:
    return text if isinstance(text, tuple) else (text,)


def _inline(text: Text) -> str:
    out = []
    for part in _parts(text):
        if isinstance(part, str):
            out.append(html.escape(part))
        elif part.kind == "code":
            out.append(f"<code{_class('long' * (len(part.text) > 44))}>{html.escape(part.text)}</code>")
        else:
            out.append(f'<span class="{part.kind}">{html.escape(part.text)}</span>')
    return "".join(out)


def as_markdown(title: str, blocks: list, foot: Text, page: str) -> str:
    """`page`: the HTML file beside it, to which charts are linked."""
    return "\n\n".join([f"# {_plain(title)}", *(_md(block, page) for block in blocks), f"*{_md_inline(foot)}*"]) + "\n"


def _md(block, page: str) -> str:
    match block:
        case Heading(text, anchor):
            return ("## " if anchor else "### ") + _plain(text)
        case Para(text, kind):
            return ("> " if kind == "warn" else "") + _md_inline(text)
        case Items(items):
            return "\n".join(f"- {_md_inline(item)}" for item in items)
        case Table():
            return _md_table(block)
        case Chart(name, heading, _, caption, table):
            link = f"[{_plain(heading)}]({page}#{name})" + (f" {_md_inline(caption)}" if caption else "")
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
    lines = [[_md_inline(cell).replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    caption = f"{_plain(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join([head, "| " + " | ".join(rule) + " |", *body])


def _md_inline(text: Text) -> str:
    return "".join(
        _md_code(p.text) if isinstance(p, Span) and p.kind == "code" else _plain(p if isinstance(p, str) else p.text) for p in _parts(text)
    )


def _md_code(text: str) -> str:
    """Fenced by more backticks than it holds."""
    text = re.sub(r"\s+", " ", text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def _plain(text: str) -> str:
    """No character of it is Markdown or HTML; a bar is left to the tables."""
    text = re.sub(r"([\\`*\[\]<>&~#])", r"\\\1", re.sub(r"\s+", " ", text))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
