"""Checkpoints: written whole or not at all, verified before use, and restored bit for bit.

A checkpoint is a folder `step-N/`: the trainable weights and the optimizer's state in safetensors, `state.json`, `state.npz` if the state
has arrays, and `manifest.json`, which is written last and names the step, the run, and the size and SHA-256 of each file. The folder is
written under another name and renamed once all of it is on the disk; the previous one is deleted only after that. The frozen base is never
in it. The order of the data, the learning rate and the dropout masks are functions of the step number, so nothing else has to be saved.
"""

import errno
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, attribute_to_student
from ..files import Damaged, read_object, read_sealed, remove, remove_leftovers, sha256_file, write_folder, write_sealed
from ..models.parts import sharded_like
from ..process.machine_errors import machine_error

_STEP = re.compile(r"step-(\d+)")
WEIGHTS, MOMENTS, STATE, MANIFEST = "student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
ARRAYS = "state.npz"


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int
    state: dict


@dataclass(frozen=True)
class Snapshot:
    """The weights that train, by name, and the optimizer's state, by PARAMETER/KEY."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Snapshot":
        weights, moments = ({name: change(value) for name, value in part.items()} for part in (self.weights, self.moments))
        return Snapshot(weights, moments)

    def is_finite(self) -> bool:
        """Whether it holds no inf or NaN."""
        found = [torch.isfinite(value).all() for value in (*self.weights.values(), *self.moments.values())]
        return bool(torch.stack([one.to(found[0].device) for one in found]).all()) if found else True


def snapshot(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Snapshot:
    """A snapshot that holds the tensors themselves, not copies; a number of the state, as bitsandbytes' count of steps, becomes a tensor."""
    state = ((f"{name}/{key}", value) for name, p in parameters.items() for key, value in optimizer.state.get(p, {}).items())
    moments = {name: torch.tensor(value) if isinstance(value, int) else value.detach() for name, value in state}
    return Snapshot({name: p.detach() for name, p in parameters.items()}, moments)


class Unusable(Exception):
    """A checkpoint cannot be used; the message is the reason, as a phrase."""


def save(
    folder: Path,
    step: int,
    learnt: Snapshot,
    state: dict,
    run: dict[str, str],
) -> Path:
    """Write `folder/step-N` and return its path. OSError if the run's folder, in which `folder` lies, is gone: it is not made again.

    state   JSON values and numpy arrays
    run     see `RunFolder.run`
    """
    from safetensors.torch import save_file

    weights = {name: value.cpu().contiguous() for name, value in learnt.weights.items()}
    # clones, since bitsandbytes' parameters share a table of 8-bit values
    moments = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in learnt.moments.items()}
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in state.items() if name not in arrays}
    tensors = sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values()))
    _need_room(folder, tensors + sum(array.nbytes for array in arrays.values()))
    remove_leftovers(folder)
    with write_folder(folder / f"step-{step}", replace=True) as part:
        save_file(weights, part / WEIGHTS)
        save_file(moments, part / MOMENTS)
        (part / STATE).write_text(json.dumps({"step": step, **plain}, indent=1), encoding="utf-8")
        if arrays:
            np.savez(part / ARRAYS, **arrays)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(part.iterdir())}
        write_sealed(part / MANIFEST, {"step": step, "run": run, "files": files})
    return folder / f"step-{step}"


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Drop all checkpoints but the newest `keep` and the step `best`."""
    for _, old in sorted(_steps(folder))[:-keep]:
        if old != folder / f"step-{best}":
            remove(old)


def newest(folders: list[Path], runs: list[dict[str, str]], last: int, info: Callable[[str], None] = print) -> list[Saved]:
    """The newest checkpoint, at most at step `last`, that every folder has whole; one for each folder, or [] without checkpoints.

    runs   for each folder the run (`RunFolder.run`) that its checkpoints must come from
    info   called with a line for each checkpoint that is passed over

    UserError if there are checkpoints and none can be used. If one student alone has no usable checkpoint, the error is attributed to it
    (`attribute_to_student`).
    """
    passed, common = [[] for _ in folders], set.intersection(*({step for step, _ in _steps(folder)} for folder in folders))
    for step in sorted(common, reverse=True):
        found = []
        for folder, run, over in zip(folders, runs, passed, strict=True):
            path = folder / f"step-{step}"
            try:
                if step > last:
                    raise Unusable(f"it is beyond the run's last step, {last}")
                found.append(verified(path, run))
            except Unusable as error:
                over.append(f"{path} ({error})")
        if len(found) == len(folders):
            for p in sum(passed, []):
                info(f"passing over the checkpoint {p}")
            return found
    if not any(passed):
        return []
    lost = [k for k, over in enumerate(passed) if len(over) == len(common)]
    if 0 < len(lost) < len(folders):
        with attribute_to_student(lost[0]):
            raise _none_left(passed[lost[0]], folders[lost[0]])
    raise _none_left(sum(passed, []), folders[0] if len(folders) == 1 else folders[0].parent.parent)


def _none_left(passed: list[str], where: Path) -> UserError:
    return UserError(
        *(f"the checkpoint {p}" for p in passed), f"no usable checkpoint is left in {where}; start again in another output_dir"
    )


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after the one that the run resumes from: they will be written again."""
    for number, path in _steps(folder):
        if number > step:
            remove(path)


def verified(path: Path, run: dict[str, str]) -> Saved:
    """The checkpoint at `path`. Unusable if a file is not what was written, or the step is not the folder's, or the run is another."""
    try:
        manifest = read_sealed(path / MANIFEST)
        step, of, files = manifest.get("step"), manifest.get("run"), manifest.get("files")
        if not isinstance(step, int) or not isinstance(of, dict) or not isinstance(files, dict):
            raise Unusable(f"its {MANIFEST} names no step, run and files: it was written by an earlier version, or is damaged")
        if path.name != f"step-{step}":
            raise Unusable(f"it was written as step-{step}")
        if differing := [what for what in run if of.get(what) != run[what]]:
            raise Unusable(f"it belongs to another run, which differs in {' and '.join(differing)}")
        for name in dict.fromkeys((WEIGHTS, MOMENTS, STATE, *files)):
            _verify(path / name, files.get(name))
        state = read_object(path / STATE) | (_arrays(path / ARRAYS) if ARRAYS in files else {})
        best, validated = state["best"], state["validated"]
        if state["step"] != step or not isinstance(best, dict | None) or not isinstance(validated, int | None):
            raise Unusable(f"its {STATE} does not belong to that step")
        if best and not (isinstance(best["by"], str) and isinstance(best["step"], int) and isinstance(best["value"], int | float)):
            raise Unusable(f"its {STATE} names no best step")
    except OSError as error:
        if (failed := machine_error(error)) and failed.certain:
            raise
        raise Unusable(f"{Path(str(error.filename or path)).name}: {(error.strerror or str(error)).lower()}") from error
    except (Damaged, KeyError, TypeError) as error:
        raise Unusable(f"its {MANIFEST} or {STATE} cannot be used: {error}") from error
    return Saved(path, step, state)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise Unusable(f"{path.name} holds no arrays: {error}") from error


def _verify(path: Path, expected: dict) -> None:
    if (size := path.stat().st_size) != expected["bytes"]:
        raise Unusable(f"{path.name} has {size} bytes, not {expected['bytes']}")
    if sha256_file(path) != expected["sha256"]:
        raise Unusable(f"{path.name} does not match its hash")


def agreed(done: int, accelerator) -> int:
    """`done`, if every process found the checkpoint of the same step. Otherwise UserError on all of them: a machine does not see the run's folder."""
    if accelerator.num_processes == 1:
        return done
    from accelerate.utils import gather_object

    found = gather_object([done])
    if other := next((rank for rank, step in enumerate(found) if step != found[0]), None):
        steps = [f"the checkpoint of step {step}" if step else "no checkpoint" for step in (found[0], found[other])]
        error = UserError(
            f"output_dir: process 0 finds {steps[0]} there, and process {other} {steps[1]}; give a folder that all machines share"
        )
        error.every_rank = True  # Oddity: an attribute on an exception, as in errors.py
        raise error
    return done


def load(saved: Saved, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Copy a checkpoint's weights into `parameters`, and its optimizer state into `optimizer`. UserError if names, shapes or dtypes differ."""
    from safetensors.torch import load_file

    weights = load_file(saved.path / WEIGHTS)
    if weights.keys() != parameters.keys() or any(
        weights[n].shape != p.shape or weights[n].dtype != p.dtype for n, p in parameters.items()
    ):
        raise UserError(f"{saved.path} holds other weights than this recipe trains; resume with the recipe that wrote it")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(sharded_like(weights[name], p))
    if optimizer is not None:
        state: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(saved.path / MOMENTS).items():
            parameter, _, key = name.rpartition("/")
            state.setdefault(parameter, {})[key] = value
        for name, p in parameters.items():
            if name in state:
                optimizer.state[p] = {
                    key: value.item() if value.dtype == torch.int64 else sharded_like(value, p) for key, value in state[name].items()
                }


def _steps(folder: Path) -> list[tuple[int, Path]]:
    return [(int(m[1]), p) for p in folder.glob("step-*") if (m := _STEP.fullmatch(p.name))]


def _need_room(folder: Path, size: int) -> None:
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.2 * size:
        raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB free and {1.2 * size / 1e6:,.1f} MB needed for a checkpoint", str(folder))
