"""*reflect_instruction* and *reflect_response*: the writer examines a pair and improves it (Selective Reflection-Tuning, arXiv:2402.10110).

Each input row stays, as the version `original`. `notes["version"]` of a row is original, instruction, response or both, and `notes["original"]` is
the id of the original; the stage select chooses one of up to four versions. An answer without the marks gives no version, and is rejected.
"""

import dataclasses
from collections.abc import Sequence

from ..marks import Unreadable, marked_answer
from ..rows import Message, Row, has_answer
from ..selection import BOTH, INSTRUCTION, ORIGINAL, RESPONSE, VERSIONS
from ..stage import Outcome, Rejected, Work


class _Reflect:
    marks: tuple[str, ...]
    #: The version that a version becomes.
    becomes: dict[str, str]

    def __init__(self, settings):
        self.settings = settings

    def run(self, rows: Sequence[Row], work: Work) -> Outcome:
        rows = [as_version(row) for row in rows]
        outcome = Outcome(passed=list(rows))
        wanted = []
        for row in rows:
            if row.notes["version"] not in self.becomes:
                continue
            if has_answer(row):
                wanted.append(row)
            else:
                outcome.rejected.append(Rejected(row, "no_answer", "there is no answer to examine"))
        asks = [
            work.ask(
                work.prompts.messages(instruction=row.instruction, answer=row.answer),
                pretend="".join(f"<{mark}>A better {mark}: {row.id}</{mark}>" for mark in self.marks),
            )
            for row in wanted
        ]
        for row, answer in zip(wanted, work.answer(asks), strict=True):
            try:
                given = f"{row.instruction}\n{row.answer}"
                found = marked_answer(answer, *self.marks, prompt=work.prompts.sections["user"], given=given)
            except Unreadable as error:
                outcome.rejected.append(Rejected(row, error.reason, error.detail, answer.text))
                continue
            question = row.asking(found[0]) if len(found) == 2 else row.question
            messages = (*question, {"role": "assistant", "content": found[-1]})
            if _without_spaces(messages) == _without_spaces(row.messages):
                outcome.rejected.append(Rejected(row, "unchanged", answer=answer.text))
                continue
            notes = {"version": self.becomes[row.notes["version"]], "original": row.notes["original"]}
            outcome.kept.append(row.child(work.label, work.writer, messages, **notes))
        return outcome


def _without_spaces(messages: Sequence[Message]) -> list[list[str]]:
    return [one["content"].split() for one in messages]


class ReflectInstruction(_Reflect):
    marks, becomes = ("task", "answer"), {ORIGINAL: INSTRUCTION}


class ReflectResponse(_Reflect):
    marks, becomes = ("answer",), {ORIGINAL: RESPONSE, INSTRUCTION: BOTH}


def as_version(row: Row) -> Row:
    """The row with its version in `notes`; a row without one is an original."""
    return (
        row
        if row.notes.get("version") in VERSIONS
        else dataclasses.replace(row, notes={**row.notes, "version": ORIGINAL, "original": row.id})
    )
