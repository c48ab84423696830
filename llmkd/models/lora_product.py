"""LoRA's products on a frozen linear layer, y = x W^T + b + s (x A^T) B^T, in one autograd function.

PEFT allocates two more tensors as large as y, for the factor s and the sum. With bfloat16 weights it also copies x, y and their gradients to
float32 and multiplies there, on a GPU at a fifteenth of the rate. Here the second product is added to y in place, and a float32 matrix is
written as the sum of two bfloat16 ones, x = high + low, which together have 16 bits; products of bfloat16 are summed in float32.
"""

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from . import norms

#: With fewer rows in bfloat16, the additional kernel launches for small matrices take longer than what is saved.
LEAST_ROWS = 2048


class LoraLinear(Linear):
    """PEFT's LoRA on a linear layer, which uses `_Adapted` for its forward pass if it is just one adapter on frozen weights."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        name = None if args or kwargs else self._adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, dropped = self.base_layer, self.lora_dropout[name](x)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        given = x, None if dropped is x else dropped, base.weight, base.bias, A, B, self.scaling[name]
        return _Adapted.apply(*given) if torch.is_grad_enabled() else _product_of(*given)[0]

    def _adapter(self, x: Tensor) -> str | None:
        """The name of the active adapter, if `_Adapted` can compute it; None also if an inner module has hooks, which would not be called."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or torch.is_autocast_enabled(x.device.type):
            return None
        (name,), base = active, self.base_layer
        A, B = self.lora_A[name], self.lora_B[name]
        frozen = type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters())
        if not frozen or name in self.lora_variant or B.bias is not None or any(map(_is_hooked, (base, A, B))):
            return None
        same = x.dtype == base.weight.dtype and A.weight.dtype == B.weight.dtype
        wide = x.dtype == A.weight.dtype and x.dtype in (torch.float32, torch.float64)
        mixed = x.dtype == torch.bfloat16 and A.weight.dtype == torch.float32 and x.numel() // x.shape[-1] >= LEAST_ROWS
        return name if same and (wide or mixed and norms.on_gpu(x)) else None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def add_in_place(model: nn.Module) -> None:
    """Make the LoRA layers of a PEFT model `LoraLinear`s."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear


def _product_of(
    x: Tensor, dropped: Tensor | None, W_OK: Tensor, b: Tensor | None, A_rK: Tensor, B_Or: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of `_Adapted`, the rows that A reads, and their scaled products with A."""
    x_NK = x.reshape(-1, x.shape[-1])
    read_NK = x_NK if dropped is None else dropped.reshape(x_NK.shape)
    y_NO = x_NK @ W_OK.T if b is None else torch.addmm(b, x_NK, W_OK.T)
    low_Nr = _narrow(read_NK, A_rK.T).mul_(scaling)
    _add_wide(y_NO, low_Nr, B_Or.T)
    y = torch.ops.aten._unsafe_view(y_NO, [*x.shape[:-1], len(W_OK)])  # autograd would forbid changing an ordinary view in place
    return y, read_NK, low_Nr


class _Adapted(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T for x [..., K], W [O, K], b [O], A [r, K], B [O, r]. W and b get no gradient.

    dropped   x after dropout, which A reads; None without dropout

    Shape letters: N rows, K and O features of the input and the output, r the rank.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, dropped: Tensor | None, W_OK: Tensor, b: Tensor | None, A_rK: Tensor, B_Or: Tensor, scaling: float
    ) -> Tensor:
        ctx.given, ctx.scaling = dropped is not None, scaling
        y, read_NK, low_Nr = _product_of(x, dropped, W_OK, b, A_rK, B_Or, scaling)
        ctx.save_for_backward(read_NK, low_Nr, W_OK, A_rK, B_Or)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        read_NK, low_Nr, W_OK, A_rK, B_Or = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_low_Nr = _narrow(grad_NO, B_Or).mul_(ctx.scaling)
        of_B = _narrow(grad_NO.T, low_Nr) if ctx.needs_input_grad[5] else None
        of_A = _narrow(read_NK.T, grad_low_Nr).T if ctx.needs_input_grad[4] else None
        of_x = grad_NO @ W_OK if ctx.needs_input_grad[0] else None
        of_dropped = None
        if ctx.given:
            of_dropped = _add_wide(torch.zeros_like(read_NK), grad_low_Nr, A_rK).view(*grad.shape[:-1], -1)
        elif of_x is not None:
            _add_wide(of_x, grad_low_Nr, A_rK)
        return None if of_x is None else of_x.view(*grad.shape[:-1], -1), of_dropped, None, None, of_A, of_B, None


def _narrow(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for y [., r] of the same dtype, or for x in bfloat16 and y in float32; in the dtype of y."""
    if x.dtype == y.dtype:
        return x @ y
    r = y.shape[1]
    parts = y.new_empty(len(y), 2 * r, dtype=x.dtype)
    _split(y, parts[:, :r], parts[:, r:])
    found = _product(x, parts, y.dtype)
    return found[:, :r] + found[:, r:]


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y of half-precision operands, summed and returned in `dtype`."""
    return torch.mm(x, y, out_dtype=dtype) if x.is_cuda else x.to(dtype) @ y.to(dtype)


def _add_wide(y: Tensor, low_Nr: Tensor, right: Tensor) -> Tensor:
    """y += low @ right [r, .], in place; both factors have the dtype of y, or float32 if y is bfloat16."""
    if y.dtype == low_Nr.dtype:
        return y.addmm_(low_Nr, right)
    r = len(right)
    left, of_right = y.new_empty(len(low_Nr), 3 * r), y.new_empty(3 * r, right.shape[1])
    _split(low_Nr, left[:, :r], left[:, r : 2 * r])
    left[:, 2 * r :].copy_(left[:, :r])
    _split(right, of_right[:r], of_right[2 * r :])
    of_right[r : 2 * r].copy_(of_right[:r])
    return y.addmm_(left, of_right)  # high high + low high + high low: low low is below 2^-16 of it


def _split(x: Tensor, high: Tensor, low: Tensor) -> None:
    """Write x as high + low, both in bfloat16."""
    high.copy_(x)
    low.copy_(x - high)
