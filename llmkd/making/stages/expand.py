"""*expand*: new questions, for which the writer is shown some of the existing ones (Self-Instruct, arXiv:2212.10560, section 2.2).

Only questions that are equal up to case and punctuation are rejected as duplicates here; the stage keep removes near-duplicates.
"""

import random
from collections import Counter
from collections.abc import Sequence

from ...config.make_stages import Expand as Settings
from ...console import warn
from ..rows import Row
from ..stage import Outcome, Rejected, Work
from .questions import Questions, pretended_list

_ROUND = 16  # asks of a round, whose questions may be shown in the next one
_MOST = 4  # at most so many times the asks that would suffice if every item were new


class Expand:
    def __init__(self, settings: Settings):
        self.settings = settings

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        own, made = self.settings, Questions(work, self.settings.min_words, self.settings.max_words, [row.instruction for row in rows])
        asked, most = 0, _MOST * -(-own.count // own.per_ask)
        before: Counter[str] = Counter()  # asks by message: with few seeds the same ones are shown again, and get a new sample number
        while len(made.outcome.kept) < own.count and asked < most:
            left = -(-(own.count - len(made.outcome.kept)) // own.per_ask)
            shown = [self._shown(rows, made.outcome.kept, work, asked + n) for n in range(min(left, _ROUND, most - asked))]
            asks = []
            for n, some in enumerate(shown):
                messages = self._messages(some, work)
                same = messages[-1]["content"]
                asks.append(work.ask(messages, before[same], pretended_list(work.label, own.per_ask, asked + n)))
                before[same] += 1
            for some, answer in zip(shown, work.answer(asks), strict=True):
                made.read(answer, [row.id for row in some], {}, asked, own.per_ask)
                asked += 1
        outcome = made.outcome
        if len(outcome.kept) < own.count:
            warn(
                f"note: {work.label}: {len(outcome.kept):,} of {own.count:,} questions after {asked:,} asks; the others were rejected: "
                "raise writer.temperature, or give more seeds"
            )
        outcome.kept, more = outcome.kept[: own.count], outcome.kept[own.count :]
        outcome.rejected += [Rejected(row, "more_than_asked") for row in more]
        outcome.passed = list(rows)
        return outcome

    def _shown(self, rows: Sequence[Row], made: Sequence[Row], work: Work, number: int) -> list[Row]:
        """The questions to show in an ask, drawn by seed: some of the rows, and some new ones."""
        draw = random.Random(work.draw("context", number))
        new = draw.sample(list(made), min(len(made), self.settings.made_in_context))
        old = draw.sample(list(rows), min(len(rows), self.settings.in_context - len(new)))
        some = [*old, *new]
        draw.shuffle(some)
        return some

    def _messages(self, some: Sequence[Row], work: Work):
        tasks = "\n".join(f"{number}. {row.instruction}" for number, row in enumerate(some, 1))
        return work.prompts.messages(tasks=tasks, count=str(self.settings.per_ask))
