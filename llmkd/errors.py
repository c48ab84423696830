"""The exceptions that end a run, their exit codes, and which rank reports them."""

import contextlib
import select
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

from .console import first_process, printable
from .process import rank_messages
from .process.machine_errors import MachineError, machine_error

T = TypeVar("T")

#: In the texts of errors the words after which the step belongs.
_RESUME = "continue with --resume"


class UserError(Exception):
    """A mistake the user can fix. Each problem is one line: the setting or file:line, what was found, what to do."""

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = tuple("\\n".join(problem.splitlines()) for problem in problems)  # a name that is quoted may have line breaks
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def fix_of(error: BaseException, otherwise: str) -> str:
    """What to do about a file that cannot be read: `otherwise`, such as to make it again, unless only the right to read it is missing."""
    return "give this user the right to read it" if isinstance(error, PermissionError) else otherwise


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


def for_each_student(recipes: Iterable[T], check: Callable[[T], object]) -> None:
    """Call `check` with every student's recipe; what it raises is marked with the student's index, as by `attribute_to_student`."""
    for k, recipe in enumerate(recipes):
        with attribute_to_student(k):
            check(recipe)


@contextlib.contextmanager
def report_from_any_rank():
    """Let any rank print a NonFinite or Stopped raised in here, by which else all ranks end: it may happen on one rank alone."""
    try:
        yield
    except Exception as error:
        # Oddity: an attribute on any exception, as above.
        error.any_rank = True
        raise


@contextlib.contextmanager
def name_last_checkpoint(step: Callable[[], int]):
    """Give an exception raised in here the step of the last checkpoint: its attribute `saved`, which `exit_code` prints.

    The texts of NonFinite, Stopped and ChangedFiles say themselves how the run goes on: these stay as they are.

    step   of the last checkpoint when it is called; 0 before the first
    """
    try:
        yield
    except (NonFinite, Stopped, ChangedFiles):
        raise
    except Exception as error:
        # Oddity: an attribute on any exception, as above.
        error.saved = step()
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
        # Oddity: an attribute on any exception, as above.
        found[1].every_rank = True
        raise found[1]
    return found[0]


def _nobody_reads() -> bool:
    """Whether the reader of this process's stdout or stderr, a pipe, has closed it."""
    poll = select.poll()
    poll.register(1, 0)
    poll.register(2, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def brief(error: BaseException) -> str:
    """A library's exception in one line: its type and the first line of its text, joined with the second if the first ends in a colon."""
    first, *more = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {f'{first} {more[0].strip()}' if first.endswith(':') and more else first}"[:320]


def exit_code(action, *, debug: bool = False, again: str = "start it again") -> int:
    """Run `action()`; print an exception as one line per problem on stderr and return its exit code.

    0 done, 1 an error of the machine or a bug, 2 a mistake the user can fix, 3 stopped at a non-finite value, 75 stopped by a signal.
    `again`: how the command goes on after an error of the machine.

    With several processes one of them prints what all or some of them met; see `process/rank_messages.py`.
    """
    try:
        action()
        return 0
    except BrokenPipeError as error:
        if _nobody_reads():  # `| head` has seen enough
            sys.stdout = None
            return 0
        caught = error
    except (Exception, KeyboardInterrupt) as error:
        caught = error
    if debug:
        traceback.print_exception(caught)
    text, code = _in_words(caught, again)
    if (saved := getattr(caught, "saved", None)) is not None:
        text = _with_last_checkpoint(text, saved)
    rank_messages.tell_launcher(text)
    alike = isinstance(caught, NonFinite | Stopped | KeyboardInterrupt) and not getattr(caught, "any_rank", False)
    lines = text.splitlines() if (first_process() if alike else rank_messages.is_first_to_say(text, caught)) else []
    if lines and not alike and not getattr(caught, "every_rank", False) and (which := rank_messages.which_process()):
        lines.append(f"this was in {which}")
    for line in lines:
        print(f"llmkd: {printable(line)}", file=sys.stderr)
    return code


def _with_last_checkpoint(text: str, step: int) -> str:
    """The text of an error with the step after which --resume goes on. `step`: of the last checkpoint; 0 before the first."""
    if _RESUME in text:
        return text.replace(_RESUME, f"{_RESUME} ({f'after step {step}' if step else 'from step 1: no checkpoint was written yet'})", 1)
    return text + (f"\n--resume goes on after step {step}" if step else "\nno checkpoint was written yet; --resume begins at step 1")


def of_the_machine(error: BaseException) -> MachineError | None:
    """What of the machine failed where that, and no mistake of the user's, is the cause of an exception."""
    if isinstance(error, NonFinite | Stopped):
        return None
    failed = machine_error(error.__cause__ if isinstance(error, UserError) else error)
    return failed if failed and (failed.certain or not isinstance(error, UserError)) else None


def _in_words(error: BaseException, again: str) -> tuple[str, int]:
    """The text that is printed for an exception, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or f"interrupted; {again}", Stopped.exit_code
    if failed := of_the_machine(error):
        cause = error.__cause__ if isinstance(error, UserError) else error
        return f"{failed.name} ({brief(cause)}); {failed.advice}, then {again}", failed.exit_code
    if isinstance(error, UserError | NonFinite | Stopped):
        return str(error), error.exit_code
    return f"bug: {type(error).__name__}: {error} (--debug shows where; please report it with what that prints)", 1
