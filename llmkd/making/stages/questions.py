"""Reads new questions from the writer's numbered lists, for *expand* and *topics*."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..asks import CUT, Answer
from ..filters.answers import length
from ..filters.words import Reason, words
from ..marks import Unreadable, no_question, numbered
from ..rows import Row, made_row
from ..stage import Outcome, Rejected, Work, unusable


class Questions:
    """Collects the items of lists: new questions, and rejected items with their reasons. `known`: the existing questions."""

    def __init__(self, work: Work, least: int, most: int, known: Sequence[str] = ()):
        self.work, self.least, self.most, self.outcome = work, least, most, Outcome()
        self.known = {plain_words(text) for text in known}

    def read(self, answer: Answer, parents: Sequence[str], columns: Mapping[str, Any], number: int, wanted: int) -> None:
        """Add the questions of one answer, at most `wanted`."""
        if problem := unusable(answer, cut=False):
            return self._reject(problem, answer.text, parents, columns, number)
        try:
            items = numbered(answer.text)
        except Unreadable as error:
            return self._reject((error.reason, error.detail), answer.text, parents, columns, number)
        for place, text in enumerate(items):
            last = place == len(items) - 1
            if last and answer.finish == CUT:
                self._reject(("cut_off", ""), text, parents, columns, (number, place))
            elif last and place and _has_paragraphs(text) and not any(map(_has_paragraphs, items[:place])):
                self._reject(("trailing_text", "what follows the list may belong to it or not"), text, parents, columns, (number, place))
            elif place >= wanted:
                self._reject(("more_than_asked", ""), text, parents, columns, (number, place))
            elif problem := length(text, self.least, self.most) or no_question(text) or self._duplicate(text):
                self._reject(problem, text, parents, columns, (number, place))
            else:
                self.known.add(plain_words(text))
                self.outcome.kept.append(self._row(text, parents, columns, (number, place)))

    def _duplicate(self, text: str) -> Reason | None:
        return ("duplicate", "") if plain_words(text) in self.known else None

    def _row(self, text: str, parents: Sequence[str], columns: Mapping[str, Any], number: Any) -> Row:
        said = ({"role": "user", "content": text},)
        return made_row(self.work.label, self.work.writer, said, parents, number, columns)

    def _reject(self, problem: Reason, text: str, parents: Sequence[str], columns: Mapping[str, Any], number: Any) -> None:
        self.outcome.rejected.append(Rejected(self._row(text, parents, columns, number), *problem))


def pretended_list(label: str, count: int, number: int) -> str:
    """A well-formed list of `count` questions for ask number `number` of a stage in a dry run."""
    return "\n".join(f"{place}. A new question of {label}, number {number} {place}" for place in range(1, count + 1))


def _has_paragraphs(text: str) -> bool:
    return bool(re.search(r"\n[ \t]*\n", text))


def plain_words(text: str) -> str:
    """A text that is equal for questions that differ only in case, white space and punctuation."""
    return " ".join(words(text))
