"""*topics*: questions about a tree of topics, asked by personas: data curation from meta-information (the survey arXiv:2402.13116, section 3.1.3)."""

from collections.abc import Iterator, Sequence
from typing import Any

from ...config.make_stages import Topics as Settings
from ..filters.answers import length
from ..marks import Unreadable, no_question, numbered
from ..rows import Row, made_row
from ..stage import Outcome, Rejected, Work, unusable
from .questions import Questions, pretended_list

_ANYBODY = "anybody"
_MOST_WORDS = 20  # of the name of a topic


class Topics:
    def __init__(self, settings: Settings):
        self.settings = settings

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        own, made = self.settings, Questions(work, self.settings.min_words, self.settings.max_words, [row.instruction for row in rows])
        leaves = [" / ".join(path) for path in paths_of(own.topics)]
        if own.subtopics:
            leaves = self._narrower(leaves, work, made.outcome)
        wanted = [(topic, persona) for topic in leaves for persona in own.personas or (None,)]
        asks = [
            work.ask(
                work.prompts.messages(topic=topic, persona=persona or _ANYBODY, count=str(own.per_topic)),
                pretend=pretended_list(work.label, own.per_topic, number),
            )
            for number, (topic, persona) in enumerate(wanted)
        ]
        for number, ((topic, persona), answer) in enumerate(zip(wanted, work.answer(asks), strict=True)):
            made.read(answer, (), {"topic": topic} | ({"persona": persona} if persona else {}), number, own.per_topic)
        made.outcome.passed = list(rows)
        return made.outcome

    def _narrower(self, leaves: Sequence[str], work: Work, outcome: Outcome) -> list[str]:
        """Each leaf replaced by the narrower topics that the writer names. If it names none, the answer is rejected and the leaf stays."""
        count, out = self.settings.subtopics, []
        asks = [
            work.ask(work.prompts.messages("subtopics", topic=leaf, count=str(count)), pretend=pretended_list(work.label, count, number))
            for number, leaf in enumerate(leaves)
        ]
        for leaf, answer in zip(leaves, work.answer(asks), strict=True):
            try:
                if problem := unusable(answer):
                    raise Unreadable(*problem)
                names = [" ".join(name.split()) for name in numbered(answer.text)[:count]]
            except Unreadable as error:
                outcome.rejected.append(Rejected(_of_leaf(answer.text, leaf, work), error.reason, error.detail))
                names = []
            problems = {name: length(name, 1, _MOST_WORDS) or no_question(name) for name in names}
            outcome.rejected += [Rejected(_of_leaf(name, leaf, work), *problem) for name, problem in problems.items() if problem]
            out += [f"{leaf} / {name}" for name, problem in problems.items() if not problem] or [leaf]
        return out


def _of_leaf(text: str, leaf: str, work: Work) -> Row:
    """The writer's text about a leaf as a row, to be rejected."""
    return made_row(work.label, work.writer, ({"role": "user", "content": text},), columns={"topic": leaf})


def paths_of(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths to a tree's leaves, in the order of the file."""
    if isinstance(tree, dict):
        for name, below in tree.items():
            yield from paths_of(below, (*above, name)) if below else [(*above, name)]
    else:
        yield from ((*above, name) for name in tree)
