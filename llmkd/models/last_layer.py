"""The last layer only where a target is predicted: of every other position nothing is ever read but its keys and values."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..batch import View
from ..head import widen
from .activation_checkpointing import is_recomputed
from .families import layers_of
from .probe import probe_ids, relative_gap

#: Modules of a layer that need a position for that position's own result, [*, in] -> [*, out].
_OWN = ("q_proj", "o_proj", "mlp")
#: Above this share of supervised positions picking them out costs more than it saves.
_WORTH = 0.9


class _Active:
    """What the hooks are to do at the moment; a global, as torch.compile takes what hangs on a module for a constant."""

    rows_N: Tensor | None = None
    ids_BT: Tensor | None = None
    fill = 0.0


_ACTIVE = _Active()


class LastLayer:
    """Hooks on the last layer of one tree of modules; at rest outside of `at`, so that several students of the tree may have them.

    The modules get the rows alone, [1, N, in], and what they make of them, [1, N, out], is put into zeros [B, T, out].
    """

    def __init__(self, layer: nn.Module):
        self.modules = _own(layer)
        self.hooks = [
            hook for module in self.modules for hook in (module.register_forward_pre_hook(_gather), module.register_forward_hook(_scatter))
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @contextlib.contextmanager
    def at(self, view: View) -> Iterator[None]:
        """Until the end of it, only the view's rows, unless they are none or nearly all."""
        ids_BT = view.inputs["input_ids"]
        if 0 < len(view.rows_N) <= _WORTH * ids_BT.numel():
            _ACTIVE.rows_N, _ACTIVE.ids_BT = view.rows_N, ids_BT
        try:
            yield
        finally:
            _ACTIVE.rows_N = _ACTIVE.ids_BT = None


def _own(layer: nn.Module) -> list[nn.Module]:
    return [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in _OWN]


def _gather(module: nn.Module, args: tuple) -> tuple | None:
    if _ACTIVE.rows_N is None:
        return None
    x_BTC, *others = args
    if x_BTC.shape[:-1] != _ACTIVE.ids_BT.shape:
        raise ValueError(f"{type(module).__name__} reads {tuple(x_BTC.shape)}")
    return x_BTC.flatten(0, 1).index_select(0, _ACTIVE.rows_N)[None], *others


def _scatter(module: nn.Module, args: tuple, out_1NC: Tensor) -> Tensor | None:
    if _ACTIVE.rows_N is None:
        return None
    out = out_1NC.new_full((_ACTIVE.ids_BT.numel(), out_1NC.shape[-1]), _ACTIVE.fill)
    return out.index_copy_(0, _ACTIVE.rows_N, out_1NC.squeeze(0)).unflatten(0, _ACTIVE.ids_BT.shape)


def at_rows(last: LastLayer | None, view: View) -> contextlib.AbstractContextManager:
    return last.at(view) if last else contextlib.nullcontext()


def enable_if_exact(model, tolerance: float) -> None:
    """Set `model.last_layer`, if the model computes the same with it: on a small batch, in eval mode, and its gradients if it trains.

    That nothing at the rows depends on what the modules would say elsewhere is compared without rounding: with two fillings there.
    """
    model.last_layer = None
    layers = layers_of(model.base_model)
    in_8bit = getattr(model.base_model, "is_loaded_in_8bit", False)  # it rounds a position by what else is in the batch
    if layers is None or in_8bit or is_recomputed(layers[-1]):  # in the backward pass, when the rows are no longer known
        return
    last = getattr(model.base_model, "last_layer", None)
    if last is None or list(map(id, last.modules)) != list(map(id, _own(layers[-1]))):  # an adapter was merged, say
        if last:
            last.remove()
        last = model.base_model.last_layer = LastLayer(layers[-1])
    with contextlib.suppress(Exception):  # a module that gives a tuple, or reads something else
        if last.modules and _same(model, last, tolerance):
            model.last_layer = last


def _same(model, last: LastLayer, tolerance: float) -> bool:
    ids_BT = probe_ids(model.head.vocab, model.device)
    view = View({"input_ids": ids_BT}, torch.tensor([0, 3, 4, 7, 10, 14, 17, 22], device=model.device))
    parameters = list(model.trainable().values())

    def run(using: LastLayer | None, fill: float = 0.0) -> list[Tensor]:
        model.last_layer, _ACTIVE.fill = using, fill
        with torch.set_grad_enabled(bool(parameters)):
            hidden_NH = model.hidden(view)
            grads = torch.autograd.grad(widen(hidden_NH).cos().sum(), parameters, allow_unused=True) if parameters else ()
        return [hidden_NH.detach(), *(g for g in grads if g is not None)]

    try:
        whole, part, other = run(None), run(last), run(last, 1.0)
    finally:
        model.last_layer, _ACTIVE.fill = None, 0.0
    return (
        torch.equal(part[0], other[0])
        and relative_gap(whole[:1], part[:1]) <= tolerance
        and relative_gap(whole[1:], part[1:]) <= 10 * tolerance
    )
