"""Checks before a model is loaded: a recipe's numbers against the length of the run, and the packages that it needs. No torch."""

import importlib.util
from collections.abc import Sequence

from ..config.recipe import MICRO_BATCH_SIZE, Loss, Optim, Student, Teacher, Train, schedules
from ..config.schedule import refuse_long_schedule
from ..console import warn
from ..errors import UserError


def refuse_long_warmup(optim: Optim, total_steps: int) -> None:
    """UserError for a warm-up with more steps than the run."""
    if optim.warmup_steps and optim.warmup_steps > total_steps:
        raise UserError(
            f"optim.warmup_steps: found {optim.warmup_steps}, but the whole run has {total_steps} steps; lower it, or use optim.warmup_ratio"
        )


def refuse_long_schedules(loss: Loss, optim: Optim, total_steps: int) -> None:
    """UserError for a warm-up, or a schedule of the loss, that is longer than the run."""
    refuse_long_warmup(optim, total_steps)
    for name, setting in schedules(loss).items():
        refuse_long_schedule(f"loss.{name}", setting, total_steps)


def report_large_micro_batch(train: Train) -> None:
    """Print a note if the requested micro-batches are larger than the whole step."""
    if (size := train.micro_batch_size) and size > train.batch_size and size != MICRO_BATCH_SIZE:
        warn(
            f"note: train.micro_batch_size: found {size}, but a step has {train.batch_size} examples (train.batch_size), so no micro-batch has more; "
            "raise batch_size, or lower micro_batch_size"
        )


def check_packages(student: Student, optim: Optim, teachers: Sequence[tuple[str, Teacher]]) -> None:
    """UserError if a package that the settings need is not installed."""
    flash = [setting for setting, one in (("student", student), *teachers) if one.attention == "flash_attention_2"]
    if flash and importlib.util.find_spec("flash_attn") is None:
        raise UserError(*(f"{one}.attention: found flash_attention_2, but flash-attn is not installed; use sdpa" for one in flash))
    wanted = {"student.quantization": student.quantization, "optim.name": optim.name != "adamw"}
    wanted |= {f"{setting}.quantization": teacher.loaded_in for setting, teacher in teachers}
    lacking = [setting for setting, value in wanted.items() if value and importlib.util.find_spec("bitsandbytes") is None]
    if lacking:
        raise UserError(
            *(f"{setting}: needs bitsandbytes, which is not installed; pip install 'llmkd[quantization]'" for setting in lacking)
        )
