"""Optimizers by name (torch's AdamW; bitsandbytes' with 8-bit or paged state) and the learning rate schedule."""

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from ..config.recipe import Optim
from ..errors import UserError

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def build(
    optim: Optim, parameters: dict[str, nn.Parameter], of_terms: Mapping[str, float | None] = MappingProxyType({})
) -> torch.optim.Optimizer:
    """AdamW over all parameters. Weight decay applies to matrices only, not to biases, norms and the parameters of loss terms.

    bitsandbytes keeps the state of tensors under 4,096 elements in 32 bit, and pages only on a GPU. It has no float64: UserError.

    of_terms   the peak learning rate of each loss term's parameter, or None for the student's. It becomes the group's `lr_ratio`, a
               multiple of the schedule's rate
    """
    own = {name: p for name, p in parameters.items() if name not in of_terms}
    decayed = [p for p in own.values() if p.ndim >= 2]
    plain = [p for p in own.values() if p.ndim < 2]
    groups = [{"params": ps, "weight_decay": decay} for ps, decay in ((decayed, optim.weight_decay), (plain, 0.0)) if ps]
    for lr in dict.fromkeys(of_terms.values()):
        theirs = [parameters[name] for name in of_terms if of_terms[name] == lr]
        groups.append({"params": theirs, "weight_decay": 0.0, "lr_ratio": 1.0 if lr is None else lr / optim.lr})
    options = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if any(p.dtype == torch.float64 for p in parameters.values()):
        raise UserError(f"optim.name: found {optim.name}, which has no float64; use adamw, or student.dtype: float32")
    import bitsandbytes

    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # see the docstring
    return getattr(bitsandbytes.optim, _BITSANDBYTES[optim.name])(groups, **options)


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: int, min_share: float = 0.0) -> float:
    """The learning rate of step `step` (from 1): linear warm-up, then cosine or linear decay to min_share * peak, or constant."""
    if step <= warmup:
        return peak * step / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup) / max(1, total - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (min_share + (1 - min_share) * fall)
