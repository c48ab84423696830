"""A trained student on disk: written in Hugging Face's form, found again, and loaded as it was trained."""

import dataclasses
import json
from pathlib import Path

from ..config.recipe import Quantization
from ..config.recipe import Student as StudentSettings
from ..config.recipe import Teacher as TeacherSettings
from ..errors import UserError
from ..model_files import RECORD, fingerprint, record_of
from . import adapters
from .language_model import LanguageModel


def as_trained(folder: Path, base: Path | None = None) -> TeacherSettings:
    """A student, to be loaded for measuring it: an adapter on its base in the type and quantisation it was trained on."""
    record = record_of(folder)
    quantization = record.get("quantization")
    return TeacherSettings(
        model=str(folder),
        base=base and str(base),
        dtype=record.get("dtype", "auto"),
        quantization=quantization and Quantization(**quantization),
    )


def student_folder(run: str | Path) -> Path:
    """Where a finished run keeps its student: `adapter` or `model`."""
    for name in ("adapter", "model"):
        if (Path(run) / name).is_dir():
            return Path(run) / name
    raise UserError(f"{run}: holds neither adapter nor model; is the run finished?")


def save(model: LanguageModel, folder: Path, settings: StudentSettings) -> None:
    """The student in Hugging Face's form: an adapter (PEFT) or a whole model, with its generation config.

    Beside an adapter stands what it was trained on: which base, and how that was held (`as_trained` reads it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model.model, "peft_config"):
        adapters.save(model.model, folder, model.adapter or "default")
        if model.base_model.generation_config is not None:
            model.base_model.generation_config.save_pretrained(folder)
        base = Path(model.base_model.config._name_or_path)
        record = {
            "base_fingerprint": fingerprint(base, "student.model"),
            "dtype": settings.dtype,
            "quantization": settings.quantization and dataclasses.asdict(settings.quantization),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    else:
        model.model.save_pretrained(folder)
