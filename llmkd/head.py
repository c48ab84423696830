"""From last hidden states to logits. Everything that model families do there differently is in this file and nowhere else."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Rows of a head's weight that are processed at a time where they must be copied, or their product is an intermediate result.
BLOCK = 8192


class Passed(nn.Identity):
    """Stands in for a head where the hidden states already are a classifier's logits."""


class Head:
    """The map from a model's last hidden states [N, H] to its logits [N, V] over the real vocabulary, in at least float32.

    project    the model's output embedding: a Linear, or PEFT's or a quantiser's module in its place
    vocab      V, the tokenizer's size; padding columns past it are cut
    scale      factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling, ...)
    softcap    logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, section 2)

    `choose` is called with the view's rows before an adapter on the head computes them, and with None afterwards, for the adapter's dropout.
    """

    choose: Callable[[slice | Tensor | None], None] = staticmethod(lambda rows: None)

    def __init__(self, project: nn.Module, vocab: int, scale: float = 1.0, softcap: float | None = None):
        self.project, self.vocab, self.scale, self.softcap = project, vocab, scale, softcap

    def logits(self, hidden_NH: Tensor, out: Tensor | None = None, rows: slice | Tensor | None = None) -> Tensor:
        """The model's own logits [N, V] of hidden states [N, H], without rounding to the model's dtype.

        out   a buffer [N, V] of `self.dtype` that may be used for them, if no gradient is needed
        rows  the rows of the model's last view to which they belong, for the dropout of an adapter
        """
        project = self.project
        if type(project) is nn.Linear:
            weight_VH = project.weight[: self.vocab]
            logits_NV = _WideProduct.apply(hidden_NH, weight_VH) if out is None else _product(hidden_NH, weight_VH, out)
            if project.bias is not None:
                logits_NV = torch.add(logits_NV, project.bias[: self.vocab], out=out)
        else:  # with an adapter, or quantised
            weight = getattr(project, "weight", hidden_NH)
            if weight.is_floating_point():
                hidden_NH = hidden_NH.to(weight.dtype)
            self.choose(rows)
            logits_NV, out = widen(project(hidden_NH))[:, : self.vocab], None
            self.choose(None)
        if self.scale != 1.0:
            logits_NV = torch.mul(logits_NV, self.scale, out=out)
        if self.softcap:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    @property
    def is_affine(self) -> bool:
        """Whether logits are only a matrix product, a bias and a scale; then `backward` computes the gradient without autograd."""
        return type(self.project) is nn.Linear and not self.softcap

    @property
    def dtype(self) -> torch.dtype:
        """The type of an affine head's logits."""
        return widen(self.project.weight[:0]).dtype

    def backward(self, grad_nV: Tensor, hidden_nH: Tensor, grad_hidden_nH: Tensor | None, grads: list[Tensor]) -> None:
        """The backward pass of an affine head, for a chunk of n rows.

        grad_nV         the gradient of the logits, in `self.dtype`, or on a GPU in the weight's dtype
        hidden_nH       the hidden states of the forward pass
        grad_hidden_nH  overwritten with the gradient of the hidden states; None if that is not needed
        grads           the gradients of `self.trainable()`, in that order, to which this chunk's are added
        """
        weight_VH = self.project.weight[: self.vocab]
        if grad_hidden_nH is not None:
            _product_back(grad_nV, weight_VH, grad_hidden_nH)
            if self.scale != 1.0:
                grad_hidden_nH *= self.scale
        for parameter, total in zip(self.trainable(), grads, strict=True):
            if parameter is self.project.bias:
                total[: self.vocab].add_(grad_nV.sum(0, dtype=total.dtype), alpha=self.scale)
            else:  # on a GPU the product cannot be added in place: blocks keep its buffer small
                for columns in _blocks(weight_VH) if grad_nV.is_cuda else [slice(0, self.vocab)]:
                    _add_outer(total[columns], grad_nV[:, columns], hidden_nH, self.scale)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.project.parameters() if p.requires_grad]


def widen(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _product(hidden_NH: Tensor, weight_VH: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden @ weight.T [N, V]; of half-precision operands the result is float32.

    Rounding the logits to bfloat16 would change the gradient by 1 to 24 %, and most late in a distillation, when student and teacher nearly
    agree.
    """
    if hidden_NH.dtype != weight_VH.dtype:
        hidden_NH = hidden_NH.to(weight_VH.dtype)
    if widen(weight_VH[:0]).dtype == weight_VH.dtype:
        return torch.mm(hidden_NH, weight_VH.T, out=out)
    if hidden_NH.is_cuda:
        return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32, **({} if out is None else {"out": out}))
    if out is None:
        out = hidden_NH.new_empty(hidden_NH.shape[0], weight_VH.shape[0], dtype=torch.float32)
    wide_NH = hidden_NH.float()
    for columns in _blocks(weight_VH):  # a float32 copy of a block of the weight, never of all of it
        torch.mm(wide_NH, weight_VH[columns].float().T, out=out[:, columns])
    return out


def _product_back(grad_NV: Tensor, weight_VH: Tensor, out_NH: Tensor) -> None:
    """Write grad @ weight [N, H] into `out_NH`, rounded once, to its dtype."""
    if grad_NV.dtype == weight_VH.dtype:
        if out_NH.dtype == grad_NV.dtype:
            torch.mm(grad_NV, weight_VH, out=out_NH)
        else:
            out_NH.copy_(grad_NV @ weight_VH)
        return
    total_NH = torch.zeros_like(out_NH, dtype=grad_NV.dtype)
    for columns in _blocks(weight_VH):
        total_NH.addmm_(grad_NV[:, columns], weight_VH[columns].to(grad_NV.dtype))
    out_NH.copy_(total_NH)


def _add_outer(total_VH: Tensor, grad_nV: Tensor, hidden_nH: Tensor, scale: float) -> None:
    """total += scale grad.T @ hidden, summed in the dtype of `total_VH`."""
    hidden_nH = hidden_nH.to(grad_nV.dtype)
    if grad_nV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_nV.T, hidden_nH, alpha=scale)
    else:
        total_VH.add_(torch.mm(grad_nV.T, hidden_nH, out_dtype=total_VH.dtype), alpha=scale)


class _WideProduct(torch.autograd.Function):
    """`_product` with its gradients, which autograd does not have for an output of another dtype than the operands."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        return _product(hidden_NH, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NV: Tensor):
        hidden_NH, weight_VH = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if grad_NV.is_cuda:
            grad_NV = grad_NV.to(weight_VH.dtype)
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden_NH)
            _product_back(grad_NV, weight_VH, grad_hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_NV.T @ hidden_NH.to(grad_NV.dtype)).to(weight_VH.dtype)
        return grad_hidden, grad_weight


def _blocks(weight_VH: Tensor) -> list[slice]:
    V = weight_VH.shape[0]
    return [slice(v, min(V, v + BLOCK)) for v in range(0, V, BLOCK)]
