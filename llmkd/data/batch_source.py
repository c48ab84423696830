"""Batch sources: where an optimizer step's finished micro-batches come from. Planned data here, a stream of rows in stream.py."""

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
    """One optimizer step. A source that takes its batches from no examples leaves out all but the first two.

    num_targets     over all ranks, if known before the batches are built; None: the loop counts them in the finished micro-batches
    weighted        if num_targets is known: by the part of the loss whose targets are weighted (`Batch.weights`), over all ranks the sum of
                    its absolute weights, and the number of those that are not 0
    data, places    the examples that the numbers below index, and where each was read
    examples        those of all ranks
    micro_batches   this rank's part of them; a list may be empty, and all ranks have equally many
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
        """How many targets count where `share` of each example's are kept."""
        return sum(part_of(share, n) for n in self.data.num_targets[self.examples].tolist())

    def place(self, example: int) -> str:
        """Where an example was read (file:line); `example` as in `Batch.example_N`."""
        return self.places[example] if self.places else f"example {example}"


@dataclass(frozen=True)
class WrittenText:
    """An answer that was written for a step, to be read: token ids of the prompt, of the answer and of the data's own answer. `finished`: its last
    token is an end token."""

    place: str
    prompt: Sequence[int]
    ids: Sequence[int]
    reference: np.ndarray
    finished: bool


class BatchSource(Protocol):
    """Gives each optimizer step its finished micro-batches: a pure function of (seed, step) and, where the student writes, of its weights.

    A source decides for itself whether to build the next step's batches while this one trains; one that depends on the student's
    weights must not.
    """

    seed: int
    total_steps: int

    def steps(self, done: int = 0) -> Iterator[tuple[Step, "list[Batch]"]]:
        """The steps after the first `done`, each with this rank's micro-batches, of which all ranks have equally many. Closed at the end."""


class TrainingSource(BatchSource, Protocol):
    """A batch source as the trainer has it.

    examples               the data known before the first step, for checks and measurements: all of it, or a stream's first step
    places                 where each of `examples` was read
    complete               whether `examples` are all that is trained on
    reads_while_training   rows are read, or a server is asked, while training: what is wrong with them may end the run after any step
    on_built               is called with each step's micro-batches once they are built, which is before their turn. It must not wait
    """

    examples: Examples
    places: Sequence[str]
    complete: bool
    reads_while_training: bool
    on_built: "Callable[[list[Batch]], None]"

    def for_rank(self, rank: int, ranks: int, device: "torch.device | None" = None) -> "TrainingSource":
        """The same source as one of `ranks` processes reads it, for a device."""

    def longest(self, count: int) -> Examples:
        """Of the examples that a step may hold those that take most memory, `count` of the data's. No weights matter."""

    def measured(self) -> dict[str, float]:
        """What the source has measured since the last time, by name; empty where it measures nothing. The same on all ranks but for times."""

    def checked(self, metrics: dict[str, float]) -> None:
        """Before the first step the student has these metrics on training examples, and the teacher has `teacher_ce`."""

    def validated(self, metrics: dict[str, float]) -> None:
        """The student has these held-out metrics, which are the same on all ranks, after the step that was trained last."""

    def texts(self, step: int) -> Sequence[WrittenText]:
        """Of the newest step some answers that were written for it, to be kept for people; most steps have none."""

    def state(self, step: int) -> dict:
        """What a checkpoint of that step keeps of the source: JSON, and numpy arrays. The step is the newest or the one before."""

    def restore(self, state: dict) -> None:
        """Resume from a checkpoint's state. ValueError, in a few words, if it cannot be of this run."""


class ExampleSource:
    """Planned data and a stream: a step's examples are split into micro-batches, whose batches are made one step ahead of training.

    micro_batch_size   examples, or tokens of a budget. The one thing here that changes during a run: `AutoBatchSize` sets it.
    """

    examples: Examples
    complete = reads_while_training = False

    def __init__(self, seed: int, total_steps: int, micro_batch_size: int | TokenBudget):
        self.seed, self.total_steps, self.micro_batch_size = seed, total_steps, micro_batch_size
        self.rank, self.ranks, self.device = 0, 1, None
        self.on_built: Callable[[list[Batch]], None] = lambda batches: None

    def for_rank(self, rank: int, ranks: int, device: "torch.device | None" = None):
        """The same source as one of `ranks` processes reads it. For a GPU the batches are in pinned memory."""
        other = copy.copy(self)
        other.rank, other.ranks, other.device = rank, ranks, device
        return other

    def steps(self, done: int = 0) -> Iterator[tuple[Step, "list[Batch]"]]:
        with contextlib.closing(prefetch(self._built(done))) as built:
            yield from built

    def _built(self, done: int) -> Iterator[tuple[Step, "list[Batch]"]]:
        if self._on_gpu:
            import torch

            torch.cuda.set_device(self.device)  # of the thread that runs this: or pinning would open the first GPU for every process
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
        """The same step in micro-batches of the size that holds now."""
        return dataclasses.replace(step, micro_batches=self.split(step.examples, self.max_lengths(step)))

    def max_lengths(self, step: Step) -> np.ndarray:
        """Of each of the step's `data`, the tokens that student or teacher read, whichever is more."""
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
    """Examples that are all in memory, in the order of a plan."""

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
