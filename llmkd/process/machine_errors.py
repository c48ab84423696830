"""Errors of the machine: recognises them in exceptions of any library, with advice on what to do. No torch."""

import errno
import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class MachineError:
    """A kind of failure that is neither a mistake in a recipe nor a bug.

    name       what happened, in a few words
    advice     what to do about it
    errnos     error numbers of the system
    text       a pattern for messages of libraries without an error number
    types      a pattern for the names of exception types
    certain    whether the machine is at fault even if it happened while a user's file was read
    exit_code  1; 2 if it concerns something that the user has named
    """

    name: str
    advice: str
    errnos: tuple[int, ...] = ()
    text: str = r"(?!)"
    types: str = r"(?!)"
    certain: bool = True
    exit_code: int = 1

    def fits(self, error: BaseException) -> bool:
        said = str(error)
        return bool(
            number_of(error) in self.errnos or re.fullmatch(self.types, type(error).__name__) or re.search(self.text, said, re.IGNORECASE)
        )


OUT_OF_MEMORY = MachineError(
    "out of memory",
    "lower train.micro_batch_size, train.micro_batch_tokens or data.max_length (of an evaluation --batch_size), or free some memory",
    (errno.ENOMEM,),
    r"can't allocate memory|not enough memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|(CUDA|HIP)( error:)? out of memory|std::bad_alloc",
    r".*OutOfMemory.*|.*MemoryError",
)
#: The first that fits applies.
MACHINE_ERRORS = (
    MachineError(
        "shared memory is full",
        "make /dev/shm larger (docker run --shm-size 8g)",
        text=r"shared memory \(shm\)|unable to (allocate|open|write|mmap|resize).*(shared memory|/torch_)|No space left.*(/dev/shm|/torch_)",
    ),
    MachineError("too many open files", "raise the limit (ulimit -n 65536)", (errno.EMFILE, errno.ENFILE), r"received 0 items of ancdata"),
    MachineError(
        "no more processes or threads",
        "end others of this user, free some memory, or raise the limit (ulimit -u; pids of a container)",
        (errno.EAGAIN,),
        r"can't start new thread|pthread_create failed",
    ),
    OUT_OF_MEMORY,
    MachineError(
        "the disk is full",
        "free some space, or raise the quota",
        (errno.ENOSPC, errno.EDQUOT),
        r"No space left on device|Disk quota exceeded|database or disk is full",
    ),
    MachineError(
        "a file may not grow further",
        "raise the limit on the size of files (ulimit -f), or use another file system",
        (errno.EFBIG,),
        r"File too large",
    ),
    MachineError("the file system is read-only", "remount it, or choose another folder", (errno.EROFS,)),
    MachineError(
        "a disk or network drive fails",
        "check it (dmesg)",
        (
            errno.EIO,
            errno.ENXIO,
            errno.ENODEV,
            errno.ENOTCONN,
            errno.EBADMSG,
            *(getattr(errno, name, errno.EIO) for name in ("EREMOTEIO", "EUCLEAN")),
        ),
        r"Input/output error",
    ),
    MachineError(
        "a child process has died",
        "the system may have killed it for memory (dmesg)",
        text=r"DataLoader worker|exited unexpectedly|is killed by signal|died with <Signals|terminated abruptly",
        types=r"BrokenProcessPool|BrokenExecutor",
    ),
    MachineError(
        "the GPU or its driver fails",
        "look at nvidia-smi and dmesg",
        text=r"CUDA driver|no kernel image is available|uncorrectable ECC|device\(s\) is/are busy or unavailable|fallen off the bus"
        r"|CUDA error: (unknown error|initialization error)|NVML",
    ),
    MachineError(
        "a file or folder is gone",
        "something has moved or removed it: put it back",
        (errno.ENOENT, errno.ESTALE),
        r"No such file or directory",
        certain=False,
    ),
    MachineError(
        "a file or folder may not be used",
        "give this user the right to read and write it, or choose another folder",
        (errno.EACCES, errno.EPERM),
        certain=False,
    ),
    MachineError(
        "a file or folder of that name is there by now",
        "another command may have made it: look at it, or choose another name",
        (errno.EEXIST, errno.ENOTEMPTY),
        certain=False,
    ),
    MachineError("a pipe or a device has the name of a file", "remove it, or choose another folder", types="NotAFile", exit_code=2),
    MachineError(
        "no home folder is known",
        "set HOME, or LLMKD_CACHE where only the cache is meant",
        text=r"Could not determine home directory",
        exit_code=2,
    ),
    MachineError(
        "a path cannot be used",
        "choose another one",
        (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
        certain=False,
        exit_code=2,
    ),
)
_LOST = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ECONNREFUSED, errno.ETIMEDOUT)
NETWORK = MachineError(
    "the network fails",
    "check the connection, or use local models and data",
    (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, *_LOST),
    r"Name or service not known|Temporary failure in name resolution",
    r"ConnectTimeout|ReadTimeout|ConnectError|RemoteProtocolError|gaierror",
    certain=False,
)
DEAD_PEER = MachineError(
    "another process of this launch has died or cannot be reached",
    "a process that leaves no message was often killed for memory (dmesg)",
    _LOST,
    r"connection (was )?(closed|reset|refused|aborted)( by( remote)? peer)?|gloo.*(timed out|timeout|broken pipe)|TCPStore.*(timed out|timeout)"
    r"|(wait|socket) timeout|Timed out waiting|pair closure|remote process (exited|has)|NCCL.*(remote|timeout|unhandled system|socket)",
    r"Dist\w*Error",
)


def machine_error(error: BaseException | None) -> MachineError | None:
    """The kind of machine error of an exception, or of an exception that it was raised from; None for any other exception."""
    seen: list[BaseException] = []
    kinds = (*MACHINE_ERRORS, *((DEAD_PEER,) if os.environ.get("WORLD_SIZE", "1") != "1" else ()), NETWORK)
    while error is not None and error not in seen:
        if found := next((kind for kind in kinds if kind.fits(error)), None):
            return found
        if isinstance(error, OSError) and error.errno:
            return MachineError("the system refuses", "the number of the error says why", certain=False)
        seen.append(error)
        error = error.__cause__
    return None


def number_of(error: BaseException) -> int | None:
    """The system's error number, from an OSError or from the text of another exception as Rust and Python write it; None without one."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else None


def is_out_of_memory(error: BaseException) -> bool:
    return OUT_OF_MEMORY.fits(error)
