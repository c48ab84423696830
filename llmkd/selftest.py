"""At the start of every run, on a few tokens: what llmkd assumes of a model, compared with what the model does.

Three assumptions: the logits are the head's on the hidden states of the body (else the model's own forward pass is
used), no position sees a later one (padding stands to the right, without a mask), and with packing no example sees
another in its row. The last depends on the family, its attention implementation and transformers' version.
"""

import contextlib
import math

import torch
from torch import Tensor

from .console import say
from .errors import UserError
from .signals import View

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(model, setting: str, packing: bool = False) -> None:
    """Compare what `models.LanguageModel` assumes; switch the model to its own forward pass where the head is not its own. UserError where it cannot be used."""
    family = model.plain.config.model_type
    with _quiet(model):
        try:
            ids_BT = (torch.arange(24, device=model.device).reshape(2, 12) * 7 + 3) % model.head.vocab
            own_NV = model.plain(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)[:, : model.head.vocab]
        except Exception as error:
            raise UserError(f"{setting}: {family} fails on a first small batch ({type(error).__name__}: {_first_line(error)})") from error
        size = own_NV.abs().max().item()
        if not math.isfinite(size):
            raise UserError(f"{setting}: its logits are not finite; its weights hold NaN or infinity, or its dtype is too narrow")
        limit = tolerance(model, own_NV.dtype) * max(size, 1e-3)
        try:
            gap = _gap(_logits(model, ids_BT), own_NV)
        except Exception:
            gap = math.inf
        if not gap <= limit:
            say(
                f"note: {setting}: llmkd does not know {family}'s head; the model's own forward pass is used, "
                "which is right and holds the logits of a whole micro-batch in memory"
            )
            model.use_own_forward()
            gap = _gap(_logits(model, ids_BT), own_NV)
            if not gap <= limit:
                raise UserError(f"{setting}: {family}'s logits differ between two passes by {gap:.2g} of {size:.2g}; it cannot be used")
        limit = max(limit, 1e-5 * size)  # some families compute their attention in float32, whatever they are held in
        _check_causal(model, ids_BT, limit, setting)
        if packing:
            _check_packing(model, ids_BT, limit, setting)


def tolerance(model, *dtypes: torch.dtype) -> float:
    """The gap, relative to the largest logit, that rounding alone may leave. An 8-bit model quantises its activations
    by what else is in the batch."""
    if getattr(model.plain, "is_loaded_in_8bit", False):
        return 0.2
    return max(_ROUNDING.get(dtype, 3e-2) for dtype in (model.dtype, *dtypes))


def _check_causal(model, ids_BT: Tensor, limit: float, setting: str) -> None:
    changed_BT = ids_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % model.head.vocab
    before = torch.arange(ids_BT.numel(), device=ids_BT.device).reshape(ids_BT.shape)[:, :-1].flatten()
    if not _gap(_logits(model, ids_BT)[before], _logits(model, changed_BT)[before]) <= limit:
        raise UserError(
            f"{setting}: {model.plain.config.model_type} lets a position see the tokens after it, so it is no causal language model "
            "(is_decoder may be false in its config.json)"
        )


def _check_packing(model, ids_BT: Tensor, limit: float, setting: str) -> None:
    """The second of two packed examples must not change with the first."""
    B, T = ids_BT.shape
    places_1T = torch.arange(T, device=ids_BT.device).repeat(B)[None]
    apart_NV = _logits(model, ids_BT)
    try:
        rows_N = torch.arange(B * T, device=ids_BT.device)
        hidden_NH = model.hidden(View({"input_ids": ids_BT.reshape(1, -1), "position_ids": places_1T}, rows_N))
        gap = _gap(model.head.logits(hidden_NH), apart_NV)
    except Exception as error:
        raise UserError(
            f"data.packing: {setting} ({model.plain.config.model_type}) takes no packed rows ({_first_line(error)}); set data.packing: false"
        ) from error
    if not gap <= limit:
        raise UserError(
            f"data.packing: in {setting} ({model.plain.config.model_type}) packed examples see one another: logits differ by {gap:.2g} "
            "from those of the same examples apart; set data.packing: false"
        )


def _logits(model, ids_BT: Tensor) -> Tensor:
    rows_N = torch.arange(ids_BT.numel(), device=ids_BT.device)
    return model.head.logits(model.hidden(View({"input_ids": ids_BT}, rows_N)))


def _gap(a_NV: Tensor, b_NV: Tensor) -> float:
    wide = torch.promote_types(a_NV.dtype, b_NV.dtype)
    return (a_NV.to(wide) - b_NV.to(wide)).abs().max().item()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


@contextlib.contextmanager
def _quiet(model):
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
