"""What a writer is asked, and what it answers. No torch."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..rollouts.sampling import Sampling
from .rows import Message, Sound

STOP, CUT, NONE = "stop", "length", "none"


@dataclass(frozen=True)
class Ask:
    """One text that is wanted.

    key       64 hex digits of messages, sampling and the writer's identity: see `key_of`
    sample    of several answers to the same messages the number, from 0: their samplings have different seeds
    pretend   a well-formed answer, for `--dry_run`; no part of what is asked
    audio     the sound whose transcript is wanted: the message has the SHA-256 of its file
    """

    key: str
    messages: tuple[Message, ...]
    sampling: Sampling
    sample: int = 0
    pretend: str = field(default="", compare=False)
    audio: Sound | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """What a writer wrote.

    finish         stop: it ended by itself; length: it was cut off; none: there is no text, see `problem`; or the server's own word
    tokens         of the text, prompt_tokens of what was read: as the writer counts them, or estimated; also of what is no answer, where it was paid for
    problem        why there is no answer. Such an answer is not kept: the next run asks again
    model          the name that the server itself gives, where it is another one than was asked for
    reasoning      characters of the reasoning that the server gave apart from the text, and that is not kept; None: it gave none
    """

    text: str
    finish: str = STOP
    tokens: int = 0
    prompt_tokens: int = 0
    problem: str | None = None
    model: str | None = None
    reasoning: int | None = None


def failed(problem: str, tokens: int = 0, prompt_tokens: int = 0) -> Answer:
    """No answer, which may have cost tokens nonetheless."""
    return Answer("", NONE, tokens, prompt_tokens, problem)


def key_of(messages: tuple[Message, ...], sampling: Sampling, identity: Mapping[str, Any]) -> str:
    """The key of an answer: it depends on nothing else."""
    return _hash({"asked": asked_of(messages, sampling), "writer": identity})


def asked_of(messages: tuple[Message, ...], sampling: Sampling) -> str:
    """The same of whatever writer: by this a recorded answer is found."""
    return _hash({"messages": list(messages), "sampling": dataclasses.asdict(canonical(sampling))})


def canonical(sampling: Sampling) -> Sampling:
    """Without what does not count: the most likely tokens depend on no seed."""
    return Sampling(0.0, sampling.max_new_tokens) if sampling.temperature == 0 else sampling


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def estimated_tokens(*texts: str) -> int:
    """About so many tokens: four bytes each, and four tokens around each text."""
    return sum(-(-len(text.encode("utf-8", "replace")) // 4) + 4 for text in texts)
