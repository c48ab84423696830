"""A run whose launcher ends: it stops with a checkpoint instead of training on as an orphan."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from llmkd.training import launcher, shutdown
from tests.conftest import plain_recipe, write_rows

REPO = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def started(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    watchdog = threading.Timer(180, lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))  # or it would hang
    watchdog.daemon = True
    watchdog.start()
    return process


def test_without_a_launcher_nothing_is_watched(monkeypatch):
    monkeypatch.setattr(launcher, "launchers", {})
    for mark in launcher._MARKS:
        monkeypatch.delenv(mark, raising=False)
    assert launcher.launcher_pid() is None
    launcher.launchers.clear()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # inherited from somewhere: this process's parent is no launcher
    if sys.platform == "linux" and b"accelerate" not in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
        assert launcher.launcher_pid() is None


PARENT = """
    import subprocess, sys, time  # accelerate
    subprocess.Popen([sys.executable, "-c", sys.argv[1]])
    time.sleep(1)
"""
CHILD = """
    import os, threading, time
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    from llmkd.training.launcher import launcher_pid, watch_launcher
    gone = threading.Event()
    with watch_launcher(gone.set):
        print("watching", launcher_pid() == os.getppid(), gone.is_set(), flush=True)
        print("told", gone.wait(20), flush=True)
"""


def test_a_second_signal_ends_at_once(monkeypatch):
    ended, before = [], signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(shutdown.os, "_exit", ended.append)
    with shutdown.ShutdownRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop() and not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [75]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with shutdown.ShutdownRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


WAITING = """
    import os, subprocess, sys, time  # accelerate
    subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.05)
"""
EARLY = """
    import os, sys, time
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    from llmkd.cli import main
    first = os.getppid()
    main(["--version"])
    open(sys.argv[1], "w").close()
    while os.getppid() == first:
        time.sleep(0.05)
    from llmkd.training.shutdown import ShutdownRequest
    with ShutdownRequest() as stop:
        deadline = time.monotonic() + 10
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.05)
        print("asked", stop(), flush=True)
"""


def test_a_launcher_that_ended_before_the_run_watched_it_stops_the_run(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WAITING), textwrap.dedent(EARLY), str(tmp_path / "begun")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-2:] == ["asked", "True"], done.stderr


def test_the_end_of_a_parent_is_told_once():
    command = [sys.executable, "-c", textwrap.dedent(PARENT), textwrap.dedent(CHILD)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["watching", "True", "False", "told", "True"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch, number",
    [
        (LAUNCH, signal.SIGHUP),  # it ends accelerate launch, which tells nobody, as SIGTERM and SIGKILL do, and torchrun at SIGUSR1
        ([*LAUNCH, "--multi_gpu", "--num_processes=2", "--main_process_port=0"], signal.SIGTERM),  # torchrun passes it on
    ],
    ids=lambda value: getattr(value, "name", f"{len(value) - 3} options" if isinstance(value, list) else None),
)
def test_a_signal_to_the_launcher_reaches_the_run(world, tmp_path, launch, number):
    """Whoever reads the run's output sees it end, all processes of it; the same command with --resume goes on."""
    write_rows(tmp_path / "rows.jsonl", 200)
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    command = [
        *launch,
        str(REPO / "llmkd/train.py"),
        "--config",
        str(tmp_path / "r.yaml"),
        "--data.train.path",
        str(tmp_path / "rows.jsonl"),
    ]
    process = started([*command, "--train.epochs", "400"])
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(number)
            sent = time.monotonic()
            break
    rest = process.stderr.read()  # until the last process that holds the other end is gone
    process.wait()
    assert (
        time.monotonic() - sent < 60
        and "continue with --resume" in rest
        and "Traceback (most recent call last)" not in rest.split("continue with")[0]
    )
    (saved,) = (tmp_path / "out/checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) < 10_000 and not (tmp_path / "out/summary.json").exists()
