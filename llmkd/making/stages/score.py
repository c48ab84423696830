"""*score*: scores each row with a model. The scores become columns of the row, with the model's fingerprint."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from ...config.make_score import Score as Settings
from ...data.reading.problems import ErrorCollector
from ...errors import UserError
from ..computed import Computed, key_of
from ..progress import shown
from ..prompts import Prompts
from ..rows import Message, Row, row_id
from ..scores.scorer import Scorer
from ..scores.views import in_context
from ..stage import Outcome, Rejected, Work

BY = "scored_by"  # column: for each score the fingerprints of the models that it depends on; and `row`, the hash of the messages
_CHUNK = 256  # rows whose scores are computed and stored together


class Score:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.models = {"student": Scorer(settings.student.loaded, "student")}
        if settings.teacher is not None:
            self.models["teacher"] = Scorer(settings.teacher.loaded, "teacher")
            self.models["student"].refuse_other(self.models["teacher"])
        for one in self.models.values():
            one.check(settings.format, settings.max_length)

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        outcome = Outcome(rejected=[Rejected(row, "no_answer", "there is nothing to score") for row in rows if row.answer is None])
        answered = [row for row in rows if row.answer is not None]
        if self.settings.too_long == "refuse":
            self._refuse_unscored(answered, work.prompts)
        computed, measuring = Computed(work.folder / work.label), None
        chunks = [answered[start : start + _CHUNK] for start in range(0, len(answered), _CHUNK)]
        keys = [self._key(chunk, work) for chunk in chunks]
        if any(key not in computed.values for key in keys):
            from ..scores.measuring import Measuring

            measuring = Measuring(self.models, self.settings)
        for key, chunk in shown(zip(keys, chunks, strict=True), work.label, len(answered), "row", size=lambda pair: len(pair[1])):
            if key not in computed.values:
                computed.put(key, measuring.scores(chunk, self._backwards(chunk, work.prompts)))
            for row, found in zip(chunk, computed.values[key], strict=True):
                outcome.take(row, self._scored(row, found))
        return outcome

    def _backwards(self, rows: Sequence[Row], prompts: Prompts) -> list[list[Message]] | None:
        """Conversations that show an answer and ask for its instruction, for r-IFD; None if no score needs them."""
        if "rifd" not in self.settings.scores:
            return None
        return [[*prompts.messages(answer=row.answer), {"role": "assistant", "content": row.instruction}] for row in rows]

    def _refuse_unscored(self, rows: Sequence[Row], prompts: Prompts) -> None:
        """UserError that names the rows that have no score, before a model is loaded."""
        problems = ErrorCollector()
        tokenizer, one = self.models["student"].tokenizer, self.settings
        for conversations in filter(None, ([row.messages for row in rows], self._backwards(rows, prompts))):
            _, reasons = in_context(conversations, [row.id for row in rows], one.format, tokenizer, one.max_length)
            for i, reason in sorted(reasons.items()):
                fix = "remove the row, raise max_length, or set too_long: reject"
                problems.add(f"score: the row {rows[i].id} has no score ({': '.join(filter(None, reason))}); {fix}")
        problems.raise_if_any()

    def _scored(self, row: Row, found: dict[str, float] | list[str]) -> Row | Rejected:
        if isinstance(found, list):
            return Rejected(row, *found)
        by = {name: self._by(name) for name in found} | {"row": row_id(row.messages)}
        return _without_inherited(row).with_columns(**found, **{BY: _current(row) | by})

    def _by(self, score: str) -> str:
        models = ("teacher",) if score == "teacher_ce" else ("student", "teacher") if score == "kl" else ("student",)
        return "+".join(f"{one}:{fingerprint(self.models[one])}" for one in models)

    def _key(self, rows: Sequence[Row], work: Work) -> str:
        """A key of everything that the scores of these rows depend on."""
        read = {"format": self.settings.format, "max_length": self.settings.max_length, "batch_size": self.settings.batch_size}
        prompts = work.prompts.sha256 if "rifd" in self.settings.scores else None
        models = {name: one.fingerprint for name, one in self.models.items()}
        return key_of([row.messages for row in rows], read, sorted(self.settings.scores), prompts, models)


def fingerprint(scorer: Scorer) -> str:
    """A model's fingerprint in 16 hex digits."""
    return hashlib.sha256(json.dumps(scorer.fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def scored_by(row: Row) -> dict[str, str]:
    """The fingerprints of the models of each score of a row. UserError if the column was not written by llmkd."""
    by = row.columns.get(BY) or {}
    if not isinstance(by, dict):
        raise UserError(
            f"{BY}: the row {row.id} has {by!r:.60} in this column, where scores have their models; set ignore: [{BY}] for the seeds"
        )
    return by


def _current(row: Row) -> dict[str, str]:
    """`scored_by` for the row's own messages: without scores of others, such as those of the row that it was made from."""
    by, said = scored_by(row), row_id(row.messages)
    return by if by.get("row", said) == said else {}


def _without_inherited(row: Row) -> Row:
    """The row without scores of other messages, which next to new ones would seem to be its own."""
    inherited = scored_by(row).keys() - _current(row).keys() - {"row"}
    return dataclasses.replace(row, columns={name: value for name, value in row.columns.items() if name not in inherited})


def column_of(row: Row, column: str, setting: str) -> float:
    """A row's number in a column. UserError if it has none."""
    value: Any = row.columns.get(column)
    if column in scored_by(row) and column not in _current(row):
        raise UserError(
            f"{setting}: found {column}, and the row {row.id} has it from the row that it was made of; add a stage score before"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        found = "no such column" if value is None else f"{value!r:.40} there"
        raise UserError(
            f"{setting}: found {column}, and the row {row.id} has {found}; add a stage score before, or name a column of numbers"
        )
    return float(value)
