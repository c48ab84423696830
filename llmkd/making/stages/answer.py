"""*answer*: the writer answers each row. Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947), and labels for rows without answers."""

from collections.abc import Sequence

from ...config.make_stages import Answer as Settings
from ..rows import Row, with_system
from ..stage import Outcome, Rejected, Work, unusable


class Answer:
    def __init__(self, settings: Settings):
        self.settings = settings

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        system = self.settings.system
        wanted = [(row, sample) for row in rows for sample in range(self.settings.samples)]
        asked = [(with_system(system, row.question) if system else row.question, sample) for row, sample in wanted]
        asks = [work.ask(said, sample, pretend="An answer.") for said, sample in asked]
        outcome = Outcome()
        for (row, sample), answer in zip(wanted, work.answer(asks), strict=True):
            if problem := unusable(answer, cut=False):
                outcome.rejected.append(Rejected(row, *problem))
            else:
                outcome.kept.append(
                    row.child(work.label, work.writer, row.answered(answer.text), sample, **{**row.notes, "finish": answer.finish})
                )
        return outcome
