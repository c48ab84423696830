"""At the start of every run, on a few tokens: what llmkd assumes of a model, compared with what the model does.

Three assumptions: the logits are the head's on the hidden states of the body (else the model's own forward pass is
used), no position sees a later one (padding stands to the right, without a mask), and with packing no example sees
another in its row. The last depends on the family, its attention implementation and transformers' version.
"""

import contextlib
import math

import torch
from torch import Tensor

from ..batch import PackedLayout, View
from ..console import info
from ..errors import UserError, brief
from . import attention as packed_attention
from .last_layer import enable_if_exact
from .probe import largest_difference, probe_ids

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(model, setting: str, packing: int = 0, attention: str = "auto") -> None:
    """Compare what `models.LanguageModel` assumes; switch the model to its own forward pass where the head is not its own.

    UserError where it cannot be used. `packing`: the most tokens that a packed row may hold, 0 without packing; it then gets llmkd's
    attention for such rows, unless `attention` is another.
    """
    family = model.base_model.config.model_type
    model.set_active_adapter()
    with _eval_no_grad(model):
        try:
            ids_BT = probe_ids(model.head.vocab, model.device)
            own_NV = model.model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)[:, : model.head.vocab]
        except Exception as error:
            raise UserError(f"{setting}: {family} fails on a first small batch ({brief(error)})") from error
        size = own_NV.abs().max().item()
        if not math.isfinite(size):
            raise UserError(f"{setting}: its logits are not finite; its weights hold NaN or infinity, or its dtype is too narrow")
        limit = tolerance(model, own_NV.dtype) * max(size, 1e-3)
        gap, failed = _gap_to(model, ids_BT, own_NV)
        if not gap <= limit:
            model.use_own_forward()
            gap, again = _gap_to(model, ids_BT, own_NV)
            if again:
                raise UserError(f"{setting}: {family} fails on a second small batch ({brief(failed or again)}); it cannot be used")
            info(
                f"note: {setting}: llmkd does not know {family}'s head; the model's own forward pass is used, "
                "which is right and holds the logits of a whole micro-batch in memory"
            )
            if not gap <= limit:
                raise UserError(f"{setting}: {family}'s logits differ between two passes by {gap:.2g} of {size:.2g}; it cannot be used")
        limit = max(limit, 1e-5 * size)  # some families compute their attention in float32, whatever they are held in
        _check_causal(model, ids_BT, limit, setting)
        if packing:
            _check_packing(model, ids_BT, limit, setting, packing, attention)
        enable_if_exact(model, tolerance(model))


def _gap_to(model, ids_BT: Tensor, own_NV: Tensor) -> tuple[float, Exception | None]:
    """How far the logits are from the model's own; or infinity, and why there are none."""
    try:
        return largest_difference(_logits(model, ids_BT), own_NV), None
    except Exception as error:
        return math.inf, error


def tolerance(model, *dtypes: torch.dtype) -> float:
    """The gap, relative to the largest logit, that rounding alone may leave. An 8-bit model quantises its activations
    by what else is in the batch."""
    if getattr(model.base_model, "is_loaded_in_8bit", False):
        return 0.2
    return max(_ROUNDING.get(dtype, 3e-2) for dtype in (model.dtype, *dtypes))


def _check_causal(model, ids_BT: Tensor, limit: float, setting: str) -> None:
    changed_BT = ids_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % model.head.vocab
    before = torch.arange(ids_BT.numel(), device=ids_BT.device).reshape(ids_BT.shape)[:, :-1].flatten()
    if not largest_difference(_logits(model, ids_BT)[before], _logits(model, changed_BT)[before]) <= limit:
        raise UserError(
            f"{setting}: {model.base_model.config.model_type} lets a position see the tokens after it, so it is no causal language model "
            "(is_decoder may be false in its config.json)"
        )


def _check_packing(model, ids_BT: Tensor, limit: float, setting: str, tokens: int, attention: str) -> None:
    """With llmkd's attention where that is right for the model and no other is asked for, or with the model's own."""
    which = f"{setting} ({model.base_model.config.model_type})"
    if attention == "auto" and packed_attention.enable(model.base_model):
        model.varlen = True
        if not (_problem_of_packing(model, ids_BT, limit, tokens, which) or _problem_of_sharing(model, ids_BT, limit)):
            return
        packed_attention.disable(model.base_model)
        model.varlen = False
    if problem := _problem_of_packing(model, ids_BT, limit, tokens, which):
        raise UserError(f"data.packing: {problem}set data.packing: false")
    if attention == "auto":
        info(f"note: {which}: its own attention is kept in packed rows, of whose pairs of tokens it may compute more than it needs")


def _problem_of_packing(model, ids_BT: Tensor, limit: float, tokens: int, which: str) -> str:
    """What is wrong with `which` model, if anything is. The second of two packed examples is what it is apart, and does not change at all with the first.

    "At all" is as exact as it is for two rows that cannot see each other: an 8-bit model rounds its activations by what
    else is in the batch. So a leak is found that is smaller than the rounding between packed and apart.
    """
    other_BT = torch.cat([ids_BT[:1].flip(1), ids_BT[1:]])
    second = slice(ids_BT.shape[1], None)
    try:
        packed_NV, changed_NV = (_logits(model, ids, packed=True) for ids in (ids_BT, other_BT))
    except Exception as error:
        return f"{which} takes no packed rows ({brief(error)}); "
    apart_NV = _logits(model, ids_BT)
    noise = largest_difference(apart_NV[second], _logits(model, other_BT)[second])
    leak, gap = largest_difference(packed_NV[second], changed_NV[second]), largest_difference(packed_NV, apart_NV)
    if not (leak <= 3 * noise + 1e-6 * apart_NV.abs().max().item() and gap <= limit):
        return f"in {which} packed examples see one another: logits differ by {max(leak, gap):.2g} from those of the same examples apart; "
    T = ids_BT.shape[1]
    config = model.base_model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", None) and tokens >= (scale := getattr(config, "floor_scale", None) or 8192):
        return _too_long(which, scale - 1, tokens)  # Llama 4's attention depends on the place in the row from there on
    table = max((b.shape[-1] for b in model.base_model.buffers() if b.ndim > 1 and b.shape[-1] == b.shape[-2]), default=0)
    if tokens > table > 0:  # a mask of its own may be as long as the longest example
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
        f"in {which} a packed row may hold {most} tokens, and this run's up to {tokens} "
        "(train.micro_batch_size x data.max_length, or train.micro_batch_tokens); lower that, or "
    )


def _problem_of_sharing(model, ids_BT: Tensor, limit: float) -> bool:
    """Whether two examples that share their first tokens are something else where these are computed once."""
    T, P = ids_BT.shape[1], ids_BT.shape[1] // 2
    ids_BT = torch.cat([ids_BT[:1], torch.cat([ids_BT[:1, :P], ids_BT[1:, P:]], 1)])
    place = torch.arange(T, device=ids_BT.device)
    inputs = {"input_ids": torch.cat([ids_BT[0], ids_BT[1, P:]])[None], "position_ids": torch.cat([place, place[P:]])[None]}
    packed = PackedLayout.of([P, T - P, T - P], [-1, 0, 0], [-1, 0, 1]).each(lambda x: x.to(ids_BT.device))
    rows_N = torch.cat([place, place[:P], place[P:] + T - P])
    return not largest_difference(model.head.logits(model.hidden(View(inputs, rows_N, packed))), _logits(model, ids_BT)) <= limit


def _logits(model, ids_BT: Tensor, packed: bool = False) -> Tensor:
    rows_N, view = torch.arange(ids_BT.numel(), device=ids_BT.device), {"input_ids": ids_BT}
    if not packed:
        return model.head.logits(model.hidden(View(view, rows_N)))
    B, T = ids_BT.shape
    inputs = {"input_ids": ids_BT.reshape(1, -1), "position_ids": torch.arange(T, device=ids_BT.device).repeat(B)[None]}
    layout = PackedLayout.of([T] * B).each(lambda x: x.to(ids_BT.device))
    return model.head.logits(model.hidden(View(inputs, rows_N, layout)))


def parameters_without_gradient(model, setting: str) -> list[str]:
    """Trainable parameters that a small batch, or a single token, gives no gradient. UserError where there is no backward pass."""
    ids_BT = probe_ids(model.head.vocab, model.device)
    out = {}
    for batch_BT in (ids_BT, ids_BT[:1, :1]):
        try:
            with torch.enable_grad():
                _logits(model, batch_BT).logsumexp(-1).sum().backward()
        except Exception as error:
            raise UserError(f"{setting}: {model.base_model.config.model_type} fails in a first backward pass ({brief(error)})") from error
        out |= {name: None for name, p in model.trainable().items() if p.grad is None}
        model.zero_grad(set_to_none=True)
    return list(out)


@contextlib.contextmanager
def _eval_no_grad(model):
    """Eval mode without gradients or autocast, and back."""
    was_training, autocast = model.training, model.autocast
    model.eval()
    model.autocast = None
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        model.autocast = autocast
