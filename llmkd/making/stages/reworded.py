"""*paraphrase* and *back_translate*: each question in other words, with the same answer: the classic augmentations, for comparison."""

from collections.abc import Sequence

from ...config.make_stages import BackTranslate as BackTranslateSettings
from ...config.make_stages import Paraphrase as ParaphraseSettings
from ..asks import Answer
from ..marks import Unreadable, marked_answer
from ..rows import Row
from ..stage import Outcome, Rejected, Work
from .questions import plain_words


class Paraphrase:
    def __init__(self, settings: ParaphraseSettings):
        self.settings = settings

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        outcome = Outcome(passed=list(rows))
        wanted = [(row, sample) for row in rows for sample in range(self.settings.samples)]
        asks = [work.ask(work.prompts.messages(text=row.instruction), sample, _pretend(row, sample)) for row, sample in wanted]
        seen = {(row.id, plain_words(row.instruction)) for row in rows}
        for (row, sample), answer in zip(wanted, work.answer(asks), strict=True):
            text = _text_of(row, answer, work, "user", outcome)
            if text is not None:
                _add(row, text, sample, work, outcome, seen, answer)
        return outcome


class BackTranslate:
    def __init__(self, settings: BackTranslateSettings):
        self.settings = settings

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        own, outcome = {"language": self.settings.language, "own_language": self.settings.own_language}, Outcome(passed=list(rows))
        forth = [work.ask(work.prompts.messages("forth", text=row.instruction, **own), pretend=_pretend(row, 0)) for row in rows]
        abroad = [(row, _text_of(row, answer, work, "forth", outcome)) for row, answer in zip(rows, work.answer(forth), strict=True)]
        there = [(row, text) for row, text in abroad if text is not None]
        back = [work.ask(work.prompts.messages("back", text=text, **own), pretend=_pretend(row, 1)) for row, text in there]
        seen = {(row.id, plain_words(row.instruction)) for row in rows}
        for (row, _), answer in zip(there, work.answer(back), strict=True):
            text = _text_of(row, answer, work, "back", outcome)
            if text is not None:
                _add(row, text, 0, work, outcome, seen, answer)
        return outcome


def _text_of(row: Row, answer: Answer, work: Work, section: str, outcome: Outcome) -> str | None:
    """The text between the marks of an answer; None if it is rejected."""
    try:
        return marked_answer(answer, "text", prompt=work.prompts.sections[section], given=row.instruction)[0]
    except Unreadable as error:
        outcome.rejected.append(Rejected(row, error.reason, error.detail, answer.text))
        return None


def _add(row: Row, text: str, sample: int, work: Work, outcome: Outcome, seen: set, answer: Answer) -> None:
    """Keep the row with its question replaced by `text`, unless it already has these words."""
    if (row.id, plain_words(text)) in seen:
        outcome.rejected.append(Rejected(row, "unchanged", answer=answer.text))
        return
    seen.add((row.id, plain_words(text)))
    messages = row.asking(text) if row.answer is None else (*row.asking(text), row.messages[-1])
    of_the_answer = {name: value for name, value in row.notes.items() if name == "finish"}
    outcome.kept.append(row.child(work.label, work.writer, messages, sample, **of_the_answer))


def _pretend(row: Row, number: int) -> str:
    return f"<text>{row.instruction} (in other words, {number})</text>"
