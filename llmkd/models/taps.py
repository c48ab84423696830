"""Reads tensors inside a model during its ordinary forward pass: the hidden states between layers, and the inputs of attention."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..signals import AttentionInputs
from . import attention
from .families import layers_of


@contextlib.contextmanager
def tapped(model: nn.Module, layers: Iterable[int], rows_N: Tensor) -> Iterator[dict[int, Tensor]]:
    """A dictionary that a forward pass inside the context fills with the hidden states [N, H] at `rows_N` after each of `layers`.

    0 are the embeddings, as the first layer reads them; the last number is the output of the last layer, before the final norm
    (transformers' `hidden_states` have it after the norm). Gradients flow through them. Models with shared weights have their own modules,
    so passes do not interfere; a pass outside the context, such as the one that recomputes a layer, reads nothing.

    Oddity: it replaces torch's private attribute `_compiled_call_impl`, which a call of a module runs. So it stays outside of the compiled
    code: a hook would be compiled with the layer, and again for each batch.
    """
    modules, taken = layers_of(model) or (), {}
    wanted = {n: {number for number in (n, n + 1) if number in set(layers)} for n in range(len(modules))}
    before = {n: modules[n]._compiled_call_impl for n, numbers in wanted.items() if numbers - ({n} if n else set())}
    for n, compiled in before.items():
        run = compiled or modules[n]._call_impl
        modules[n]._compiled_call_impl = functools.partial(_call, run, taken, rows_N, n, wanted[n])
    try:
        yield taken
    finally:
        for n, compiled in before.items():
            modules[n]._compiled_call_impl = compiled


def _call(run, taken: dict[int, Tensor], rows_N: Tensor, n: int, wanted: set[int], *args, **kwargs):
    """Run layer `n` (from 0), and take its input as number 0 if that is wanted, and its output as number n + 1."""
    if n == 0 and 0 in wanted:
        _take(taken, 0, args[0] if args else kwargs["hidden_states"], rows_N)
    out = run(*args, **kwargs)
    if n + 1 in wanted:
        _take(taken, n + 1, out if isinstance(out, Tensor) else out[0], rows_N)
    return out


def _take(taken: dict[int, Tensor], number: int, hidden_BTH: Tensor, rows_N: Tensor) -> None:
    if number in taken:
        raise ValueError(f"layer {number} ran twice")
    # Activation checkpointing compares the tensors that a layer saves in both passes: keep these out of its hooks.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        taken[number] = hidden_BTH.flatten(0, 1).index_select(0, rows_N)


@contextlib.contextmanager
def attention_tapped(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, AttentionInputs]]:
    """A dictionary that a forward pass inside the context fills with the inputs of attention in each of `layers` (counted from 1).

    Gradients flow through them. They are the model's own tensors, and nothing is computed with them here, so that layers may be recomputed
    in the backward pass; that pass, outside the context, reads nothing.
    """
    taken: dict[int, AttentionInputs] = {}

    def keep(number: int, inputs: AttentionInputs, out: Tensor) -> None:
        if number in taken:
            raise NotImplementedError(f"layer {number} has attention twice")
        taken[number] = inputs

    with watched(model, layers, keep):
        yield taken


@contextlib.contextmanager
def watched(model: nn.Module, layers: Iterable[int], keep: Callable[[int, AttentionInputs, Tensor], None]) -> Iterator[None]:
    """Inside the context, `keep(number, inputs, output)` is called for every call of attention in one of `layers`."""
    modules = [(number, module) for number in layers for module in layers_of(model)[number - 1].modules()]
    for number, module in modules:
        attention.WATCHED[module] = lambda inputs, out, number=number: keep(number, inputs, out)
    try:
        yield
    finally:
        for _, module in modules:
            del attention.WATCHED[module]
