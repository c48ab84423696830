"""Batch sources give each optimizer step its micro-batches. The protocols, and the source of planned data; a stream of rows is in stream.py."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..config.fields import part_of
from .batching import BatchPlan, TokenBudget, make_micro_batches
from .examples import Draw, Examples
from .prefetch import prefetch

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    import torch

    from ..batch import Batch


@dataclass(frozen=True)
class Step:
    """One optimizer step. A source whose batches are not made of examples sets only the number and the epoch.

    num_targets     targets over all ranks, if they are known before the batches are built; None: the loop counts them in the micro-batches
    weighted        if num_targets is known, for each part of the loss with weighted targets (`Batch.weights`): the sum of the absolute weights
                    and the number of weights that are not 0, over all ranks
    examples        the examples of all ranks, as indices into `data`
    micro_batches   this rank's examples, as indices into `data`; one may be empty, and all ranks have equally many
    data, places    the examples, and the file and line of each
    """

    number: int  # from 1
    epoch: int  # from 0
    num_targets: int | None = None
    weighted: dict[str, tuple[float, int]] = field(default_factory=dict)
    examples: list[int] = field(default_factory=list)
    micro_batches: list[list[int]] = field(default_factory=list)
    data: Examples | None = field(default=None, compare=False, repr=False)
    places: Sequence[str] = field(default=(), compare=False, repr=False)

    def kept(self, share: float) -> int:
        """The number of targets that count if `loss.keep` keeps `share` of each example's."""
        return sum(part_of(share, n) for n in self.data.num_targets[self.examples].tolist())

    def place(self, example: int) -> str:
        """The file:line of an example, by its index in `data`, as in `Batch.example_N`."""
        return self.places[example] if self.places else f"example {example}"


@dataclass(frozen=True)
class WrittenText:
    """An answer that was written for a step, for people to read: the token ids of the prompt, of the answer (`ids`) and of the data's own answer
    (`reference`). `finished`: the answer ends with an end token."""

    place: str
    prompt: Sequence[int]
    ids: Sequence[int]
    reference: np.ndarray
    finished: bool


class BatchSource(Protocol):
    """Gives each optimizer step its micro-batches, as a pure function of (seed, step) and, if the student writes, of the student's weights.

    A source may build the next step's batches during the current step, unless they depend on the student's weights.
    """

    seed: int
    total_steps: int

    def steps(self, done: int = 0) -> Iterator[tuple[Step, "list[Batch]"]]:
        """The steps after the first `done`, each with this rank's micro-batches, of which all ranks have equally many. The caller closes it."""


class TrainingSource(BatchSource, Protocol):
    """A batch source as the trainer uses it.

    examples               the examples known before the first step, for checks and measurements: all of them, or a stream's first step
    places                 the file and line of each of `examples`
    complete               whether `examples` are all training examples
    reads_while_training   whether rows are read, or a server is asked, during training, so that an error in them may end the run after any step
    on_built               called with each step's micro-batches as soon as they are built, before they are used. It must not block
    """

    examples: Examples
    places: Sequence[str]
    complete: bool
    reads_while_training: bool
    on_built: "Callable[[list[Batch]], None]"

    def for_rank(self, rank: int, ranks: int, device: "torch.device | None" = None) -> "TrainingSource":
        """The source for one of `ranks` processes and its device."""

    def longest(self, count: int) -> Examples:
        """The `count` examples that take most memory in a step. Their weights do not matter."""

    def measured(self) -> dict[str, float]:
        """The source's own metrics since the last call, by name. Equal on all ranks, except for times."""

    def checked(self, metrics: dict[str, float]) -> None:
        """Tell the source the metrics of the student on training examples before the first step, and `teacher_ce`."""

    def validated(self, metrics: dict[str, float]) -> None:
        """Tell the source the student's held-out metrics after the last step. They are equal on all ranks."""

    def texts(self, step: int) -> Sequence[WrittenText]:
        """Some answers that were written for the newest step, for samples.jsonl; empty for most steps."""

    def state(self, step: int) -> dict:
        """The source's state for a checkpoint of `step`, the newest step or the one before: values of JSON, and numpy arrays."""

    def restore(self, state: dict) -> None:
        """Resume from a checkpoint's state. ValueError, with a short reason, if it cannot belong to this run."""


class ExampleSource:
    """Base class of sources of examples, planned or streamed: it splits a step's examples into micro-batches and builds them one step ahead.

    micro_batch_size   examples, or a budget of tokens. The only attribute that changes during a run: `AutoBatchSize` sets it
    """

    examples: Examples
    complete = reads_while_training = False

    def __init__(self, seed: int, total_steps: int, micro_batch_size: int | TokenBudget):
        self.seed, self.total_steps, self.micro_batch_size = seed, total_steps, micro_batch_size
        self.rank, self.ranks, self.device = 0, 1, None
        self.on_built: Callable[[list[Batch]], None] = lambda batches: None

    def for_rank(self, rank: int, ranks: int, device: "torch.device | None" = None):
        """The source for one of `ranks` processes. For a GPU its batches are in pinned memory."""
        other = copy.copy(self)
        other.rank, other.ranks, other.device = rank, ranks, device
        return other

    def steps(self, done: int = 0) -> Iterator[tuple[Step, "list[Batch]"]]:
        with contextlib.closing(prefetch(self._built(done))) as built:
            yield from built

    def _built(self, done: int) -> Iterator[tuple[Step, "list[Batch]"]]:
        if self._on_gpu:
            import torch

            torch.cuda.set_device(self.device)  # of this thread: otherwise pinning would open the first GPU in every process
        for step in self.schedule(done):
            batches = self.build(step)
            self.on_built(batches)
            yield step, batches

    def schedule(self, done: int = 0) -> Iterator[Step]:
        """The steps after the first `done`, without their batches."""
        raise NotImplementedError

    def build(self, step: Step) -> "list[Batch]":
        """A step's micro-batches."""
        draw = Draw(self.seed, step.epoch, step.number)
        built = [step.data.batch(examples, draw) for examples in step.micro_batches]
        return [batch.pinned() for batch in built] if self._on_gpu else built

    def split(self, examples: list[int], max_lengths: np.ndarray) -> list[list[int]]:
        """This rank's micro-batches of those examples."""
        return make_micro_batches(examples, max_lengths, self.micro_batch_size, self.rank, self.ranks) or [[]]

    def resplit(self, step: Step) -> Step:
        """The same step, split by the current micro-batch size."""
        return dataclasses.replace(step, micro_batches=self.split(step.examples, self.max_lengths(step)))

    def max_lengths(self, step: Step) -> np.ndarray:
        """`Examples.max_lengths` of the step's `data`."""
        return step.data.max_lengths

    def longest(self, count: int) -> Examples:
        return self.examples.take(np.argsort(-self.examples.max_lengths, kind="stable")[:count])

    def measured(self) -> dict[str, float]:
        return {}

    def texts(self, step: int) -> Sequence[WrittenText]:
        return ()

    def checked(self, metrics: dict[str, float]) -> None:
        pass

    def validated(self, metrics: dict[str, float]) -> None:
        pass

    def state(self, step: int) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass

    @property
    def _on_gpu(self) -> bool:
        return self.device is not None and self.device.type == "cuda"


class PlannedSource(ExampleSource):
    """A batch source of examples that are all in memory, in the order of a plan."""

    complete = True

    def __init__(self, examples: Examples, places: Sequence[str], plan: BatchPlan, micro_batch_size: int | TokenBudget):
        super().__init__(plan.seed, plan.total_steps, micro_batch_size)
        self.examples, self.places, self.plan = examples, places, plan
        self._max_lengths = examples.max_lengths

    def schedule(self, done: int = 0) -> Iterator[Step]:
        for number, epoch, examples in self.plan.steps(done):
            num_targets, split = int(self.examples.num_targets[examples].sum()), self.split(examples, self._max_lengths)
            yield Step(number, epoch, num_targets, self.examples.weighted(examples), examples, split, self.examples, self.places)

    def max_lengths(self, step: Step) -> np.ndarray:
        return self._max_lengths
