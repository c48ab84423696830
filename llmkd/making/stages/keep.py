"""*keep*: the filters, in the order of their settings: first those of single rows, then those that compare the remaining rows, then balance."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ...config.fields import with_setting_names
from ...config.make_keep import CLUSTERS, Balance
from ...config.make_keep import Keep as Settings
from ...console import count
from ...data.reading.problems import ErrorCollector
from ...data.reading.sources import open_source, some_rows
from ...errors import UserError
from ..clusters import by_words, k_means, refuse_without_clusters
from ..computed import Computed, key_of
from ..filters import answers, consistency, repetition, scripts
from ..filters.balance import balanced
from ..filters.contamination import HeldOutTexts, texts_in
from ..filters.duplicates import near_duplicates
from ..filters.languages import Languages
from ..filters.task_files import evaluated
from ..filters.transcripts import WordErrors
from ..filters.words import Reason
from ..rows import Row, row_id
from ..stage import Outcome, Rejected, Work
from .score import column_of

#: For each row the reason why it is left out, or None.
Reasons = list[Reason | None]


class Keep:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.held_out = _held_out(settings) if settings.contamination else None
        self.word_errors = WordErrors(settings.wer_below, settings.wer_normaliser) if settings.wer_below is not None else None
        self.languages = Languages(settings.languages, "languages") if settings.languages else None
        if settings.balance and not settings.balance.column:
            refuse_without_clusters("balance")
        self.kinds = None if settings.balance is None else _Kinds(settings.balance)

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        outcome, left = Outcome(), list(rows)
        judged = self._singly, lambda left: self._transcribed(left, work), self._agreeing, self._different, self._known
        for filter_rows in (*judged, lambda left: self._balanced(left, work)):
            reasons = filter_rows(left)
            outcome.rejected += [Rejected(row, *reason) for row, reason in zip(left, reasons, strict=True) if reason]
            left = [row for row, reason in zip(left, reasons, strict=True) if not reason]
        outcome.kept = left
        return outcome

    # ---- each row by itself

    def _singly(self, rows: list[Row]) -> Reasons:
        return [next(filter(None, self._of_row(row)), None) for row in rows]

    def _of_row(self, row: Row) -> Iterable[Reason | None]:
        """The filters of a single row that are switched on. Of a row without an answer only the question is checked."""
        one, answer, question = self.settings, row.answer, row.instruction
        if answer is not None:
            yield answers.empty(answer)
            if one.finish == "stop":
                yield answers.cut_off(answer, row.notes.get("finish"))
            yield answers.length(answer, one.min_words, one.max_words)
            if one.refusals:
                yield answers.refusal(answer, one.refusal_phrases or answers.REFUSALS)
            if one.echo is not None:
                yield answers.echo(question, answer, one.echo)
            if one.repetition is not None or one.repeated_words is not None:
                yield repetition.repetition(answer, one.repetition, one.repeated_words)
        if one.scripts:
            yield scripts.other_script("\n".join([question, answer or ""]), one.scripts, one.script_share or 0.9)
        if self.languages:
            yield self.languages.other(question, answer or "")
        if answer is not None and one.sums:
            yield consistency.wrong_sum(answer)
        if self.held_out:
            yield self.held_out.contaminated(question, *(message["content"] for message in row.messages))

    def _transcribed(self, rows: list[Row], work: Work) -> Reasons:
        if self.word_errors is None:
            return [None] * len(rows)
        return self.word_errors.reasons([(row.notes.get("reference"), row.answer or "") for row in rows], work.label)

    # ---- rows that are compared

    def _agreeing(self, rows: list[Row]) -> Reasons:
        """Several answers to one question; a single one agrees with itself."""
        out: Reasons = [None] * len(rows)
        least, groups = self.settings.agreement, defaultdict(list)
        for i, row in enumerate(rows if least is not None else ()):
            if row.answer is not None:
                groups[row_id(row.question)].append(i)
        for group in groups.values():
            texts = [rows[i].answer for i in group]
            if self.settings.agreement_by == "words":
                found = consistency.mean_f1(texts)
                for i, f1 in zip(group, found, strict=True):
                    out[i] = None if f1 >= least else ("disagreement", f"mean F1 {f1:.2f} with {len(group) - 1} other answers")
            else:
                for i, agrees in zip(group, consistency.agreeing(texts, least), strict=True):
                    out[i] = None if agrees else ("disagreement", f"comes to {consistency.final_answer(rows[i].answer)[:80]!r}")
        return out

    def _different(self, rows: list[Row]) -> Reasons:
        out: Reasons = [None] * len(rows)
        if self.settings.near_duplicate is not None:
            dropped = near_duplicates([_compared(row, self.settings.near_duplicate_of) for row in rows], self.settings.near_duplicate)
            for i, (j, index) in dropped.items():
                out[i] = "near_duplicate", f"{index:.2f} of {rows[j].id}"
        return out

    def _known(self, rows: list[Row]) -> Reasons:
        if self.settings.teacher_ce is None:
            return [None] * len(rows)
        values = [column_of(row, "teacher_ce", "teacher_ce") for row in rows]
        above = consistency.above_quantile(values, [row.id for row in rows], self.settings.teacher_ce)
        return [("teacher_ce", f"{value:.4g}") if one else None for value, one in zip(values, above, strict=True)]

    def _balanced(self, rows: list[Row], work: Work) -> Reasons:
        if self.kinds is None or not rows:
            return [None] * len(rows)
        kinds, most = self.kinds.of(rows, work), self.kinds.settings.max_share
        stay = balanced(kinds, [row.id for row in rows], most, work.draw("balance"))
        if not any(stay):
            raise UserError(
                f"balance.max_share: found {most:g}, and the {len(rows)} rows are of {len(set(kinds))} kinds, so that each cannot be so small a share; raise it"
            )
        return [None if one else ("too_many_of_its_kind", kind) for kind, one in zip(kinds, stay, strict=True)]


def _compared(row: Row, of: str | None) -> str:
    parts = {"answer": [row.answer or ""], "both": [row.instruction, row.answer or ""]}.get(of or "", [row.instruction])
    return "\n".join(parts)


def _held_out(settings: Settings) -> HeldOutTexts:
    """The texts of the held-out rows. UserError where they cannot be read."""
    texts, problems = [], ErrorCollector()
    for setting, held_out in with_setting_names(settings.contamination, "contamination"):
        for source in evaluated(held_out.tasks, held_out.tasks_dir, setting) if held_out.tasks else [held_out.source]:
            for place, row in some_rows(open_source(source, setting).records, source, problems):
                texts += [(place, text) for text in texts_in(row)]
    problems.raise_if_any()
    return HeldOutTexts(texts)


class _Kinds:
    """The kind of each row: a column, or a cluster of instructions."""

    def __init__(self, settings: Balance):
        self.settings, self.scorer = settings, None
        if settings.model is not None:
            from ..scores.scorer import Scorer

            self.scorer = Scorer(settings.model.loaded, "balance.model")

    def of(self, rows: list[Row], work: Work) -> list[str]:
        if self.settings.column:
            return _kinds_of(rows, self.settings.column, "balance.column")
        texts, clusters = [row.instruction for row in rows], self.settings.clusters or CLUSTERS
        if self.scorer is None:
            return _numbered(by_words(texts, clusters, work.draw("clusters")))
        computed = Computed(work.folder / work.label)
        key = key_of(texts, dataclasses.asdict(self.settings), self.scorer.fingerprint, work.draw("clusters"))
        if key not in computed.values:
            from ..scores.hidden import mean_states

            states = mean_states(self.scorer, texts, self.settings.batch_size or 16)
            computed.put(key, k_means(states, clusters, work.draw("clusters")))
        return _numbered(computed.values[key])


def _numbered(labels: Iterable[int]) -> list[str]:
    return [f"cluster {label}" for label in labels]


def _kinds_of(rows: Sequence[Row], column: str, setting: str) -> list[str]:
    kinds = [row.columns.get(column) for row in rows]
    if lacking := [row for row, kind in zip(rows, kinds, strict=True) if not isinstance(kind, str | int | bool)]:
        first = lacking[0]
        raise UserError(
            f"{setting}: {count(len(lacking), 'row')} of {len(rows):,} have no text or number as {column}, the first made by {first.stage}: "
            f"{first.instruction[:60]!r}; give every seed one, name another column, or leave column out"
        )
    return list(map(str, kinds))
