"""The exceptions that end a run, their exit codes, and which rank reports them."""

import contextlib
import errno
import sys
import traceback

from .console import first_process


class UserError(Exception):
    """A mistake the user can fix. Each problem is one line: the setting or file:line, what was found, what to do."""

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


class ChangedFiles(UserError):
    """A file that the running process reads was changed under it: what is on disk is no longer what it began with."""

    exit_code = 1


class ArgumentError(UserError, ValueError):
    """An argument of the Python API is wrong."""


class NonFinite(Exception):
    """`term` was inf or NaN at `step`. Training stopped before the weights changed."""

    exit_code = 3

    def __init__(self, step: int, term: str, places: list[str], text: str = ""):
        self.step, self.term, self.places = step, term, places
        super().__init__(text or f"step {step}: {term} is not finite")

    def __reduce__(self):
        """To be pickled, as between processes."""
        return type(self), (self.step, self.term, self.places, str(self))


class Stopped(Exception):
    """A signal stopped the run. A checkpoint is saved; `--resume` continues from it."""

    exit_code = 75


@contextlib.contextmanager
def attribute_to_student(student: int):
    """Mark an exception raised in here with the index of the student that caused it: its attribute `student`."""
    try:
        yield
    except Exception as error:
        # Oddity: an attribute set on any exception, so that its type and its text stay those of where it was raised.
        error.student = student
        raise


@contextlib.contextmanager
def report_from_any_rank():
    """Let any rank print an exception raised in here, since it may happen on one rank alone (a damaged local file, say)."""
    try:
        yield
    except Exception as error:
        # Oddity: an attribute on any exception, as above.
        error.any_rank = True
        raise


def on_main_process(accelerator, action):
    """Run `action` on rank 0 and broadcast its result; a UserError is broadcast too and raised on every rank, so that no rank hangs."""
    found: list = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = action()
        except UserError as error:
            found[1] = error
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    if found[1]:
        raise found[1]
    return found[0]


_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}


def is_disk_full(error: BaseException) -> bool:
    """safetensors reports a full disk in its own exception, as text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def brief(error: BaseException) -> str:
    """A library's exception in one line: its type and the first line of its text, joined with the second if the first ends in a colon."""
    first, *more = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {f'{first} {more[0].strip()}' if first.endswith(':') and more else first}"[:320]


def is_out_of_memory(error: BaseException) -> bool:
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return "OutOfMemory" in type(error).__name__ or any(words in str(error) for words in said)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def exit_code(action, *, debug: bool = False) -> int:
    """Run `action()`; print an exception as one line per problem on stderr and return its exit code.

    0 done, 1 a bug, 2 a mistake the user can fix, 3 stopped at a non-finite value, 75 stopped by a signal.
    With several processes only rank 0 prints, except bugs, out of memory and exceptions marked by `report_from_any_rank`.
    """
    prints = first_process()
    try:
        action()
        return 0
    except (UserError, NonFinite, Stopped) as error:
        caught, text, code = error, str(error), error.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt as error:
        caught, text, code = error, "interrupted; --resume continues from the last checkpoint, if there is one", Stopped.exit_code
    except Exception as error:
        caught = error
        if is_disk_full(error):
            text, code = f"{_first_line(error)}; free some space, then --resume", UserError.exit_code
        elif isinstance(error, OSError) and error.errno in _REFUSED:
            text, code = f"{_first_line(error)}; choose a writable folder, then --resume", UserError.exit_code
        elif is_out_of_memory(error):
            text, code, prints = (
                f"out of memory ({_first_line(error)}); lower train.micro_batch_size, train.micro_batch_tokens or data.max_length, then --resume",
                UserError.exit_code,
                True,
            )
        else:
            text, code, prints = f"bug: {type(error).__name__}: {error} (--debug shows where)", 1, True
    lines = text.splitlines()
    prints = prints or getattr(caught, "any_rank", False)
    if debug:
        traceback.print_exception(caught)
    if prints:
        for line in lines:
            print(f"llmkd: {line}", file=sys.stderr)
    return code
