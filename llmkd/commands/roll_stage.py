"""A stage of a pipeline or a sweep that rolls: a recipe's `on_policy` says who answers its prompts, how often and how."""

from pathlib import Path

from ..config.loader import dump
from ..config.recipe import Recipe
from ..console import several_processes
from ..errors import UserError
from ..files import write_atomic
from ..output.run_files import RECIPE
from ..output.run_folder import RunFolder
from ..rollouts.answer_file import read_about
from ..rollouts.sampling import Sampling
from ..training.shutdown import ShutdownRequest
from .other_tasks import refuse_other_task
from .roll import roll, source_of

#: Settings of on_policy that are about training alone.
_OF_TRAINING = ("long_horizon", "replay", "prompt_tokens")


def roll_stage(recipe: Recipe, stop: ShutdownRequest | None = None) -> None:
    """As `roll`, of a stage's recipe: its student, or with `on_policy.teacher_writes: 1` its teacher, writes `train.jsonl` in its output_dir.

    Expects `refuse_unrollable` to have passed. The same call continues a file, and writes nothing if all answers are there. In a launch of
    several processes they are.
    """
    if several_processes():
        return
    says, folder = recipe.on_policy, _rows(recipe).parent
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RECIPE, dump(recipe, folder))  # `refuse_unrollable` compares with it
    sampling = Sampling(says.temperature, says.max_new_tokens, recipe.seed, says.top_p, says.top_k, says.min_p)
    roll(_writer(recipe), recipe, _rows(recipe), sampling, says.samples, batch_size=says.batch_size, stop=stop)


def refuse_unrollable(recipe: Recipe) -> None:
    """UserError if a recipe does not say who answers all of its prompts, asks for what only training can do, or is not the one with which the
    stage began. Loads no model."""
    refuse_other_task(recipe, "roll")
    says = recipe.on_policy
    if says is None:
        raise UserError("on_policy: not given; give it, with the samples, max_new_tokens and temperature of the answers")
    problems = []
    if (says.share, says.teacher_writes) not in ((1, 0), (0, 1)):
        share = says.share if isinstance(says.share, float) else "a schedule"
        problems.append(
            f"on_policy.share, on_policy.teacher_writes: found {share} and {says.teacher_writes}, and one of them writes all answers of a stage; "
            "set one to 1 and the other to 0"
        )
    if says.engine != "local":
        problems.append("on_policy.engine: given, and a stage writes with the model in this process; leave it out")
    problems += [
        f"on_policy.{name}: given, and it is about training alone, which a stage that rolls does not do; leave it out"
        for name in _OF_TRAINING
        if getattr(says, name) is not None
    ]
    if problems:
        raise UserError(*problems)
    if _writer(recipe) == "teacher" or not isinstance(recipe.student.layers, tuple):  # of layers the model may be yet to come
        source_of(_writer(recipe), recipe)
    if several_processes() and not ((about := read_about(_rows(recipe))) and about["complete"]):
        raise UserError(
            f"{_rows(recipe)} is not complete, and a stage writes answers in one process; run this without accelerate launch until it is, and then go "
            "on with both accelerate launch and --resume"
        )
    folder = RunFolder(recipe, resume=True)
    if folder.path.exists():
        folder.check()


def _writer(recipe: Recipe) -> str:
    return "teacher" if recipe.on_policy.teacher_writes else "student"


def _rows(recipe: Recipe) -> Path:
    return Path(recipe.output_dir).expanduser() / "train.jsonl"
