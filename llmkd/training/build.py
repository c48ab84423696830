"""From a recipe to the parts of a trainer: models in memory, the order of the data, students with their optimizers."""

import math
from collections.abc import Callable

from ..config.recipe import Loss, Recipe, Teacher
from ..console import info
from ..data.batching import TokenBudget
from ..errors import UserError
from ..losses.divergences import make_divergence
from ..losses.objective import Objective
from ..losses.terms import HeadTerm, Term
from ..models.compile import compile_layers, configure_torch_compile
from ..models.language_model import LanguageModel
from ..models.load import AroundTransform, load_models
from . import optim as optimizers
from .distiller import Distiller
from .loop import StudentState
from .optim import learning_rate
from .prepare import micro_batch


def load(
    recipes: list[Recipe], teachers: list[tuple[str, Teacher]], vocab: int, device, around_transform: AroundTransform
) -> tuple[list[LanguageModel], list[LanguageModel]]:
    """The recipes' students and the teachers, by their settings' names, ready for packed rows and compiled where the recipe says so."""
    recipe = recipes[0]
    if recipe.train.compile:
        configure_torch_compile(device)
    packing = recipe.data.packing * longest_row(recipe)
    students, found = load_models([one.student for one in recipes], teachers, vocab, device, recipe.seed, packing, around_transform)
    every = [
        *(("student.model", one) for one in students),
        *((f"{name}.model", one) for (name, _), one in zip(teachers, found, strict=True)),
    ]
    if recipe.data.share_prefixes and (
        other := next(((setting, one) for setting, one in every if not one.capabilities.packed_attention), None)
    ):
        raise UserError(
            f"data.share_prefixes: {other[0]} ({other[1].base_model.config.model_type}) keeps an attention of its own in packed rows, which cannot "
            "share; set it to false"
        )
    if recipe.train.compile:
        info("compiling the layers of student and teachers, which takes a while; what was compiled before is found again")
        for setting, model in every:
            compile_layers(model, setting, recipe.data.packing)
    return students, found


def longest_row(recipe: Recipe) -> int:
    """The tokens that a packed row may hold."""
    size, most = micro_batch(recipe), recipe.data.max_length
    return max(most, min(size.tokens, recipe.train.batch_size * most)) if isinstance(size, TokenBudget) else size * most


def build_student(recipe: Recipe, student: LanguageModel, total_steps: int, accelerator, chunk_size: int | None = None) -> StudentState:
    """The student with its terms, optimizer and schedule. `chunk_size`: rows of the head, where the recipe does not say."""
    optim = recipe.optim
    distiller = Distiller(student, [term.to(accelerator.device) for term in build_terms(recipe.loss, chunk_size)])
    parameters = distiller.trainable()
    optimizer = optimizers.build(optim, parameters)
    if (
        student.capabilities.parameters_without_gradient and accelerator.num_processes > 1
    ):  # or the processes would wait for gradients that never come
        accelerator.ddp_handler.find_unused_parameters = True
    return StudentState(accelerator.prepare_model(distiller), optimizer, parameters, schedule(recipe, total_steps), optim.max_grad_norm)


def build_terms(loss: Loss, chunk_size: int | None = None) -> list[Term]:
    """The terms of the loss. `chunk_size`: rows of the head at a time, where the settings do not say."""
    divergence = make_divergence(loss.divergence, **loss.divergence_options)
    return [HeadTerm(Objective(loss.kd_ratio, loss.temperature, divergence), loss.chunk_size or chunk_size)]


def schedule(recipe: Recipe, total: int) -> Callable[[int], float]:
    """The learning rate by step."""
    optim = recipe.optim
    if optim.warmup_steps and optim.warmup_steps > total:
        raise UserError(
            f"optim.warmup_steps: found {optim.warmup_steps}, and the whole run has {total} steps; lower it, or use optim.warmup_ratio"
        )
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil((optim.warmup_ratio or 0) * total)
    return lambda step: learning_rate(step, total, optim.lr, optim.schedule, warmup, optim.min_lr_ratio)
