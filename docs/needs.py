"""Writes the table of needs in recipes/README.md from plans: `python docs/needs.py`, some minutes. `tests/planning/test_needs.py` repeats a row."""

import argparse
from pathlib import Path

from llmkd.config.loader import load_recipe
from llmkd.planning.devices import held_on_gpu
from llmkd.planning.find import find
from llmkd.planning.plan import Plan, plan

RECIPES = Path(__file__).parent.parent / "recipes"
#: Folders whose models' configurations are in `planning/known_models.py`, so that the table is the same on every machine.
FOLDERS = (
    "laptop_360m_to_135m",
    "qwen2.5_1.5b_to_0.5b",
    "smollm2_1.7b_to_360m",
    "gemma3_4b_to_1b",
    "llama3_8b_to_1b_qlora",
    "qwen3_8b_to_0.6b",
    "llama3_8b_to_1b",
)
BEGIN, END = "<!-- needs -->\n", "<!-- end of needs -->\n"
HEAD = "| stage | student's weights | trained, with its optimizer | teacher's weights | the rest at the peak | on a GPU, GB |\n|---|---|---|---|---|---|\n"


def needs(folder: str, stage: int) -> Plan:
    """The plan of a stage on a GPU with plenty of memory."""
    (path,) = (RECIPES / folder).glob(f"{stage}_*.yaml")
    recipe = load_recipe(path)
    return plan([recipe], find([recipe], path.parent), None, gpu=True)


def row(folder: str, stage: int, planned: Plan) -> str:
    """A line of the table, in GB."""
    parts = planned.parts
    trains = sum(parts.get(name, 0) for name in ("trained", "optimizer", "gradients"))
    known = parts["student's weights"], trains, parts.get("teacher's weights", 0)
    shown = (*known, planned.peak - sum(known), held_on_gpu(planned.peak, planned.weights))
    return f"| `{folder}` {stage} | " + " | ".join(f"{size / 1e9:.1f}" if size else "" for size in shown) + " |\n"


def replaced(text: str, rows: list[str]) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + HEAD + "".join(rows) + END + rest.split(END)[1]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    page, rows = RECIPES / "README.md", []
    for folder in FOLDERS:
        for stage in (1, 2):
            rows.append(row(folder, stage, needs(folder, stage)))
            print(rows[-1], end="", flush=True)
    page.write_text(replaced(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
