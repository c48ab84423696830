"""python eval/speed/epoch.py [--steps 12] [--rounds 5] [--students 1 4 9] [--teacher FOLDER --student FOLDER]

Time of training by kind of teacher: live, a teacher cache (hidden states, top-k, samples), or none; for one student and for several that
share a teacher. Times are those of the training loop alone, interleaved, after one warm-up round: median, smallest and largest. Beside them
the counted matrix operations (llmkd/commands/cost.py), which say what several students or a teacher cache can save at best.
Writing a cache is timed once.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

from llmkd.commands.cost import step_operations  # noqa: E402
from llmkd.config import loader  # noqa: E402
from llmkd.models.size import model_size  # noqa: E402
from llmkd.output.run_folder import RunFolder  # noqa: E402
from llmkd.training.shutdown import ShutdownRequest  # noqa: E402

RECIPE = REPO / "recipes/quickstart/2_distill.yaml"
ARMS = [{"loss.kd_ratio": kd, "optim.lr": lr} for kd in (0.25, 0.5, 1.0) for lr in (3e-3, 1e-3, 3e-4)]
KINDS = ("hidden", "topk", "sampled")


class Timed:
    """A teacher, and how long it took to answer."""

    def __init__(self, teacher):
        self.teacher, self.metrics, self.seconds = teacher, teacher.metrics, 0.0

    def __call__(self, batch):
        before = time.perf_counter()
        signal = self.teacher(batch)
        self.seconds += time.perf_counter() - before
        return signal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--students", type=int, nargs="+", default=[1, 4, 9])
    parser.add_argument("--teacher", default=str(REPO / "recipes/quickstart/base/teacher"))
    parser.add_argument("--student", default=str(REPO / "recipes/quickstart/base/student"))
    options = parser.parse_args()
    from llmkd.cli import quiet
    from llmkd.commands.cache import cache

    quiet()
    with tempfile.TemporaryDirectory() as root:
        teachers, made = {"live": {"model": options.teacher}, "nobody": None}, {}
        for kind in KINDS:
            teachers[kind] = {"model": options.teacher, "cache": {"path": f"{root}/{kind}", "kind": kind}}
            before = time.perf_counter()
            cache(recipes(options, teachers[kind], Path(root) / "none", 1)[0])
            made[kind] = time.perf_counter() - before
        cases = [(who, count) for count in options.students for who in teachers]
        times: dict = {case: [] for case in cases}
        for round_ in range(options.rounds + 1):
            for who, count in cases:
                found = trained(recipes(options, teachers[who], Path(root) / f"{round_}-{who}-{count}", count))
                times[who, count] += [found] if round_ else []
        report(options, times, made, counted(options, teachers, Path(root)))


def recipes(options, teacher: dict | None, folder: Path, count: int) -> list:
    base = {
        "student.model": options.student,
        "teacher": teacher,
        "train.max_steps": options.steps,
        "train.epochs": None,
        "data.validation": None,
        "data.choices": None,
        "validation.every": None,
        "validation.teacher_check": 0,
        "checkpoint.every": None,
        "train.log_every": options.steps,
    }
    arms = [arm | ({} if teacher else {"loss.kd_ratio": 0.0}) for arm in ARMS[:count]]
    return [loader.load_recipe(RECIPE, base | arm | {"output_dir": str(folder / str(i))}) for i, arm in enumerate(arms)]


def trained(many: list) -> tuple[float, float, int]:
    """Seconds of the training loop, the share of it that the teacher took, and targets passed."""
    from llmkd.training.build import build_setup
    from llmkd.training.launch import start
    from llmkd.training.prepare import prepare
    from llmkd.training.trainer import Trainer, TrainerSettings

    with ShutdownRequest() as stop:
        folders, accelerator = [RunFolder(recipe, False) for recipe in many], start()
        first = many[0]
        setup = build_setup(many, prepare(first, others=many[1:]), folders, accelerator, stop)
        trainer = Trainer(setup, TrainerSettings(first.train, first.validation, first.checkpoint), accelerator, stop)
        trainer.teacher = asked = Timed(trainer.teacher) if trainer.teacher else None
        before = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - before
        targets = sum(step.num_targets for step in trainer.source.schedule())
        return seconds, asked.seconds / seconds if asked else 0.0, targets


def counted(options, teachers: dict, root: Path) -> dict:
    """Operations of a step by who answers and for how many students, up to a factor."""
    from llmkd.training.prepare import prepare

    prepared = prepare(recipes(options, teachers["live"], root / "counted", 1)[0])
    tokens, targets = len(prepared.train.ids), int(prepared.train.loss_mask.sum())
    student, live = model_size(prepared.student), [model_size(one.files) for one in prepared.teachers]
    out = {}
    for who in teachers:
        for count in options.students:
            out[who, count] = step_operations(student, live if who == "live" else [], count, tokens, targets, False, False, tokens)
    return out


def report(options, times: dict, made: dict[str, float], operations: dict) -> None:
    import torch

    one, least = statistics.median(seconds for seconds, *_ in times["live", options.students[0]]), operations["live", options.students[0]]
    print(
        "| students | who answers | ms a step (smallest to largest) | targets/s of all students | of it asking | against a live one | operations |"
    )
    print("|---|---|---|---|---|---|---|")
    for (who, count), found in times.items():
        seconds = [s for s, *_ in found]
        median, targets = statistics.median(seconds), found[0][2]
        spread = (
            f"{median / options.steps * 1e3:.0f} ({min(seconds) / options.steps * 1e3:.0f} to {max(seconds) / options.steps * 1e3:.0f})"
        )
        share = statistics.median(share for _, share, _ in found)
        print(
            f"| {count} | {who} | {spread} | {count * targets / median:,.0f} | {share:.1%} | {median / (count * one):.2f} | "
            f"{operations[who, count] / (count * least):.2f} |"
        )
    print(
        f"\nThe last two columns: per student, against one before a live teacher. Caches were written in {', '.join(f'{s:.1f} s ({k})' for k, s in made.items())}, loading included."
    )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; `python eval/speed/epoch.py {' '.join(sys.argv[1:])}`")


if __name__ == "__main__":
    main()
