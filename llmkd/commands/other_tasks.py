"""Commands for language models refuse recipes and runs of other tasks, and name the alternative. No torch."""

from pathlib import Path

from ..config.recipe import Recipe
from ..config.tasks import SEQUENCES
from ..config.yaml_loader import parse_yaml
from ..errors import UserError
from ..files import read_file
from ..output.run_files import RECIPE

#: The alternative for classifiers, by command.
INSTEAD = {
    "doctor": "llmkd data shows what the models read, and llmkd train checks them on a small batch before its first step",
    "eval": "data.validation measures accuracy and macro F1 in training, and llmkd report shows the confusion matrix",
    "sample": "transformers' pipeline, as in the README.md of the student's folder, uses it",
    "roll": "it writes no text; leave its labels to a teacher in training",
}
#: The alternative for encoder-decoder models, where it differs.
OF_SEQUENCES = {
    "eval": "validation.error_rates measures word and character error rates in training",
    "roll": "its targets are those of the rows",
    "doctor": "llmkd train checks models on a small batch before its first step",
}


def refuse_other_task(recipe: Recipe, command: str) -> None:
    """UserError for a recipe of another task than causal_lm."""
    if recipe.task != "causal_lm":
        raise UserError(_line("task", recipe.task, command))


def refuse_run_of_other_task(run: Path, command: str) -> None:
    """UserError for a run's folder, or its student's, where the run's task is not causal_lm."""
    for folder in (run, run.parent):
        if (file := folder / RECIPE).is_file():
            settings = parse_yaml(read_file(file).decode("utf-8"), str(file))[0]
            if isinstance(settings, dict) and settings.get("task", "causal_lm") != "causal_lm":
                raise UserError(_line(str(run), settings["task"], command))
            return


def _line(where: str, task: str, command: str) -> str:
    instead = INSTEAD if task not in SEQUENCES else INSTEAD | OF_SEQUENCES
    return f"{where}: found task {task}, and llmkd {command} is for language models; {instead[command]}"
