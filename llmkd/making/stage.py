"""The protocol of the stages of `llmkd make`: each turns rows into rows, and gives a reason for every row that it leaves out. No torch."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..rollouts.sampling import Sampling
from .asks import CUT, Answer, Ask, canonical, key_of
from .prompts import Prompts
from .rows import Message, Row, Sound, row_id


@dataclass(frozen=True)
class Rejected:
    """A row that is left out, or whose answer could not be used.

    reason   a keyword by which rejected rows are counted: cut_off, empty, ...
    detail   more about this row
    answer   the writer's text, if no row could be made from it
    """

    row: Row
    reason: str
    detail: str = ""
    answer: str | None = None


@dataclass
class Outcome:
    """The result of a stage. Its candidates, rows that it made or judged, are kept or rejected.

    passed     rows that it passes on unchanged, which are no candidates
    kept       candidates that become rows
    rejected   candidates that do not
    """

    passed: list[Row] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [*self.passed, *self.kept]

    def take(self, row: Row, made: "Row | Rejected") -> None:
        """Add the result of a row."""
        (self.rejected if isinstance(made, Rejected) else self.kept).append(made)


class Stage(Protocol):
    """One stage, made from its settings in `config/make_stages.py`. Its outcome is a function of the rows, the settings and the answers only.

    A class may also have:

    places    a static method from the settings to the sections that a user's own prompt file must have, and the places in each; by default
              those of the shipped file
    chooses   True if it is meant to leave out most rows, so that `max_rejected` does not apply to it
    """

    def __init__(self, settings: Any): ...

    def run(self, rows: Sequence[Row], work: "Work") -> Outcome: ...


@dataclass
class Work:
    """The context in which a stage runs.

    label      of the stage, such as 2_evolve: `Row.stage` of the rows that it makes
    seed       of the stage's random numbers, see `draw`
    writer     label of the model that writes
    identity   of the writer, see `writers/writer.py`
    sampling   the writer's; its seed is set for each ask
    prompts    the texts of the stage's prompt file, by section
    folder     of the pipeline; a stage may keep results in a subfolder named by its label
    answer     returns the answers to asks, in their order
    """

    label: str
    seed: int
    writer: str
    identity: dict[str, Any]
    sampling: Sampling
    prompts: Prompts
    folder: Path
    answer: Callable[[Sequence[Ask]], list[Answer]]
    dry_run: bool = False

    def ask(self, messages: Sequence[Message], sample: int = 0, pretend: str = "", audio: Sound | None = None, **sampling: Any) -> Ask:
        """An ask for one text.

        sample     tells several asks with the same messages apart
        pretend    see `Ask`
        audio      see `Ask`
        sampling   changes to the writer's sampling
        """
        chosen = canonical(dataclasses.replace(self.sampling, **sampling, seed=self.draw("sample", sample)))
        said = tuple({"role": one["role"], "content": one["content"]} for one in messages)
        return Ask(key_of(said, chosen, self.identity), said, chosen, sample, pretend, audio)

    def draw(self, *of: Any) -> int:
        """A random number from 0 to 2^31 - 1: a function of the seed and of `of`, the number's purpose."""
        return int(row_id(self.seed, *of)[:8], 16) >> 1


def unusable(answer: Answer, cut: bool = True) -> tuple[str, str] | None:
    """(reason, detail) if an answer is missing, empty or, with `cut`, cut off; None if it can be used."""
    if answer.problem is not None:
        return "no_answer", answer.problem
    if not answer.text.strip():
        return (
            "empty",
            "cut off by max_new_tokens before its first word; a model that reasons first needs more" if answer.finish == CUT else "",
        )
    if cut and answer.finish == CUT:
        return "cut_off", ""
    return None
