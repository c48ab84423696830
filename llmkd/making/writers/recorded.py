"""A writer that is a file of answers, from an earlier run or made by hand. No torch."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...config.make import Writer as Settings
from ...errors import UserError, fix_of
from ...files import read_file, sha256_file
from ..answers import PROBLEM
from ..asks import STOP, Answer, Ask, asked_of, estimated_tokens
from ..rows import row_id
from .outside import MOST_OF_FINISH, in_a_word


class RecordedWriter:
    """Reads JSON lines: the answers.jsonl of a run, found by the hash of the ask; or lines with `messages` and `text`, of which several with the same
    messages are samples."""

    def __init__(self, settings: Settings):
        self.path = Path(settings.recorded).expanduser()
        self.label = str(settings.recorded)
        self.by_ask: dict[str, Answer] = {}
        self.by_messages: dict[str, list[Answer]] = defaultdict(list)
        try:
            self.identity: dict[str, Any] = {"recorded": sha256_file(self.path)}
            lines = read_file(self.path).split(b"\n")
        except OSError as error:
            raise UserError(f"writer.recorded: {self.path}: {error.strerror}; {fix_of(error, 'name a file of answers')}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._add(number, line)

    def _add(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            if PROBLEM in row:  # of a run: an ask that cost tokens and got no answer
                return
            text = row["text"]
            text.encode()
            tokens, read, reasoning = (row.get(name) for name in ("tokens", "prompt_tokens", "reasoning"))
            if isinstance(reasoning, str):  # characters in the file of a run; a file made by hand may have the text
                reasoning = len(reasoning)
            if not all(one is None or (type(one) is int and one >= 0) for one in (tokens, read, reasoning)):
                raise ValueError
            finish = in_a_word(str(row.get("finish") or STOP), MOST_OF_FINISH)
            answer = Answer(text, finish, estimated_tokens(text) if tokens is None else tokens, read or 0, reasoning=reasoning or None)
            asked = str(row["asked"]) if "asked" in row else None
            said = () if asked else [{"role": one["role"], "content": one["content"]} for one in row["messages"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"writer.recorded: {self.path}:{number}: expected an object with text, and with messages or asked, whose counts are whole numbers; "
                "correct the line"
            ) from None
        if asked is None:
            self.by_messages[row_id(said)].append(answer)
        elif self.by_ask.setdefault(asked, answer).text != text:
            raise UserError(
                f"writer.recorded: {self.path}:{number}: has another answer to the ask of an earlier line, as of two writers; keep one of them"
            )

    def check(self) -> None:
        pass

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        wanted = [(ask, self._answer(ask)) for ask in asks if ask.key not in known]
        if lacking := sum(answer is None for _, answer in wanted):
            raise UserError(
                f"writer.recorded: {self.path} has no answer to {lacking} of {len(asks)} asks; "
                "name the file of the same seeds, prompts and sampling, or another writer"
            )
        yield from wanted

    def _answer(self, ask: Ask) -> Answer | None:
        if found := self.by_ask.get(asked_of(ask.messages, ask.sampling)):
            return found
        texts = self.by_messages.get(row_id(ask.messages), [])
        return texts[ask.sample] if ask.sample < len(texts) else None

    def close(self) -> None:
        pass
