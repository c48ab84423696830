"""Computes the last layer at the target positions only: of all other positions nothing but keys and values is ever read."""

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..batch import View
from .activation_checkpointing import is_recomputed
from .families import layers_of
from .probe import hidden_and_gradients, probe_ids, relative_gap
from .sharding import all_agree

#: Modules of a layer whose output at a position depends on the input at that position only, [*, in] -> [*, out].
_POSITIONWISE = ("q_proj", "o_proj", "mlp")
#: Above this share of target positions, selecting them costs more than it saves.
_WORTH = 0.9


class _Active:
    """The positions to which the hooks of one last layer restrict the current pass; `rows_N` is None while they do nothing."""

    rows_N: Tensor | None = None
    ids_BT: Tensor | None = None
    fill = 0.0  # the value at positions that are not computed


#: Oddity: the hooks' state is kept here, by the number of their `LastLayer`, and not on that object. torch.compile treats values that a hook
#: reaches through a module or a closure as constants, and would compile the layer again for every batch; entries of a global dictionary are
#: inputs of the compiled code. Each model has its own entry, so that models on several threads do not interfere. An entry stays when its
#: model is deleted, since a deep copy of the model's modules has the same hooks; it holds no tensor outside of `at`.
_ACTIVE: dict[int, _Active] = {}
_NUMBERS = itertools.count()
#: The hooks that a transformers model already has: students on one base share them.
_HOOKED: "weakref.WeakKeyDictionary[nn.Module, LastLayer]" = weakref.WeakKeyDictionary()


class LastLayer:
    """Forward hooks that restrict q_proj, o_proj and the MLP of the last layer to the target positions.

    They do nothing outside `with at(view)`, so students that share the modules do not interfere. Each module reads only these rows,
    [1, N, in]; its output [1, N, out] is scattered into zeros [B, T, out].
    """

    def __init__(self, layer: nn.Module):
        self.modules, self._number = _positionwise(layer), next(_NUMBERS)
        self._active = _ACTIVE[self._number] = _Active()
        self._hooks = [
            hook
            for module in self.modules
            for hook in (
                module.register_forward_pre_hook(partial(_gather, self._number)),
                module.register_forward_hook(partial(_scatter, self._number)),
            )
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def at(self, view: View) -> Iterator[None]:
        """Inside, the last layer computes only the view's rows, unless these are none or nearly all positions."""
        ids_BT = view.inputs["input_ids"]
        if 0 < len(view.rows_N) <= _WORTH * ids_BT.numel():
            self._active.rows_N, self._active.ids_BT = view.rows_N, ids_BT
        try:
            yield
        finally:
            self._active.rows_N = self._active.ids_BT = None

    @contextlib.contextmanager
    def filled_with(self, value: float) -> Iterator[None]:
        """Inside, positions that are not computed have `value`."""
        self._active.fill = value
        try:
            yield
        finally:
            self._active.fill = 0.0


def _positionwise(layer: nn.Module) -> list[nn.Module]:
    return [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in _POSITIONWISE]


def _gather(number: int, module: nn.Module, args: tuple) -> tuple | None:
    active = _ACTIVE[number]
    if active.rows_N is None:
        return None
    x_BTC, *others = args
    if x_BTC.shape[:-1] != active.ids_BT.shape:
        raise ValueError(f"{type(module).__name__} reads {tuple(x_BTC.shape)}")
    return x_BTC.flatten(0, 1).index_select(0, active.rows_N)[None], *others


def _scatter(number: int, module: nn.Module, args: tuple, out_1NC: Tensor) -> Tensor | None:
    active = _ACTIVE[number]
    if active.rows_N is None:
        return None
    out = out_1NC.new_full((active.ids_BT.numel(), out_1NC.shape[-1]), active.fill)
    return out.index_copy_(0, active.rows_N, out_1NC.squeeze(0)).view(*active.ids_BT.shape, -1)  # torch.compile does not know unflatten


def at_rows(last: LastLayer | None, view: View) -> contextlib.AbstractContextManager:
    """`last.at(view)`; without effect for None."""
    return last.at(view) if last else contextlib.nullcontext()


def enable_if_exact(model, tolerance: float) -> LastLayer | None:
    """Put the hooks on a `LanguageModel`'s last layer; None if they change the model's results.

    Hidden states on a small batch, and gradients if the model trains, must agree within `tolerance` of the largest value. To prove that
    target positions do not depend on the skipped ones, the batch runs with the skipped positions filled with 0 and with 1; the outputs must
    be bitwise equal.
    """
    last, exact = put_on(model.base_model), False
    with contextlib.suppress(Exception):  # a module that returns a tuple, or reads another shape
        exact = last is not None and _is_exact(model, last, tolerance)
    return last if all_agree(model.model, exact) else None


def put_on(base: nn.Module) -> LastLayer | None:
    """The hooks on a transformers model's last layer; None if they cannot be used, or have no module to restrict."""
    layers = layers_of(base)
    in_8bit = getattr(base, "is_loaded_in_8bit", False)  # activations are quantised depending on the rest of the batch
    if layers is None or in_8bit or is_recomputed(layers[-1]):  # a backward pass recomputes outside of `at`
        return None
    last = _HOOKED.get(base)
    if last is None or list(map(id, last.modules)) != list(map(id, _positionwise(layers[-1]))):  # such as after merging an adapter
        if last:
            last.remove()
        last = _HOOKED[base] = LastLayer(layers[-1])
    return last if last.modules else None


def _is_exact(model, last: LastLayer, tolerance: float) -> bool:
    rows_N = torch.tensor([0, 3, 4, 7, 10, 14, 17, 22], device=model.device)
    view = View({"input_ids": probe_ids(model.head.vocab, model.device)}, rows_N)

    def results(hooks: LastLayer | None) -> list[Tensor]:
        return hidden_and_gradients(model.replaced(capabilities=dataclasses.replace(model.capabilities, last_layer=hooks)), view)

    whole, part = results(None), results(last)
    with last.filled_with(1.0):
        other = results(last)
    same_hidden = torch.equal(part[0], other[0]) and relative_gap(whole[:1], part[:1]) <= tolerance
    return same_hidden and relative_gap(whole[1:], part[1:]) <= 10 * tolerance
