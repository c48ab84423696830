"""A finished run's student as one plain transformers model, which needs neither PEFT nor llmkd."""

import os
import shutil
from pathlib import Path

from .errors import UserError
from .model_files import find, locate


def export(run: Path, to: Path | None = None) -> Path:
    """Write `RUN/merged` (or `to`). `run` may be a run's folder, or an adapter's."""
    from .data.tokenizer import load_tokenizer
    from .models import merge, student_folder

    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run's output_dir or an adapter")
    adapter = run if (run / "adapter_config.json").exists() else student_folder(run)
    if not (adapter / "adapter_config.json").exists():
        raise UserError(f"{run}: was trained in full, so {adapter} is already a plain model; nothing to merge")
    to = to or (run / "merged" if adapter != run else run.with_name(run.name + "-merged"))
    if to.exists():
        raise UserError(f"--to: {to} exists; choose another folder, or remove it")
    files = find(str(adapter), "export")
    model = merge(files)
    part = to.with_name(f"{to.name}.tmp-{os.getpid()}")
    try:
        model.save_pretrained(part)
        tokenizer = adapter if (adapter / "tokenizer.json").exists() else files.base
        load_tokenizer(str(locate(str(tokenizer), "export")), "export").save_pretrained(part)
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return to
