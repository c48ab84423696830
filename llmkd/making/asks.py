"""Asks, which are sent to a writer, and its answers. No torch."""

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
    """A request for one text.

    key       64 hex digits, a hash of messages, sampling and the writer's identity, see `key_of`
    sample    the number, from 0, among several asks with the same messages, whose samplings have different seeds
    pretend   a well-formed answer for `--dry_run`; not part of the request
    audio     the sound to be transcribed; the message then has the SHA-256 of its file
    """

    key: str
    messages: tuple[Message, ...]
    sampling: Sampling
    sample: int = 0
    pretend: str = field(default="", compare=False)
    audio: Sound | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """A writer's answer.

    finish          stop: it ended by itself; length: it was cut off; none: there is no text, see `problem`; or the server's own word
    tokens          of the text, as the writer counts them, or estimated; also of a failed answer that cost tokens
    prompt_tokens   of the ask, likewise
    problem         why there is no text. Such an answer is not stored: the next run asks again
    model           the model's name by the server, if it differs from the one that was asked for
    reasoning       number of characters of the reasoning that the server gave separately, which is not stored; None: it gave none
    """

    text: str
    finish: str = STOP
    tokens: int = 0
    prompt_tokens: int = 0
    problem: str | None = None
    model: str | None = None
    reasoning: int | None = None


def failed(problem: str, tokens: int = 0, prompt_tokens: int = 0) -> Answer:
    """An answer without text, which may still have cost tokens."""
    return Answer("", NONE, tokens, prompt_tokens, problem)


def key_of(messages: tuple[Message, ...], sampling: Sampling, identity: Mapping[str, Any]) -> str:
    """The key of an ask. An answer depends on nothing else."""
    return _hash({"asked": asked_of(messages, sampling), "writer": identity})


def asked_of(messages: tuple[Message, ...], sampling: Sampling) -> str:
    """A hash of an ask that does not depend on the writer, by which recorded answers are found."""
    return _hash({"messages": list(messages), "sampling": dataclasses.asdict(canonical(sampling))})


def canonical(sampling: Sampling) -> Sampling:
    """The sampling without the settings that have no effect: greedy decoding depends on max_new_tokens only."""
    return Sampling(0.0, sampling.max_new_tokens) if sampling.temperature == 0 else sampling


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def estimated_tokens(*texts: str) -> int:
    """An estimate of the number of tokens: one for four bytes, and four more for each text."""
    return sum(-(-len(text.encode("utf-8", "replace")) // 4) + 4 for text in texts)
