"""The protocol of the stages of `llmkd make`: rows in, rows out, and each that is left out with its reason. No torch."""

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
    """A row that is left out, or the row whose answer could not be used.

    reason   one word of a few, by which they are counted: cut_off, empty, ...
    detail   more on this one
    answer   the text that the writer gave, where a row could not be made of it
    """

    row: Row
    reason: str
    detail: str = ""
    answer: str | None = None


@dataclass
class Outcome:
    """What a stage gives. Its candidates, one way or the other: rows that are new or judged, and those that are rejected.

    passed    rows that it hands on as they are, and does not count as candidates
    kept      candidates that become rows
    rejected  candidates that do not
    """

    passed: list[Row] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [*self.passed, *self.kept]

    def take(self, row: Row, made: "Row | Rejected") -> None:
        """Count what was made of a row."""
        (self.rejected if isinstance(made, Rejected) else self.kept).append(made)


class Stage(Protocol):
    """One stage. It is made from its settings (of `config/make_stages.py`), and is a function of the rows, them and the answers alone.

    A static method `places(settings)` may say which sections of its prompt file a user's own must have, and which places in each; by default all.

    `chooses` says whether it is meant to leave out most rows: `max_rejected` is not for it. May be missing: False.
    """

    def __init__(self, settings: Any): ...

    def run(self, rows: Sequence[Row], work: "Work") -> Outcome: ...


@dataclass
class Work:
    """What a stage works with.

    label      of the stage, such as 2_evolve: `Row.stage` of what it makes
    seed       of all that it draws: `draw` says how
    writer     the label of the model that writes
    identity   the writer's, see `writers/writer.py`
    sampling   of the writer's settings; its seed is set for each ask
    prompts    the texts of the stage's prompt file, by section
    folder     of the pipeline: a stage may keep there, in a folder of its label, what it has computed
    answer     gives the answers to asks, in their order
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
        """An ask for one text. `sample`: of several to the same messages the number; `audio`: see `Ask`; `sampling`: changes to the writer's."""
        chosen = canonical(dataclasses.replace(self.sampling, **sampling, seed=self.draw("sample", sample)))
        said = tuple({"role": one["role"], "content": one["content"]} for one in messages)
        return Ask(key_of(said, chosen, self.identity), said, chosen, sample, pretend, audio)

    def draw(self, *of: Any) -> int:
        """A number from 0 to 2^31 - 1, a function of the seed and of what it is for."""
        return int(row_id(self.seed, *of)[:8], 16) >> 1


def unusable(answer: Answer, cut: bool = True) -> tuple[str, str] | None:
    """(reason, detail) where there is no text of use in an answer; `cut`: also where it was cut off. None where there is one."""
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
