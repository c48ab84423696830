"""Heartbeats of the processes of a launch, which show the one that stands still while the others wait for it. No torch.

A process records where it is (`at`); a thread sends that record and a beat to the others, through the launcher's key-value server. A process
that was stopped, or whose machine is gone, sends no beats; one that hangs sends beats, but does not reach the place where the others are.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

#: Seconds for which a process may stand still (`train.timeout`).
TIMEOUT = 600.0
#: The same at places where one process works while the others wait: loading a model, hashing its files, writing a checkpoint, asking a server.
PATIENT = 7200.0


_LEFT = 0  # the beat of a process that the others need not wait for any more
_NONE = -1  # the beat of a process that has not begun: it may still be importing


@dataclass
class Place:
    """Where a process is.

    number   counts the places, to which all processes come in the same order
    text     its description, for messages
    patient  whether a process may stay there for `PATIENT` seconds
    signs    counts signs of progress there
    """

    number: int = 0
    text: str = "its start"
    patient: bool = True
    signs: int = 0


@dataclass
class Seen:
    """What a process knows of another: its last record, and for how many seconds it has sent no new beat (`silent`) and not moved (`still`)."""

    beat: int = _NONE
    place: Place = field(default_factory=lambda: Place(-1, "nothing: it has not begun"))
    runs_on: str = ""
    silent: float = 0.0
    still: float = 0.0


_here, _timeout = Place(), TIMEOUT


def at(text: str, patient: bool = False) -> None:
    """Record that this process is at a place to which all processes of the launch come. `patient`: see `Place`."""
    global _here
    _here = Place(_here.number + 1, text, patient)


def going_on() -> None:
    """Record that this process makes progress at the place where it is."""
    _here.signs += 1


def timeout() -> float:
    """Seconds for which a process may stand still."""
    return _timeout


def expect_within(seconds: float) -> None:
    """Set the seconds for which a process may stand still from now on."""
    global _timeout
    _timeout = seconds


class Heartbeats:
    """Sends this process's records and reads those of all, through a server with set, check and multi_get, such as torch's TCPStore.

    key  returns the key on the server for a name
    """

    def __init__(self, key: Callable[[str], str], rank: int, ranks: int):
        self._keys, self._rank = [key(f"place/{one}") for one in range(ranks)], rank
        self._beat, self._unread, self._seen = _LEFT, 0.0, [Seen() for _ in range(ranks)]

    def look(self, server, seconds: float) -> str | None:
        """Send a record and, ten times within the timeout, read those of all. Returns a sentence on the process that stands still, or None.

        seconds  since the last call, without the time for which this process itself was suspended
        """
        self._beat, self._unread = self._beat + 1, self._unread + seconds
        self._send(server, self._beat)
        if self._unread < _timeout / 10:
            return None
        for seen, record in zip(self._seen, self._read(server), strict=True):
            seen.silent, seen.still = seen.silent + self._unread, seen.still + self._unread
            if record is not None:
                beat, place, seen.runs_on = record[0], Place(*record[1]), record[2]
                seen.silent, seen.still = seen.silent * (beat == seen.beat), seen.still * (place == seen.place)
                seen.beat, seen.place = beat, place
        self._unread = 0.0
        return _verdict(self._seen)

    def leave(self, server) -> None:
        """Tell the others not to wait for this process."""
        self._send(server, _LEFT)

    def _send(self, server, beat: int) -> None:
        record = [beat, dataclasses.astuple(_here), f"{socket.gethostname()}, process id {os.getpid()}"]
        server.set(self._keys[self._rank], json.dumps(record))

    def _read(self, server) -> list[list | None]:
        there = self._keys if server.check(self._keys) else [key for key in self._keys if server.check([key])]
        found = dict(zip(there, map(json.loads, server.multi_get(there)), strict=True))
        return [found.get(key) for key in self._keys]


def _verdict(seen: list[Seen]) -> str | None:
    """A sentence on the process that sends nothing; if all stand still, on one that has been silent for half of the time, or else is behind; or None."""
    present = {rank: one for rank, one in enumerate(seen) if one.beat != _LEFT}
    if len(present) < 2:
        return None
    stand = all(one.still > (PATIENT if one.place.patient else _timeout) for one in present.values())
    limit = _timeout / 2 if stand else _timeout
    if gone := [rank for rank, one in present.items() if one.silent > (PATIENT if one.beat == _NONE else limit)]:
        return f"{_names(seen, gone)} sent no sign of life for {seen[gone[0]].silent:,.0f} s, and was last at {seen[gone[0]].place.text}"
    if not stand:
        return None
    least = min(one.place.number for one in present.values())
    behind = [rank for rank, one in present.items() if one.place.number == least]
    waits = ", and the others wait for it" if len(behind) < len(present) else ", as all do"
    return f"{_names(seen, behind)} stood still for {seen[behind[0]].still:,.0f} s at {seen[behind[0]].place.text}{waits}"


def _names(seen: list[Seen], ranks: list[int]) -> str:
    """The first of `ranks` with the machine it runs on, and the number of the others."""
    runs_on = f"; {seen[ranks[0]].runs_on}" if seen[ranks[0]].runs_on else ""
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"process {ranks[0]} (of 0 to {len(seen) - 1}{runs_on}){more}"
