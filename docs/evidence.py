"""Writes the two tables of docs/evidence.md: what so many items can show, and what the recipes for GPUs cost. `python docs/evidence.py`, some minutes.

`--seen` writes the first alone, which needs no models.
"""

import argparse
import contextlib
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "evidence.md"
POWER = 1.959964 + 0.841621  # standard errors of a difference that is shown 4 times in 5, at 5 % and two-sided


@dataclass(frozen=True)
class Claim:
    """A published difference between two shares of right answers, in points, and the items that it was measured on.

    share   about what both models reach
    parts   items of each task, of which the score is the mean
    """

    what: str
    parts: tuple[int, ...]
    share: float
    points: float

    @property
    def error(self) -> float:
        """One standard error of one model's score, in points: sqrt(p (1 - p) / n), of a mean of k tasks the root of the sum of squares over k."""
        return 100 * math.sqrt(sum(self.share * (1 - self.share) / n for n in self.parts)) / len(self.parts)

    def seen(self, disagree: float | None = None) -> float:
        """The difference that these items show 4 times in 5: of two models apart from one another, or compared item by item where so large a share of the
        items is right in one of them alone, sqrt(d / n)."""
        one = math.sqrt(2) * self.error if disagree is None else 100 * math.sqrt(sum(disagree / n for n in self.parts)) / len(self.parts)
        return POWER * one


CLAIMS = (
    Claim("HellaSwag, KD at 0.5 against tuning (torchtune)", (10_042,), 0.46, 0.08),
    Claim("CommonsenseQA, the same", (1_221,), 0.555, 0.41),
    Claim("CommonsenseQA, KD at 1.0", (1_221,), 0.56, 1.89),
    Claim("TruthfulQA, KD at 0.5", (817,), 0.45, -0.11),
    Claim("AIME'24, on-policy against its start (Thinking Machines)", (30,), 0.65, 10.0),
    Claim("MATH-500, forward KL where the teacher is unsure (its paper)", (500,), 0.51, 1.93),
    Claim("MATH-500, the same (its repetition)", (500,), 0.53, -1.32),
    Claim("ToolAlpaca, self-distillation against tuning, least", (97,), 0.66, 1.03),
    Claim("ToolAlpaca, the same, most", (97,), 0.67, 3.09),
    Claim("five tasks, QAD against GPTQ (AngelSlim)", (1_838, 2_376, 1_172, 10_042, 1_267), 0.66, 2.21),
    Claim("MMLU, across tokenizers against the start (NeMo-RL)", (14_042,), 0.36, 7.18),
    Claim("GSM8K, the same", (1_319,), 0.06, 0.45),
)


@dataclass(frozen=True)
class Cost:
    """A recipe to plan. `changes`: settings in place of what the data would say; `tokens`: of a mean row, where that is known; `study`: the file that repeats it."""

    recipe: str
    gpu: str = "h100"
    changes: dict = field(default_factory=dict)
    tokens: int | None = None
    study: str | None = None


def _steps(count: int) -> dict:
    return {"train.epochs": None, "train.max_steps": count}


COSTS = (
    Cost("llama3_8b_to_1b/1_teacher", tokens=300),
    Cost("llama3_8b_to_1b/2_distill", tokens=300, study="llama3_8b_to_1b/study"),
    Cost("gpt2_1.5b_to_120m/1_teacher", changes=_steps(4_380)),
    Cost("gpt2_1.5b_to_120m/3_distillm", changes=_steps(8_760), study="gpt2_1.5b_to_120m/study"),
    Cost("gpt2_1.5b_to_120m/3_minillm"),
    Cost("qwen3_4b_qad/distill", changes=_steps(625), tokens=1_300, study="qwen3_4b_qad/study"),
    Cost("qwen3_8b_to_0.6b_base/on_policy", study="qwen3_8b_to_0.6b_base/study"),
    Cost("sdft_toolalpaca/1_sdft", changes=_steps(125), study="sdft_toolalpaca/study"),
    Cost("qwen3_32b_to_8b/1_start", "h200"),
    Cost("qwen3_32b_to_8b/2_on_policy", "h200", study="qwen3_32b_to_8b/study"),
    Cost("qwen3_32b_to_8b/3_off_policy", "h200"),
    Cost("qwen3_32b_to_8b/4_rolled"),
)


def seen_table() -> str:
    head = (
        "| published difference | items | points | one standard error of a score | shown 4 times in 5: unpaired | item by item, 10 % disagreeing |\n"
        "|---|---|---|---|---|---|\n"
    )
    rows = (f"| {c.what} | {sum(c.parts):,} | {c.points:+.2f} | {c.error:.2f} | {c.seen():.1f} | {c.seen(0.1):.1f} |\n" for c in CLAIMS)
    return head + "".join(rows)


def planned(cost: Cost, changes: dict) -> dict:
    """What `llmkd plan` says of a recipe on its GPU."""
    from llmkd.commands import plan
    from llmkd.planning.devices import GPUS

    with contextlib.redirect_stdout(io.StringIO()):
        return plan.run(str(ROOT / "recipes" / f"{cost.recipe}.yaml"), cost.changes | changes, plan.Wanted(GPUS[cost.gpu]))


def cost_row(cost: Cost) -> str:
    """A line of the second table: memory and the most hours from rows of data.max_length tokens, hours from rows of a mean length where it is known."""
    most = planned(cost, {})
    hours = [most["devices"][0]["seconds"] / 3600]
    if cost.tokens:
        hours.append(planned(cost, {"data.max_length": cost.tokens})["devices"][0]["seconds"] / 3600)
    shown = [f"{one:,.1f}" if one < 10 else f"{one:,.0f}" for one in hours]
    runs = runs_of_study(cost.study) if cost.study else 0
    return (
        f"| `{cost.recipe}` | {cost.gpu.upper()} | {most['memory']['needed'] / 1e9:.0f} | {shown[0]} | {shown[1] if cost.tokens else ''} | "
        + (f"`{Path(cost.study).name}`: {runs} runs, at most {runs * hours[-1]:,.0f} |\n" if cost.study else "|\n")
    )


def runs_of_study(study: str) -> int:
    """The number of a study's runs: configurations by seeds."""
    from llmkd.config.loader import load_sweep
    from llmkd.config.sweep import expand

    return len(expand(load_sweep(ROOT / "recipes" / f"{study}.yaml")))


COST_HEAD = "| recipe | on one | GB | hours, all rows as long as they may be | hours, rows of a mean length | a study of it, hours |\n|---|---|---|---|---|---|\n"


def replaced(text: str, name: str, table: str) -> str:
    """The page with another table between the marks of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seen", action="store_true", help="the first table alone")
    only_seen, tables = parser.parse_args().seen, {"seen": seen_table()}
    if not only_seen:
        rows = []
        for one in COSTS:
            rows.append(cost_row(one))
            print(rows[-1], end="", flush=True)
        tables["cost"] = COST_HEAD + "".join(rows)
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        page = replaced(page, name, table)
    PAGE.write_text(page, encoding="utf-8")
