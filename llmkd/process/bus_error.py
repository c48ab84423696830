"""Reports SIGBUS, which ends a process without a message when it reads a memory-mapped file that was cut short, or whose disk fails."""

import contextlib
import ctypes
import os
import re
import signal

_held: list = []  # the handler, which must outlive the call


def report_bus_errors() -> None:
    """From now on SIGBUS ends the process with one line on stderr and exit code 1. Without effect on systems without that signal.

    Python runs its own handlers only after the failing instruction, which never completes; the C library calls this one at once. It only
    reads /proc and writes a line, since it may interrupt any code.
    """
    if not hasattr(signal, "SIGBUS"):
        return
    with contextlib.suppress(Exception):  # some systems forbid code that is generated at run time
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
    """The path of a mapped file that is shorter than its mapping; None without one."""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+\s+(/.*)", line):
                start, stop, offset = (int(part, 16) for part in found.groups()[:3])
                page = os.sysconf("SC_PAGE_SIZE")
                with contextlib.suppress(OSError):
                    if os.stat(found[4]).st_size + page <= offset + stop - start:
                        return found[4]
    return None
