"""How the time of a step divides on-policy: writing, teacher, student; for every arm of a sweep, its first seed.

    python eval/speed/on_policy.py [--sweep recipes/on_policy/study.yaml] [--steps 6] [--rounds 3] [--out FILE.md]

Needs the sweep's stages: the arms start from them. Each arm has a training loop of its own; the loops take turns of one step, so that what
else runs on the machine slows all of them, and every arm's first step is left out. Seconds are of CPU time (all threads), so give it one
thread (OMP_NUM_THREADS=1). The heads of both models, the divergence and its gradient are one call, and one column. Prints Markdown.
"""

import argparse
import contextlib
import dataclasses
import functools
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

import torch  # noqa: E402

from llmkd.commands.sweep import SweepRecipes  # noqa: E402
from llmkd.config.loader import load_sweep  # noqa: E402
from llmkd.config.recipe import Recipe  # noqa: E402
from llmkd.config.sweep import expand  # noqa: E402
from llmkd.losses import terms  # noqa: E402
from llmkd.losses.long_horizon import LongHorizonTerm  # noqa: E402
from llmkd.models.language_model import LanguageModel  # noqa: E402
from llmkd.output.run_folder import RunFolder  # noqa: E402
from llmkd.rollouts.writer import LocalWriter  # noqa: E402
from llmkd.teachers.live import LiveTeacher  # noqa: E402
from llmkd.training import loop  # noqa: E402
from llmkd.training.build import build_setup  # noqa: E402
from llmkd.training.launch import start  # noqa: E402
from llmkd.training.prepare import prepare  # noqa: E402

WRITING, TEACHER, FORWARD, HEADS, HORIZON = "writing", "teacher's body", "student's body", "heads and divergence", "long horizon"
BACKWARD, REST = "backward of the student's body", "everything else"
PARTS = (WRITING, TEACHER, FORWARD, HEADS, HORIZON, BACKWARD, REST)


class Shares:
    """CPU seconds by part. A call within another is a part of that."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.open = False

    def of(self, part: str, call: Callable) -> Callable:
        @functools.wraps(call, updated=())
        def timed(*arguments, **keywords):
            if self.open:
                return call(*arguments, **keywords)
            self.open, begun = True, time.process_time()
            try:
                return call(*arguments, **keywords)
            finally:
                self.seconds[part] += time.process_time() - begun
                self.open = False

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default=str(REPO / "recipes/on_policy/study.yaml"))
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each arm in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipes, accelerator = arms(options.sweep), start()
    found = measured(recipes, accelerator, options.steps, options.rounds)
    head = f"`python eval/speed/on_policy.py --steps {options.steps} --rounds {options.rounds}`  "
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    text = "\n".join([head, machine, "", *report(found)])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def arms(path: str) -> dict[str, Recipe]:
    """The recipe of each arm of the same number of steps, with the first seed."""
    sweep = load_sweep(path)
    specs = {
        spec.name: spec for spec in expand(sweep) if spec.seed == next(iter(sweep.seeds), None) and "train.max_steps" not in spec.changes
    }
    recipes = SweepRecipes(sweep, Path(path), specs, check_inputs=True).recipes()
    return {specs[name].arm: recipe for name, recipe in recipes.items()}


def measured(recipes: dict[str, Recipe], accelerator, steps: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """CPU seconds by part of each measured step, by arm."""
    found, shares = defaultdict(list), Shares()
    with calls_timed(shares), tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            loops = {}
            for arm, recipe in recipes.items():
                run = RunFolder(dataclasses.replace(recipe, output_dir=f"{folder}/{number}_{arm}"), False)
                setup = build_setup([run.recipe], prepare(run.recipe), [run], accelerator, lambda: False)
                loops[arm] = loop.train(setup.source, [one.state for one in setup.students], setup.teacher, accelerator)
            for turn in range(steps + 1):
                for arm, going in loops.items():
                    shares.seconds.clear()
                    begun = time.process_time()
                    next(going)
                    whole = time.process_time() - begun
                    if turn:
                        found[arm].append(shares.seconds | {REST: whole - sum(shares.seconds.values())})
            for going in loops.values():
                going.close()
    return found


@contextlib.contextmanager
def calls_timed(shares: Shares) -> Iterator[None]:
    """While this is open, the calls of a step are timed."""
    calls = [
        (LocalWriter, "write", WRITING),
        (LiveTeacher, "__call__", TEACHER),
        (LanguageModel, "outputs", FORWARD),
        (terms, "fused_parts", HEADS),
        (LongHorizonTerm, "forward", HORIZON),
        (torch.Tensor, "backward", BACKWARD),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, part in calls:
            stack.enter_context(mock.patch.object(place, name, shares.of(part, getattr(place, name))))
        yield


def report(found: dict[str, list[dict[str, float]]]) -> list[str]:
    totals = {arm: statistics.median(sum(step.values()) for step in steps) for arm, steps in found.items()}
    least = min(totals.values())
    lines = ["| arm | CPU ms a step (median) | times the least | " + " | ".join(PARTS) + " |", "| --- " * (3 + len(PARTS)) + "|"]
    for arm, steps in found.items():
        whole = sum(sum(step.values()) for step in steps)
        cells = [f"{sum(step.get(part, 0.0) for step in steps) / whole:.0%}" for part in PARTS]
        lines.append(f"| `{arm}` | {totals[arm] * 1e3:.0f} | {totals[arm] / least:.2f} | " + " | ".join(cells) + " |")
    return [*lines, "", f"{len(next(iter(found.values())))} steps of each."]


if __name__ == "__main__":
    main()
