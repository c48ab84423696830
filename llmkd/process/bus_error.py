"""The end of a process that reads a memory-mapped file which was cut short, or whose disk fails: the system sends SIGBUS, and that ends in silence."""

import contextlib
import ctypes
import os
import re
import signal

_held: list = []  # the handler, which must outlive the call


def report_bus_errors() -> None:
    """From now on SIGBUS ends the process with one line on stderr and exit code 1. Nothing happens on systems without that signal.

    Python's own handlers run after the instruction that failed, and that one never ends; this one is called by the C library at once. It
    only reads /proc and writes, since the process may be anywhere.
    """
    if not hasattr(signal, "SIGBUS"):
        return
    with contextlib.suppress(Exception):  # a system that forbids code made at run time
        library = ctypes.CDLL(None)
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
        library.signal.argtypes, library.signal.restype = [ctypes.c_int, type(handler)], ctypes.c_void_p
        library.signal(signal.SIGBUS, handler)
        _held.append(handler)


def _end(number: int) -> None:
    with contextlib.suppress(BaseException):
        which = _cut_short() or "a file that this process has mapped into memory"
        os.write(
            2,
            f"llmkd: {which} was rewritten or cut short while it was being read, or its disk fails; restore it, and start again\n".encode(),
        )
    os._exit(1)


def _cut_short() -> str | None:
    """The name of a mapped file that is shorter than its mapping."""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+\s+(/.*)", line):
                start, stop, offset = (int(part, 16) for part in found.groups()[:3])
                page = os.sysconf("SC_PAGE_SIZE")
                with contextlib.suppress(OSError):
                    if os.stat(found[4]).st_size + page <= offset + stop - start:
                        return found[4]
    return None
