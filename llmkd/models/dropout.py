"""Dropout for LoRA whose masks depend on the example, not on how a step is split into micro-batches, packed rows and ranks.

Whether an element is kept is a hash of its position's key (`View.keys`, made from seed, step, example and position), its module and its
feature. So a layer that is recomputed gets the same mask again, and nothing is drawn from torch's generator.
"""

import hashlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Rows, View

_LANE = 1 << 16  # one word of a hash decides two elements, with 16 bits for each
_GOLDEN, _FIRST, _SECOND = -0x61C88647, 0x7FEB352D, -0x7B935975  # odd int32 factors: 2^32 over the golden ratio, and Wellons' lowbias32


@dataclass
class _Computed:
    """The keys of the current forward pass.

    positions   [B * T] int32, of all positions
    rows        [N], of the view's rows, to which the last layer may be restricted
    chunk       those of the view's rows that the head is computing
    examples    [B] int32, one key for each example, if modules differ in their numbers of positions, like encoder and decoder
    """

    positions: Tensor | None = None
    rows: Tensor | None = None
    chunk: Rows | None = None
    examples: Tensor | None = None

    def of(self, n: int) -> Tensor | None:
        """The keys [n] of a module's n rows of inputs; None if they are none of these."""
        if self.examples is not None and self.chunk is None:
            return spread(self.examples, n // len(self.examples)) if n % len(self.examples) == 0 else None
        known = (self.positions, self.rows) if self.chunk is None or self.rows is None else (self.rows[self.chunk],)
        for keys in known:
            if keys is not None and len(keys) == n:
                return keys
        return None


#: Oddity: kept here and not on the modules, for the reason that `last_layer._ACTIVE` gives. The keys of a forward pass stay until the next one,
#: since the backward pass may recompute layers.
_COMPUTED: dict[int, _Computed] = {}
_NUMBERS = itertools.count()


class ExampleDropout(nn.Dropout):
    """Dropout of a module's inputs [..., F] by the keys of their positions.

    where   the module's name, on which its masks depend
    number  of the model's `DropoutMasks`

    Inputs that are neither all positions nor the view's rows nor a chunk of them, such as an expert's, get ordinary dropout.
    """

    def __init__(self, p: float, where: str, number: int):
        super().__init__(p)
        self.number = number
        self.key = int.from_bytes(hashlib.blake2b(where.encode(), digest_size=4).digest(), "big", signed=True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keys = _COMPUTED[self.number].of(x.numel() // x.shape[-1])
        return super().forward(x) if keys is None else drop(x, keys, self.key, self.p)


def drop(x: Tensor, keys: Tensor, key: int, p: float) -> Tensor:
    """Dropout of x [..., F] by the keys [n] of its n rows and the key of a module. p is rounded to 16 bits, and the scale follows the rounded p."""
    dropped = min(round(p * _LANE), _LANE - 1)
    mask = hashed(keys, key, x.shape[-1]) < dropped - _LANE // 2
    return x.masked_fill(mask.view(x.shape), 0).mul_(_LANE / (_LANE - dropped))


def hashed(keys: Tensor, key: int, features: int) -> Tensor:
    """Numbers [n, F], uniform over int16. A word for two features is the position's key xor theirs, mixed like Wellons' lowbias32: add the high
    bits and multiply, twice, then add the high bits."""
    pairs = torch.arange((features + 1) // 2, dtype=torch.int32, device=keys.device)
    words = keys[:, None] ^ _mix_(pairs * _GOLDEN + key)
    return _mix_(words).view(torch.int16)[:, :features]


def spread(keys_B: Tensor, positions: int) -> Tensor:
    """Keys [B * positions] of the positions of B examples, each a function of its example's key and its index only."""
    numbers = torch.arange(positions, dtype=torch.int32, device=keys_B.device)
    return _mix_(keys_B[:, None] ^ _mix_(numbers * _GOLDEN)).flatten()


def _mix_(words: Tensor) -> Tensor:
    words.add_(words >> 16)
    words.mul_(_FIRST)
    words.add_(words >> 15)
    words.mul_(_SECOND)
    return words.add_(words >> 16)


class DropoutMasks:
    """Sets the keys of a model's `ExampleDropout` modules before each pass."""

    def __init__(self, number: int):
        self.number = number

    def begin(self, view: View) -> None:
        """Called before a forward pass of the view. Without keys it gets random ones."""
        keys_BT = view.keys
        if keys_BT is None:
            keys_BT = torch.randint(-(1 << 31), 1 << 31, view.shape[:2], dtype=torch.int32, device=view.rows_N.device)
        computed = _COMPUTED[self.number]
        computed.positions = keys_BT.flatten()
        computed.rows, computed.chunk, computed.examples = computed.positions[view.rows_N], None, None

    def begin_examples(self, view: View) -> None:
        """As `begin`, for a view with one key per example, [B, 1], from which the keys of any number of positions follow."""
        keys_B1 = view.keys
        if keys_B1 is None:
            keys_B1 = torch.randint(-(1 << 31), 1 << 31, (view.B, 1), dtype=torch.int32, device=view.rows_N.device)
        computed = _COMPUTED[self.number]
        computed.examples, computed.positions, computed.chunk = keys_B1[:, 0], None, None
        computed.rows = spread(computed.examples, view.T)[view.rows_N]

    def choose(self, rows: Rows | None) -> None:
        """Called before the head computes these rows of the view, and with None afterwards."""
        _COMPUTED[self.number].chunk = rows


def dropout_masks_of(model: nn.Module) -> DropoutMasks | None:
    """The masks of a model with dropout in its adapters; None for any other."""
    found = next((one for one in model.modules() if isinstance(one, ExampleDropout)), None)
    return found and DropoutMasks(found.number)


def follow_examples(model: nn.Module) -> None:
    """Replace the dropout of a PEFT model's adapters by `ExampleDropout`."""
    number, base = next(_NUMBERS), model.get_base_model()
    _COMPUTED[number] = _Computed()
    for where, module in base.named_modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if type(dropout) is nn.Dropout:
                module.lora_dropout[name] = ExampleDropout(dropout.p, where, number).train(dropout.training)
