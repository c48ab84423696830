"""Keeps the inputs of recomputed layers in the host's memory between forward and backward pass.

Activation checkpointing keeps one tensor per layer, its input. For a row of 32k tokens and a model with 32 layers, 4,096 wide, in 16 bit,
these take 8.6 GB. On a GPU they are copied to pinned memory and back on their own stream, the next one while a layer is recomputed. On a
CPU, where this saves nothing, they are copied too, so that the code can be tested. It has not run on a GPU yet.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Kept:
    """One tensor in the host's memory. `before`: the tensor that was kept before it, which the backward pass needs next."""

    def __init__(self, x: Tensor, before: "Kept | None", stream: "torch.cuda.Stream | None"):
        self.device, self.stream, self.back = x.device, stream, None
        self.before = None if before is None else weakref.ref(before)
        if stream is None:
            self.host = x.detach().clone()
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x.detach(), non_blocking=True)
        x.record_stream(stream)  # its memory is not reused before the copy is done

    def fetch(self) -> None:
        """Start copying it back."""
        if self.stream is not None and self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor on its device; starts copying back the one before it."""
        if self.stream is None:
            return self.host
        self.fetch()
        present = torch.cuda.current_stream(self.device)
        present.wait_stream(self.stream)
        back, self.back = self.back, None
        back.record_stream(present)
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        return back


class Offload:
    """Keeps the tensors that checkpointing of a model's layers saves: `pack` and `unpack` are for `saved_tensors_hooks`."""

    def __init__(self):
        self._newest: weakref.ref[Kept] | None = None
        self._stream: torch.cuda.Stream | None = None

    def pack(self, x: Tensor) -> "Kept | Tensor":
        if isinstance(x, nn.Parameter) or not x.is_floating_point() or not x.numel():
            return x
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        kept = Kept(x, self._newest and self._newest(), self._stream if x.is_cuda else None)
        self._newest = weakref.ref(kept)
        return kept

    def unpack(self, kept: "Kept | Tensor") -> Tensor:
        return kept.take() if isinstance(kept, Kept) else kept

    def around(self, checkpoint: Callable) -> Callable:
        """transformers' checkpointing function, (function, *inputs), changed to keep its inputs here; not the tensors that a recomputed layer saves."""

        def checkpointed(function: Callable, *inputs):
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return checkpoint(function, *inputs)

        return checkpointed
