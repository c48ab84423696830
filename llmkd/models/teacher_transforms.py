"""Transforms of a loaded teacher that make it faster: its adapter merged, its linear layers in 8-bit floats."""

import torch

from ..config.recipe import Teacher
from ..errors import UserError, brief
from ..model_folder.files import ModelFiles
from . import float8
from .merge import merge_adapter_
from .probe import probe_ids
from .quantization import note_share


@torch.no_grad()
def apply_transforms(teacher, settings: Teacher, files: ModelFiles, setting: str) -> None:
    """Merge a teacher's adapter and convert the teacher to fp8, as its settings say, in place. UserError if it fails afterwards."""
    if settings.merge_adapter:
        teacher.replace_with(merge_adapter_(teacher.model, f"{setting}.merge_adapter: {files.adapter}"))
    if settings.float8:
        if not float8.convert(teacher.base_model):
            raise UserError(
                f"{setting}.quantization.type: found fp8, but {files.base} has no linear layers whose sizes are multiples of 16; leave it out"
            )
        note_share(teacher.base_model, f"{setting}.model")
        _refuse_failure(teacher, setting)


def _refuse_failure(teacher, setting: str) -> None:
    ids_BT = probe_ids(teacher.head.vocab, teacher.device)
    try:
        teacher.base_model(input_ids=ids_BT, use_cache=False)
    except Exception as error:
        raise UserError(
            f"{setting}.quantization.type: found fp8, in which {teacher.base_model.config.model_type} fails on a first small batch ({brief(error)}); "
            "use int8 or nf4"
        ) from error
