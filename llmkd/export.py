"""A finished run's student as one plain transformers model, which needs neither PEFT nor llmkd."""

import json
import os
import shutil
from pathlib import Path

from .data.tokenizer import load_tokenizer, vocab_size
from .errors import UserError
from .model_files import find


def export(run: Path, to: Path | None = None, checkpoint: str | None = None) -> Path:
    """Write `RUN/merged` (or `to`). `run` may be a run's folder, or an adapter's; `checkpoint` is a step's number, or best."""
    from .models import merge, restored, student_folder

    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run's output_dir or an adapter")
    run = run.resolve()
    student = run if (run / "adapter_config.json").exists() else student_folder(run)
    saved = checkpoint_folder(run, checkpoint) if checkpoint else None
    is_adapter = (student / "adapter_config.json").exists()
    if not is_adapter and not saved:
        raise UserError(f"{run}: was trained in full, so {student} is already a plain model; nothing to merge")
    if to is None:
        name = f"merged-{checkpoint}" if checkpoint else "merged"
        to = run.with_name(f"{run.name}-{name}") if student == run else run / name
    if to.exists():
        raise UserError(f"--to: {to} exists; choose another folder, or remove it")
    files = find(str(student), "export")
    tokenizer = load_tokenizer(str(student if (student / "tokenizer.json").exists() else files.base), "export")
    model = merge(files, vocab_size(tokenizer), saved) if is_adapter else restored(student, saved)
    part = to.with_name(f"{to.name}.tmp-{os.getpid()}")
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return to


def checkpoint_folder(run: Path, which: str) -> Path:
    """The folder of a checkpoint by its step, or of the best by the recipe's checkpoint.best_by; whole, or refused."""
    from .checkpoint import damaged

    if which == "best":
        best = json.loads((run / "summary.json").read_text()).get("best") if (run / "summary.json").exists() else None
        if not best:
            raise UserError(f"--checkpoint: {run} kept no best checkpoint; it needs checkpoint.best_by in its recipe")
        which = str(best["step"])
    folder = run / "checkpoints" / f"step-{which}"
    there = ", ".join(sorted(p.name.removeprefix("step-") for p in folder.parent.glob("step-*"))) or "none"
    if not folder.is_dir():
        raise UserError(f"--checkpoint: {run} has no checkpoint {which}; it has {there}")
    if damage := damaged(folder):
        raise UserError(f"--checkpoint: {folder} is damaged ({damage}); the run has {there}")
    return folder
