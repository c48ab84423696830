"""Consistency: whether several answers to one question agree, and whether the sums in an answer are right."""

import ast
import itertools
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from ...config.fields import part_of
from .words import Reason, words

_BOXED, _MARKED = "\\boxed{", re.compile(r"####\s*(.+)")
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")
_WRITTEN = re.compile(r"<<([-+.(\d][^<>=\n]*=[^<>\n]*)>>")  # not the streams of C++
_SUM = re.compile(r"(?:[\d.+\-*/() \t]|(?<=[\d.])[eE][-+]?\d{1,2}(?!\d))*", re.ASCII)  # 1e999999999 would fill the memory
_MOST = 400  # characters of a sum
_ENOUGH = Fraction(10) ** 30
_DO = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
}


# ---- several answers


def final_answer(text: str) -> str:
    """The final answer of a text: the content of its last \\boxed{} or after its last ####, else its last number, else the words of its last line.

    Numbers are normalised: 1,200.0 is 1200.
    """
    marked = _boxed(text) or next(reversed(_MARKED.findall(text)), None)
    numbers = _NUMBER.findall(text if marked is None else marked)
    if len(numbers) == 1 or (numbers and marked is None):
        return _in_one_form(numbers[-1])
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(words(marked or (lines[-1] if lines else "")))


def _in_one_form(number: str) -> str:
    """A written number of any length in its shortest ASCII form: 01,200.50 is 1200.5."""
    digits = re.sub(r"\d", lambda found: str(int(found[0])), number.lstrip("-").replace(",", ""))
    whole, _, part = digits.partition(".")
    value = (whole.lstrip("0") or "0") + ("." + part.rstrip("0")).rstrip(".")
    return f"-{value}" if number.startswith("-") and value != "0" else value


def _boxed(text: str) -> str | None:
    """What is between the braces of the last \\boxed{}, which may hold braces."""
    start, depth = text.rfind(_BOXED) + len(_BOXED), 1
    if start < len(_BOXED):
        return None
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return None


def agreeing(answers: Sequence[str], least: float) -> list[bool]:
    """Whether each of several answers has the most frequent final answer, if its share is `least` or more (self-consistency, arXiv:2203.11171). If
    two final answers are equally frequent, all False."""
    finals = [final_answer(answer) for answer in answers]
    (best, count), *others = Counter(finals).most_common(2)
    clear = best and count >= Fraction(repr(float(least))) * len(finals) and not any(other == count for _, other in others)
    return [bool(clear) and final == best for final in finals]


def token_f1(one: str, other: str) -> float:
    """2 c / (a + b): c words in common, each as often as both have it, of a and b words (SQuAD, arXiv:1606.05250). 1 for two without words."""
    a, b = words(one), words(other)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b)) if a or b else 1.0


def mean_f1(answers: Sequence[str]) -> list[float]:
    """The mean token F1 of each answer with the others; 1 for a single answer."""
    sums = [0.0] * len(answers)
    for (i, one), (j, other) in itertools.combinations(enumerate(answers), 2):
        found = token_f1(one, other)
        sums[i] += found
        sums[j] += found
    return [total / (len(answers) - 1) for total in sums] if len(answers) > 1 else [1.0] * len(answers)


def above_quantile(values: Sequence[float], keys: Sequence[str], share: float) -> list[bool]:
    """Whether each value is above the lowest ceil(share n) of n values. `keys` break ties."""
    order = sorted(range(len(values)), key=lambda i: (values[i], keys[i]))
    above = set(order[part_of(share, len(order)) :])
    return [i in above for i in range(len(values))]


# ---- sums


def wrong_sum(text: str) -> Reason | None:
    """A reason if a sum in the text, written as <<48/2=24>> (GSM8K, arXiv:2110.14168), is wrong or cannot be computed; None if all are right.

    A result may be rounded to the digits that it has. Numbers, + - * / and brackets are computed, exactly.
    """
    for written in _WRITTEN.findall(text):
        left, _, right = written.partition("=")
        try:
            found, result = value_of(left), value_of(right)
        except (ValueError, ZeroDivisionError):
            return "wrong_sum", f"{written[:80]!r} cannot be computed"
        digits = len(right.strip().partition(".")[2])
        if abs(found - result) > Fraction(1, 2 * 10**digits) * (digits > 0):
            return "wrong_sum", f"{written[:80]!r} is {_shown(found)}"
    return None


def value_of(term: str) -> Fraction:
    """The exact value of numbers, + - * / and brackets. ValueError for anything else, and for numbers beyond 1e30."""
    term = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", term).strip()
    if len(term) > _MOST or not _SUM.fullmatch(term):
        raise ValueError("not a sum")
    term = re.sub(r"(?<![\d.])0+(?=\d)", "", term)  # Python knows no 007
    try:
        return _value(ast.parse(term, mode="eval").body, term)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not a sum") from None


def _value(node: ast.expr, term: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(ast.get_source_segment(term, node))  # as written: 0.1 is a tenth
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, term) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _DO:
        value = _DO[type(node.op)](_value(node.left, term), _value(node.right, term))
    else:
        raise ValueError("not a sum")
    if abs(value) > _ENOUGH or value.denominator > _ENOUGH:
        raise ValueError("too large")
    return value


def _shown(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
