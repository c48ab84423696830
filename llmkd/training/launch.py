"""Starts the Accelerator, and checks that as many processes joined as the launcher announced."""

import os

from ..errors import UserError


def start():
    """The Accelerator. UserError unless it has WORLD_SIZE processes."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; use accelerate launch --multi_gpu --num_processes N, also without a GPU"
        )
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not torch.cuda.is_available() and "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch sets OMP_NUM_THREADS=1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timedelta(minutes=10))]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were requested, but {accelerator.num_processes} joined; start with accelerate launch --num_processes {asked} or torchrun"
        )
    return accelerator
