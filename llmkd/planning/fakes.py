"""Fake tensors: llmkd's own code runs on tensors with shapes and dtypes but without values and memory, so a model of any size takes seconds.

Code that reads values cannot run on them and is replaced here by its usual result; with `gpu`, code that differs on a GPU is replaced, too.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from .. import batch, head
from ..batch import PackedLayout
from ..losses import fused, ratio
from ..models import activation_offload, attention, attention_taps, encoder_states, norms, startup_checks
from ..training import loop
from .live_memory import attention_flops, multiplied


@contextlib.contextmanager
def fake_tensors(gpu: bool) -> Iterator[None]:
    """Inside, every new tensor is a fake one, on the CPU. `gpu`: attention, norms and loss allocate what they allocate on a GPU."""
    changes = [
        (nn.Module, "_apply", _apply),
        (FakeTensor, "__deepcopy__", _copied),
        (loop, "read_step_metrics", lambda *_: ({}, {})),
        (fused, "log_backend", lambda how: None),
    ]
    changes += [(batch, "by_pattern", lambda none: {})]  # no target is left out
    changes += [(ratio, "in_range", lambda x_nV, mean_n1: True)]
    changes += [(loop, "read_masses", lambda masses, accelerator: dict.fromkeys(masses, 1.0))]
    # a family's layers are assumed to return what they should: the checks at the start of a run will see whether they do
    changes += [(module, "relative_gap", lambda these, those: 0.0) for module in (startup_checks, attention_taps)]
    changes += [(norms, "agrees", lambda module: True), (encoder_states, "key_of", _place), (encoder_states, "storage_bytes", _storages)]
    if gpu:
        from ..models import lora_product  # loads PEFT

        changes += [(norms, "on_gpu", lambda x: True), (lora_product, "_product", _wide_product)]
        changes += [(F, "rms_norm", _rms_norm(F.rms_norm))]
        changes += [(ratio, "applies", lambda *_: False), (activation_offload, "Kept", InHostMemory)]
        changes += [(F, "scaled_dot_product_attention", _sdpa(F.scaled_dot_product_attention))]
        changes += [(attention, "by_segment", _by_segment(attention.by_segment))]
        changes += [(head, "_product", _product), (head, "_product_back", _product_back), (head, "_add_outer", _add_outer)]
        if importlib.util.find_spec("triton"):
            from ..losses import kernels

            changes += [(fused, "kernels_run", lambda device: True), (kernels, "loss_and_grad", _kernel)]
    with contextlib.ExitStack() as stack:
        for owner, name, new in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _copied(self: Tensor, memo: dict) -> Tensor:
    """Replaces `Tensor.__deepcopy__`, which would access memory that fake tensors do not have; PEFT copies the modules that train in full."""
    with torch.no_grad():
        made = self.clone()
    return memo.setdefault(id(self), nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made)


def _place(inputs: dict[str, Tensor]) -> tuple:
    """Replaces a hash of inputs' values: their storages, which are the same for student and teacher."""
    return tuple((x.untyped_storage()._cdata, x.storage_offset()) for x in inputs.values())


def _storages(model: nn.Module) -> dict[int, int]:
    """Replaces `shared_weights.storage_bytes`, for storages without an address."""
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in model.parameters()}


def _apply(self: nn.Module, change, recurse: bool = True) -> nn.Module:
    """Replaces `Module._apply`, with new parameters: torch would swap fake ones in place, which PEFT's weak references to them prevent."""
    made: dict[int, nn.Parameter] = {}
    for module in self.modules() if recurse else (self,):
        for name, old in module._parameters.items():
            if old is not None:
                with torch.no_grad():
                    new = change(old)
                if new is not old:  # tied weights stay tied
                    module._parameters[name] = made.setdefault(id(old), nn.Parameter(new, requires_grad=old.requires_grad))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return self


class FlashAttention(torch.autograd.Function):
    """The memory of FlashAttention: it keeps queries, keys and values, the output, and a float32 for each query.

    query [B, heads, T, D]; keys and values [B, kv_heads, S, D]; the gradients have the same shapes. `share`: the share of all pairs of
    positions that belong to the same example.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, share: float) -> Tensor:
        ctx.share = share
        multiplied(round(share * attention_flops(query, key, 2)))
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, _, sums = ctx.saved_tensors
        multiplied(round(ctx.share * attention_flops(query, key, 5)))
        torch.empty_like(sums)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _sdpa(own):
    @functools.wraps(own)
    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        half = query.dtype in (torch.bfloat16, torch.float16)
        if half and attn_mask is None and query.shape[-1] == value.shape[-1] <= 256:
            return FlashAttention.apply(query, key, value, 1.0)
        return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return attend


def _by_segment(own):
    def attend(query, key, value, packed: PackedLayout, dropout: float, scale, groups: int, window: int | None) -> Tensor:
        half, D = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
        if half and not dropout and D == value.shape[-1] <= 256 and D % 8 == 0:
            share = sum(n * m for n, m in zip(packed.lengths, packed.kv_lengths, strict=True)) / (len(query) * len(key))
            q, k, v = (x.contiguous().transpose(0, 1)[None] for x in (query, key, value))
            return FlashAttention.apply(q, k, v, share)[0].transpose(0, 1)
        return own(query, key, value, packed, dropout, scale, groups, window)

    return attend


class RmsNorm(torch.autograd.Function):
    """The memory of a GPU's RMS norm kernel: it keeps its input and a float32 for each row, and allocates the output."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _rms_norm(own):
    def normed(x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)
        return RmsNorm.apply(x) if half and weight is None else own(x, shape, weight, eps)

    return normed


class InHostMemory(activation_offload.Kept):
    """An offloaded input on a GPU: it is not in GPU memory until the backward pass takes it, and then the one before it is being copied, too."""

    def __init__(self, x: Tensor, before: "InHostMemory | None", stream):
        super().__init__(torch.empty_like(x, device="meta"), before, None)
        self.device = x.device

    def fetch(self) -> None:
        if self.back is None:
            self.back = torch.empty_like(self.host, device=self.device)

    def take(self) -> Tensor:
        self.fetch()
        back, self.back = self.back, None
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        return back


def _kernel(objective, logits_nV, labels_n, grad_nV, teacher_nV, shares=None, weights=None) -> dict[str, Tensor]:
    """The memory of the Triton kernel: it writes the gradient over the logits, and allocates a number for each row and term."""
    names = ("ce",) if teacher_nV is None else ("ce", "kd")
    return {name: torch.empty(len(labels_n), dtype=torch.float32, device=logits_nV.device) for name in names}


def _product(hidden_NH: Tensor, weight_VH: Tensor, out: Tensor | None = None) -> Tensor:
    """`head._product` on a GPU: one kernel, whose result is at least float32."""
    N, (V, H) = len(hidden_NH), weight_VH.shape
    if hidden_NH.dtype != weight_VH.dtype:
        hidden_NH.to(weight_VH.dtype)
    multiplied(2 * N * V * H)
    return hidden_NH.new_empty(N, V, dtype=head.widen(weight_VH[:0]).dtype) if out is None else out


def _wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`lora_product._product` on a GPU: one kernel."""
    multiplied(2 * x.shape[0] * x.shape[1] * y.shape[1])
    return x.new_empty(x.shape[0], y.shape[1], dtype=dtype)


def _product_back(grad_NV: Tensor, weight_VH: Tensor, out_NH: Tensor) -> None:
    """`head._product_back` on a GPU, where the gradient has the weight's dtype."""
    if out_NH.dtype != weight_VH.dtype:
        torch.empty_like(out_NH, dtype=weight_VH.dtype)
    multiplied(2 * grad_NV.shape[0] * weight_VH.numel())


def _add_outer(total_VH: Tensor, grad_nV: Tensor, hidden_nH: Tensor, scale: float) -> None:
    """`head._add_outer` on a GPU, for blocks: for half precision each block's product is a separate tensor in the total's dtype."""
    if hidden_nH.dtype != total_VH.dtype:
        torch.empty(min(len(total_VH), head.BLOCK), total_VH.shape[1], dtype=total_VH.dtype, device=total_VH.device)
    multiplied(2 * grad_nV.shape[0] * total_VH.numel())
