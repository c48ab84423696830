"""Memory gauges for a GPU and the CPU: the peak use since the gauge was made, and the memory that is free."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from ..errors import UserError


class GpuMemory:
    """GPU memory in bytes: `taken`, the peak use since this object was made, and `room`, 90 % of what was free then."""

    cautious = False  # running out only raises an exception

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
    """The machine's memory, likewise. `room` is half of the free memory, so that doubling a batch stays inside even if the need is quadratic."""

    cautious = True  # running out ends the process

    def __init__(self):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, and allocations from it would not be seen
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.before = self._status("VmRSS")
            free = next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        except (OSError, StopIteration):
            raise UserError(
                "train.micro_batch_tokens: found auto, but this system does not report how much memory is free; give a number"
            ) from None
        for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
            try:
                free = min(free, int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
            except (OSError, ValueError):  # no such file, or no limit ("max")
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
