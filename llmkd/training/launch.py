"""Starts the Accelerator; checks that all processes of the launch joined, and that no other setting changes results."""

import contextlib
import ctypes
import os

from ..console import warn
from ..errors import UserError
from ..process import heartbeat, rank_messages
from .environment import check_environment
from .process_state import check_accelerator, check_process_state

_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start():
    """Start and return the Accelerator. UserError unless it has WORLD_SIZE processes, and for an environment that would change results."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    for name in _OF_MPI if "WORLD_SIZE" not in os.environ else ():
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name}: found {os.environ[name]} (mpirun or srun has set it), and Accelerate would wait for that many processes; start with "
                f"accelerate launch or torchrun, or unset it for one process"
            )
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; use accelerate launch --multi_gpu --num_processes N, also without a GPU"
        )
    if asked > 1 and os.environ.get("MASTER_PORT") == "0":  # torch would wait for ever
        raise UserError(
            "MASTER_PORT: found 0, expected the port on which processes meet; start with torchrun --standalone, or name a free port (--master_port)"
        )
    check_environment()
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    check_process_state()
    keep_freed_memory()
    if not torch.cuda.is_available() and "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch sets OMP_NUM_THREADS=1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    # llmkd's watch ends hanging processes itself and names them. torch's limit, which names none, is only for hangs that the watch misses.
    seconds = heartbeat.TIMEOUT + (heartbeat.PATIENT if rank_messages.watched else 0)
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))]
    once = GradientAccumulationPlugin(num_steps=1)  # Oddity: without it the environment's number takes precedence over an argument
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", gradient_accumulation_plugin=once, kwargs_handlers=handlers
        )
    except ValueError as error:
        raise UserError(f"Accelerate does not start: {error}") from error
    check_accelerator(accelerator)
    if accelerator.num_processes != asked:
        raise UserError(
            f"WORLD_SIZE: found {asked}, but {accelerator.num_processes} processes joined; start with accelerate launch --num_processes {asked} or torchrun"
        )
    if torch.cuda.is_available() and accelerator.device.type == "cpu":
        warn("note: ACCELERATE_USE_CPU (use_cpu in Accelerate's config file) is set, so this runs on the CPU although there is a GPU")
    return accelerator


def keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 1 GB of freed memory for the next micro-batch: returning it and getting it back, page by page, takes up to
    a tenth of a step on a CPU. The user's own malloc variables take precedence."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 256 << 20) or mallopt(mmap_threshold, 32 << 20)  # the most that older versions accept
        mallopt(trim_threshold, 1 << 30)
