"""Tracks memory while code runs on real or fake tensors: the bytes of every storage, from the operation that returns it until it is freed."""

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
    """A phase of a step: its peak memory in bytes, the parts of that peak, and its floating-point operations."""

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    flops: int = 0


class LiveMemory(TorchDispatchMode):
    """Counts every storage that an operation returns, until it is freed; `add` counts storages that existed before.

    Memory that a kernel allocates and frees before it returns is not seen.

    part      the part to which new storages are counted
    phase     the name of the current phase
    phases    memory and operations of each phase
    round_to  storages are rounded up to a multiple of so many bytes; CUDA's allocator rounds to 512
    """

    def __init__(self, round_to: int = 1):
        super().__init__()
        self.round_to, self.part, self.phase = round_to, "weights", "load"
        self.phases: dict[str, Phase] = {}
        self.now, self.parts = 0, Counter()
        self._held: dict[int, tuple[int, str]] = {}  # by the storage's address in C++, which is unique while it lives

    def add(self, tensor: Tensor, part: str | None = None, elsewhere: bool = False) -> None:
        """Count a tensor's storage, unless it is counted already; as 0 bytes if it is on another device (`elsewhere`)."""
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
        """Move a tensor that is counted already to another part."""
        key = tensor.untyped_storage()._cdata
        if key in self._held:
            size, before = self._held[key]
            self._held[key] = size, part
            self.parts[before] -= size
            self.parts[part] += size

    def resized(self, tensor: Tensor) -> None:
        """Called when a counted storage got memory or lost it."""
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
        """Begin `phase`, in which new storages are counted to `part`."""
        self.phase, self.part = phase, part
        self._note()

    def forget(self) -> None:
        """Drop the phases so far. Storages stay counted."""
        self.phases = {}

    def __enter__(self):
        _WATCHING.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _WATCHING.remove(self)
        return super().__exit__(*error)

    def multiplied(self, flops: int) -> None:
        """Count floating-point operations in the current phase."""
        self.phases.setdefault(self.phase, Phase()).flops += flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # a fast path: half of all calls on fake tensors ask for their device
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := operations(func.overloadpacket):
            self.multiplied(count(args, kwargs, out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(local(leaf))
        return out


#: The `LiveMemory` contexts that are entered.
_WATCHING: list[LiveMemory] = []


def resized(tensor: Tensor) -> None:
    """Report to all active contexts that a storage got or lost memory without an operation."""
    for one in _WATCHING:
        one.resized(tensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor. Its storage may be larger than its rows, if other processes have more rows."""
    return getattr(tensor, "_local_tensor", tensor)


def multiplied(flops: int) -> None:
    """Report to all active contexts the operations of a kernel that does not run here."""
    for one in _WATCHING:
        one.multiplied(flops)


@functools.cache
def operations(packet) -> Callable | None:
    """The function that counts an operation's floating-point operations from its arguments and result; None for one without matrix products."""
    aten = torch.ops.aten
    if packet is aten.mm:  # a third argument is the dtype of the result
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
    """Floating-point operations of causal attention [B, heads, T, D] that skips the half above the diagonal: 2 products forward, 5 backward (Dao
    2023, arXiv:2307.08691)."""
    B, heads, T, D = query.shape
    return products * B * heads * T * key.shape[2] * D
