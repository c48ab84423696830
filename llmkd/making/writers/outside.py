"""Common code of writers outside this process: stopping after a signal, invalid texts, and token counts that are missing. No torch."""

import math
import time
from collections.abc import Callable
from typing import Any

from ...console import printable
from ...errors import Stopped
from ..asks import Ask, estimated_tokens

#: Seconds after a signal in which answers that are being written may be finished.
GRACE = 10.0
MOST_OF_FINISH = 40  # characters
_MOST_TOKENS = 1 << 31  # that one answer may be said to have


class Ending:
    """The end of a writer that was asked to stop: it sends no more asks, and the running ones have `GRACE` seconds to finish."""

    def __init__(self, stop: Callable[[], bool], setting: str):
        self._stop, self._setting, self._until = stop, setting, math.inf

    @property
    def asked(self) -> bool:
        if self._until == math.inf and self._stop():
            self._until = time.monotonic() + GRACE
        return self._until < math.inf

    def follow(self, running: int) -> None:
        """Raise Stopped if the writer was asked to stop and no ask is running, or the time is over."""
        if self.asked and (not running or time.monotonic() > self._until):
            raise Stopped(f"stopped by a signal while {self._setting} was asked; what is written is kept, and the same command goes on")


def bad_text(text: str) -> str | None:
    """Why a text is invalid; None if it is valid."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text has half of a surrogate pair, which is not a character"
    return None


def in_a_word(text: str, most: int) -> str:
    """A name or reason from another program, as one printable line of at most `most` characters."""
    return printable(" ".join(text.split()))[:most]


def counted(ask: Ask, text: str, tokens: Any, prompt_tokens: Any) -> tuple[int, int]:
    """Tokens written and read, as another program counts them, or estimated if its counts are invalid."""
    read = estimated_tokens(*(one["content"] for one in ask.messages))
    return told(tokens, estimated_tokens(text)), told(prompt_tokens, read)


def told(count: Any, otherwise: int) -> int:
    """A count from another program, or `otherwise` if it is invalid."""
    return count if type(count) is int and 0 <= count < _MOST_TOKENS else otherwise
