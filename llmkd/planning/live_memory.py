"""What is in memory while code runs, real or on fake tensors: the bytes of every storage from its first operation until it is freed."""

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class Phase:
    """A part of a step: its largest memory in bytes, what that consisted of, and its floating-point operations."""

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    flops: int = 0


class LiveMemory(TorchDispatchMode):
    """Counts every storage that an operation returns, until it is freed; those that were there before are told by `add`.

    What a kernel allocates for itself and frees before it returns is not seen.

    part      what new storages are counted as, until it is set to another
    phase     the name of what runs now, until it is set to another
    phases    what was in memory in each phase
    round_to  storages are rounded up to a multiple of so many bytes, as the allocator of CUDA does by 512
    """

    def __init__(self, round_to: int = 1):
        super().__init__()
        self.round_to, self.part, self.phase = round_to, "weights", "load"
        self.phases: dict[str, Phase] = {}
        self.now, self.parts = 0, Counter()
        self._held: dict[int, tuple[int, str]] = {}  # by the storage's address in C++: it stands for one storage as long as that lives

    def add(self, tensor: Tensor, part: str | None = None, elsewhere: bool = False) -> None:
        """Count a tensor's storage, unless it is counted already; as nothing if it is in another device's memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or tensor.device.type == "meta":
            return
        size = 0 if elsewhere else self._rounded(storage)
        self._held[key] = size, part or self.part
        weakref.finalize(storage, self._drop, key)
        self.now += size
        self.parts[part or self.part] += size
        self._note()

    def _note(self) -> None:
        phase = self.phases.setdefault(self.phase, Phase())
        if self.now > phase.peak:
            phase.peak, phase.parts = self.now, {name: size for name, size in self.parts.items() if size}

    def rename(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that is counted already as another part."""
        key = tensor.untyped_storage()._cdata
        if key in self._held:
            size, before = self._held[key]
            self._held[key] = size, part
            self.parts[before] -= size
            self.parts[part] += size

    def resized(self, tensor: Tensor) -> None:
        """A storage that is counted has been given memory, or its memory taken."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._held:
            before, part = self._held[storage._cdata]
            size = self._rounded(storage)
            self._held[storage._cdata] = size, part
            self.now += size - before
            self.parts[part] += size - before
            self._note()

    def _rounded(self, storage) -> int:
        return -(-storage.nbytes() // self.round_to) * self.round_to

    def _drop(self, key: int) -> None:
        size, part = self._held.pop(key)
        self.now -= size
        self.parts[part] -= size

    def enter(self, phase: str, part: str) -> None:
        """From now on `phase` runs, and new storages are counted as `part`."""
        self.phase, self.part = phase, part
        self._note()

    def forget(self) -> None:
        """Start the phases anew: what is in memory stays counted."""
        self.phases = {}

    def __enter__(self):
        _WATCHING.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _WATCHING.remove(self)
        return super().__exit__(*error)

    def multiplied(self, flops: int) -> None:
        """Count floating-point operations in the phase that runs."""
        self.phases.setdefault(self.phase, Phase()).flops += flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # half of all calls on fake tensors: they ask where they are
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := operations(func.overloadpacket):
            self.multiplied(count(args, kwargs, out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(local(leaf))
        return out


#: Those that are entered.
_WATCHING: list[LiveMemory] = []


def resized(tensor: Tensor) -> None:
    """Tell those that watch of a storage that was given or taken memory without an operation."""
    for one in _WATCHING:
        one.resized(tensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is in this process; it may have more memory than its rows, which are then fewer than another's."""
    return getattr(tensor, "_local_tensor", tensor)


def multiplied(flops: int) -> None:
    """Tell those that watch of operations that stand for a kernel which does not run here."""
    for one in _WATCHING:
        one.multiplied(flops)


@functools.cache
def operations(packet) -> Callable | None:
    """A function from an operation's arguments and its result to its floating-point operations; None for one that multiplies no matrices."""
    aten = torch.ops.aten
    if packet is aten.mm:  # a third argument is the type of the result
        return lambda args, kwargs, out: _product(*args[:2])
    if packet is aten.addmm_:
        return lambda args, kwargs, out: _product(*args[1:3])
    if packet is aten._scaled_mm:
        return lambda args, kwargs, out: _product(*args[:2])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return lambda args, kwargs, out: attention_flops(args[0], args[1], 2)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return lambda args, kwargs, out: attention_flops(args[1], args[2], 5)
    known = flop_registry.get(packet)
    return known and (lambda args, kwargs, out: known(*args, **kwargs, out_val=out))


def _product(a_MK: Tensor, b_KN: Tensor) -> int:
    return 2 * a_MK.shape[0] * a_MK.shape[1] * b_KN.shape[1]


def attention_flops(query: Tensor, key: Tensor, products: int) -> int:
    """Of causal attention [B, heads, T, D] that leaves out the half above the diagonal: 2 products forward, 5 backward (Dao 2023, arXiv:2307.08691)."""
    B, heads, T, D = query.shape
    return products * B * heads * T * key.shape[2] * D
