"""Checks at the start of every run: llmkd's assumptions about a model are compared with the model's own forward pass on a small batch.

There are three assumptions. The head applied to the body's last hidden states gives the model's logits; otherwise the model's own forward
pass is used. No position attends to a later one, since padding is on the right, without a mask. In a packed row no example attends to
another, which depends on the family, its attention implementation and the version of transformers.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import PackedLayout, View
from ..console import warn
from ..errors import UserError, brief
from ..signals import Taps
from . import attention
from .language_model import Capabilities, LanguageModel
from .last_layer import enable_if_exact
from .model import Model
from .outline import listed_layers, not_one_tensor
from .probe import evaluating, largest_difference, probe_ids, relative_gap

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(model: LanguageModel, setting: str, packing: int = 0, implementation: str = "auto") -> Capabilities:
    """The model's capabilities, found in eval mode; the model is left unchanged. UserError if it cannot be used.

    setting         the model's name in the recipe, for messages
    packing         the most tokens that a packed row may hold; 0 without packing
    implementation  the recipe's `attention`; llmkd's attention for packed rows is tried with "auto" only
    """
    family = model.base_model.config.model_type
    model.set_active_adapter()
    with evaluating(model):
        model = model.replaced(autocast=None)
        try:
            ids_BT = probe_ids(model.head.vocab, model.device)
            own_NV = model.model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)[:, : model.head.vocab]
        except Exception as error:
            raise UserError(
                f"{setting}: {family} fails on a first small batch ({brief(error)}); check its files, or use another model"
            ) from error
        size = own_NV.abs().max().item()
        if not math.isfinite(size):
            raise UserError(
                f"{setting}: its logits are not finite: its weights hold NaN or infinity, or its dtype is too narrow; load it in another dtype, or use other weights"
            )
        limit = tolerance(model, own_NV.dtype) * max(size, 1e-3)
        model = _with_known_head(model, ids_BT, own_NV, limit, setting)
        limit = max(limit, 1e-5 * size)  # some families compute attention in float32, whatever the dtype of their weights
        _check_causal(model, ids_BT, limit, setting)
        if packing:
            model = _with_packing(model, ids_BT, limit, setting, packing, implementation)
        return dataclasses.replace(model.capabilities, last_layer=enable_if_exact(model, tolerance(model)))


def _with_known_head(model: LanguageModel, ids_BT: Tensor, own_NV: Tensor, limit: float, setting: str) -> LanguageModel:
    """The model as it is if its head is known; otherwise with its own forward pass."""
    gap, failed = _gap_to(model, ids_BT, own_NV)
    if gap <= limit:
        return model
    family, size = model.base_model.config.model_type, own_NV.abs().max().item()
    model = model.replaced(capabilities=Capabilities(own_forward=True))
    gap, again = _gap_to(model, ids_BT, own_NV)
    if again:
        raise UserError(f"{setting}: {family} fails on a second small batch ({brief(failed or again)}); use another model")
    warn(
        f"note: {setting}: llmkd does not know {family}'s head; the model's own forward pass is used, "
        "which is exact but holds the logits of a whole micro-batch in memory"
    )
    if not gap <= limit:
        raise UserError(f"{setting}: {family}'s logits differ between two passes by {gap:.2g} of {size:.2g}; use another model")
    return model


def _gap_to(model: LanguageModel, ids_BT: Tensor, own_NV: Tensor) -> tuple[float, Exception | None]:
    """The largest difference between the head's logits and the model's own, and None; or infinity and the error that prevents a comparison."""
    try:
        return largest_difference(_logits(model, ids_BT), own_NV), None
    except Exception as error:
        return math.inf, error


def tolerance(model: LanguageModel, *dtypes: torch.dtype) -> float:
    """The largest difference that rounding may cause, relative to the largest logit.

    An 8-bit model quantises its activations depending on the rest of the batch, so its passes differ by far more.
    """
    if getattr(model.base_model, "is_loaded_in_8bit", False):
        return 0.2
    return max(_ROUNDING.get(dtype, 3e-2) for dtype in (model.dtype, *dtypes))


def _check_causal(model: LanguageModel, ids_BT: Tensor, limit: float, setting: str) -> None:
    changed_BT = ids_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % model.head.vocab
    before = torch.arange(ids_BT.numel(), device=ids_BT.device).reshape(ids_BT.shape)[:, :-1].flatten()
    if not largest_difference(_logits(model, ids_BT)[before], _logits(model, changed_BT)[before]) <= limit:
        raise UserError(
            f"{setting}: {model.base_model.config.model_type} lets a position see the tokens after it, so it is not a causal language model "
            "(is_decoder may be false in its config.json)"
        )


def _with_packing(model: LanguageModel, ids_BT: Tensor, limit: float, setting: str, tokens: int, implementation: str) -> LanguageModel:
    """The model with llmkd's attention in packed rows, if it is right for the model and the recipe names no other; else with its own."""
    which = f"{setting} ({model.base_model.config.model_type})"
    had_it = attention.is_enabled(model.base_model)  # for another student on the same base
    if implementation == "auto" and attention.enable(model.base_model):
        tried = model.replaced(capabilities=dataclasses.replace(model.capabilities, packed_attention=True))
        try:
            if not (_packing_problem(tried, ids_BT, limit, tokens, which) or _shared_prefix_differs(tried, ids_BT, limit)):
                return tried
        finally:
            if not had_it:
                attention.disable(model.base_model)
    if problem := _packing_problem(model, ids_BT, limit, tokens, which):
        raise UserError(f"data.packing: {problem}set data.packing: false")
    if implementation == "auto":
        warn(f"note: {which}: packed rows use its own attention, which may compute more pairs of tokens than are needed")
    return model


def _packing_problem(model: LanguageModel, ids_BT: Tensor, limit: float, tokens: int, which: str) -> str:
    """The reason why examples cannot be packed for the model, as the start of a sentence; "" if they can.

    Of two packed examples, the second must have the logits that it has alone, and must not change at all with the first. The tolerance for
    such leakage is the noise between two unpacked rows (8-bit models quantise activations per batch), which is far below the rounding
    between packed and unpacked rows; so small leaks are detected.
    """
    other_BT = torch.cat([ids_BT[:1].flip(1), ids_BT[1:]])
    second = slice(ids_BT.shape[1], None)
    try:
        packed_NV, changed_NV = (_logits(model, ids, packed=True) for ids in (ids_BT, other_BT))
    except Exception as error:
        return f"{which} does not accept packed rows ({brief(error)}); "
    apart_NV = _logits(model, ids_BT)
    noise = largest_difference(apart_NV[second], _logits(model, other_BT)[second])
    leak, gap = largest_difference(packed_NV[second], changed_NV[second]), largest_difference(packed_NV, apart_NV)
    if not (leak <= 3 * noise + 1e-6 * apart_NV.abs().max().item() and gap <= limit):
        return f"in {which} packed examples see one another: logits differ by {max(leak, gap):.2g} from those of the same examples apart; "
    T = ids_BT.shape[1]
    config = model.base_model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", None) and tokens >= (scale := getattr(config, "floor_scale", None) or 8192):
        return _too_long(which, scale - 1, tokens)  # from there on Llama 4's attention depends on the position in the row
    table = max((b.shape[-1] for b in model.base_model.buffers() if b.ndim > 1 and b.shape[-1] == b.shape[-2]), default=0)
    if tokens > table > 0:  # a family's own mask may be as long as the longest example
        long_BT = ids_BT[:1].repeat(table // T + 1, 1)
        try:
            gap = largest_difference(_logits(model, long_BT, packed=True)[-T:], apart_NV[:T])
        except Exception:
            gap = math.inf
        if not gap <= limit:
            return _too_long(which, table, tokens)
    return ""


def _too_long(which: str, most: int, tokens: int) -> str:
    return (
        f"in {which} a packed row may hold {most} tokens, but this run's rows may have {tokens} "
        "(train.micro_batch_size x data.max_length, or train.micro_batch_tokens); lower that, or "
    )


def _shared_prefix_differs(model: LanguageModel, ids_BT: Tensor, limit: float) -> bool:
    """Whether the logits of two examples with a common prefix change if the prefix is computed once for both."""
    T, P = ids_BT.shape[1], ids_BT.shape[1] // 2
    ids_BT = torch.cat([ids_BT[:1], torch.cat([ids_BT[:1, :P], ids_BT[1:, P:]], 1)])
    place = torch.arange(T, device=ids_BT.device)
    inputs = {"input_ids": torch.cat([ids_BT[0], ids_BT[1, P:]])[None], "position_ids": torch.cat([place, place[P:]])[None]}
    packed = PackedLayout.of([P, T - P, T - P], [-1, 0, 0], [-1, 0, 1]).each(lambda x: x.to(ids_BT.device))
    rows_N = torch.cat([place, place[:P], place[P:] + T - P])
    shared_NV = model.head.logits(model.hidden(View(inputs, rows_N, packed)))
    return not largest_difference(shared_NV, _logits(model, ids_BT)) <= limit


def _logits(model: LanguageModel, ids_BT: Tensor, packed: bool = False) -> Tensor:
    """Logits [B * T, V] at all positions, in the order of the rows; of separate rows, or of one packed row."""
    rows_N, inputs = torch.arange(ids_BT.numel(), device=ids_BT.device), {"input_ids": ids_BT}
    if not packed:
        return model.head.logits(model.hidden(View(inputs, rows_N)))
    B, T = ids_BT.shape
    inputs = {"input_ids": ids_BT.reshape(1, -1), "position_ids": torch.arange(T, device=ids_BT.device).repeat(B)[None]}
    layout = PackedLayout.of([T] * B).each(lambda x: x.to(ids_BT.device))
    return model.head.logits(model.hidden(View(inputs, rows_N, layout)))


def parameters_without_gradient(model: Model, setting: str, views: Sequence[View] = ()) -> list[str]:
    """Trainable parameters that get no gradient from one of `views`, by default a small batch and a single token. UserError if the backward
    pass fails."""
    if not views:
        ids_BT = probe_ids(model.head.vocab, model.device)
        views = [View({"input_ids": ids}, torch.arange(ids.numel(), device=ids.device)) for ids in (ids_BT, ids_BT[:1, :1])]
    out = {}
    for view in views:
        try:
            with torch.enable_grad():
                model.head.logits(model.hidden(view)).logsumexp(-1).sum().backward()
        except Exception as error:
            raise UserError(
                f"{setting}: {model.base_model.config.model_type} fails in a first backward pass ({brief(error)}), so it cannot be trained here; use another model"
            ) from error
        out |= {name: None for name, p in model.trainable().items() if p.grad is None}
        model.zero_grad(set_to_none=True)
    return list(out)


def layer_widths(model: LanguageModel, layers: Sequence[int], setting: str) -> dict[int, int]:
    """The width of the hidden states after each of `layers`, by number (`signals.Taps`), found on a small batch in eval mode.

    UserError for a layer that the model does not have, and for a family whose layers return something else than the model's hidden states
    in transformers.

    setting   the model's name in the recipe, for messages
    """
    which, modules = f"{setting} ({model.base_model.config.model_type})", listed_layers(model.base_model, setting)
    if beyond := [n for n in sorted(layers) if not 0 <= n <= len(modules)]:
        raise UserError(f"{which} has {len(modules)} layers: found layer {beyond[0]}, expected 0 (embeddings) to {len(modules)}")
    if not layers:
        return {}
    ids_BT = probe_ids(model.head.vocab, model.device)
    view = View({"input_ids": ids_BT}, torch.arange(ids_BT.numel(), device=ids_BT.device))
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        try:
            taken = model.replaced(autocast=None).outputs(view, Taps(frozenset(layers))).layers
            own = model.base_model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
            known = [hidden_BTH.flatten(0, 1) for hidden_BTH in own[: len(modules)]]  # the last one has passed the final norm
        except Exception as error:
            raise UserError(f"{which} returns no hidden states of its layers ({brief(error)}); use another model") from error
    for number in layers:
        hidden_NH = taken.get(number)
        gaps = [relative_gap([one], [hidden_NH]) for one in known if hidden_NH is not None and one.shape == hidden_NH.shape]
        checked = min(gaps, default=math.inf) <= tolerance(model) or number in (0, len(modules))  # some families do not list both ends
        if hidden_NH is None or hidden_NH.ndim != 2 or not checked:
            raise not_one_tensor(model.base_model, setting)
    return {number: hidden_NH.shape[-1] for number, hidden_NH in taken.items()}
