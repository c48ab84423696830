"""Dropout of LoRA whose masks follow the example: how a step is cut into micro-batches, packed rows and ranks does not change them.

Whether an element is kept is a hash of its position's key (`View.keys`, which holds seed, step, example and position), of its module and of
its feature. So a layer that is recomputed has its mask again, and nothing is drawn from torch's generator.
"""

import hashlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Rows, View

_LANE = 1 << 16  # one word of a hash decides two elements, each by a number of 16 bits
_GOLDEN, _FIRST, _SECOND = -0x61C88647, 0x7FEB352D, -0x7B935975  # odd int32 factors: 2^32 over the golden ratio, and Wellons' lowbias32


@dataclass
class _Computed:
    """The keys of what is computed at the moment."""

    positions: Tensor | None = None  # [B * T] int32: all positions
    rows: Tensor | None = None  # [N]: the view's rows, which the last layer computes alone
    chunk: Rows | None = None  # those of the view's rows that the head computes at the moment
    examples: Tensor | None = None  # [B] int32: one key for each, where modules have several numbers of positions, as encoder and decoder

    def of(self, n: int) -> Tensor | None:
        """Of a module's n rows of inputs; None where they are none of these."""
        if self.examples is not None and self.chunk is None:
            return spread(self.examples, n // len(self.examples)) if n % len(self.examples) == 0 else None
        known = (self.positions, self.rows) if self.chunk is None or self.rows is None else (self.rows[self.chunk],)
        for keys in known:
            if keys is not None and len(keys) == n:
                return keys
        return None


#: Oddity: here and not on the modules, for the reason that `last_layer._ACTIVE` gives. What a forward pass leaves stands until the next one,
#: since the backward pass recomputes layers.
_COMPUTED: dict[int, _Computed] = {}
_NUMBERS = itertools.count()


class ExampleDropout(nn.Dropout):
    """Dropout of a module's inputs [..., F] by the keys of their positions.

    where   the module's name, of which its masks are a function
    number  of the model's `DropoutMasks`

    Inputs that are neither all positions nor the view's rows nor a chunk of them (an expert's, say) get ordinary dropout.
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
    """Dropout of x [..., F] by the keys [n] of its n rows and the key of a module. p is rounded to 16 bits, and the scale is that of the rounded p."""
    dropped = min(round(p * _LANE), _LANE - 1)
    mask = hashed(keys, key, x.shape[-1]) < dropped - _LANE // 2
    return x.masked_fill(mask.view(x.shape), 0).mul_(_LANE / (_LANE - dropped))


def hashed(keys: Tensor, key: int, features: int) -> Tensor:
    """Numbers [n, F], uniform over int16: a word is that of the position, xor that of two features, mixed in the
    manner of lowbias32: add the high bits, multiply, twice, and add them."""
    pairs = torch.arange((features + 1) // 2, dtype=torch.int32, device=keys.device)
    words = keys[:, None] ^ _mix_(pairs * _GOLDEN + key)
    return _mix_(words).view(torch.int16)[:, :features]


def spread(keys_B: Tensor, positions: int) -> Tensor:
    """Keys of the positions of B examples [B * positions], each a function of its example's key and its number alone."""
    numbers = torch.arange(positions, dtype=torch.int32, device=keys_B.device)
    return _mix_(keys_B[:, None] ^ _mix_(numbers * _GOLDEN)).flatten()


def _mix_(words: Tensor) -> Tensor:
    words.add_(words >> 16)
    words.mul_(_FIRST)
    words.add_(words >> 15)
    words.mul_(_SECOND)
    return words.add_(words >> 16)


class DropoutMasks:
    """What a model's `ExampleDropout` modules are told before they compute."""

    def __init__(self, number: int):
        self.number = number

    def begin(self, view: View) -> None:
        """A forward pass of the view begins. Without keys it has random ones."""
        keys_BT = view.keys
        if keys_BT is None:
            keys_BT = torch.randint(-(1 << 31), 1 << 31, view.shape[:2], dtype=torch.int32, device=view.rows_N.device)
        computed = _COMPUTED[self.number]
        computed.positions = keys_BT.flatten()
        computed.rows, computed.chunk, computed.examples = computed.positions[view.rows_N], None, None

    def begin_examples(self, view: View) -> None:
        """The same where the view has one key for each example [B, 1], from which those of any number of positions follow."""
        keys_B1 = view.keys
        if keys_B1 is None:
            keys_B1 = torch.randint(-(1 << 31), 1 << 31, (view.B, 1), dtype=torch.int32, device=view.rows_N.device)
        computed = _COMPUTED[self.number]
        computed.examples, computed.positions, computed.chunk = keys_B1[:, 0], None, None
        computed.rows = spread(computed.examples, view.T)[view.rows_N]

    def choose(self, rows: Rows | None) -> None:
        """The head computes those of the view's rows next; None: it is done."""
        _COMPUTED[self.number].chunk = rows


def dropout_masks_of(model: nn.Module) -> DropoutMasks | None:
    """Those of a model with dropout in its adapters; None for another."""
    found = next((one for one in model.modules() if isinstance(one, ExampleDropout)), None)
    return found and DropoutMasks(found.number)


def follow_examples(model: nn.Module) -> None:
    """Replace the dropout of a PEFT model's adapters."""
    number, base = next(_NUMBERS), model.get_base_model()
    _COMPUTED[number] = _Computed()
    for where, module in base.named_modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if type(dropout) is nn.Dropout:
                module.lora_dropout[name] = ExampleDropout(dropout.p, where, number).train(dropout.training)
