"""Connections to a server, through the proxy of the environment where there is one; a request on one of them may be cut off. No torch."""

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3 import exceptions as failures
from urllib3.connection import HTTPConnection, HTTPSConnection

from ..errors import UserError

_thread = threading.local()


class _Shown:
    """A connection that tells `cut_after` which socket this thread's request uses."""

    def request(self, *args, **kwargs):
        try:
            super().request(*args, **kwargs)
        finally:  # urllib3 reads on where the server has not read all
            _thread.use(self.sock)


class _Http(urllib3.HTTPConnectionPool):
    ConnectionCls = type("_HttpShown", (_Shown, HTTPConnection), {})


class _Https(urllib3.HTTPSConnectionPool):
    ConnectionCls = type("_HttpsShown", (_Shown, HTTPSConnection), {})


@contextlib.contextmanager
def cut_after(seconds: float) -> Iterator[threading.Event]:
    """In the block, the connection of this thread's request is shut when the time is over, which the event says.

    A time-out of a socket is one of each read: what comes a byte at a time outlives it. To connect and to send have limits of their own.
    """
    over, used = threading.Event(), []

    def cut() -> None:
        over.set()
        for one in used:  # a duplicate, since TLS may be read at this moment, and is no socket within TLS
            with (
                contextlib.suppress(OSError, AttributeError),
                socket.fromfd(one.fileno(), socket.AF_INET, socket.SOCK_STREAM) as duplicate,
            ):
                duplicate.shutdown(socket.SHUT_RDWR)

    def use(one) -> None:
        used.append(one)
        if over.is_set():  # before all was sent
            cut()

    _thread.use, timer = use, threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()
        del _thread.use


def pool(address: str, connections: int, setting: str) -> urllib3.PoolManager:
    """A pool of connections, through the environment's proxy if there is one for that host; never for this machine's own addresses.

    UserError, without showing it, if the proxy's address is invalid: it may hold a password.
    """
    parts, options = urlsplit(address), {"maxsize": connections, "retries": False}
    proxy = urllib.request.getproxies().get(parts.scheme)
    local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
    if not proxy or local or urllib.request.proxy_bypass(parts.netloc):
        manager = urllib3.PoolManager(**options)
    else:
        try:
            manager = _through(proxy if "://" in proxy else f"http://{proxy}", options)
        except (failures.HTTPError, ValueError):
            raise UserError(
                f"{setting}: the variable {parts.scheme}_proxy of the environment (not shown) is no address of a proxy that is understood; "
                "set it to http://host:port or http://name:password@host:port, or unset it"
            ) from None
    manager.pool_classes_by_scheme = {"http": _Http, "https": _Https}
    return manager


def _through(proxy: str, options: dict) -> urllib3.ProxyManager:
    """A pool of connections through a proxy, with the name and password in its address, which urllib3 does not send by itself."""
    parts = urlsplit(proxy)
    if not parts.hostname:
        raise ValueError("no host")
    named = None if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    headers = urllib3.make_headers(proxy_basic_auth=named) if named else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
