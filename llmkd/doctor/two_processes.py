"""A step on two processes that exchange gradients over gloo, as two ranks of a run on CPUs do. They are forked, so that nothing is loaded again."""

import contextlib
import dataclasses
import datetime
import os
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .setup import Setup

SECONDS = 60  # for both processes


@dataclass(frozen=True)
class Rank:
    """One process of several: the part of an accelerator that the training loop uses."""

    device: torch.device
    process_index: int
    num_processes: int

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self, module: nn.Module):
        return module.no_sync() if hasattr(module, "no_sync") else contextlib.nullcontext()


def can_fork() -> bool:
    """Whether processes can be forked here: not with a GPU, which a forked process cannot use."""
    return hasattr(os, "fork") and torch.distributed.is_available() and not torch.cuda.is_available()


def exchanged_gradients(setup: Setup, dealt: list[list[list[int]]], step) -> dict[str, Tensor]:
    """The gradient that the first of two processes has at the end of a step: {parameter: gradient}.

    dealt  the examples of each micro-batch of each rank
    step   (setup, micro-batches, accelerator, state) -> gradients

    RuntimeError with the error of a process; TimeoutError if they do not end.
    """
    for name in ("gradients", "error", "meeting"):
        (setup.folder / name).unlink(missing_ok=True)
    with _forked([lambda rank=rank: run_rank(setup, rank, dealt[rank], step) for rank in range(2)]) as children:
        until = time.monotonic() + SECONDS
        while children and time.monotonic() < until:
            for child in [child for child in children if os.waitpid(child, os.WNOHANG)[0]]:
                children.remove(child)
            time.sleep(0.02)
        if (setup.folder / "error").exists():
            raise RuntimeError((setup.folder / "error").read_text())
        if children:
            raise TimeoutError(f"two processes did not end within {SECONDS} s")
    return torch.load(setup.folder / "gradients", weights_only=True)


def run_rank(setup: Setup, rank: int, micro_batches: list[list[int]], step) -> None:
    try:
        torch.set_num_threads(1)  # the parent's other threads are not in this process
        where, limit = f"file://{setup.folder}/meeting", datetime.timedelta(seconds=SECONDS)
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=limit)
        idle = bool(setup.student.capabilities.parameters_without_gradient)
        with warnings.catch_warnings(action="ignore"):  # the name of the first option is a new one in torch 2.13; as in training/launch.py
            module = nn.parallel.DistributedDataParallel(setup.distiller, broadcast_buffers=False, find_unused_parameters=idle)
        state = dataclasses.replace(setup.state, distiller=module)
        found = step(setup, [setup.batch(one, weighted=True) for one in micro_batches], Rank(setup.device, rank, 2), state)
        if rank == 0:
            torch.save(found, setup.folder / "gradients")
        torch.distributed.barrier()
    except Exception:
        (setup.folder / "error").write_text(traceback.format_exc().splitlines()[-1])


@contextlib.contextmanager
def _forked(jobs: list) -> Iterator[list[int]]:
    """A forked process for each job. Those that are still in the list at the end are killed."""
    children: list[int] = []
    try:
        for job in jobs:
            with warnings.catch_warnings(action="ignore"):
                child = os.fork()
            if not child:
                try:
                    job()
                finally:
                    os._exit(0)  # without closing or flushing anything of the parent
            children.append(child)
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
