"""How much a teacher's outputs change when it is merged or converted to fp8, and the samples of data to measure that on."""

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
from ..data.examples import Examples
from ..errors import UserError
from ..head import Head
from ..losses.divergences import forward_kl
from ..losses.fused import default_chunk
from ..models.model import Model
from .resolve import examples_of

#: Targets on which the change of a transformed teacher is measured.
TARGETS = 1024


def sample_examples(train: Examples, count: int) -> Examples:
    """`count` random training examples, the same for every run; of a stream, from its first window. All count alike."""
    chosen = random.Random("gate").sample(range(len(train)), min(count, len(train)))
    return train.take(np.array(sorted(chosen), np.int64)).unweighted()


def sample_teacher_batches(train: Examples, teacher: int, size: int, device) -> list[Batch]:
    """Batches of at most `size` training examples of teacher number `teacher`, with at most TARGETS targets (at least one example).

    The same for every run. Empty where no example uses this teacher.
    """
    mine = examples_of(train, teacher).tolist()
    chosen = np.array(random.Random("asked").sample(mine, min(len(mine), TARGETS)), np.int64)
    if not len(chosen):
        return []
    fit = max(1, int(np.searchsorted(train.num_targets[chosen].cumsum(), TARGETS, side="right")))
    few = train.take(np.sort(chosen[:fit]))
    return [few.batch(examples).to(device) for examples in make_micro_batches(list(range(len(few))), few.lengths, size)]


#: Sample batches of the teacher with that setting's name.
ProbeBatches = Callable[[str], Sequence[Batch]]


@contextlib.contextmanager
def measured_transform(probe: ProbeBatches, teacher: Model, settings: Teacher, setting: str) -> Iterator[dict[str, float]]:
    """Compare the teacher's outputs on the probe batches before and after the body: KL(before || after) and top-1 agreement, as a line of
    the log and in the dictionary that is yielded. UserError where the outputs are no longer finite."""
    batches, found = probe(setting), {}
    with torch.no_grad():
        before, head = _hidden(teacher, batches, setting), _frozen_head(teacher.head)
        yield found
        if not batches:
            return
        found |= compare(before, head, _hidden(teacher, batches, setting), teacher.head)
    if not math.isfinite(found["forward_kl"]):
        which = "quantization" if settings.float8 else "merge_adapter"
        raise UserError(f"{setting}.{which}: the teacher's outputs are finite as it was loaded, and not with {settings.held}; leave it out")
    info(
        f"{setting}: {settings.held}: KL to the teacher before {found['forward_kl']:.1e} nats per token, "
        f"top-1 agreement {found['top1_agreement']:.1%} over {found['targets']:,} targets"
    )


def compare(before_NH: Tensor, head: Head, after_NH: Tensor, now: Head) -> dict[str, float]:
    """forward_kl: the mean of KL(before || after) in nats, in float64; top1_agreement: the share of targets with the same most likely
    token; targets: N."""
    chunk = default_chunk(now.vocab, after_NH.device.type) // 8
    kl, same = 0.0, 0
    for before_nH, after_nH in zip(before_NH.split(chunk), after_NH.split(chunk), strict=True):
        log_p_nV, log_q_nV = (torch.log_softmax(of.logits(h).double(), -1) for of, h in ((head, before_nH), (now, after_nH)))
        kl += forward_kl(log_q_nV, log_p_nV).sum().item()
        same += (log_p_nV.argmax(-1) == log_q_nV.argmax(-1)).sum().item()
    return {"forward_kl": kl / len(after_NH), "top1_agreement": same / len(after_NH), "targets": len(after_NH)}


def _hidden(teacher, batches: Sequence[Batch], setting: str) -> Tensor | None:
    """Last hidden states [N, H] at all targets; None without batches."""
    views = [batch.view_of(setting).each(lambda x: x.to(teacher.device)) for batch in batches]
    return torch.cat([teacher.hidden(view) for view in views]) if views else None


def _frozen_head(head: Head) -> Head:
    """A head that later changes of this one do not affect. A plain Linear never changes; an adapter would be merged in place."""
    project = head.project if type(head.project) is torch.nn.Linear else copy.deepcopy(head.project)
    return Head(project, head.vocab, head.scale, head.softcap)
