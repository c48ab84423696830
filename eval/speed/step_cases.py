"""The rows of eval/speed/step.py: the matrix products that any step needs (the lower bound), and llmkd's settings."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llmkd.batch import Batch
from llmkd.config.features import Features
from llmkd.config.recipe import Optim
from llmkd.data.batching import TokenBudget
from llmkd.data.collate import collate
from llmkd.losses.divergences import make_divergence
from llmkd.losses.features import FeatureTerm
from llmkd.losses.fused import default_chunk
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm, Term
from llmkd.models.families import decoder_of
from llmkd.models.language_model import LanguageModel
from llmkd.signals import Dense, Teacher
from llmkd.teachers.live import LiveTeacher
from llmkd.training import optim as optimizers
from llmkd.training.distiller import Distiller
from llmkd.training.features import feature_terms
from llmkd.training.loop import StudentState, train
from llmkd.training.memory import memory_gauge

from .step_setup import Setup


@dataclass
class Measurement:
    """Measured steps of one case. The first is a warm-up."""

    seconds: list[float]
    tokens: list[int]
    targets: list[int]
    passes: float = 0.0  # forward and backward, a step
    slots: int = 0  # tokens with padding, of all steps
    first: list[int] = field(default_factory=list)  # the examples of the first step
    ce: float | None = None  # means over the first step's targets
    kl: float | None = None
    gradient: dict[float, float] = field(default_factory=dict)  # of the first step, its norm by kd_ratio
    bytes: int = 0  # in addition to the weights
    remark: str = ""

    def __post_init__(self):
        if not len(self.seconds) == len(self.tokens) == len(self.targets) > 1:
            raise ValueError(f"{len(self.seconds)} steps ran, and {len(self.tokens)} were to")


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Setup], Measurement]
    teacher: bool = True
    remark: str = ""
    lower_bound: bool = False


class Clock:
    """Marks the ends of steps: CPU time on a CPU; on a GPU once it is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.gauge = memory_gauge(device)
        self.marks = [self.now()]

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self) -> None:
        self.marks.append(self.now())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def cases(setup: Setup) -> list[Case]:
    tokens = setup.options.tokens
    settings = [
        ("micro_batch_size 4", {"size": 4}),
        (f"micro_batch_tokens {tokens}", {"size": TokenBudget(tokens)}),
        ("the same, packed", {"size": TokenBudget(tokens, packing=True)}),
    ]  # what a setting may be: the arguments of `ours`
    if setup.options.compile:
        settings.append(("the same, packed and compiled", {"size": TokenBudget(tokens, packing=True), "compiled": True}))
    found = []
    for teacher in (True, False):
        found.append(Case("the matrix products alone", partial(products, teacher=teacher), teacher, lower_bound=True))
        found += [Case(f"llmkd, {name}", partial(ours, kd=0.5 if teacher else 0.0, **how), teacher) for name, how in settings]
    for words, more in (("hidden states known", {"body": False}), ("four students", {"students": 4})):
        remark = "the least that any step of this kind takes; of the products of a live one before one student"
        found.append(Case(f"the matrix products alone, {words}", partial(products, teacher=True, **more), remark=remark, lower_bound=True))
    name, how = settings[-1]
    remark = "its hidden states made before, and kept in memory; the products are of a live one"
    found.append(Case(f"llmkd, {name}, hidden states known", partial(ours, kd=0.5, teacher=known, **how), remark=remark))
    remark = "every token counts for each, and the products are of one"
    found.append(
        Case(
            "llmkd, the same, packed, four students",
            partial(ours, kd=0.5, students=lambda setup: setup.students_on_one_base(4), **settings[2][1]),
            remark=remark,
        )
    )
    remark = "loss.features between the middle layers; its gradient is another, and is not compared"
    found.append(
        Case(f"llmkd, {settings[2][0]}, with hidden states", partial(ours, kd=0.5, features=True, **settings[2][1]), remark=remark)
    )
    if setup.options.float8:
        remark = "its KL and gradient are others, and are not compared"
        found.append(Case(f"llmkd, {name}, teacher in fp8", partial(ours, kd=0.5, teacher=in_float8, **how), remark=remark))
    return sorted(found, key=lambda case: not case.teacher)


def learning(setup: Setup, kd: float, student: LanguageModel, more: Sequence[Term] = ()) -> StudentState:
    setup.fresh_adapter(student)
    made = Distiller(student, [HeadTerm(Objective(kd, 1.0, make_divergence("forward_kl"))), *more])
    parameters, optimizer = made.trainable(), optimizers.build(Optim(), made.trainable(), made.own_rates())
    return StudentState(setup.accelerator.prepare_model(made), optimizer, parameters, lambda step: 2e-4, 1.0)


def middle_layers(setup: Setup) -> list[FeatureTerm]:
    """The term of loss.features, with maps that start at random."""
    terms = feature_terms(Features(init="xavier"), "teacher", setup.student, {"teacher": setup.teacher}, seed=0)
    return [term.to(setup.device) for term in terms]


class Known(LiveTeacher):
    """A teacher whose hidden states at every target are in memory already, as `teacher.cache.kind: hidden` has them on a disk."""

    def __init__(self, setup: Setup):
        super().__init__(setup.teacher)
        self.found = {}
        for example in range(len(setup.data)):
            batch = collate(setup.data, [example], pad=0).to(setup.device)
            hidden_nH = super().__call__(batch).hidden_NH.cpu()
            self.found[setup.data.content_hash(example)] = hidden_nH.pin_memory() if setup.device.type == "cuda" else hidden_nH

    def __call__(self, batch: Batch) -> Dense:
        hidden_NH = torch.cat([self.found[example.content_hash] for example in batch.examples])
        return Dense(hidden_NH.to(batch.labels_N.device, non_blocking=True), self.model.head)


def live(setup: Setup) -> Teacher:
    return LiveTeacher(setup.teacher)


def in_float8(setup: Setup) -> Teacher:
    return LiveTeacher(setup.float8_teacher)


@functools.cache
def known(setup: Setup) -> Teacher:
    return Known(setup)


def ours(
    setup: Setup,
    size: int | TokenBudget,
    kd: float,
    compiled: bool = False,
    teacher: Callable[[Setup], Teacher] = live,
    students: Callable[[Setup], list[LanguageModel]] = lambda setup: [setup.student],
    features: bool = False,
) -> Measurement:
    """Steps by the training loop of a run, with its prefetch. `features`: with the hidden states of the middle layers in the loss."""
    if compiled:
        setup.compile()
    with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
        more = middle_layers(setup) if features else []
        chosen = LiveTeacher(setup.teacher, more[0].teacher_taps) if features else teacher(setup) if kd else None
        return _ours(setup, size, kd, chosen, students(setup), teacher is not in_float8, more)


def _ours(
    setup: Setup,
    size: int | TokenBudget,
    kd: float,
    teacher: Teacher | None,
    students: list[LanguageModel],
    true: bool,
    more: Sequence[Term] = (),
) -> Measurement:
    """`true`: the teacher is the one that the reference is of. `more`: further terms of the loss."""
    states = [learning(setup, kd, student, more) for student in students]
    source = setup.source(size)
    clock, targets, first, norm = Clock(setup.device), [], {}, 0.0
    for progress in train(source, states, teacher, setup.accelerator):
        clock.mark()
        first, norm = first or progress.terms[0], norm or progress.grad_norms[0]
        targets.append(progress.num_targets)
    steps, built = zip(*source.steps(), strict=True)
    batches = [micro for micro_batches in built for micro in micro_batches]
    return Measurement(
        clock.seconds,
        [len(states) * setup.tokens(step.examples) for step in steps],
        [len(states) * n for n in targets],
        len(batches) / len(steps),
        len(states) * sum(batch.student.inputs["input_ids"].numel() for batch in batches),
        steps[0].examples,
        first["ce"],
        first.get("kd") if true else None,
        {kd: norm} if true and not more else {},
        clock.gauge.taken,
    )


@torch.no_grad()
def products(setup: Setup, teacher: bool, body: bool = True, students: int = 1) -> Measurement:
    """A step's linear layers: the teacher forward; the student forward and back, with its adapter's gradients and none of frozen weights;
    both heads at the targets, and the student's back. Micro-batches as full as the budget lets them be, without padding.

    body      whether the teacher's is computed, and not its head alone
    students  side by side before one teacher; every token counts for each
    """
    tokens, targets = (round(x) for x in setup.window)
    pieces = math.ceil(tokens / setup.options.tokens)
    each, buffers = math.ceil(tokens / pieces), Buffers(setup)
    teacher_weights = (
        [m.weight for m in decoder_of(setup.teacher.base_model).modules() if isinstance(m, nn.Linear)] if teacher and body else []
    )
    layers = [
        (m.base_layer.weight, *(getattr(m, f"lora_{x}")["default"].weight.to(setup.dtype) for x in "AB"), _feeds_back(name))
        for name, m in decoder_of(setup.student.base_model).named_modules()
        if hasattr(m, "lora_A")
    ]
    heads = [model.head.project.weight for model in ([setup.student, setup.teacher] if teacher else [setup.student])]

    def step() -> None:
        for _ in range(pieces):
            for W in teacher_weights:
                buffers.mm(each, "x", W.T, "y")
            for _ in range(students):
                body_of_student()
        chunk = default_chunk(setup.vocab, setup.device.type)
        for start in range(0, targets, chunk):
            n = min(chunk, targets - start)
            for W in heads[1:]:
                buffers.mm(n, "h", W.T, "logits", wide=True)
            for _ in range(students):
                buffers.mm(n, "h", heads[0].T, "logits", wide=True)
                buffers.mm(n, "g", heads[0], "h")

    def body_of_student() -> None:
        for W, A, B, _ in layers:
            buffers.mm(each, "x", W.T, "y")
            buffers.mm(each, "x", A.T, "low")
            buffers.mm(each, "low", B.T, "y")
        for W, A, B, feeds in reversed(layers):
            x, low, g = buffers("x", each, W.shape[1]), buffers("low", each, A.shape[0]), buffers("y", each, W.shape[0])
            torch.mm(g.T, low)
            buffers.mm(each, "y", B, "low")
            torch.mm(low.T, x)
            if feeds:
                buffers.mm(each, "y", W, "x")
                buffers.mm(each, "low", A, "x")

    clock = Clock(setup.device)
    for _ in range(setup.options.steps + 1):
        step()
        clock.mark()
    count = len(clock.seconds)
    return Measurement(clock.seconds, [students * tokens] * count, [students * targets] * count, pieces, students * tokens * count)


def _feeds_back(name: str) -> bool:
    """Whether a layer's input asks for a gradient: not the embedding of the first one."""
    return not (name.startswith("layers.0.") and name.endswith(("q_proj", "k_proj", "v_proj")))


class Buffers:
    """Tensors by role and width, made once."""

    def __init__(self, setup: Setup):
        self.setup, self.held = setup, {}

    def __call__(self, role: str, rows: int, width: int, dtype=None) -> Tensor:
        key = role, width, dtype
        if key not in self.held or len(self.held[key]) < rows:
            self.held[key] = torch.ones(rows, width, dtype=dtype or self.setup.dtype, device=self.setup.device)
        return self.held[key][:rows]

    def mm(self, rows: int, left: str, right: Tensor, into: str, wide: bool = False) -> None:
        wide = wide and self.setup.device.type == "cuda"
        out = self(into, rows, right.shape[1], torch.float32 if wide else None)
        torch.mm(self(left, rows, right.shape[0]), right, **({"out_dtype": torch.float32} if wide else {}), out=out)
