"""The exceptions that end a run, their exit codes, and which rank reports them."""

import contextlib
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .console import first_process, printable
from .process import rank_messages
from .process.machine_errors import MachineError, machine_error

T = TypeVar("T")

#: Where an error's text has these words, the step of the last checkpoint is inserted after them.
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
    """The advice for a file that cannot be read: to grant read permission where that is all that is missing, else `otherwise`."""
    return "give this user the right to read it" if isinstance(error, PermissionError) else otherwise


class ChangedFiles(UserError):
    """A file that the process reads has changed on disk since the process started."""

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
        """For pickle, which passes it between processes."""
        return type(self), (self.step, self.term, self.places, str(self))


class Stopped(Exception):
    """A signal stopped the run. A checkpoint is saved; `--resume` continues from it."""

    exit_code = 75


@contextlib.contextmanager
def resumable(stage: str) -> Iterator[None]:
    """Says how a pipeline or sweep goes on that was stopped in a stage whose own command would go on without `--resume`."""
    try:
        yield
    except Stopped:
        raise Stopped(f"stopped by a signal in stage {stage}; what it has written is kept; continue with --resume") from None


@contextlib.contextmanager
def attribute_to_student(student: int):
    """Give an exception raised in the block the index of the student that caused it, as its attribute `student`."""
    try:
        yield
    except Exception as error:
        # Oddity: an attribute on an exception of any class. A wrapper would change its type and its text.
        error.student = student
        raise


def for_each_student(recipes: Iterable[T], check: Callable[[T], object]) -> None:
    """Call `check` with every student's recipe, each inside `attribute_to_student`."""
    for k, recipe in enumerate(recipes):
        with attribute_to_student(k):
            check(recipe)


@contextlib.contextmanager
def report_from_any_rank():
    """Let whichever rank raises NonFinite or Stopped in the block print it.

    Elsewhere all ranks raise these together and rank 0 prints them; in here they may occur on one rank only.
    """
    try:
        yield
    except Exception as error:
        # Oddity: an attribute on any exception, as above.
        error.any_rank = True
        raise


@contextlib.contextmanager
def name_last_checkpoint(step: Callable[[], int]):
    """Give an exception raised in the block the step of the last checkpoint, as its attribute `saved`, which `exit_code` prints.

    NonFinite, Stopped and ChangedFiles are left as they are: their texts already say how to continue.

    step   returns the step of the last checkpoint, 0 before the first
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
    """Run `action` on rank 0 and return its result on every rank. A UserError is raised on every rank, so that none of them hangs."""
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
    """A library's exception in one line, at most 320 characters: its type and the first line of its text, and the second line too where
    the first ends in a colon."""
    first, *more = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {f'{first} {more[0].strip()}' if first.endswith(':') and more else first}"[:320]


def exit_code(action, *, debug: bool = False, again: str = "start it again") -> int:
    """Run `action()`; print an exception as one line per problem on stderr and return its exit code.

    0 done, 1 an error of the machine or a bug, 2 a mistake the user can fix, 3 stopped at a non-finite value, 75 stopped by a signal.

    debug   print the traceback too
    again   how to continue after an error of the machine, such as "start it again"

    With several processes, an error that several of them raised is printed by one; see `process/rank_messages.py`.
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
    text, code = _text_and_code(caught, again)
    if (saved := getattr(caught, "saved", None)) is not None:
        text = _with_last_checkpoint(text, saved)
    rank_messages.tell_launcher(text)
    on_all_ranks = isinstance(caught, NonFinite | Stopped | KeyboardInterrupt) and not getattr(caught, "any_rank", False)
    prints = first_process() if on_all_ranks else rank_messages.is_first_to_say(text, caught)
    lines = text.splitlines() if prints else []
    if lines and not on_all_ranks and not getattr(caught, "every_rank", False) and (which := rank_messages.which_process()):
        lines.append(f"this was in {which}")
    for line in lines:
        print(f"llmkd: {printable(line)}", file=sys.stderr)
    return code


def _with_last_checkpoint(text: str, step: int) -> str:
    """An error's text with the step from which --resume continues. `step`: of the last checkpoint, 0 before the first."""
    if _RESUME in text:
        return text.replace(_RESUME, f"{_RESUME} ({f'after step {step}' if step else 'from step 1: no checkpoint was written yet'})", 1)
    return text + (f"\n--resume goes on after step {step}" if step else "\nno checkpoint was written yet; --resume begins at step 1")


def of_the_machine(error: BaseException) -> MachineError | None:
    """The failure of the machine that caused an exception; None where a mistake of the user's or a bug did."""
    if isinstance(error, NonFinite | Stopped):
        return None
    failed = machine_error(error.__cause__ if isinstance(error, UserError) else error)
    return failed if failed and (failed.certain or not isinstance(error, UserError)) else None


def _text_and_code(error: BaseException, again: str) -> tuple[str, int]:
    """The text to print for an exception, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or f"interrupted; {again}", Stopped.exit_code
    if failed := of_the_machine(error):
        cause = error.__cause__ if isinstance(error, UserError) else error
        return f"{failed.name} ({brief(cause)}); {failed.advice}, then {again}", failed.exit_code
    if isinstance(error, UserError | NonFinite | Stopped):
        return str(error), error.exit_code
    return f"bug: {type(error).__name__}: {error} (--debug shows where; please report it with what that prints)", 1
