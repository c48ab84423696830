"""Puts users' text into Markdown: escaped, as a code span, or as a code block."""

import re


def escape(text: str) -> str:
    """The text on one line, escaped so that Markdown and its HTML show it unchanged; except for bars, which matter in tables only."""
    text = re.sub(r"([\\`*\[\]<>&~#])", r"\\\1", re.sub(r"\s+", " ", text))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def code_span(text: str) -> str:
    """A code span, whose fence is longer than any run of backticks in the text; "" for an empty text."""
    text = re.sub(r"\s+", " ", text)
    fence = "`" * (1 + _longest_run(text))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}" if text else ""


def code_block(text: str, language: str) -> str:
    """A code block, whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table_row(cells: list[str]) -> str:
    """A line of a table. The cells are Markdown already; only their bars are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
