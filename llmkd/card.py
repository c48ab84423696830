"""The card beside a trained adapter or model: what it is, how it was made, what was measured."""

import platform
from importlib.metadata import version

from . import __version__
from .recipe import Recipe
from .settings import dump


def card(recipe: Recipe, summary: dict) -> str:
    """Markdown with the hub's metadata block."""
    teacher = recipe.teacher.model if recipe.teacher and recipe.loss.kd_ratio else None
    base = recipe.student.model
    head = ["---"] + ([f"base_model: {base}"] if base else [])
    head += [
        "library_name: " + ("peft" if recipe.student.method == "lora" else "transformers"),
        "pipeline_tag: text-generation",
        "tags: [llmkd, distillation]" if teacher else "tags: [llmkd]",
        "---",
    ]
    kind = "A LoRA adapter" if recipe.student.method == "lora" else "A model"
    made = (
        f"distilled from `{teacher}` ({recipe.loss.divergence}, kd_ratio {recipe.loss.kd_ratio:g})"
        if teacher
        else "trained by supervised fine-tuning"
    )
    figures = [
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in summary["validation"].items()
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))
    return "\n".join(
        [
            *head,
            "",
            f"# {recipe.output_dir}",
            "",
            f"{kind} {f'for `{base}` ' if base else ''}{made} with llmkd {__version__}.",
            "",
            "## Held-out figures",
            "",
            *(["| figure | value |", "|---|---|", *figures] if figures else ["None were measured."]),
            "",
            "## Recipe",
            "",
            "```yaml",
            dump(recipe).rstrip(),
            "```",
            "",
            f"Python {platform.python_version()}, {versions}.",
            "",
        ]
    )
