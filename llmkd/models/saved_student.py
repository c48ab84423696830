"""Trained students on disk, in Hugging Face's format: saving them, and the settings to load them again."""

import dataclasses
from pathlib import Path

from torch import nn

from ..config.recipe import Quantization
from ..config.recipe import Student as StudentSettings
from ..config.recipe import Teacher as TeacherSettings
from ..model_folder.generation import write_generation
from ..model_folder.identity import base_config_hash, fingerprint, record_of, write_record
from . import adapters
from .model import Model


def as_trained(folder: Path, base: Path | None = None) -> TeacherSettings:
    """Settings that load a trained student for evaluation: its adapter on the base, in the dtype and quantisation of training."""
    record = record_of(folder)
    quantization = record.get("quantization")
    return TeacherSettings(
        model=str(folder),
        base=base and str(base),
        dtype=record.get("dtype", "auto"),
        quantization=quantization and Quantization(**quantization),
    )


def save(model: Model, folder: Path, settings: StudentSettings, generation: dict | None) -> None:
    """Write the student in Hugging Face's format: an adapter (PEFT) or a whole model, with a generation config unless that is None.

    llmkd.json in the same folder holds the hashes of its files, so the tokenizer must be there already. For an adapter it also records the
    base's fingerprint, dtype and quantisation; `as_trained` reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model.model, "peft_config"):
        adapters.save(model.model, folder, model.adapter or "default")
        if generation is not None:
            write_generation(folder, generation)
        base = Path(model.base_model.config._name_or_path)
        record = {
            "base_fingerprint": fingerprint(base, "student.model"),
            "base_config": base_config_hash(base, "student.model"),
            "dtype": settings.dtype,
            "quantization": settings.quantization and dataclasses.asdict(settings.quantization),
        }
        write_record(folder, "output_dir", student="adapter", **record)
    else:
        save_whole(model.model, folder, generation)
        write_record(folder, "output_dir", student="full")


def save_whole(model: nn.Module, folder: Path, generation: dict | None) -> None:
    """Write a plain transformers model, with a generation config unless that is None."""
    if generation is None:
        model.save_pretrained(folder)
        return
    held, model.generation_config = model.generation_config, None if model.generation_config is None else type(model.generation_config)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = held
    write_generation(folder, generation)
