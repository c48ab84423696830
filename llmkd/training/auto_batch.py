"""Automatic micro-batch size: the largest that fits into memory, measured before the first step, with smaller chunks of head and attention if needed.

If memory runs out later, micro-batches and chunks are halved and the optimizer step is repeated from its beginning; nothing of it had been applied.
"""

import dataclasses
import gc
import math
from collections.abc import Callable

import numpy as np
import torch

from ..batch import Batch
from ..data.batch_source import ExampleSource, Step
from ..data.batching import MOST_PACKED, MOST_TOKENS, TokenBudget
from ..data.examples import Draw, Examples
from ..errors import UserError
from ..losses.fused import LEAST_ROWS, MOST_ROWS
from ..models.parts import local
from ..process.machine_errors import is_out_of_memory
from ..signals import Teacher
from ..teachers.live import LiveTeacher
from .distiller import Distiller
from .loop import StudentState, forward_backward, unwrap
from .memory import memory_gauge
from .step_result import Accumulated

_FEWEST_ROWS = 128  # chunks of the head are not halved below this
_HEADS_SHARE = 1 / 8  # of the free memory, for the head's tiles


def head_chunk_size(vocab: int, device: torch.device, info) -> int | None:
    """Rows per chunk of the head on a GPU, after the models are loaded; None on a CPU, where the vocabulary alone decides.

    `MOST_ROWS`, or fewer if the float32 tiles of student and teacher would take more than an eighth of the free memory, but at least `LEAST_ROWS`.
    """
    if device.type != "cuda":
        return None
    room = memory_gauge(device).room
    rows, tiles = chunk_rows(vocab, room), 2 * 4 * vocab
    share = room * _HEADS_SHARE / 1e9
    info(f"head: chunks of {rows:,} rows ({rows * tiles / 1e9:.2f} GB of tiles; an eighth of the free memory is {share:.2f})")
    return rows


def chunk_rows(vocab: int, room: float) -> int:
    """Rows per chunk of the head on a GPU with `room` bytes to spare."""
    return max(LEAST_ROWS["cuda"], min(MOST_ROWS["cuda"], int(room * _HEADS_SHARE / (2 * 4 * vocab)) // 128 * 128))


class AutoBatchSize:
    """Sets the size of a source's micro-batches (`source.micro_batch_size`) for `micro_batch_tokens: auto`.

    `measure` finds it before the first step; called as the loop's `retry_on_oom`, this object lowers it when memory runs out.

    chunked   distillers whose chunks may be made smaller too
    together  a model is sharded, so the processes compute every pass together, and memory must not run out on one of them alone
    """

    def __init__(
        self,
        source: ExampleSource,
        students: list[StudentState],
        teacher: Teacher | None,
        accelerator,
        info,
        chunked: list[Distiller] | None = None,
        together: bool = False,
    ):
        self.source, self.students, self.teacher, self.accelerator = source, students, teacher, accelerator
        self.info, self.chunked, self.together = info, chunked or [], together

    @property
    def budget(self) -> TokenBudget:
        return self.source.micro_batch_size

    def _set(self, tokens: int) -> None:
        self.source.micro_batch_size = dataclasses.replace(self.budget, tokens=tokens)

    def measure(self, batch_size: int) -> None:
        """Double the token budget as long as its worst micro-batch, which has the longest examples, fits in a forward and backward pass.

        It has no side effects: gradients are dropped, random states restored, and the optimizer takes no step (room for its state is
        reserved). All processes use the smallest budget that one of them found. UserError if not even the longest example fits.

        With `together`, all processes try each size at the same time, and the next one, which needs at most twice the memory, only if
        that much is free on every process.
        """
        ranks = self.accelerator.num_processes
        share = math.ceil(batch_size / ranks)  # no rank has more of a step in one piece
        worst = self.source.longest(share).unweighted()  # targets of weight 0 would take less memory
        if not len(worst):
            raise UserError("train.micro_batch_tokens: found auto, but the first step has no example to measure with; give a number")
        lengths = worst.max_lengths
        chunks: list[str] = []
        longest, bound = int(lengths[0]), min(self._most_tokens, self.budget.of(lengths))
        gauge, tokens, found, taken = memory_gauge(self.accelerator.device), longest, 0, 0
        room = gauge.room - sum(2 * local(p).nbytes for one in self.students if not one.optimizer.state for p in one.parameters.values())
        cautious, room = gauge.cautious or self.together, self._least(room)
        with torch.random.fork_rng([self.accelerator.device] if self.accelerator.device.type == "cuda" else []):
            while True:
                held = np.cumsum(lengths) if self.budget.packing else longest * np.arange(1, len(lengths) + 1)
                count = max(1, int(np.searchsorted(held, tokens, side="right")))
                fits = self._fits(worst, count)
                while not fits and not found and (smaller := self._smaller_chunks()):
                    fits, chunks = self._fits(worst, count), smaller
                if not fits or (peak := -self._least(-gauge.taken)) > room:
                    break
                found, taken = tokens, peak
                if tokens >= bound or (cautious and 2 * taken > room):
                    break
                tokens = min(2 * tokens, bound)
        if ranks > 1:
            found = int(self.accelerator.gather(torch.tensor([found], device=self.accelerator.device)).min())
        if not found:
            raise UserError(
                f"train.micro_batch_tokens: an example of {longest} tokens, the longest, does not fit into memory; lower data.max_length, "
                "or set student.gradient_checkpointing"
            )
        self._set(found)
        whole = ", a whole step" if found >= self.budget.of(lengths) else ""
        self.info(
            f"micro-batches of at most {found:,} tokens{whole} (measured: {taken / 1e9:.2f} of {room / 1e9:.2f} GB){''.join(f', {one}' for one in chunks)}"
        )

    def _least(self, number: float) -> float:
        """With `together` the least of all processes' numbers; else the number itself."""
        if not self.together:
            return number
        every = self.accelerator.gather(torch.tensor([number], dtype=torch.float64, device=self.accelerator.device))
        return float(every.min())

    @property
    def _most_tokens(self) -> int:
        """The largest budget that is tried. It is lower if a model's attention ignores packing and computes all pairs of a packed row's positions."""
        models = [unwrap(one).student for one in self.students] + ([self.teacher.model] if isinstance(self.teacher, LiveTeacher) else [])
        return MOST_TOKENS if not self.budget.packing or all(one.capabilities.packed_attention for one in models) else MOST_PACKED

    def _fits(self, worst: Examples, count: int) -> bool:
        """Whether a micro-batch of the first `count` examples fits into memory, forward and backward."""
        try:
            batch = worst.batch(range(count), Draw(self.source.seed, 0, 0))
            scale, sync = 1 / max(1, batch.num_targets), self.together  # sharded gradients cannot be dropped before they are exchanged
            forward_backward(batch, dict(enumerate(self.students)), self.teacher, 0, scale, self.accelerator, sync)
            return True
        except Exception as error:
            if self.together or not is_out_of_memory(error):
                raise
            return False
        finally:
            self._drop()

    def _drop(self) -> None:
        for student in self.students:
            student.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, attempt: Callable[[list[Batch]], Accumulated], step: Step, micro_batches: list[Batch]) -> Accumulated:
        """Attempt the step; when memory runs out, repeat it with smaller micro-batches. With one process only: others would wait for it."""
        lengths = self.source.max_lengths(step)
        while True:
            sizes = [self.budget.of(lengths[examples]) for examples in step.micro_batches if len(examples) > 1]
            if any(size > self.budget.tokens for size in sizes):  # built before memory ran out
                step = self.source.resplit(step)
                micro_batches = self.source.build(step)
                continue
            try:
                return attempt(micro_batches)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                smaller = self._smaller_chunks()
                if not (sizes or smaller):
                    raise
            self._drop()  # after the `except` block: until then the exception keeps the interrupted pass's tensors alive
            if sizes:
                self._set(max(sizes) // 2)
                smaller.insert(0, f"micro-batches of at most {self.budget.tokens:,} tokens")
            self.info(f"out of memory in step {step.number}; repeating it with {' and '.join(smaller)}")

    def _smaller_chunks(self) -> list[str]:
        """Halve the chunks, the head's not below `_FEWEST_ROWS` rows. Returns a phrase for each kind that was halved."""
        each = (one.halve_chunks(self.accelerator.device.type, _FEWEST_ROWS) for one in self.chunked)
        return list(dict.fromkeys(phrase for phrases in each for phrase in phrases))
