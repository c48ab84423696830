"""*explain*: answers with explanations, each under a system message that is drawn by seed and stays in the row (Orca, arXiv:2306.02707, section 3)."""

import random
from collections.abc import Collection, Mapping, Sequence

from ...config.make_stages import Explain as Settings
from ...errors import UserError
from ..rows import Row, with_system
from ..stage import Outcome, Rejected, Work, unusable


class Explain:
    def __init__(self, settings: Settings):
        self.settings = settings

    @staticmethod
    def places(settings: Settings) -> Mapping[str, Collection[str]]:
        return {name: () for name in settings.system}

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        names, samples = list(self.settings.system or work.prompts.sections), self.settings.samples
        if samples > len(names) and work.sampling.temperature == 0:
            raise UserError(
                f"{work.label}: found {samples} samples of {len(names)} system messages with writer.temperature 0, where some would be the same; "
                "raise the temperature, or use fewer samples"
            )
        wanted = []
        for row in rows:
            order = random.Random(work.draw("system", row.id)).sample(names, len(names))
            wanted += [(row, order[n % len(order)], n // len(order), n) for n in range(samples)]
        asked = [with_system(work.prompts.text(name), row.question) for row, name, _, _ in wanted]
        asks = [work.ask(said, again, pretend="An answer.") for said, (_, _, again, _) in zip(asked, wanted, strict=True)]
        outcome = Outcome()
        for (row, name, _, sample), said, answer in zip(wanted, asked, work.answer(asks), strict=True):
            if problem := unusable(answer, cut=False):
                outcome.rejected.append(Rejected(row, *problem))
                continue
            messages = (*said, {"role": "assistant", "content": answer.text})
            outcome.kept.append(
                row.child(work.label, work.writer, messages, sample, **{**row.notes, "finish": answer.finish, "system": name})
            )
        return outcome
