"""The append-only file of answers, answers.jsonl: each answer has its ask's key, so that nothing is asked for twice. No torch."""

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
    """Answers by key. A kill loses at most the one that is being written; only one process may use the file.

    tokens   tokens that all asks in the file have cost, read and written. Asks without an answer have lines too, which `problem` marks
    """

    def __init__(self, path: Path, setting: str = "output_dir"):
        self.file, self.known, self.new, self.tokens = AppendOnly(path, setting), {}, 0, 0
        self.dates: list[str] = []

    @contextlib.contextmanager
    def open(self) -> Iterator["Answers"]:
        """Lock the file for the `with` block and read it. UserError if another process uses it, or it is damaged."""
        with self.file.held("choose another output_dir"):
            self.read()
            self.file.remove_unfinished()
            yield self

    def read(self) -> None:
        """Read the file, if it exists. Changes nothing."""
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
        """Record the tokens of an ask that got no answer, if it cost any. The next run asks again."""
        if answer.tokens or answer.prompt_tokens:
            self._add({"key": ask.key, "tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens, PROBLEM: answer.problem})

    def _add(self, row: dict[str, Any]) -> None:
        row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.file.add([row | {"checksum": _checksum(row)}])
        self.tokens += row["tokens"] + row["prompt_tokens"]


def _checksum(row: dict[str, Any]) -> str:
    content = json.dumps({name: value for name, value in row.items() if name != "checksum"}, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
