"""Keeps the states of a frozen encoder by their inputs: they are computed once for all epochs, and for a teacher with the same encoder."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

from ..console import info
from .encoder_decoder import EncoderDecoder
from .shared_weights import storage_bytes


class EncoderStates:
    """The states [S, H] of at most `most` examples in the host's memory (`kept`, by `key_of`); the least recently used are dropped.

    Each example is encoded alone, so that its states do not depend, even by rounding, on the rest of its batch.
    """

    def __init__(self, most: int):
        self.most, self.kept = most, OrderedDict()

    def __call__(self, inputs: dict[str, Tensor], encode: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """States [B, S, H] of inputs [B, ...] without padding."""
        names, out = sorted(inputs), []
        for b in range(len(inputs[names[0]])):
            one = {name: inputs[name][b : b + 1] for name in names}
            key = key_of(one)
            if key not in self.kept:
                self.kept[key] = encode(one)[0].cpu()
            self.kept.move_to_end(key)
            out.append(self.kept[key].to(inputs[names[0]].device))
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return torch.stack(out)


def key_of(inputs: dict[str, Tensor]) -> Hashable:
    """A hash of the inputs' values."""
    return hashlib.blake2b(b"".join(x.cpu().contiguous().view(torch.uint8).numpy().tobytes() for x in inputs.values())).digest()


def keep_states(students: Iterable[EncoderDecoder], teachers: Iterable[tuple[str, EncoderDecoder]], most: int) -> None:
    """Let students with a frozen encoder keep its states, and let teachers whose encoder has the same weights in memory use them, too.

    teachers  (setting, teacher) of each
    """
    students = list(students)
    first, states = students[0], EncoderStates(most)
    for student in students:
        student.states = states
    for setting, teacher in teachers:
        if isinstance(teacher, EncoderDecoder) and _same_encoder(first, teacher):
            teacher.states = states
            info(f"{setting}: its encoder is the student's, so its states are computed once for both")


def _same_encoder(one: EncoderDecoder, other: EncoderDecoder) -> bool:
    """Whether two encoders are frozen and compute the same: same weights in memory, same modules, same autocast."""
    a, b = (model.base_model.get_encoder() for model in (one, other))
    same = storage_bytes(a) == storage_bytes(b) and _modules(a) == _modules(b)
    return same and one.autocast == other.autocast and not one.encoder_trains and not other.encoder_trains


def _modules(module: nn.Module) -> list[str]:
    return [f"{name} {type(one).__name__}" for name, one in module.named_modules()]
