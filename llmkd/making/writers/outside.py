"""What writers outside this process have in common: a stop that is followed, texts that are none, and tokens that are not counted. No torch."""

import math
import time
from collections.abc import Callable
from typing import Any

from ...console import printable
from ...errors import Stopped
from ..asks import Ask, estimated_tokens

#: Seconds in which what is being written may be finished, after a signal.
GRACE = 10.0
MOST_OF_FINISH = 40  # characters
_MOST_TOKENS = 1 << 31  # that one answer may be said to have


class Ending:
    """Of a writer that is asked to stop: nothing more is asked, and what is being written has `GRACE` seconds to be kept."""

    def __init__(self, stop: Callable[[], bool], setting: str):
        self._stop, self._setting, self._until = stop, setting, math.inf

    @property
    def asked(self) -> bool:
        if self._until == math.inf and self._stop():
            self._until = time.monotonic() + GRACE
        return self._until < math.inf

    def follow(self, running: int) -> None:
        """Stopped, if it is asked to stop and nothing more is written, or the time is over."""
        if self.asked and (not running or time.monotonic() > self._until):
            raise Stopped(f"stopped by a signal while {self._setting} was asked; what is written is kept, and the same command goes on")


def bad_text(text: str) -> str | None:
    """Why a text is none; None if it is one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text has half of a surrogate pair, which is not a character"
    return None


def in_a_word(text: str, most: int) -> str:
    """A name or a reason that another program gave, in one line of characters that print."""
    return printable(" ".join(text.split()))[:most]


def counted(ask: Ask, text: str, tokens: Any, prompt_tokens: Any) -> tuple[int, int]:
    """Tokens written and read, as they were told; estimated, where that is no count."""
    read = estimated_tokens(*(one["content"] for one in ask.messages))
    return told(tokens, estimated_tokens(text)), told(prompt_tokens, read)


def told(count: Any, otherwise: int) -> int:
    """A count that another program gave, where it is one."""
    return count if type(count) is int and 0 <= count < _MOST_TOKENS else otherwise
