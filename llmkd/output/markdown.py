"""Text from users inside Markdown: escaped, as a code span, or as a block of code."""

import re


def escape(text: str) -> str:
    """Text that Markdown and the HTML in it show as it is, on one line. A bar is left alone: only a table gives it a meaning."""
    text = re.sub(r"([\\`*\[\]<>&~#])", r"\\\1", re.sub(r"\s+", " ", text))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def code_span(text: str) -> str:
    """A code span. Its fence is longer than any run of backticks in the text. Nothing for an empty text."""
    text = re.sub(r"\s+", " ", text)
    fence = "`" * (1 + _longest_run(text))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}" if text else ""


def code_block(text: str, language: str) -> str:
    """A fenced block. Its fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table_row(cells: list[str]) -> str:
    """A line of a table. The cells are Markdown already; only their bars are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
