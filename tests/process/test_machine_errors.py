"""What goes wrong with the machine is called so: exit code 1, one line, what to do. "bug" is said of bugs alone."""

import errno
import os
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llmkd.errors import UserError, exit_code
from llmkd.files import NotAFile
from llmkd.process import rank_messages
from llmkd.training.shutdown import end_on_signal

GLOO = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16422"
CASES = [
    (OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl"), "the disk is full", "free some space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "the disk is full", "quota"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full", "free"),
    (OSError(errno.EFBIG, "File too large"), "a file may not grow further", "ulimit -f"),
    (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "a file may not grow further", "ulimit -f"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "the file system is read-only", "remount"),
    (SafetensorError("I/O error: Read-only file system (os error 30)"), "the file system is read-only", "remount"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/metrics.jsonl"), "a file or folder is gone", "put it back"),
    (FileNotFoundError('No such file or directory: "/x/model.safetensors"'), "a file or folder is gone", "put it back"),
    (OSError(errno.ESTALE, "Stale file handle"), "a file or folder is gone", "put it back"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "a file or folder may not be used", "right"),
    (OSError(errno.EIO, "Input/output error", "/x"), "a disk or network drive fails", "dmesg"),
    (SafetensorError("I/O error: Input/output error (os error 5)"), "a disk or network drive fails", "dmesg"),
    (OSError(errno.EMFILE, "Too many open files"), "too many open files", "ulimit -n"),
    (RuntimeError("received 0 items of ancdata"), "too many open files", "ulimit -n"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more processes or threads", "ulimit -u"),
    (RuntimeError("can't start new thread"), "no more processes or threads", "ulimit -u"),
    (MemoryError(), "out of memory", "micro_batch_size"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory", "micro_batch_size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory", "micro"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory", "micro_batch_size"),
    (RuntimeError("CUDA error: out of memory"), "out of memory", "micro_batch_size"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory", "micro_batch_size"),
    (
        RuntimeError("unable to allocate shared memory(shm) for file </torch_12_3>: No space left on device"),
        "shared memory is full",
        "shm-size",
    ),
    (BrokenProcessPool("A process in the process pool was terminated abruptly"), "a child process has died", "dmesg"),
    (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."), "a child process has died", "dmesg"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "the GPU or its driver fails", "nvidia-smi"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "the network fails", "connection"),
    (OSError(errno.EBUSY, "Device or resource busy", "/x"), "the system refuses", "/x"),
    (OSError(errno.ENOTEMPTY, "Directory not empty", "m"), "a file or folder of that name is there by now", "choose another name"),
]


@pytest.mark.parametrize(("error", "name", "advice"), CASES, ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_an_error_of_the_machine_is_one_line_that_says_what_to_do(error, name, advice, capsys):
    def fail():
        raise error

    assert exit_code(fail, again="continue with --resume") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmkd: {name} (") and advice in line and line.endswith("continue with --resume") and "bug" not in line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shape"),
        KeyError("gone"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        AssertionError(),
        OSError("no tokenizer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_says_so_and_how_to_report_it(error, capsys):
    def fail():
        raise error

    assert exit_code(fail) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"llmkd: bug: {type(error).__name__}: ") and "--debug shows where; please report it" in line
    exit_code(fail, debug=True)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENAMETOOLONG, "File name too long", "x"),
        RuntimeError("Could not determine home directory."),
        NotAFile(errno.EINVAL, "it is a pipe", "x"),
    ],
)
def test_a_path_that_cannot_be_is_the_users_mistake(error, capsys):
    def fail():
        raise error

    assert exit_code(fail) == 2 and "bug" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (OSError(errno.EMFILE, "Too many open files"), 1),
        (MemoryError(), 1),
        (FileNotFoundError(2, "No such file"), 2),
        (ValueError("x"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_refusal_that_the_machine_caused_is_the_machines(cause, code, capsys):
    def fail():
        raise UserError("student.model: x cannot be loaded; check its files") from cause

    assert exit_code(fail) == code
    assert ("check its files" in capsys.readouterr().err) == (code == 2)


class Server:
    """A launcher's key-value server, in this process, by which no process has sent anything but its own records."""

    def __init__(self):
        self.counts = {}

    def set(self, key: str, value: str) -> None:
        pass

    def add(self, key: str, number: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + number
        return self.counts[key]


@pytest.fixture
def launch(monkeypatch):
    server = Server()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_messages, "connect", lambda: server)
    monkeypatch.setattr(rank_messages, "_SECONDS", 0.2)

    def ends(rank: str, error: Exception, capsys) -> str:
        monkeypatch.setenv("RANK", rank)

        def fail():
            raise error

        exit_code(fail)
        return capsys.readouterr().err

    return ends


def test_what_one_process_alone_meets_is_its_line_and_not_anothers_lost_connection(launch, capsys):
    assert launch("1", UserError("data.train.path: rows.jsonl:3: no column"), capsys) == "llmkd: data.train.path: rows.jsonl:3: no column\n"
    assert launch("0", RuntimeError(GLOO), capsys) == ""


def test_what_all_processes_meet_is_said_once(launch, capsys):
    assert "no such file" in launch("1", UserError("no such file"), capsys)
    assert launch("0", UserError("no such file"), capsys) == "" and "another" in launch("0", UserError("another"), capsys)


def test_a_process_that_dies_without_a_word_is_missed_once(launch, capsys):
    assert launch("0", RuntimeError(GLOO), capsys).startswith("llmkd: another process of this launch has died or cannot be reached (")
    assert launch("1", RuntimeError(GLOO.replace("closed", "reset")), capsys) == ""


def test_a_process_that_the_launcher_ends_meanwhile_still_says_that_another_was_lost(launch, capsys, monkeypatch):
    def signalled(seconds):
        raise KeyboardInterrupt("stopped by SIGTERM")

    monkeypatch.setattr(rank_messages.time, "sleep", signalled)
    assert launch("0", RuntimeError(GLOO), capsys).startswith("llmkd: another process of this launch has died or cannot be reached (")


def test_the_line_names_the_process_once_they_have_met(launch, capsys, monkeypatch):
    met = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 4)
    monkeypatch.setitem(sys.modules, "torch.distributed", met)
    assert launch("1", MemoryError("x"), capsys).endswith("llmkd: this was in process 1 (of 0 to 3)\n")


def test_the_launcher_has_the_error_for_its_report(launch, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    launch("1", UserError("data.train.path: rows.jsonl:3: no column"), capsys)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))  # torchrun's own reading
    assert "data.train.path: rows.jsonl:3: no column" in str(ChildFailedError("llmkd", {1: failure})) and failure.timestamp > 0


def test_a_process_that_waits_for_one_that_has_failed_ends_by_itself(launch, capsys, monkeypatch):
    """One that was started anew does not end for a failure before."""
    ended, codes = threading.Event(), set()
    monkeypatch.setattr(rank_messages, "_LOOKS", 0.01)
    monkeypatch.setattr(rank_messages, "_PATIENCE", 0.05)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rank_messages.os, "_exit", lambda code: (codes.add(code), ended.set()))
    with rank_messages.ending_with_others():
        assert not ended.wait(0.2)
        launch("1", UserError("x"), capsys)
        assert ended.wait(5) and codes == {1}
    ended.clear()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with rank_messages.ending_with_others():
        assert not ended.wait(0.2)


def test_without_a_server_every_process_says_what_it_met(launch, capsys, monkeypatch):
    monkeypatch.setattr(rank_messages, "connect", lambda: 1 / 0)
    assert "x" in launch("0", UserError("x"), capsys) and "x" in launch("1", UserError("x"), capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_a_command_with_a_message(number, capsys):
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        with end_on_signal("start it again"):
            assert exit_code(lambda: (os.kill(os.getpid(), number), time.sleep(5))) == 75
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"llmkd: stopped by {number.name}; nothing half-written is left; start it again\n"
