"""Communication between the processes of a run, and the speed of many GPUs: a step takes as long as the slower of computing and sending."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config.recipe import Recipe
from ..config.sharding import sharded_student, sharded_teacher
from ..models.model import Model
from .devices import Device
from .fakes import fake_tensors
from .find import Found
from .models import Depth, build_students, build_teacher
from .step import layers_apart

PER_NODE = 8  # GPUs of one machine
BETWEEN = 50e9  # bytes per second that a GPU sends to another machine: a network card of 400 Gb/s for each
LINK_SHARE = 0.7  # the share of a stated rate that is reached: an assumption
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the student's layers and of its other weights, adapters included; of trainable weights; of the teachers' layers and other weights.

    all_train   whether all of the student trains: if it is sharded, gradients are then exchanged after every micro-batch
    """

    layers: float
    rest: float
    trained: float
    teacher_layers: float
    teacher_rest: float
    all_train: bool = False


@dataclass(frozen=True)
class Exchanged:
    """Bytes that take part in the collectives of one step.

    gathered   weights in all-gathers
    reduced    gradients in reduce-scatters
    averaged   gradients in all-reduces
    first      weights in all-gathers of the first step only
    """

    gathered: float
    reduced: float
    averaged: float
    first: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes that each of n ranks sends in a step after the first, with ring algorithms: (n - 1) / n of an all-gather or reduce-scatter, and
        twice that of an all-reduce (Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms)."""
        return (ranks - 1) / ranks * (self.gathered + self.reduced + 2 * self.averaged)


def sizes_of(recipe: Recipe, found: Found) -> Sizes:
    """The sizes of a recipe's models at full depth."""
    with fake_tensors(False):
        own = recipe.student
        (student,) = build_students([own], [found.student], found.vocab, Depth(None), 0, found.kind())
        layers, rest = _parted(student)
        trained = sum(p.nbytes for p in student.trainable().values())
        teachers = [
            _parted(build_teacher(one, config, name, found.vocab, None, 0, found.kind(f"{name}.model"))) for name, one, config in found.live
        ]
    of_teachers = sum(a for a, _ in teachers), sum(b for _, b in teachers)
    return Sizes(layers, rest, trained, *of_teachers, recipe.student.method == "full")


def _parted(model: Model) -> tuple[float, float]:
    """Bytes of a model's layers, and of its other weights."""
    every = {id(p): p.nbytes for p in model.base_model.parameters()}
    inside = {id(p): p.nbytes for layer in layers_apart(model) for p in layer.parameters()}
    return float(sum(inside.values())), float(sum(every.values()) - sum(inside.values()))


def exchanged(sizes: Sizes, sharded: tuple[bool, bool], micro_batches: int) -> Exchanged:
    """The collectives of one step with so many micro-batches on each process.

    A sharded student's layers are gathered in every forward and every backward pass, its other weights once for both; its gradients are
    reduced once per step, or after every micro-batch if all of it trains. A whole student's gradients are all-reduced once. A sharded
    teacher's layers are gathered in every pass, its other weights only in the first.

    sharded   whether the student is sharded, and whether the teachers are
    """
    student, teacher = sharded
    gathered = micro_batches * (student * (2 * sizes.layers + sizes.rest) + teacher * sizes.teacher_layers)
    reduced = student * sizes.trained * (micro_batches if sizes.all_train else 1)
    return Exchanged(gathered, reduced, (not student) * sizes.trained, teacher * sizes.teacher_rest)


def how_sharded(recipe: Recipe, found: Found) -> tuple[bool, bool]:
    """Whether the recipe shards the student, and whether it shards a teacher."""
    return sharded_student(recipe.train), any(sharded_teacher(recipe.train, one) for _, one, _ in found.live)


@dataclass(frozen=True)
class Speed:
    """The speed of so many GPUs: tokens per second, seconds per step of computing and of sending, and the bytes that a GPU sends per step."""

    ranks: int
    tokens: float
    computing: float
    sending: float
    sent: float

    @property
    def efficiency(self) -> float:
        """The share of the speed that the GPUs would have without waiting for each other."""
        return self.computing / max(self.computing, self.sending)


def speeds(exchange: Exchanged, tokens: float, computing: float, device: Device, counts: Sequence[int] = COUNTS) -> Iterator[Speed]:
    """The speeds of growing numbers of GPUs; each GPU has the same part of a step, so that steps grow with their number.

    tokens     tokens of a step on each GPU
    computing  seconds of computing them
    """
    for ranks in counts:
        sent = exchange.sent(ranks)
        sending = sent / (LINK_SHARE * (device.link if ranks <= PER_NODE else min(device.link, BETWEEN)))
        yield Speed(ranks, ranks * tokens / max(computing, sending), computing, sending, sent)
