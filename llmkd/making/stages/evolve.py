"""*evolve*: makes questions deeper or rarer, round by round (Evol-Instruct, WizardLM, arXiv:2304.12244, section 3).

With the paper's elimination of: a change that adds nothing, as judged by the writer; an answer that declines; an answer without content words; a
question that repeats words of the prompt. The question before an eliminated change is changed again in the next round.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from ...config.make_stages import Evolve as Settings
from ..marks import Unreadable, marked_answer
from ..rows import Row
from ..stage import Outcome, Rejected, Work, unusable
from .questions import plain_words

#: Words of the prompts that a genuine question would not contain.
_OF_THE_PROMPT = ("given prompt", "rewritten prompt", "created prompt", "given task", "rewritten task", "created task")
#: Words without content of their own, see the paper's third rule.
_STOP_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his i if in into is it its me my no not of on or our "
    "she should so than that the their them then there these they this to was we were what when where which who will with would yes you your".split()
)
_VERDICT = re.compile(r"\W*(equal|different|not equal)\b", re.IGNORECASE)


class Evolve:
    def __init__(self, settings: Settings):
        self.settings = settings

    @staticmethod
    def places(settings: Settings) -> Mapping[str, Collection[str]]:
        judge = {"judge": ("instruction", "evolved")} if settings.judge else {}
        return {name: ("instruction",) for name in settings.operations} | judge

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        outcome, now = Outcome(passed=list(rows)), list(rows)
        for round_ in range(1, self.settings.rounds + 1):
            made = self._changed(now, work, round_, outcome)
            if self.settings.judge:
                made = self._judged(made, work, outcome)
            if self.settings.answers:
                made = self._answered(made, work, outcome)
            outcome.kept += [new for _, new in made]
            after = {old.id: new for old, new in made}
            now = [after.get(row.id, row) for row in now]
        return outcome

    def _changed(self, now: list[Row], work: Work, round_: int, outcome: Outcome) -> list[tuple[Row, Row]]:
        """(row, row with the changed question) for the rows whose question could be changed."""
        names = [self.settings.operations[work.draw("operation", round_, row.id) % len(self.settings.operations)] for row in now]
        asks = [
            work.ask(
                work.prompts.messages(name, instruction=row.instruction), pretend=f"<task>{row.instruction} Give {round_} reasons.</task>"
            )
            for name, row in zip(names, now, strict=True)
        ]
        made = []
        for row, name, answer in zip(now, names, work.answer(asks), strict=True):
            notes = {"operation": name, "round": round_}
            try:
                (text,) = marked_answer(answer, "task", prompt=work.prompts.sections[name], given=row.instruction)
                if plain_words(text) == plain_words(row.instruction):
                    raise Unreadable("unchanged")
                if copied := next(
                    (words for words in _OF_THE_PROMPT if words in text.lower() and words not in row.instruction.lower()), None
                ):
                    raise Unreadable("copies_the_prompt", copied)
            except Unreadable as error:
                outcome.rejected.append(Rejected(row, error.reason, error.detail, answer.text))
                continue
            made.append((row, row.child(work.label, work.writer, row.asking(text), round_, **notes)))
        return made

    def _judged(self, made: list[tuple[Row, Row]], work: Work, outcome: Outcome) -> list[tuple[Row, Row]]:
        """The pairs whose questions the writer judges to be different."""
        asks = [
            work.ask(
                work.prompts.messages("judge", instruction=old.instruction, evolved=new.instruction), pretend="Different", temperature=0.0
            )
            for old, new in made
        ]
        out = []
        for (old, new), answer in zip(made, work.answer(asks), strict=True):
            if problem := unusable(answer, cut=False):
                outcome.rejected.append(Rejected(new, *problem))
            elif not (found := _VERDICT.match(answer.text)):
                outcome.rejected.append(Rejected(new, "no_verdict", answer=answer.text))
            elif found[1].lower() == "equal":
                outcome.rejected.append(Rejected(new, "no_gain", answer=answer.text))
            else:
                out.append((old, new))
        return out

    def _answered(self, made: list[tuple[Row, Row]], work: Work, outcome: Outcome) -> list[tuple[Row, Row]]:
        """The pairs whose new question has a usable answer, with that answer."""
        asks = [work.ask(new.question, pretend="An answer of its own.") for _, new in made]
        out = []
        for (old, new), answer in zip(made, work.answer(asks), strict=True):
            problem = unusable(answer, cut=False) or says_nothing(answer.text)
            if problem:
                outcome.rejected.append(Rejected(new, *problem, answer=answer.text))
                continue
            whole = old.child(work.label, work.writer, new.answered(answer.text), new.notes["round"], **new.notes, finish=answer.finish)
            out.append((old, whole))
        return out


def says_nothing(answer: str) -> tuple[str, str] | None:
    """A reason if an answer declines in few words, or has only stop words and punctuation (the paper's second and third rule); else None."""
    words = re.findall(r"\w+", answer.lower())
    if "sorry" in words and len(words) < 80:
        return "declines", ""
    if all(word in _STOP_WORDS for word in words):
        return "says_nothing", ""
    return None
