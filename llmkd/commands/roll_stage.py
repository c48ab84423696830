"""A stage of a pipeline or a sweep that rolls: a recipe's `on_policy` says who answers its prompts, how often and how. No torch until it runs."""

from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..errors import UserError
from ..rollouts.sampling import Sampling
from ..training.shutdown import ShutdownRequest
from .other_tasks import refuse_other_task
from .roll import roll


def roll_stage(recipe: Recipe, stop: ShutdownRequest | None = None) -> dict[str, Any]:
    """As `roll`, of a stage's recipe: its student, or with `on_policy.teacher_writes: 1` its teacher, writes `train.jsonl` in its output_dir.

    Expects `refuse_unrollable` to have passed. The same call continues a file, and writes nothing if all answers are there.
    """
    says = recipe.on_policy
    sampling = Sampling(says.temperature, says.max_new_tokens, recipe.seed, says.top_p, says.top_k, says.min_p)
    writer = "teacher" if says.teacher_writes else "student"
    return roll(
        writer, recipe, Path(recipe.output_dir).expanduser() / "train.jsonl", sampling, says.samples, batch_size=says.batch_size, stop=stop
    )


def refuse_unrollable(recipe: Recipe) -> None:
    """UserError if a recipe does not say who answers all of its prompts, or asks for what only training can do. Reads the settings only."""
    refuse_other_task(recipe, "roll")
    says = recipe.on_policy
    if says is None:
        raise UserError("on_policy: not given; give it, with the samples, max_new_tokens and temperature of the answers")
    problems = []
    if (says.share, says.teacher_writes) not in ((1, 0), (0, 1)):
        problems.append(
            f"on_policy.share, on_policy.teacher_writes: found {says.share} and {says.teacher_writes}, and one of them writes all answers of a stage; "
            "set one to 1 and the other to 0"
        )
    if says.engine != "local":
        problems.append("on_policy.engine: given, and a stage writes with the model in this process; leave it out")
    if says.long_horizon and says.long_horizon.teacher_mix:
        problems.append("on_policy.long_horizon.teacher_mix: given, and a stage's answers are one model's; set it to 0")
    if problems:
        raise UserError(*problems)
