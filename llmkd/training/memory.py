"""Memory gauges: the peak that was used since a moment, and the bytes that are free, on a GPU or the CPU."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from ..errors import UserError


class GpuMemory:
    """GPU memory in bytes: `taken`, the peak since this object was made, and `room`, 90 % of what was free then."""

    cautious = False  # running out of it only raises an exception

    def __init__(self, device):
        self.device = device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)
        self.room = 0.9 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - self.before)

    @property
    def taken(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class CpuMemory:
    """The machine's memory, likewise. `room` is half of what was free: then doubling stays inside it even where the need is quadratic."""

    cautious = True  # running out of it ends the process

    def __init__(self):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, and allocations from it would not be seen
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.before = self._status("VmRSS")
            free = next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        except (OSError, StopIteration):
            raise UserError(
                "train.micro_batch_tokens: found auto, and this system does not say how much memory is free; give a number"
            ) from None
        for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
            try:
                free = min(free, int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
            except (OSError, ValueError):  # there is none, or it says "max"
                continue
        self.room = 0.5 * free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @staticmethod
    def _status(name: str) -> int:
        return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

    @property
    def taken(self) -> int:
        return max(0, self._status("VmHWM") - self.before)


def memory_gauge(device: torch.device) -> GpuMemory | CpuMemory:
    return GpuMemory(device) if device.type == "cuda" else CpuMemory()
