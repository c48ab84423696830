"""Checkpoints: written whole or not at all, verified before they are used, bit for bit what was saved.

A checkpoint is `step-N/` with the trainable weights and the optimizer's state in safetensors, `state.json`, and
`manifest.json` with the size and SHA-256 of each, written last. It is built under another name and renamed when all
of it is on the disk; the previous one is deleted only after that. The frozen base is never in it. The order of the
data, the learning rate and the dropout masks are functions of the step number, so nothing else has to be saved.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import remove_leftovers, sha256_file, write_folder

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int
    state: dict


def save(
    folder: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict,
) -> Path:
    """Write `folder/step-N`."""
    from safetensors.torch import save_file

    weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    moments = {f"{name}/{key}": _plain(value) for name, p in parameters.items() for key, value in optimizer.state.get(p, {}).items()}
    _need_room(folder, sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values())))
    remove_leftovers(folder)
    with write_folder(folder / f"step-{step}", replace=True) as part:
        save_file(weights, part / "student.safetensors")
        save_file(moments, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(part.iterdir())}
        (part / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    return folder / f"step-{step}"


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Drop all checkpoints but the newest `keep` and the step `best`."""
    for _, old in sorted(_steps(folder))[:-keep]:
        if old != folder / f"step-{best}":
            shutil.rmtree(old, ignore_errors=True)


def newest(folders: list[Path], info: Callable[[str], None] = print) -> list[Saved]:
    """The newest checkpoint that is whole, at a step that all the folders have; those passed over are named. Empty if there is none."""
    passed, common = [], set.intersection(*({step for step, _ in _steps(folder)} for folder in folders))
    for step in sorted(common, reverse=True):
        paths = [folder / f"step-{step}" for folder in folders]
        damages = [f"{path} ({damage})" for path in paths if (damage := damaged(path))]
        if not damages:
            for p in passed:
                info(f"skipping the damaged checkpoint {p}")
            return [Saved(path, step, json.loads((path / "state.json").read_text())) for path in paths]
        passed += damages
    if passed:
        where = folders[0] if len(folders) == 1 else folders[0].parent.parent
        raise UserError(
            *(f"the checkpoint {p}" for p in passed), f"no undamaged checkpoint is left in {where}; start again in another output_dir"
        )
    return []


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after the one that the run resumes from: they will be written again."""
    for number, path in _steps(folder):
        if number > step:
            shutil.rmtree(path, ignore_errors=True)


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest.json is missing or unreadable"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if sha256_file(file) != expected["sha256"]:
            return f"{name} does not match its hash"
    return None


def load(saved: Saved, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put weights, and the optimizer's state, back in place."""
    from safetensors.torch import load_file

    weights = load_file(saved.path / "student.safetensors")
    if weights.keys() != parameters.keys() or any(
        weights[n].shape != p.shape or weights[n].dtype != p.dtype for n, p in parameters.items()
    ):
        raise UserError(f"{saved.path} holds other weights than this recipe trains; resume with the recipe that wrote it")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    if optimizer is not None:
        state: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(saved.path / "optimizer.safetensors").items():
            parameter, _, key = name.rpartition("/")
            state.setdefault(parameter, {})[key] = value
        for name, p in parameters.items():
            if name in state:
                optimizer.state[p] = {
                    key: value.item() if value.dtype == torch.int64 else value.to(p.device) for key, value in state[name].items()
                }


def _plain(value: Tensor | int) -> Tensor:
    """As safetensors takes it. bitsandbytes counts its steps in an int, and all parameters share its table of 8-bit values."""
    if isinstance(value, int):
        return torch.tensor(value)
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    return [(int(m[1]), p) for p in folder.glob("step-*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]


def _need_room(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.2 * size:
        raise UserError(
            f"output_dir: {free >> 20} MB free at {folder}, {int(1.2 * size) >> 20} MB needed for a checkpoint; make room, then --resume"
        )
