"""The subject of the checks: a recipe's data, models and loss, built as in a run, from a few rows and once for all checks."""

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..config.fields import as_tuple, with_setting_names
from ..config.on_policy import writes
from ..config.recipe import Recipe, at_the_middle, distils, divergences_of
from ..config.teacher import Cache
from ..data.dataset import read_data
from ..data.examples import Draw, Examples
from ..losses.divergences import make_divergence
from ..losses.objective import Objective
from ..losses.terms import HeadTerm
from ..models.language_model import LanguageModel
from ..models.load import LoadContext
from ..models.startup_checks import tolerance
from ..signals import Signal, Teacher
from ..teachers.connect import open_served
from ..teachers.fidelity import measured_transform
from ..training.build import check_servers, load, longest_row, open_teacher, teacher_probe, teacher_taps
from ..training.build_student import build_student, build_terms, keep_of, layer_terms
from ..training.features import start_features
from ..training.launch import start
from ..training.loop import StudentState, unwrap
from ..training.prepare import Prepared, prepare
from .check import BUG

MOST_EXAMPLES = 8  # for computations; only teacher and student are compared on all rows that were read
MOST_TOKENS = 2048  # of all these examples together, unless the two shortest have more
MOST_TARGETS = 32  # of each example, if logits of several models are held at once


class Setup:
    """The parts of a run, which exist after `read` and `load`.

    small     the user's recipe with the first `rows` rows of each source
    unwritten the caches that are not written yet, by their teachers' settings; `small` has the teachers themselves instead
    keep      the rule that chooses the targets that count, or None; in `small` all count
    folder    an empty folder, the only one that checks write to
    stand_ins the settings of models that are still to be trained, for which the recipe names untrained ones
    prepared  data, tokenizer and the models' files (after `read`)
    few       the examples that checks compute with (after `read`)
    student, state, teacher, live   (after `load`) the student; with its loss and optimizer; its teacher, or None; the teachers that are
                                    models, by setting
    """

    def __init__(self, recipe: Recipe, rows: int, folder: Path, stand_ins: frozenset[str] = frozenset()):
        self.folder, self.stand_ins = folder, stand_ins
        self.keep = keep_of(recipe.loss)
        self.small, self.unwritten = without_unwritten_caches(with_few_rows(recipe, rows))
        self.device = torch.device("cpu")

    # ---- the stages

    def read(self) -> None:
        self.prepared: Prepared = prepare(self.small)
        self.small = dataclasses.replace(self.small, student=self.prepared.resolved(self.small.student))
        self.few = few_examples(self.prepared.train)

    def load(self) -> None:
        recipe, prepared = self.small, self.prepared
        self.accelerator = start()
        self.device = self.accelerator.device
        live = [(source.setting, source.settings) for source in prepared.teachers if source.needs_model]
        probe = functools.partial(teacher_probe, prepared, recipe.validation.micro_batch_size, self.device)
        packing = recipe.data.packing * longest_row(recipe.train, recipe.data)
        context = LoadContext(prepared.vocab, self.device, recipe.seed, packing, functools.partial(measured_transform, probe))
        settings = [recipe.student], live, context, recipe.data.share_prefixes
        (self.student,), teachers = load(*settings, compile=False, attention=[recipe.loss.attention])
        self.live: dict[str, LanguageModel] = {name: model for (name, _), model in zip(live, teachers, strict=True)}
        terms = layer_terms(recipe, self.student, self.live)
        steps = max(prepared.source.total_steps, (recipe.optim.warmup_steps or 0) + 1)
        self.state: StudentState = build_student(
            recipe.loss, recipe.optim, self.student, steps, self.accelerator, None, terms, self.divergences
        )
        taps = teacher_taps([recipe], [self.state])
        served = open_served(prepared.teachers, self.device, prepared.vocab)
        check_servers(served.values(), prepared)
        self.teacher: Teacher | None = open_teacher(prepared.teachers, recipe.mixture, teachers, taps, self.device, served)
        if recipe.loss.features:
            term = unwrap(self.state).terms["features"]
            start_features(recipe.loss.features, term, self.student, self.teacher, ([self.batch()], [self.batch()]))
        self.student.eval()

    # ---- what checks use

    @property
    def distils(self) -> bool:
        return distils(self.small)

    @property
    def distiller(self):
        return unwrap(self.state)

    @property
    def models(self) -> dict[str, LanguageModel]:
        """The student and the teachers that are models, by their settings."""
        return {"student": self.student} | self.live

    @functools.cached_property
    def rows(self) -> list[dict] | None:
        """The rows that the training examples were made from, indexed by `Examples.row`. None for a stream."""
        read = read_data(self.small.data)["data.train"]
        return [row for one in read for row in one.rows] or None

    @functools.cached_property
    def formats(self) -> list[str]:
        """The format of each source."""
        return [source.format for source in as_tuple(self.small.data.train)]

    @property
    def divergences(self) -> list[tuple[str, dict[str, float]]]:
        return divergences_of(self.small.loss, self.small.data)

    def divergence_at(self, batch: Batch) -> tuple[str, dict[str, float]]:
        """The divergence, with its options, at the targets of a batch of one example."""
        (example,) = batch.examples
        return self.divergences[1 + example.source]

    def batch(self, indices: list[int] | None = None, packing: bool = False, weighted: bool = False) -> Batch:
        """Some or all of the few examples as a batch on the student's device, with equal weights or, if `weighted`, those of their sources."""
        indices = list(range(len(self.few))) if indices is None else indices
        few = self.few if weighted else self.few.unweighted()
        if not packing:
            return few.batch(indices).to(self.device)
        collator = few.collator._replace(packing=True)
        return dataclasses.replace(few, collator=collator).batch(indices, Draw(self.small.seed, 0, 1)).to(self.device)

    def sample(self, batch: Batch) -> Tensor:
        """The first MOST_TARGETS targets of each example, as indices into the batch's targets [n]."""
        counts = [example.num_targets for example in batch.examples]
        place = torch.cat([torch.arange(count) for count in counts]) if counts else torch.zeros(0)
        return (place < MOST_TARGETS).nonzero()[:, 0].to(batch.labels_N.device)

    def signal(self, batch: Batch) -> Signal | None:
        return self.teacher(batch) if self.distils else None

    def objective(self, kd_ratio: float | None = None) -> Objective:
        loss = self.small.loss
        divergence = make_divergence(loss.divergence, **loss.divergence_options)
        return Objective(loss.kd_ratio if kd_ratio is None else kd_ratio, loss.temperature, divergence)

    def term(self, kd_ratio: float | None = None, chunk: int | None = None) -> HeadTerm:
        """Cross-entropy and divergence as a run computes them, or with another kd_ratio or chunk size."""
        if kd_ratio is None:
            (term,) = build_terms(self.small.loss, chunk, divergences=self.divergences)
            term.chunk_size = chunk or term.chunk_size
            return term
        return HeadTerm(self.objective(kd_ratio), chunk)

    def loss_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Each term of the run's loss at each target of a batch [N], float64 on the CPU."""
        with torch.no_grad():
            rows = self.distiller(batch, self.signal(batch)).rows
        return {name: values.double().cpu() for name, values in rows.items()}

    @functools.cached_property
    def alone(self) -> list[dict[str, Tensor]]:
        """The terms of each example computed alone, without padding or neighbours."""
        return [self.loss_rows(self.batch([i])) for i in range(len(self.few))]

    @property
    def cause(self) -> str:
        """What to do if numbers differ by more than rounding explains."""
        dtypes = {dtype for model in self.models.values() for dtype in (model.dtype, model.autocast) if dtype}
        if dtypes <= {torch.float32, torch.float64} and not self.small.student.quantization:
            return BUG
        return (
            "first ask again with float32 weights (--student.dtype, --teacher.dtype; without mixed precision and quantization). If it passes, "
            "this model is more sensitive to rounding than most, and its narrow weights may train worse. If it fails, " + BUG
        )

    def rounding(self, model: LanguageModel) -> float:
        """The difference that rounding may cause in a model's logits, relative to the largest."""
        return tolerance(model, *([model.autocast] if model.autocast else []))

    @functools.cached_property
    def largest_logit(self) -> float:
        with torch.no_grad():
            batch = self.batch()
            return self.student.head.logits(self.student.hidden(batch.student)[self.sample(batch)]).abs().max().item()

    @property
    def allowed(self) -> float:
        """The difference that rounding in the models may cause in a term of the loss at one target; in the mean over targets a tenth of it."""
        most = max(self.rounding(model) for model in self.models.values())
        return most * max(self.largest_logit, 1.0) * max(1.0, self.small.loss.temperature)

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """The student in training mode while the block lasts, unless it has dropout, with which two passes would differ."""
        dropout = any(isinstance(m, torch.nn.Dropout) and m.p for m in self.student.modules())
        config = self.student.base_model.config.get_text_config()
        dropout = dropout or any("drop" in name and isinstance(v, float) and v for name, v in config.to_dict().items())
        self.student.train(not dropout)
        try:
            yield
        finally:
            self.student.eval()

    @contextlib.contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Restores the trained weights when the block ends."""
        parameters = self.state.parameters
        before = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(before[name])
            self.state.optimizer.zero_grad(set_to_none=True)


def with_few_rows(recipe: Recipe, rows: int) -> Recipe:
    """The recipe with at most `rows` rows of each source, each used once, and without a token cache of its own. A stream stays as it is.

    Further changes: with on-policy distillation the student writes all answers, with no replay, as so few rows have too few steps. Maps of hidden
    states start at random, for which few rows suffice. Schedules of the loss have their middle value. All targets count, since rounding may change
    the choice of a share (`Setup.keep` is checked separately). The loss is divided by the number of targets, so that its gradient is that of the
    textbook's mean.
    """
    data, loss = recipe.data, recipe.loss
    if loss.features and loss.features.init == "least_squares":
        loss = dataclasses.replace(loss, features=dataclasses.replace(loss.features, init="xavier"))

    def few(sources):
        if sources is None:
            return None
        taken = tuple(dataclasses.replace(one, limit=min(one.limit or rows, rows), weight=1.0) for one in as_tuple(sources))
        return taken if isinstance(sources, tuple) else taken[0]

    data = dataclasses.replace(
        data,
        train=data.train if data.streaming else few(data.train),
        validation=few(data.validation),
        choices=few(data.choices),
        validation_fraction=max(data.validation_fraction, 0.1) if data.validation_fraction else 0.0,
        cache_dir=None,
    )
    loss, own = dataclasses.replace(at_the_middle(loss), keep=1.0, normalize="targets"), recipe.on_policy
    if own:
        own = dataclasses.replace(
            own, share=1.0 if writes(own) else 0.0, replay=None, teacher_writes=0.0, long_horizon=None, engine="local"
        )
    return dataclasses.replace(recipe, data=data, loss=loss, on_policy=own)


def without_unwritten_caches(recipe: Recipe) -> tuple[Recipe, dict[str, Cache]]:
    """The recipe with live teachers in place of caches that are not written yet, and these caches by setting."""
    named = with_setting_names(recipe.teacher, "teacher")
    waiting = {
        setting: one.cache for setting, one in named if one.model_path and one.cache and not Path(one.cache.path).expanduser().exists()
    }
    teachers = tuple(dataclasses.replace(one, cache=None) if setting in waiting else one for setting, one in named)
    return dataclasses.replace(recipe, teacher=teachers if isinstance(recipe.teacher, tuple) else (*teachers, None)[0]), waiting


def few_examples(examples: Examples) -> Examples:
    """At most MOST_EXAMPLES examples with at most MOST_TOKENS tokens together, drawn at random but the same for every call."""
    lengths, chosen, tokens = examples.max_lengths, [], 0
    for i in random.Random("doctor").sample(range(len(examples)), len(examples)):
        if len(chosen) < MOST_EXAMPLES and tokens + lengths[i] <= MOST_TOKENS:
            chosen.append(i)
            tokens += int(lengths[i])
    if len(chosen) < 2:
        chosen = np.argsort(lengths, kind="stable")[:2].tolist()
    return examples.take(np.array(sorted(chosen), np.int64))
