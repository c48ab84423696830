"""Changes of a model's weights for the time of a check: moved at random, in a wider dtype, or rounded."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .setup import Setup


@contextlib.contextmanager
def moved(setup: Setup, share: float = 0.1) -> Iterator[None]:
    """The student's trained weights moved while the block lasts, since a new adapter changes nothing yet.

    share  the size of the random changes, as a share of a tensor's root mean square, or of 0.02 if that is more
    """
    generator = torch.Generator().manual_seed(0)
    idle = setup.student.capabilities.parameters_without_gradient
    with setup.weights_kept():
        with torch.no_grad():
            for p in (p for name, p in setup.state.parameters.items() if name not in idle):
                size = max(p.float().pow(2).mean().sqrt().item(), 0.02) * share
                p.add_((torch.randn(p.shape, generator=generator) * size).to(p.device, p.dtype))
        yield


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """The model's weights in at least float32 while the block lasts, so that it computes without the rounding of a narrow dtype."""
    held = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    wide = torch.float64 if any(dtype == torch.float64 for _, dtype in held) else torch.float32
    for t, _ in held:
        t.data = t.data.to(wide)
    try:
        yield
    finally:
        for t, dtype in held:
            t.data = t.data.to(dtype)


@torch.no_grad()
def round_at_random_(model: nn.Module, dtype: torch.dtype) -> None:
    """Change every weight at random by as much as rounding to `dtype` can: up to half the gap between neighbouring values."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        gap = torch.ldexp(torch.full_like(p, torch.finfo(dtype).eps), torch.frexp(p)[1] - 1) * (p != 0)
        p.add_(gap * (torch.rand(p.shape, generator=generator) - 0.5).to(p))
