"""The devices that this machine may have, as far as files and environment variables show it. No torch."""

import difflib
import importlib.util
import os
import re
import sys
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU of the machine
_KINDS = ("cpu", "cuda", "mps", "xpu")


def why_missing(name: str) -> str | None:
    """Why this machine has no device of that name (cpu, cuda:1, ...); None if it may have one: then only torch can tell."""
    if not (found := re.fullmatch(r"([a-z_]+)(?::(\d+))?", name)):
        return "is not the name of a device"
    kind, number = found[1], int(found[2] or 0)
    if kind == "meta":
        return "holds no weights"
    if kind == "mps" and sys.platform != "darwin":
        return "is Apple's"
    if kind == "cuda":
        return _without_gpu(number)
    if kind == "gpu" or kind not in _KINDS and difflib.get_close_matches(kind, _KINDS, 1, 0.7):
        near = "cuda" if kind == "gpu" else difflib.get_close_matches(kind, _KINDS, 1, 0.7)[0]
        return f"is not the name of a device (did you mean {near}?)"
    return None


def _without_gpu(number: int) -> str | None:
    if _torch_is_built_for_cpus():
        return "needs a GPU, but the installed torch was built for CPUs only"
    counts = [len(list(_DRIVER.iterdir()))] if _DRIVER.is_dir() else []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        counts.append(0 if shown.strip() in ("", "-1", "NoDevFiles") else len(shown.split(",")))
    if not counts or number < min(counts):
        return None
    hides = " (see CUDA_VISIBLE_DEVICES)" if shown is not None else ""
    if not min(counts):
        return f"needs a GPU, but this process sees none{hides}"
    return f"is one GPU too many: this process sees {min(counts)}{hides}"


def _torch_is_built_for_cpus() -> bool:
    """Whether torch's record of its own build says so; False if that cannot be read."""
    try:
        folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
        record = (folder / "version.py").read_text(encoding="utf-8")
    except (OSError, AttributeError, TypeError, IndexError, ValueError):
        return False
    built_for = dict(re.findall(r"^(cuda|hip)(?:: *Optional\[str\])? *= *(.+)$", record, re.MULTILINE))
    return built_for.get("cuda", "").strip() == "None" and built_for.get("hip", "None").strip() == "None"
