"""Inputs of recomputed layers in the host's memory between forward and backward pass.

Activation checkpointing keeps one tensor a layer, its input. Of a row of 32k tokens those of a model of 32 layers, 4,096 wide, in 16 bit are
8.6 GB. On a GPU they are copied to pinned memory and back on a stream of their own, the next one while a layer is recomputed. On a CPU,
where nothing is saved by it, they are copied too, so that what a GPU does can be tried. It has not run on a GPU yet.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Kept:
    """One tensor in the host's memory. `before`: the one that was kept before it, which the backward pass wants next."""

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
        x.record_stream(stream)  # its memory is not used again before it is copied

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self.stream is not None and self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor on its device, and the one before it on its way there."""
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
    """Keeps what the checkpointing of a model's layers saves: a function for `saved_tensors_hooks` and its inverse."""

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
        """A checkpointing function of transformers, (function, *inputs), that keeps its inputs here. What the recomputed layer saves is not."""

        def checkpointed(function: Callable, *inputs):
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return checkpoint(function, *inputs)

        return checkpointed
