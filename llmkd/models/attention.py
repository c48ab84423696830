"""Variable-length attention for packed rows: work and memory depend on the examples' own lengths, not on the square of the row's length.

A packed row is a list of segments. A segment attends causally to itself and to all of its prefix segment, if it has one, so a prompt
prefix that several examples share is computed once (`batch.PackedLayout`).

On a GPU in half precision each layer makes one call of torch.nn.attention.varlen (FlashAttention); elsewhere one call of
scaled_dot_product_attention for each segment. Rows that are not packed use transformers' sdpa.
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..batch import PackedLayout
from ..console import warn
from ..errors import brief
from ..signals import AttentionInputs

NAME, OWN = "llmkd_varlen", "llmkd_own"
#: By module, the function that is called with the inputs and the output [B, T, heads, D] of each call of its attention. See `taps.watched`.
WATCHED: "weakref.WeakKeyDictionary[nn.Module, Callable[[AttentionInputs, Tensor], None]]" = weakref.WeakKeyDictionary()


def enable(model: nn.Module) -> bool:
    """Switch a transformers model to this attention. False for a model that has other layers than full or sliding-window attention."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    other = kinds or getattr(config, "attention_chunk_size", None) or config._attn_implementation not in ("sdpa", NAME)
    if other or not model._can_set_attn_implementation():
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def enable_own(model: nn.Module) -> bool:
    """Report the family's own eager attention to `WATCHED`, for a family with soft caps. False for any other family."""
    config, own = model.config.get_text_config(), _eager_of(model)
    if config._attn_implementation not in ("eager", OWN) or not getattr(config, "attn_logit_softcapping", None) or not own:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(OWN, own_attention)
    AttentionMaskInterface.register(OWN, eager_mask)
    model.set_attn_implementation(OWN)
    return True


def _eager_of(module: nn.Module) -> Callable | None:
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


@torch.compiler.disable
def own_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others) -> tuple:
    """The family's own eager attention, as transformers calls it."""
    out = _eager_of(module)(module, query, key, value, attention_mask, **others)
    if watching := WATCHED.get(module):
        if odd := [name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None]:
            raise NotImplementedError(f"{odd[0]} in its attention")
        scale = query.shape[-1] ** -0.5 if others.get("scaling") is None else float(others["scaling"])
        watching(AttentionInputs(query, key, value, scale, _window(module, others), others.get("softcap")), out[0])
    return out


def is_enabled(model: nn.Module) -> bool:
    return model.config.get_text_config()._attn_implementation == NAME


def disable(model: nn.Module) -> None:
    """Switch back to the attention before `enable`."""
    model.set_attn_implementation("sdpa")


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling=None,
    **others,
) -> tuple[Tensor, None]:
    """Called by transformers with query [B, heads, T, D], key and value [B, kv_heads, T, D]; returns [B, T, heads, D], and None for the weights.

    NotImplementedError for a family whose attention is more than a scaled softmax; the startup checks then keep its own attention.
    """
    watching = WATCHED.get(module)
    packed = getattr(attention_mask, "packed", None)
    if packed is not None or watching:
        if odd := [name for name in ("softcap", "s_aux", "position_bias", "head_mask") if others.get(name) is not None]:
            raise NotImplementedError(f"{odd[0]} in its attention")
        window = _window(module, others)
    if packed is not None:
        out = _packed_attention(query, key, value, packed, dropout, scaling, window)
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)[0]
    if watching:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        watching(AttentionInputs(query, key, value, scale, window), out)
    return out, None


def _packed_attention(query, key, value, packed: PackedLayout, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings make queries and keys float32, but not values
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]; the gradient of x[0] would be a copy
    if packed.kv_index is not None:
        key, value = (x.index_select(0, packed.kv_index) for x in (key, value))
    half, D = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    takes = query.is_cuda and half and not dropout and D == value.shape[-1] <= 256 and D % 8 == 0
    if takes and (way := one_call(query.device, window is not None)):
        return way(query, key, value, packed, scaling, groups, window)[None]
    return by_segment(query, key, value, packed, dropout, scaling, groups, window)[None]


def _window(module: nn.Module, others: dict) -> int | None:
    """The sliding window of a layer in tokens, the query's own included; None without one. If layers differ, each call must pass it."""
    config = module.config
    limited = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "sliding_window", None)
    if limited and getattr(config, "use_sliding_window", True) and "sliding_window" not in others:
        raise NotImplementedError("a sliding window that the call does not pass")
    return others.get("sliding_window")


def by_segment(query, key, value, packed: PackedLayout, dropout: float, scale: float | None, groups: int, window: int | None) -> Tensor:
    """Attention of queries [T, heads, D], by one scaled_dot_product_attention per segment. `groups`: query heads per key head."""
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts, out = (query.split(packed.lengths), key.split(packed.kv_lengths), value.split(packed.kv_lengths)), []
    for q, k, v in zip(*parts, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        n, m = q.shape[2], k.shape[2]
        plain = n == m and (window is None or n <= window)
        mask = None
        if not plain:
            back = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
            mask = (back >= 0) if window is None else (back >= 0) & (back < window)
        out.append(scaled_dot_product_attention(q, k, v, mask, dropout, plain, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


def flash_attention(
    query, key, value, packed: PackedLayout, scale: float | None, groups: int, window: int | None, repeat: bool = False
) -> Tensor:
    """As `by_segment`, by one FlashAttention kernel. With `repeat`, keys and values are repeated for each head instead of grouped."""
    from torch.nn.attention.varlen import varlen_attn

    if repeat and groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # torch 2.11 has the same kernel without this option
    grouped = {"enable_gqa": groups > 1 and not repeat} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    query, key, value = (x.contiguous() for x in (query, key, value))
    lengths = packed.cu_seqlens_q, packed.cu_seqlens_k, max(packed.lengths), max(packed.kv_lengths)
    window_size = (-1 if window is None else window - 1, 0)
    return varlen_attn(query, key, value, *lengths, scale=scale, window_size=window_size, **grouped)


@functools.cache
def one_call(device: torch.device, windowed: bool) -> Callable[..., Tensor] | None:
    """The form of `flash_attention` that is right on this device, or None; tried once per process."""
    return right_form(flash_attention, device, windowed)


def right_form(flash: Callable[..., Tensor], device: torch.device, windowed: bool) -> Callable[..., Tensor] | None:
    """`flash` with grouped heads, else with repeated keys and values, or None if neither is right on this device.

    Before its use it is compared with `by_segment`, forward and backward: versions of torch and devices differ in the head sizes that they
    accept, and in where the causal mask of a segment with more keys than queries begins.
    """
    packed = PackedLayout.of([20, 40, 7, 33], [-1, 0, 0, -1]).each(lambda x: x.to(device))
    generator = torch.Generator().manual_seed(0)
    sizes = ((packed.lengths, 4), (packed.kv_lengths, 2), (packed.kv_lengths, 2))
    tensors = [torch.randn(sum(n), heads, 64, generator=generator).to(device, torch.bfloat16) for n, heads in sizes]

    def outcome(way: Callable[..., Tensor], dtype: torch.dtype, *rest: float) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in tensors]
        with torch.enable_grad():
            out = way(*given, packed, *rest, None, 2, 9 if windowed else None)
            return [x.float() for x in (out, *torch.autograd.grad(out.float().square().sum(), given))]

    right = outcome(by_segment, torch.float32, 0.0)
    for repeat in (False, True):
        way = functools.partial(flash, repeat=repeat)
        try:
            if all((a - b).norm() < 0.03 * a.norm() for a, b in zip(right, outcome(way, torch.bfloat16), strict=True)):
                return way
            reason = "it does not agree with scaled_dot_product_attention"
        except Exception as error:
            reason = brief(error)
    warn(f"note: variable-length attention in one call is not used on {device} ({reason}); packed rows are slower, with the same results")
    return None
