"""The file of answers, answers.jsonl: it is only added to, each answer under its key, so that nothing is asked for twice. No torch."""

import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rollouts.append_only import AppendOnly
from .asks import Answer, Ask, asked_of

NAME = "answers.jsonl"
PROBLEM = "problem"
_FIELDS = ("text", "finish", "tokens", "prompt_tokens", "model", "reasoning")


class Answers:
    """Answers by their keys. A kill loses at most the one that is being written; one process at a time.

    tokens  what all asks in the file have cost, read and written; also those that got no answer: lines of their own, which `problem` marks
    """

    def __init__(self, path: Path, setting: str = "output_dir"):
        self.file, self.known, self.new, self.tokens = AppendOnly(path, setting), {}, 0, 0
        self.dates: list[str] = []

    @contextlib.contextmanager
    def open(self) -> Iterator["Answers"]:
        """The file, for this process alone, with what is in it. UserError where it is in use or damaged."""
        with self.file.held("choose another output_dir"):
            self.read()
            self.file.remove_unfinished()
            yield self

    def read(self) -> None:
        """What is in the file, which may not exist. Nothing is changed."""
        for number, line in self.file.lines() if self.file.path.exists() else ():
            try:
                row = json.loads(line)
                if row["checksum"] != _checksum(row):
                    raise ValueError
                self.tokens += row["tokens"] + row["prompt_tokens"]
                if PROBLEM in row:
                    continue
                answer = Answer(**{name: row[name] for name in _FIELDS if name in row})
                key, date = row["key"], row["date"]
            except (ValueError, KeyError, TypeError):
                fix = "delete the line, and its answer is asked for again"
                raise UserError(f"{self.file.setting}: {self.file.path}:{number} is damaged; {fix}") from None
            if key in self.known:
                raise UserError(
                    f"{self.file.setting}: {self.file.path}:{number} has the answer of an earlier line; delete one of the two lines"
                )
            self.known[key] = answer
            self.dates.append(date)

    def add(self, ask: Ask, answer: Answer) -> None:
        """Add an answer, and wait until it is on the disk."""
        row: dict[str, Any] = {"key": ask.key, "asked": asked_of(ask.messages, ask.sampling)}
        row |= {name: value for name in _FIELDS if (value := getattr(answer, name)) is not None}
        self._add(row)
        self.known[ask.key] = answer
        self.dates.append(row["date"])
        self.new += 1

    def lose(self, ask: Ask, answer: Answer) -> None:
        """Add what an ask has cost that got no answer, if it has: the next run asks again."""
        if answer.tokens or answer.prompt_tokens:
            self._add({"key": ask.key, "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens, PROBLEM: answer.problem})

    def _add(self, row: dict[str, Any]) -> None:
        row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.file.add([row | {"checksum": _checksum(row)}])
        self.tokens += row["tokens"] + row["prompt_tokens"]


def _checksum(row: dict[str, Any]) -> str:
    content = json.dumps({name: value for name, value in row.items() if name != "checksum"}, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
