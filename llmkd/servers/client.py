"""JSON requests to a server over HTTP: time-outs, retries while it is busy or gone, and errors in one line.

The key comes from the environment only; it is sent in the header `Authorization` and appears in no message and no file. No torch.
"""

import datetime
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import urllib3
from urllib3 import exceptions as failures

from ..config.served import base_address, key_problem
from ..console import duration, printable, warn
from ..errors import UserError
from ..process import heartbeat
from .connections import cut_after, pool

#: Statuses of a server that is busy, starting or temporarily broken.
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
#: By content type: answers that will not become JSON by repeating the request, and what to do.
_OTHER = {
    "text/html": ("a page of HTML", "name the address of its API"),
    "text/event-stream": ("a stream of events", "let it send whole answers"),
}
_DOUBLED = 10  # how often the pause doubles: 2 to the power of thousands of attempts would overflow a float
_BROKE_OFF = "closed the connection before its answer was whole"
_YEAR = 365 * 86400.0  # seconds; a longer pause cannot be meant, and is not printed
_CONNECT = 10.0  # seconds within which a connection must be accepted
_LONGEST_WAIT = 30.0  # seconds between two attempts, unless the server names more
_SHORTEST_WAIT = 0.1  # even if the server names less
_LARGEST = 1 << 30  # bytes of an answer
_START = "start it, or correct the address"
_SHORTEST_SECRET = 8  # characters: a shorter key (EMPTY, x) is not secret, and may occur in any text


class ServerFailed(UserError):
    """A server cannot be reached, or does not answer. What was done before is not lost.

    alone   how the request failed, if the request itself may be the cause and not the server: an error 500, a broken answer, a time-out.
            None otherwise
    """

    exit_code = 1

    def __init__(self, problem: str, alone: str | None = None):
        super().__init__(problem)
        self.alone = alone


class Refused(Exception):
    """A server's error that repeating the request would not change: its status (400, say) and its text."""

    def __init__(self, status: int, text: str):
        self.status, self.text = status, text
        super().__init__(f"answers {status}: {text}")


class _Passing(Exception):
    """A failure that may be temporary. Its text continues a sentence that begins with the server's address.

    fix        what to do; {section} is replaced by the section of the server's settings
    wait       seconds to wait that the server named
    answered   whether the server answered at all
    alone      whether the request itself may be the cause
    """

    def __init__(self, text: str, fix: str = _START, *, wait: float | None = None, answered: bool = False, alone: bool = False):
        super().__init__(text)
        self.fix, self.wait, self.answered, self.alone = fix, wait, answered, alone


class Server:
    """One server. Several threads may use it.

    address       http://host:port, possibly with a path
    setting       the setting that names it, for messages
    key_env       the environment variable that holds the key; None: no key is sent
    timeout       seconds that one request may take
    patience      seconds for which a request is repeated
    connections   most connections that are kept open
    again         how to continue, for the error when the server is given up
    """

    def __init__(
        self,
        address: str,
        setting: str,
        key_env: str | None = None,
        timeout=300.0,
        patience=600.0,
        connections: int = 8,
        again: str = "with --resume a run goes on from its last checkpoint",
    ):
        self.address, self.setting, self.timeout, self.patience = base_address(address), setting, timeout, patience
        self._again = again
        self._key = _key(key_env, f"{setting.removesuffix('.server')}.api_key_env") if key_env else None
        self._secret = self._key if self._key and len(self._key) >= _SHORTEST_SECRET else None
        self._pool = pool(self.address, connections, setting)
        self._ended, self._gone = threading.Event(), threading.Event()
        self._answers_json = False  # once it has, a page of HTML comes from a proxy whose server is temporarily gone

    def get(self, path: str, patience: float | None = None, within: float | None = None) -> Any:
        """The answer, parsed from JSON. `within`: seconds that it may take, if fewer than the server's `timeout`."""
        return self._asked("GET", path, None, patience, within=within)

    def post(self, path: str, content: dict, patience: float | None = None) -> Any:
        """The answer, parsed from JSON. Refused, or ServerFailed after `patience` seconds (by default the server's own)."""
        return self._asked("POST", path, json.dumps(content).encode(), patience)

    def tell(self, path: str, content: dict, patience: float | None = None) -> None:
        """As `post`, for a request whose answer is not read and need not be JSON."""
        self._asked("POST", path, json.dumps(content).encode(), patience, lambda body: None)

    def reach(self, path: str) -> None:
        """Send one request. ServerFailed if no answer comes at all; Refused for an error that is not temporary."""
        try:
            self._once("GET", path, None, lambda body: None, self.timeout)
        except _Passing as error:
            if not error.answered:
                raise ServerFailed(f"{self.setting}: {self.address} {error}; {self._fixed(error)}") from None

    def lives(self) -> bool:
        """Whether it answers a request, even with an error, within ten seconds."""
        try:
            self._once("GET", "/v1/models", None, lambda body: None, min(_CONNECT, self.timeout))
        except _Passing as error:
            return error.answered
        except Refused:
            pass
        return True

    def holds_key(self, text: str) -> bool:
        """Whether a text contains the key, so that it must not be written anywhere."""
        return self._secret is not None and self._secret in text

    def end(self) -> None:
        """Make the requests that wait for the server fail."""
        self._ended.set()

    def _asked(
        self,
        method: str,
        path: str,
        content: bytes | None,
        patience: float | None,
        parse: Callable[[bytes], Any] = json.loads,
        within: float | None = None,
    ) -> Any:
        patience = self.patience if patience is None else patience
        timeout = self.timeout if within is None else min(self.timeout, within)
        until, attempt = time.monotonic() + patience, 0
        while True:
            heartbeat.going_on()
            try:
                answer = self._once(method, path, content, parse, timeout)
                if self._gone.is_set():
                    self._gone.clear()
                    warn(f"note: {self.setting}: {self.address} answers again")
                return answer
            except _Passing as error:
                wait = _pause(attempt) if error.wait is None else max(_SHORTEST_WAIT, error.wait)
                if self._ended.is_set() or time.monotonic() + wait > until:
                    tried = f" (tried {attempt + 1} times)" if attempt else ""
                    resume = f"; {self._again}" if patience else ""
                    alone = f"{error}{tried}" if error.alone and not self._ended.is_set() else None
                    raise ServerFailed(f"{self.setting}: {self.address} {error}{tried}; {self._fixed(error)}{resume}", alone) from None
                if attempt == 1 and not self._gone.is_set():
                    self._gone.set()
                    warn(f"note: {self.setting}: {self.address} {error}; trying again for up to {duration(patience)}")
                attempt += 1
                self._ended.wait(wait)

    def _fixed(self, error: _Passing) -> str:
        return error.fix.format(section=self.setting.removesuffix(".server"))

    def _once(self, method: str, path: str, content: bytes | None, parse: Callable[[bytes], Any], timeout: float) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with cut_after(timeout) as over:
            try:
                response = self._pool.request(
                    method,
                    self.address + path,
                    body=content,
                    headers=headers,
                    timeout=urllib3.Timeout(connect=min(_CONNECT, timeout), read=timeout),
                    retries=False,
                    redirect=False,
                    preload_content=False,
                )
                parts, size = [], 0
                try:
                    while part := response.read1(1 << 20):
                        parts.append(part)
                        size += len(part)
                        if size > _LARGEST:
                            raise Refused(response.status, f"more than {_LARGEST >> 20:,} MiB")
                    if over.is_set():
                        raise TimeoutError
                except BaseException:
                    response.close()  # or the rest of this answer would be read as the beginning of the next
                    raise
                response.release_conn()
            except (failures.HTTPError, OSError) as error:
                raise _failure(error, over.is_set(), timeout, self.timeout) from None
        return self._read(response, b"".join(parts), parse)

    def _read(self, response, body: bytes, parse: Callable[[bytes], Any]) -> Any:
        status = response.status
        if status != 200:
            text = self._told(body)
            if status in _AGAIN:
                wait, said, fix = _seconds(response.headers.get("Retry-After")), f"answers {status}{': ' + text if text else ''}", _START
                if status == 429:
                    said += f", and asks for a pause of {duration(wait)}" if wait and wait < _YEAR else ""
                    fix = "lower {section}.requests, or raise {section}.patience"
                raise _Passing(said, fix, wait=wait, answered=True, alone=status == 500)
            if 300 <= status < 400:
                to = printable(self._without_key(response.headers.get("Location", "")))[:120]
                text = f"sends the request elsewhere ({to}); name that address"
            raise Refused(status, text)
        try:
            found = parse(body)
            if parse is json.loads:
                self._answers_json = True
            return found
        except (ValueError, RecursionError):
            begins = f": {start[:60]!r}" if (start := self._told(body)) else ""
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind in _OTHER and not self._answers_json:
                what, fix = _OTHER[kind]
                raise Refused(status, f"{what}, expected JSON{begins}; {fix}") from None
            raise _Passing(f"gives an answer that is no whole JSON ({len(body):,} bytes{begins})", answered=True, alone=True) from None

    def _told(self, body: bytes) -> str:
        """The message in an error's body, in one line and without the key, which is removed before the text is cut so that no part of it is left."""
        text = body[:65536].decode("utf-8", "replace")
        try:
            return self.in_a_line(json.loads(text))
        except (ValueError, RecursionError):
            return self.in_a_line(text)

    def in_a_line(self, found: Any) -> str:
        """The message in a parsed body, in one line, without the key."""
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
        return printable(" ".join(self._without_key(text).split()))[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._secret, "(the key)") if self._secret else text


def _key(name: str, setting: str) -> str:
    if problem := key_problem(name):
        raise UserError(f"{setting}: {problem}")
    return os.environ[name]


def _pause(attempt: int) -> float:
    """Seconds before the attempt after number `attempt` (from 0): about 0.5, 1, 2, ... up to `_LONGEST_WAIT`, drawn at random so that processes
    do not ask all at once."""
    return min(_LONGEST_WAIT, 0.5 * 2 ** min(attempt, _DOUBLED)) * random.uniform(0.5, 1)


def _failure(error: Exception, over: bool, timeout: float, most: float) -> _Passing:
    """The failure of a request. `over`: whether it was cut off after `timeout` seconds; `most`: the settings' own timeout, which may be longer."""
    if (over or isinstance(error, failures.ReadTimeoutError | TimeoutError)) and not isinstance(error, failures.ConnectTimeoutError):
        fix = _START if timeout < most else "raise {section}.timeout if it is working, or start it"
        return _Passing(f"has not answered within {timeout:g} seconds", fix, alone=True)
    text = _in_words(error, timeout)
    return _Passing(text, alone=text == _BROKE_OFF)


def _in_words(error: Exception, timeout: float) -> str:
    """A failed connection in words, to follow the server's address."""
    text = str(error)
    if isinstance(error, failures.LocationValueError):
        return "is no address"
    if isinstance(error, failures.NameResolutionError):
        return "has a host name that is not known"
    if isinstance(error, failures.ProxyError):
        wants = ", which wants a name and a password" if " 407 " in text else ""
        return f"cannot be reached through the proxy that the environment names{wants}"
    if isinstance(error, failures.SSLError):
        return f"has no certificate that this machine trusts, or no TLS ({printable(text)[-160:]})"
    if isinstance(error, failures.NewConnectionError | ConnectionRefusedError):
        return "refuses the connection" if "refused" in text.lower() else f"cannot be reached ({printable(text.rpartition(': ')[2])[:120]})"
    if isinstance(error, failures.ConnectTimeoutError):
        return f"accepts no connection within {min(_CONNECT, timeout):g} seconds"
    return _BROKE_OFF


def _seconds(header: str | None) -> float | None:
    """The seconds that a header Retry-After names, as a number or a date."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        then = email.utils.parsedate_to_datetime(header)
        return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
