"""Processes that decode and augment clips: the same samples as here, in the jobs' order, and errors in words."""

import hashlib
import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llmkd.data.audio.augment import SoundAugmentation
from llmkd.data.audio.way import SoundWay
from llmkd.data.media.worker import Job, Reader
from llmkd.data.media.workers import MediaWorkers
from llmkd.errors import ChangedFiles, UserError

soundfile = pytest.importorskip("soundfile")
audiomentations = pytest.importorskip("audiomentations")


def job_of(n: int, draw: tuple[int, int] | None = None) -> Job:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(n).normal(0, 0.1, 500 + n), 8_000, format="WAV")
    return Job(out.getvalue(), hashlib.sha256(out.getvalue()).hexdigest(), f"f.jsonl:{n + 1}", draw)


@pytest.fixture(scope="module")
def plain():
    workers = MediaWorkers(SoundWay(8_000), 2)
    yield workers
    workers.close()


def test_clips_come_in_the_order_of_their_jobs(plain):
    jobs, here = [job_of(n) for n in range(7)], Reader(SoundWay(8_000))
    for some in (jobs, jobs[:1], jobs[::-1]):
        assert all(np.array_equal(clip, here(job)) for clip, job in zip(plain(some), some, strict=True))


def test_two_threads_may_ask_at_the_same_time(plain):
    """As validation does while the next training batch is made."""
    jobs, here = [job_of(n) for n in range(8)], Reader(SoundWay(8_000))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(plain, [jobs[i : i + 3] for i in (0, 2, 4, 5)] * 5))
    for i, clips in zip((0, 2, 4, 5) * 5, found, strict=True):
        assert all(np.array_equal(clip, here(job)) for clip, job in zip(clips, jobs[i : i + 3], strict=True))


@pytest.mark.parametrize(
    ("job", "kind", "says"),
    [
        (Job(b"no", "", "f.jsonl:9"), UserError, "f.jsonl:9: not a sound file"),
        (Job(job_of(1).file, "another", "f.jsonl:9"), ChangedFiles, "f.jsonl:9: the file was changed while the run reads it"),
    ],
)
def test_a_clip_that_is_refused_is_so_here_and_the_next_is_read(plain, job, kind, says):
    with pytest.raises(kind, match=says):
        plain([job_of(0), job_of(1), job])
    assert len(plain([job_of(2)])[0]) == 502


def test_a_process_that_is_killed_is_an_error_and_no_wait(plain):
    plain([job_of(0)])
    os.kill(plain._processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the process that decodes files ended .* f.jsonl:1"):
        plain([job_of(0), job_of(1)])
    assert len(plain([job_of(3)])[0]) == 503


def test_augmentation_is_the_same_in_another_process():
    asked = ({"PitchShift": {"p": 0.8}}, {"AddGaussianSNR": {"p": 0.8}})
    way, jobs = SoundWay(8_000, asked, "data.augment.audio"), [job_of(n, draw) for draw in ((0, 0), (0, 1), None) for n in (0, 1)]
    workers, augmentation = MediaWorkers(way, 1), SoundAugmentation(asked, 8_000, "a")
    try:
        clips = workers(jobs[::-1])[::-1]
    finally:
        workers.close()
    clean = [soundfile.read(io.BytesIO(job.file), dtype="float32")[0] for job in jobs]
    wanted = [x if job.draw is None else augmentation(x, *job.draw, job.content_hash) for x, job in zip(clean, jobs, strict=True)]
    assert all(np.array_equal(clip, one) for clip, one in zip(clips, wanted, strict=True))
    assert not np.array_equal(wanted[0], wanted[2]) and not np.array_equal(wanted[0], clean[0])
