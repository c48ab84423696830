"""Builds one student's training: the terms of its loss, its optimizer and its schedule."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from ..config.features import feature_teacher
from ..config.fields import part_of
from ..config.on_policy import OnPolicy, writes
from ..config.recipe import Loss, Optim, Recipe, scheduled, schedules
from ..config.schedule import middle, refuse_long_schedule
from ..config.target_weights import Keep as KeepSettings
from ..config.target_weights import chosen_by
from ..losses.divergences import make_divergence
from ..losses.keep import Keep
from ..losses.long_horizon import LongHorizonTerm
from ..losses.objective import Objective
from ..losses.target_weights import TargetWeights
from ..losses.terms import HeadTerm, Term
from ..models.model import Model
from . import optim as optimizers
from .attention import attention_terms
from .distiller import Distiller
from .features import feature_terms
from .loop import StudentState
from .optim import learning_rate
from .parallel import REPLICATED, Replicated
from .recipe_checks import refuse_long_warmup


def build_student(
    loss: Loss,
    optim: Optim,
    student: Model,
    total_steps: int,
    accelerator,
    chunk_size: int | None = None,
    more: Iterable[Term] = (),
    divergences: Sequence[tuple[str, dict[str, float]]] = (),
    strategy: Replicated = REPLICATED,
) -> StudentState:
    """The student with its terms, optimizer and schedule.

    chunk_size   rows of the head at a time, if `loss` does not set it
    more         further terms of the loss
    divergences  see `build_terms`
    strategy     how the processes hold the student; its `hold` was called already
    """
    more, settings = list(more), schedules(loss)
    for term in more:
        if (name := f"{term.names[0]}.weight") in settings:
            term.follow(settings[name], total_steps, loss.normalize)
    terms = [term.to(accelerator.device) for term in (*build_terms(loss, chunk_size, total_steps, divergences), *more)]
    strategy.hold_terms(terms)
    distiller = Distiller(student, terms)
    parameters = distiller.trainable()
    optimizer = optimizers.build(optim, parameters, distiller.own_rates())
    if student.capabilities.parameters_without_gradient and accelerator.num_processes > 1:
        # Oddity: accelerate has no argument for it. Without it the processes would wait for gradients that never come.
        accelerator.ddp_handler.find_unused_parameters = True
    wrapped, rate = strategy.wrap(distiller, accelerator), schedule(optim, total_steps)
    return StudentState(wrapped, optimizer, parameters, rate, optim.max_grad_norm, strategy=strategy)


def build_terms(
    loss: Loss, chunk_size: int | None = None, total_steps: int = 1, divergences: Sequence[tuple[str, dict[str, float]]] = ()
) -> list[Term]:
    """The terms of the loss that need no model, in a run of `total_steps`.

    chunk_size   rows of the head at a time, if `loss` does not set it
    divergences  that of the loss, then those of the training sources (`recipe.divergences_of`); empty: all sources have the loss's
    """
    for name, setting in schedules(loss).items():
        refuse_long_schedule(f"loss.{name}", setting, total_steps)
    divergence = make_divergence(loss.divergence, **loss.divergence_options)
    whole, at_step = Objective(middle(loss.kd_ratio), middle(loss.temperature), divergence), None
    if own := {"kd_ratio", "temperature"} & scheduled(loss, 1, total_steps).keys():
        at_step = lambda step: dataclasses.replace(whole, **{name: scheduled(loss, step, total_steps)[name] for name in own})  # noqa: E731
    rule = loss.target_weights and TargetWeights.of(loss.target_weights)
    by_source = {i: make_divergence(name, **own) for i, (name, own) in enumerate(divergences[1:]) if (name, own) != divergences[0]}
    return [HeadTerm(whole, loss.chunk_size or chunk_size, loss.normalize, at_step, rule, keep_of(loss), by_source)]


def keep_of(loss: Loss) -> Keep | None:
    """The choice of the targets that count, by `loss.keep`; None if all do."""
    chosen = chosen_by(loss.keep, loss.target_weights)
    setting = "loss.keep.by" if isinstance(loss.keep, KeepSettings) else "loss.keep"
    return Keep.of(chosen, setting) if chosen.share < 1 else None


def layer_terms(recipe: Recipe, student: Model, teachers: dict[str, Model]) -> list[Term]:
    """The terms that compare layers of the student and a teacher: `loss.features` and `loss.attention`. `teachers`: by setting."""
    setting = feature_teacher(recipe.loss.features, recipe.teacher)
    return [
        *feature_terms(recipe.loss.features, setting, student, teachers, recipe.seed),
        *attention_terms(recipe.loss.attention, student, list(teachers.values())),
    ]


def long_horizon_terms(
    settings: OnPolicy | None,
    loss: Loss,
    chunk_size: int | None = None,
    total_steps: int = 1,
    divergences: Sequence[tuple[str, dict[str, float]]] = (),
) -> list[Term]:
    """MiniLLM's long-horizon term of an on-policy run, with the divergence's weight; [] without it. The other arguments are those of `build_terms`."""
    if not writes(settings) or not settings.long_horizon:
        return []
    ahead = settings.long_horizon
    costs = build_terms(loss, chunk_size, total_steps, divergences)[0] if ahead.rewards == "exact" else None
    mix = ahead.teacher_mix, ahead.mix_weights == "product"
    term = LongHorizonTerm(middle(loss.kd_ratio), ahead.gamma, ahead.length_normalized, loss.chunk_size or chunk_size, *mix, costs)
    term.follow(loss.kd_ratio, total_steps, loss.normalize)
    return [term]


def schedule(optim: Optim, total: int) -> Callable[[int], float]:
    """The learning rate by step."""
    refuse_long_warmup(optim, total)
    warmup = optim.warmup_steps if optim.warmup_steps is not None else part_of(optim.warmup_ratio or 0, total)
    return lambda step: learning_rate(step, total, optim.lr, optim.schedule, warmup, optim.min_lr_ratio)
