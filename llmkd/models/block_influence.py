"""Block influence (ShortGPT, arXiv 2403.03853): how much each layer of a model changes the hidden states. Layers are chosen by it."""

import contextlib
import functools

import torch
from torch import Tensor, nn

from .families import decoder_of, layers_of


def block_influence(model: nn.Module, examples: list[Tensor]) -> list[float]:
    """For each layer l: 1 - the mean over all tokens of cos(x_l, x_l+1), with its input x_l and its output x_l+1 (ShortGPT, equation 1).

    examples  token ids [T] of each; one forward pass for each, so that neither padding nor other examples matter
    """
    layers = layers_of(model)
    sums, tokens = [0.0] * len(layers), 0

    def measure(number: int, layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        sums[number] += torch.cosine_similarity(before.double(), after.double(), dim=-1).sum().item()

    with contextlib.ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(functools.partial(measure, number), with_kwargs=True).remove)
        for ids_T in examples:
            decoder_of(model)(input_ids=ids_T[None].to(next(model.parameters()).device), use_cache=False)
            tokens += len(ids_T)
    return [1 - total / tokens for total in sums]


def most_influential(influence: list[float], count: int) -> tuple[int, ...]:
    """The indices of the `count` layers with the largest block influence, in ascending order; of equal ones the earlier."""
    return tuple(sorted(sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:count]))
