"""Files are written whole or not at all, whatever ends the process, and a lock is held by one process at a time."""

import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llmkd import files
from llmkd.files import (
    FileLocked,
    is_leftover,
    lock_file,
    read_jsonl,
    remove_leftovers,
    sha256_file,
    try_to_make_in,
    write_atomic,
    write_folder,
)


def killed(action) -> None:
    """`action` in a forked child, which kills itself."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_, **__) -> None:
    raise OSError("no space left")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text: str, replace: bool = True) -> None:
    with write_folder(folder, replace) as part:
        (part / "below").mkdir()
        (part / "below/a.txt").write_text(text)


@pytest.mark.parametrize("content", ["é\n", b"\xff\x00"])
def test_a_file_is_written_and_replaced(tmp_path, content):
    for earlier in ("none", "another"):
        write_atomic(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == (content if isinstance(content, bytes) else content.encode()), earlier
        assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("point", ["sync", "os.replace"])
def test_a_kill_leaves_the_file_as_it_was_and_a_leftover_that_is_known_as_one(tmp_path, point):
    write_atomic(tmp_path / "a.json", "old")

    def write():
        place, name = (os, "replace") if point == "os.replace" else (files, point)
        setattr(place, name, kill)
        write_atomic(tmp_path / "a.json", "new")

    killed(write)
    leftover, kept = sorted(tmp_path.iterdir(), key=lambda path: path.name == "a.json")
    assert is_leftover(leftover) and not is_leftover(kept) and kept.read_text() == "old"
    remove_leftovers(tmp_path, "b.json")
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path, "*.json")
    assert names(tmp_path) == ["a.json"]


def test_a_sync_and_an_append_wait_for_the_disk(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: waited.append(os.fstat(descriptor).st_ino))
    (tmp_path / "a").write_text("x")
    for path in (tmp_path / "a", tmp_path):
        files.sync(path)
    files.append(tmp_path / "a", "y")
    files.append(tmp_path / "a", "z", sync=False)
    file, folder = (path.stat().st_ino for path in (tmp_path / "a", tmp_path))
    assert waited == [file, folder, file]


@pytest.mark.parametrize("point", ["sync", "os.replace"])
def test_an_error_leaves_the_file_as_it_was_and_no_leftover(tmp_path, monkeypatch, point):
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", fail) if point == "os.replace" else monkeypatch.setattr(files, point, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_full_disk_is_named_with_the_file_that_was_written(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.append(Path("/dev/full"), "x")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/a'"):
            write_atomic(tmp_path / "a", "x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, sync = [], files.sync
    monkeypatch.setattr(files, "sync", lambda path: (order.append(("sync", path.name.partition(".tmp-")[0])), sync(path)))
    for name in ("replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda a, b, real=real: (order.append(("rename", b.name)), real(a, b)))
    write_atomic(tmp_path / "a", "text")
    assert order == [("sync", "a"), ("rename", "a"), ("sync", tmp_path.name)]
    order.clear()
    fill(tmp_path / "f", "text")
    assert order[-2:] == [("rename", "f"), ("sync", tmp_path.name)]
    assert sorted(order[:-2]) == sorted([("sync", "f"), ("sync", "below"), ("sync", "a.txt")])


def test_a_folder_is_written_and_replaced(tmp_path):
    for text in ("one", "two"):
        fill(tmp_path / "f", text)
        assert (tmp_path / "f/below/a.txt").read_text() == text and names(tmp_path) == ["f"]


def test_what_another_process_is_writing_is_no_leftover(tmp_path, monkeypatch):
    """In the same folder, of the same name; for a file at the moment before it has its name."""
    seen, sync = [], files.sync

    def look(path):
        remove_leftovers(tmp_path)
        seen.append(path.exists())
        sync(path)

    with write_folder(tmp_path / "f") as part:
        remove_leftovers(tmp_path)
        assert part.is_dir()
    monkeypatch.setattr(files, "sync", look)
    write_atomic(tmp_path / "a", "text")
    assert seen == [True, True] and names(tmp_path) == ["a", "f"]


def test_a_link_by_the_name_of_a_leftover_goes_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "a.tmp-1-0123abcd").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["mine"]


def test_a_temporary_folder_goes_with_its_process_or_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))

    def use():
        with files.temporary_folder("adapter") as folder:
            (folder / "a").write_text("")
            kill()

    killed(use)
    assert len(names(tmp_path)) == 1
    with files.temporary_folder("adapter") as folder, files.temporary_folder("adapter") as second:
        assert names(tmp_path) == sorted([folder.name, second.name])
    assert names(tmp_path) == []


def test_a_folder_that_is_there_is_kept_unless_it_is_to_be_replaced(tmp_path):
    fill(tmp_path / "f", "mine")
    with pytest.raises(OSError):
        fill(tmp_path / "f", "other", replace=False)
    assert (tmp_path / "f/below/a.txt").read_text() == "mine" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("point", ["write", "sync", "rename", "remove"])
def test_a_kill_leaves_a_whole_folder_or_none(tmp_path, there, point):
    """At no point is the folder a part of one. Without an earlier folder nothing has its name before the rename, and nothing is removed."""
    if there:
        fill(tmp_path / "f", "old")

    def write():
        if point == "sync":
            files.sync = kill
        elif point == "rename":
            os.rename = kill
        elif point == "remove":
            files.shutil.rmtree = kill
        with write_folder(tmp_path / "f", replace=True) as part:
            (part / "below").mkdir()
            (part / "below/a.txt").write_text("new")
            if point == "write":
                kill()

    killed(write)
    found = (tmp_path / "f/below/a.txt").read_text() if (tmp_path / "f").exists() else None
    assert found == ("new" if point == "remove" else "old" if there else None)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == (["f"] if found else [])


@pytest.mark.parametrize("fails", ["block", "second rename"])
def test_an_error_leaves_the_folder_as_it_was(tmp_path, monkeypatch, fails):
    fill(tmp_path / "f", "old")
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(b)
        return fail() if len(calls) == 2 else real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no space"), write_folder(tmp_path / "f", replace=True) as part:
        (part / "b.txt").write_text("new")
        if fails == "block":
            fail()
    assert (tmp_path / "f/below/a.txt").read_text() == "old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("target", ["real", "nowhere"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, target):
    fill(tmp_path / "real", "kept")
    (tmp_path / "f").symlink_to(target)
    fill(tmp_path / "f", "new")
    assert names(tmp_path) == ["f", "real"] and (tmp_path / "f/below/a.txt").read_text() == "new"
    assert (tmp_path / "real/below/a.txt").read_text() == "kept"
    (tmp_path / "f.tmp-1-0123abcd").symlink_to("real")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["f", "real"]


@pytest.mark.parametrize("name", ["notes.tmp-old", "a.tmp-1", "a.tmp-1-0123abcd.jsonl", "a.tmp-1-0123ABCD"])
def test_files_of_others_are_no_leftovers(tmp_path, name):
    (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [name] and not is_leftover(tmp_path / name)


def test_two_unfinished_files_of_one_name_do_not_meet(tmp_path):
    """As of two containers that share a folder, in each of which the process has the same number."""
    with write_folder(tmp_path / "f", replace=True) as one, write_folder(tmp_path / "f", replace=True) as other:
        assert one != other


HOLDER = """
import sys, time
from llmkd.files import lock_file
with lock_file(sys.argv[1]) as held:
    held.write("process 7")
    held.flush()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_lock_is_refused_to_another_process_with_what_the_holder_wrote(tmp_path, holder):
    with pytest.raises(FileLocked, match="process 7"):
        lock_file(tmp_path / "lock")


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_lock_ends_with_its_process(tmp_path, holder, end):
    holder.kill() if end == "kill" else holder.stdin.close()
    holder.wait(10)
    lock_file(tmp_path / "lock").close()


def test_a_process_waits_for_a_lock(tmp_path, holder):
    code = "import sys; from llmkd.files import lock_file; lock_file(sys.argv[1], wait=True); print('mine')"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True) as waiter:
        time.sleep(0.5)
        assert waiter.poll() is None
        holder.stdin.close()
        assert waiter.communicate(timeout=20)[0] == "mine\n"


def test_where_a_lock_cannot_be_had_it_is_an_os_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "no/lock")
    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.raises(OSError, match="no space"):
        lock_file(tmp_path / "lock")


def test_a_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    long = b"0123456789" * 300_000
    (tmp_path / "a").write_bytes(long)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(long).hexdigest()


@pytest.mark.parametrize("last", [b"", b'{"n": 2', b'{"n": "\xc3', b"{"])
def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path, last):
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(2)) + last)
    assert read_jsonl(tmp_path / "a.jsonl") == [{"n": 0}, {"n": 1}]


def test_a_killed_trial_is_removed_by_the_next_even_if_that_is_at_work(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rmdir", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        try_to_make_in(tmp_path)
    (left,) = tmp_path.iterdir()
    assert is_leftover(left)
    try_to_make_in(tmp_path)
    assert not list(tmp_path.iterdir())
    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, *how: (real(path, *how), remove_leftovers(tmp_path)))
    try_to_make_in(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["file", "folder", "temporary"])
def test_what_was_taken_for_a_leftover_before_it_was_locked_is_begun_again(tmp_path, monkeypatch, write):
    """Another process lists the folder between the making of a file and its lock."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real, made = fcntl.flock, []

    def flock(descriptor, how):
        (part,) = [path for path in tmp_path.iterdir() if is_leftover(path)]
        made.append(part)
        if len(made) == 1:
            files.remove(part)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    if write == "temporary":
        monkeypatch.setattr(files, "remove_leftovers", lambda *which: None)
        with files.temporary_folder("test") as folder:
            assert folder.is_dir()
    else:
        (write_atomic if write == "file" else fill)(tmp_path / "f", "text")
        assert tmp_path.joinpath("f", *["below/a.txt"] * (write == "folder")).read_text() == "text"
    assert len(made) == 2 and made[0] != made[1] and names(tmp_path) == ["f"] * (write != "temporary")


def test_a_leftover_is_locked_while_it_is_removed(tmp_path, monkeypatch):
    """So that whoever made it just now waits, and sees that it is gone."""
    (tmp_path / "a.tmp-1-0123abcd").mkdir()

    def remove(path):
        with pytest.raises(BlockingIOError):
            fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.rmdir()

    monkeypatch.setattr(files, "remove", remove)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
