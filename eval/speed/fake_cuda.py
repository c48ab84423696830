"""A step of the training loop on fake CUDA tensors, where there is no GPU: the code that a GPU runs, with its types and arguments, without values.

`install()` comes before torch is imported; `fake_cuda()` then is as `planning.fakes.fake_tensors`, on the device "cuda". Of what a GPU
runs only the launch of the Triton kernel is replaced, by a check of its arguments, and what reads a value.
"""

import contextlib
import ctypes
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".cpp")
_LIBRARIES: list = []  # what is registered there lives as long as these


def install(folder: Path) -> None:
    """Build what a CPU-only PyTorch lacks into the folder, unless it is there, and load it. RuntimeError after torch."""
    if "torch" in sys.modules:
        raise RuntimeError("fake_cuda.install() comes before torch is imported")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    built = folder / "fake_cuda.so"
    if not built.exists():
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
        subprocess.run(["g++", *flags, str(_SOURCE), "-lc10", "-ltorch_cpu", "-o", str(built)], check=True)
    if not ctypes.CDLL(str(built)).install():
        raise RuntimeError("PyTorch does not take the hooks of fake_cuda.cpp")
    import torch

    # without a CUDA kernel PyTorch would compose it of others
    _LIBRARIES.append(torch.library.Library("aten", "IMPL"))
    _LIBRARIES[-1].impl("silu_backward", lambda grad, x: torch.empty_like(grad), "CUDA")


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, new tensors are fake ones on a GPU."""
    import torch
    from torch.nn import functional as F

    from llmkd.losses import fused, kernels
    from llmkd.models import attention
    from llmkd.planning.fakes import fake_tensors
    from llmkd.training import step_result

    changes = [(F, "scaled_dot_product_attention", _sdpa(F.scaled_dot_product_attention))]
    # which form of FlashAttention is right, and whether the kernel agrees with PyTorch, is seen by values
    changes += [(attention, "one_call", lambda device, windowed: functools.partial(attention.flash_attention, repeat=False))]
    changes += [(F, "rms_norm", _rms_norm(F.rms_norm))]
    changes += [(fused, "kernels_run", lambda device: True), (kernels, "rows_kernel", _Launches(kernels.rows_kernel))]
    changes += [(step_result, "torch", _Unpinned(torch))]
    changes += [(torch.cuda, "is_bf16_supported", lambda: True), (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)]
    with contextlib.ExitStack() as stack:
        for owner, name, new in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        stack.enter_context(fake_tensors(False))
        stack.enter_context(torch.device("cuda"))
        yield


def _sdpa(own):
    """PyTorch's choice on a GPU: FlashAttention in half precision without a mask, else the memory-efficient kernel. On fake tensors it
    would multiply out the whole matrix."""
    import torch

    aten, half = torch.ops.aten, (torch.bfloat16, torch.float16)

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not query.is_cuda or query.dtype == torch.float64:
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.dtype in half and attn_mask is None and query.shape[-1] == value.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]

    return attend


def _rms_norm(own):
    """One kernel forward and one backward. Compiled code makes its own of it."""
    import torch

    from llmkd.planning.fakes import RmsNorm

    class Told(RmsNorm):
        @staticmethod
        def forward(ctx, x):
            out = RmsNorm.forward(ctx, x)
            _tell("_fused_rms_norm", [x], [out])
            return out

        @staticmethod
        def backward(ctx, grad):
            x, _ = ctx.saved_tensors  # once: activation checkpointing allows no second time
            found = torch.empty_like(x)
            _tell("_fused_rms_norm_backward", [grad, x], [found])
            return found

    def normed(x, shape, weight=None, eps=None):
        known = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight is None
        return Told.apply(x) if known and not torch.compiler.is_compiling() else own(x, shape, weight, eps)

    return normed


#: What the kernel is compiled for (`tests/losses/test_kernels.py`), by argument; `None`: any.
_TYPES = {"logits": "float32", "teacher": "float32", "labels": "int64", "ce": "float32", "kd": "float32"}


#: Told of each launch: name, what it reads, what it writes.
WATCHING: list[Callable[[str, list, list], None]] = []


class _Launches:
    """Stands for the Triton kernel: the arguments of a launch are held to its signature."""

    def __init__(self, kernel):
        self.names = kernel.arg_names

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *args, num_warps: int, **constants) -> None:
        given = dict(zip(self.names, args, strict=False)) | constants
        assert given.keys() == set(self.names), given.keys() ^ set(self.names)
        rows, columns = grid[0], given["V"]
        for name in ("logits", "teacher", "grad"):
            x = given[name]
            assert x.is_cuda and x.shape == (rows, columns) and x.stride(1) == 1 and x.stride(0) == given[f"{name}_stride"], (name, x)
        assert given["grad"].dtype in _gradients(), given["grad"].dtype
        for name in ("labels", "ce", "kd", "ce_weights", "kd_weights"):
            assert given[name].is_cuda and given[name].shape == (rows,) and given[name].is_contiguous(), name
        for name, dtype in _TYPES.items():
            assert str(given[name].dtype) == f"torch.{dtype}", (name, given[name].dtype)
        _tell("triton rows_kernel", [given["logits"], given["teacher"]], [given["grad"]])


def _tell(name: str, read: list, written: list) -> None:
    for tell in WATCHING:
        tell(name, read, written)


def _gradients() -> tuple:
    import torch

    return torch.float32, torch.bfloat16, torch.float16


class _Unpinned:
    """torch, less what fake tensors cannot: pinned memory and events."""

    class _Event:
        def record(self) -> None:
            pass

    class cuda:
        Event = None

    def __init__(self, torch):
        self._torch = torch
        self.cuda.Event = self._Event

    def __getattr__(self, name: str):
        return getattr(self._torch, name)

    def empty(self, *args, pin_memory: bool, **options):
        return self._torch.empty(*args, device="cpu", **options)
