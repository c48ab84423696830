"""A teacher made faster once it is loaded: its adapter merged, its linear layers in 8-bit floats; and how far that moves its answers."""

import math

import torch

from ..config.recipe import Teacher
from ..console import say
from ..errors import UserError, brief
from ..model_files import ModelFiles
from ..teachers.fidelity import Asked, _hidden, _kept, compare
from . import float8
from .merge import fold
from .quantization import note_share


@torch.no_grad()
def hone(teacher, settings: Teacher, files: ModelFiles, setting: str, asked: Asked | None = None) -> None:
    """Change a `models.LanguageModel` as its settings say, in place.

    With `asked`, what it answers to that before and after is compared: said in a line, and kept as `teacher.fidelity`.
    """
    batches = asked(setting) if asked else ()
    before, head = _hidden(teacher, batches), _kept(teacher.head)
    if settings.merge_adapter:
        teacher.become(fold(teacher.model, f"{setting}.merge_adapter: {files.adapter}"))
    if settings.float8:
        if not float8.convert(teacher.plain):
            raise UserError(
                f"{setting}.quantization.type: found fp8, and {files.base} has no linear layers whose sizes are multiples of 16; leave it out"
            )
        note_share(teacher.plain, f"{setting}.model")
        _refuse_failure(teacher, setting)
    if not batches:
        return
    teacher.fidelity = found = compare(before, head, _hidden(teacher, batches), teacher.head)
    if not math.isfinite(found["forward_kl"]):
        which = "quantization" if settings.float8 else "merge_adapter"
        raise UserError(f"{setting}.{which}: the teacher's answers are finite as it was loaded, and not with {settings.held}; leave it out")
    say(
        f"{setting}: {settings.held}: KL to the teacher before {found['forward_kl']:.1e} nats per token, "
        f"top-1 agreement {found['agreement']:.1%} over {found['targets']:,} targets"
    )


def _refuse_failure(teacher, setting: str) -> None:
    ids_BT = torch.arange(24, device=teacher.device).reshape(2, 12) % teacher.head.vocab
    try:
        teacher.plain(input_ids=ids_BT, use_cache=False)
    except Exception as error:
        raise UserError(
            f"{setting}.quantization.type: found fp8, in which {teacher.plain.config.model_type} fails on a first small batch ({brief(error)}); "
            "use int8 or nf4"
        ) from error
