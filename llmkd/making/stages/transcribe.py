"""*transcribe*: the writer writes a transcript of each sound: the pseudo-labels of Distil-Whisper (arXiv:2311.00430)."""

from collections.abc import Sequence

from ...config.make_stages import Transcribe as Settings
from ..rows import Row
from ..stage import Outcome, Rejected, Work, unusable


class Transcribe:
    """A row's own transcript, where it has one, becomes `made.reference`, with which *keep* compares."""

    def __init__(self, settings: Settings):
        pass

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        asks = [work.ask(row.question, pretend="A transcript.", audio=row.audio) for row in rows]
        outcome = Outcome()
        for row, answer in zip(rows, work.answer(asks), strict=True):
            notes = {**row.notes, "finish": answer.finish} | ({} if row.answer is None else {"reference": row.answer})
            if problem := unusable(answer, cut=False):
                asked = row.child(work.label, work.writer, row.question, **notes)
                outcome.rejected.append(Rejected(asked, *problem))
            else:
                outcome.kept.append(row.child(work.label, work.writer, row.answered(answer.text), **notes))
        return outcome
