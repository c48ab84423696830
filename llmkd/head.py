"""From last hidden states to logits: all that a model family does there is known here and nowhere else."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Head:
    """How a model turns last hidden states into logits over the real vocabulary, in at least float32.

    project    the model's output embedding: a Linear, or what PEFT or a quantiser made of it
    vocab      the tokenizer's size; padding columns past it are cut
    scale      logits are multiplied by it (Cohere's logit_scale, 1 / Granite's logits_scaling, ...)
    softcap    logits become softcap * tanh(logits / softcap) (Gemma 2)
    """

    def __init__(self, project: nn.Module, vocab: int, scale: float = 1.0, softcap: float | None = None):
        self.project, self.vocab, self.scale, self.softcap = project, vocab, scale, softcap

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, H]; equal to the model's own, but not rounded to its dtype."""
        project = self.project
        if type(project) is nn.Linear:
            logits_NV = _WideProduct.apply(hidden_NH, project.weight[: self.vocab])
            if project.bias is not None:
                logits_NV = logits_NV + project.bias[: self.vocab]
        else:  # with an adapter, or quantised
            weight = getattr(project, "weight", hidden_NH)
            if weight.is_floating_point():
                hidden_NH = hidden_NH.to(weight.dtype)
            logits_NV = widen(project(hidden_NH))[:, : self.vocab]
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.project.parameters() if p.requires_grad]


def widen(x: Tensor) -> Tensor:
    """float32 for half precision; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _WideProduct(torch.autograd.Function):
    """hidden @ weight.T with a float32 result of half-precision operands.

    Rounding the logits to bfloat16 would put 1 to 24 % of error into the gradient, most of it late in a
    distillation, when student and teacher nearly agree.
    """

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        if hidden_NH.dtype != weight_VH.dtype:
            hidden_NH = hidden_NH.to(weight_VH.dtype)
        if widen(weight_VH[:0]).dtype == weight_VH.dtype:
            return hidden_NH @ weight_VH.T
        if hidden_NH.is_cuda:
            return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32)
        out_NV = hidden_NH.new_empty(hidden_NH.shape[0], weight_VH.shape[0], dtype=torch.float32)
        wide_NH = hidden_NH.float()
        for columns in _blocks(weight_VH):  # a float32 copy of a block of the weight, never of all of it
            torch.mm(wide_NH, weight_VH[columns].float().T, out=out_NV[:, columns])
        return out_NV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NV: Tensor):
        hidden_NH, weight_VH = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if grad_NV.is_cuda or weight_VH.dtype == grad_NV.dtype:
            narrow_NV = grad_NV.to(weight_VH.dtype)
            if ctx.needs_input_grad[0]:
                grad_hidden = (narrow_NV @ weight_VH).to(hidden_NH.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = narrow_NV.T @ hidden_NH.to(weight_VH.dtype)
            return grad_hidden, grad_weight
        if ctx.needs_input_grad[0]:
            total_NH = torch.zeros_like(hidden_NH, dtype=grad_NV.dtype)
            for columns in _blocks(weight_VH):
                total_NH.addmm_(grad_NV[:, columns], weight_VH[columns].to(grad_NV.dtype))
            grad_hidden = total_NH.to(hidden_NH.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_NV.T @ hidden_NH.to(grad_NV.dtype)).to(weight_VH.dtype)
        return grad_hidden, grad_weight


def _blocks(weight_VH: Tensor, rows: int = 8192) -> list[slice]:
    return [slice(v, v + rows) for v in range(0, weight_VH.shape[0], rows)]
