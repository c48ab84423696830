"""A teacher made faster once it is loaded: its adapter merged, its linear layers in 8-bit floats; and how far that moves its answers."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import float8
from .console import say
from .errors import UserError, brief
from .head import Head
from .loading import note_share
from .losses.divergences import forward_kl
from .losses.fused import default_chunk
from .merge import fold
from .model_files import ModelFiles
from .recipe import Teacher
from .signals import Batch

#: Some of what a teacher will be asked, by the name of its setting.
Asked = Callable[[str], Sequence[Batch]]


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


def compare(before_NH: Tensor, head: Head, after_NH: Tensor, now: Head) -> dict[str, float]:
    """forward_kl: the mean of KL(before || after) in nats, in float64; agreement: where both find the same token likeliest; targets: N."""
    chunk = default_chunk(now.vocab, after_NH.device.type) // 8
    kl, same = 0.0, 0
    for before_nH, after_nH in zip(before_NH.split(chunk), after_NH.split(chunk), strict=True):
        log_p_nV, log_q_nV = (torch.log_softmax(of.logits(h).double(), -1) for of, h in ((head, before_nH), (now, after_nH)))
        kl += forward_kl(log_q_nV, log_p_nV).sum().item()
        same += (log_p_nV.argmax(-1) == log_q_nV.argmax(-1)).sum().item()
    return {"forward_kl": kl / len(after_NH), "agreement": same / len(after_NH), "targets": len(after_NH)}


def _hidden(teacher, batches: Sequence[Batch]) -> Tensor | None:
    """Last hidden states [N, H] at all targets."""
    views = [batch.teacher.each(lambda x: x.to(teacher.device)) for batch in batches]
    return torch.cat([teacher.hidden(view) for view in views]) if views else None


def _kept(head: Head) -> Head:
    """The head as it is, whatever becomes of it: an adapter on it is merged in place, and a plain one never changes."""
    project = head.project if type(head.project) is torch.nn.Linear else copy.deepcopy(head.project)
    return Head(project, head.vocab, head.scale, head.softcap)


def _refuse_failure(teacher, setting: str) -> None:
    ids_BT = torch.arange(24, device=teacher.device).reshape(2, 12) % teacher.head.vocab
    try:
        teacher.plain(input_ids=ids_BT, use_cache=False)
    except Exception as error:
        raise UserError(
            f"{setting}.quantization.type: found fp8, in which {teacher.plain.config.model_type} fails on a first small batch ({brief(error)}); "
            "use int8 or nf4"
        ) from error
