"""How far a merged, quantised or cached teacher is from itself."""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..config.recipe import Teacher
from ..console import info
from ..data.batching import make_micro_batches
from ..data.collate import collate
from ..data.examples import Examples
from ..errors import UserError
from ..head import Head
from ..losses.divergences import forward_kl
from ..losses.fused import default_chunk
from ..models.language_model import LanguageModel
from .resolve import examples_of

#: On how many it is measured what became of a teacher that is not used as it was loaded.
TARGETS = 1024


def sample_examples(train: Examples, count: int) -> Examples:
    """So many training examples, the same ones for every run; of a stream, those of its first step."""
    chosen = random.Random("gate").sample(range(len(train)), min(count, len(train)))
    return train.take(np.array(sorted(chosen), np.int64))


def sample_teacher_batches(train: Examples, teacher: int, size: int, pad: int, device) -> list[Batch]:
    """Batches of at most `size` examples that teacher number `teacher` is asked, the same ones for every run: as many as hold TARGETS."""
    mine = examples_of(train, teacher).tolist()
    chosen = np.array(random.Random("asked").sample(mine, min(len(mine), TARGETS)), np.int64)
    if not len(chosen):
        return []
    fit = max(1, int(np.searchsorted(train.num_targets[chosen].cumsum(), TARGETS, side="right")))
    few = train.take(np.sort(chosen[:fit]))
    return [collate(few, examples, pad).to(device) for examples in make_micro_batches(list(range(len(few))), few.lengths, size)]


#: Some of what a teacher will be asked, by the name of its setting.
Asked = Callable[[str], Sequence[Batch]]


@contextlib.contextmanager
def measured_transform(asked: Asked, teacher: LanguageModel, settings: Teacher, setting: str) -> Iterator[dict[str, float]]:
    """Compares the teacher's answers before and after what happens inside, in a line of the log and in the dictionary that it yields."""
    batches, found = asked(setting), {}
    with torch.no_grad():
        before, head = _hidden(teacher, batches), _kept(teacher.head)
        yield found
        if not batches:
            return
        found |= compare(before, head, _hidden(teacher, batches), teacher.head)
    if not math.isfinite(found["forward_kl"]):
        which = "quantization" if settings.float8 else "merge_adapter"
        raise UserError(f"{setting}.{which}: the teacher's answers are finite as it was loaded, and not with {settings.held}; leave it out")
    info(
        f"{setting}: {settings.held}: KL to the teacher before {found['forward_kl']:.1e} nats per token, "
        f"top-1 agreement {found['top1_agreement']:.1%} over {found['targets']:,} targets"
    )


def compare(before_NH: Tensor, head: Head, after_NH: Tensor, now: Head) -> dict[str, float]:
    """forward_kl: the mean of KL(before || after) in nats, in float64; agreement: where both find the same token likeliest; targets: N."""
    chunk = default_chunk(now.vocab, after_NH.device.type) // 8
    kl, same = 0.0, 0
    for before_nH, after_nH in zip(before_NH.split(chunk), after_NH.split(chunk), strict=True):
        log_p_nV, log_q_nV = (torch.log_softmax(of.logits(h).double(), -1) for of, h in ((head, before_nH), (now, after_nH)))
        kl += forward_kl(log_q_nV, log_p_nV).sum().item()
        same += (log_p_nV.argmax(-1) == log_q_nV.argmax(-1)).sum().item()
    return {"forward_kl": kl / len(after_NH), "top1_agreement": same / len(after_NH), "targets": len(after_NH)}


def _hidden(teacher, batches: Sequence[Batch]) -> Tensor | None:
    """Last hidden states [N, H] at all targets."""
    views = [batch.teacher.each(lambda x: x.to(teacher.device)) for batch in batches]
    return torch.cat([teacher.hidden(view) for view in views]) if views else None


def _kept(head: Head) -> Head:
    """The head as it is, whatever becomes of it: an adapter on it is merged in place, and a plain one never changes."""
    project = head.project if type(head.project) is torch.nn.Linear else copy.deepcopy(head.project)
    return Head(project, head.vocab, head.scale, head.softcap)
