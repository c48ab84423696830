"""The filter of transcripts by their word error rate against the row's own transcript, as in Distil-Whisper (arXiv:2311.00430, section 3.2)."""

import importlib.util
from collections.abc import Sequence

from ...console import count, info, warn
from ...errors import UserError
from ...tasks.metrics.transcripts import Errors, word_errors
from .words import Reason

NORMALISER = "basic"


class WordErrors:
    """Judges transcripts and sums their errors. UserError if jiwer is missing.

    below         transcripts with this rate or more are left out
    normaliser    a name of `tasks.metrics.transcripts.NORMALISERS`
    every, kept   errors of all compared transcripts, and of those that stay
    """

    def __init__(self, below: float, normaliser: str | None):
        if importlib.util.find_spec("jiwer") is None:
            raise UserError('wer_below: needs jiwer, which is not installed; pip install "llmkd[audio]"')
        self.below, self.normaliser = below, normaliser or NORMALISER
        self.every = self.kept = Errors(0, 0, 0, 0)

    def reasons(self, transcripts: Sequence[tuple[str | None, str]], label: str) -> list[Reason | None]:
        """The reason why each (reference, transcript) is left out, or None; pairs without a reference stay. Prints the rates. UserError if no pair has a
        reference."""
        out = [None if reference is None else self.reason(reference, text) for reference, text in transcripts]
        lacking = sum(reference is None for reference, _ in transcripts)
        if transcripts and lacking == len(transcripts):
            raise UserError("wer_below: no row has a transcript of its own to compare with (text in the seeds); leave it out")
        stay = len(out) - lacking - sum(reason is not None for reason in out)
        info(
            f"{label}: word error rate ({self.normaliser}) {self.every.rate:.3f} of {count(len(out) - lacking, 'transcript')}, {self.kept.rate:.3f} of the "
            f"{stay:,} below {self.below:g}"
        )
        if lacking:
            warn(f"note: {label}: wer_below: {count(lacking, 'row')} of {len(out):,} have no transcript of their own, and stay")
        return out

    def reason(self, reference: str, transcript: str) -> Reason | None:
        """The reason why a transcript is left out, or None. For a reference without words only a transcript without words stays."""
        found = word_errors([reference], [transcript], self.normaliser)
        self.every += found
        if found.rate < self.below or not (found.length or found.insertions):
            self.kept += found
            return None
        rate = f"word error rate {found.rate:.2f}" if found.length else "words"
        return "word_errors", f"{rate} ({self.normaliser}), and its own transcript is {reference[:80]!r}"
