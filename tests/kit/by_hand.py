"""Training written out here: steps of torch's own Adam, and the losses that a run has written, to be compared with theirs."""

from collections.abc import Iterator
from pathlib import Path

import torch

from llmkd.config.recipe import Recipe
from llmkd.files import read_jsonl


def adam_steps(model: torch.nn.Module, recipe: Recipe, losses: Iterator[torch.Tensor]) -> list[float]:
    """A step of rate 0.01 at each loss, which is computed with the weights after the step before. Returns the losses."""
    adam, found = torch.optim.Adam(model.parameters(), 1e-2, recipe.optim.betas, recipe.optim.eps), []
    for loss in losses:
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(loss.item())
    return found


def logged(recipe: Recipe, name: str = "loss") -> list[float]:
    """A term of the loss at each step, as the run has written it."""
    return [record[name] for record in read_jsonl(Path(recipe.output_dir) / "metrics.jsonl") if "loss" in record]
