"""What the processes of a run send each other, and the speed of many: a step takes what computing takes, or what sending takes, whichever is more."""

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
BETWEEN = 50e9  # bytes a second that a GPU sends to another machine: a network card of 400 Gb/s for each
LINK_SHARE = 0.7  # of a stated rate that is reached: a plain assumption
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the student's layers and of the rest of it, with adapters; of what trains; of the teachers' layers and of the rest of them.

    all_train   a sharded student's gradients are then exchanged after every micro-batch
    """

    layers: float
    rest: float
    trained: float
    teacher_layers: float
    teacher_rest: float
    all_train: bool = False


@dataclass(frozen=True)
class Exchanged:
    """Bytes in one step, of all processes together.

    gathered   weights that come together
    reduced    gradients of which each process keeps the sum of its part
    averaged   gradients of which each keeps the whole sum
    first      weights that come together in the first step alone
    """

    gathered: float
    reduced: float
    averaged: float
    first: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes that one of so many ranks sends in a later step, by rings: n - 1 of n parts of what comes together or is added up, and of a sum
        that all keep twice that (Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms)."""
        return (ranks - 1) / ranks * (self.gathered + self.reduced + 2 * self.averaged)


def sizes_of(recipe: Recipe, found: Found) -> Sizes:
    """Of a recipe's models at their full depth."""
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
    every = {id(p): p.nbytes for p in model.base_model.parameters()}
    inside = {id(p): p.nbytes for layer in layers_apart(model) for p in layer.parameters()}
    return float(sum(inside.values())), float(sum(every.values()) - sum(inside.values()))


def exchanged(sizes: Sizes, sharded: tuple[bool, bool], micro_batches: int) -> Exchanged:
    """Of one step of so many micro-batches on each process.

    A sharded student's layers come together in every forward and every backward pass, the rest once for both, and its gradients are added up
    once a step, or after every micro-batch where all of it trains; a whole one's gradients are averaged once. A sharded teacher's layers come
    together in every pass, the rest in the first.

    sharded   whether the student is, and whether the teachers are
    """
    student, teacher = sharded
    gathered = micro_batches * (student * (2 * sizes.layers + sizes.rest) + teacher * sizes.teacher_layers)
    reduced = student * sizes.trained * (micro_batches if sizes.all_train else 1)
    return Exchanged(gathered, reduced, (not student) * sizes.trained, teacher * sizes.teacher_rest)


def how_sharded(recipe: Recipe, found: Found) -> tuple[bool, bool]:
    """Whether the recipe's student is, and whether a teacher is."""
    return sharded_student(recipe.train), any(sharded_teacher(recipe.train, one) for _, one, _ in found.live)


@dataclass(frozen=True)
class Speed:
    """Of so many GPUs: tokens a second, the seconds of a step that computing and that sending takes, and the bytes that a GPU sends in it."""

    ranks: int
    tokens: float
    computing: float
    sending: float
    sent: float

    @property
    def efficiency(self) -> float:
        """Of so many GPUs that need not wait for each other."""
        return self.computing / max(self.computing, self.sending)


def speeds(exchange: Exchanged, tokens: float, computing: float, device: Device, counts: Sequence[int] = COUNTS) -> Iterator[Speed]:
    """Of growing numbers of GPUs, each of which takes as much of a step as one does: a step grows with them.

    tokens     of a step on each GPU
    computing  its seconds
    """
    for ranks in counts:
        sent = exchange.sent(ranks)
        sending = sent / (LINK_SHARE * (device.link if ranks <= PER_NODE else min(device.link, BETWEEN)))
        yield Speed(ranks, ranks * tokens / max(computing, sending), computing, sending, sent)
