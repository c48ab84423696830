"""python eval/speed/sweep.py [--steps 20] [--repeats 3] [--teacher FOLDER --student FOLDER]

What a sweep costs: training 1, 3 and 9 students side by side before one teacher, against as many runs one after another. Times are
those of the training loop alone, interleaved and repeated; the median with the smallest and largest. Besides, the operations counted
(llmkd/cost.py), which say what side by side can save at best: the teacher's body, not the students' own passes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

from llmkd import cost, settings  # noqa: E402
from llmkd.run_folder import RunFolder  # noqa: E402
from llmkd.stopping import StopRequest  # noqa: E402

ARMS = [{"loss.kd_ratio": kd, "optim.lr": lr} for kd in (0.25, 0.5, 1.0) for lr in (3e-3, 1e-3, 3e-4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--teacher", default=str(REPO / "recipes/quickstart/base/teacher"))
    parser.add_argument("--student", default=str(REPO / "recipes/quickstart/base/student"))
    options = parser.parse_args()
    from llmkd.cli import quiet

    quiet()
    with tempfile.TemporaryDirectory() as root:
        times = {count: [] for count in (1, 3, 9)}
        for repeat in range(options.repeats + 1):  # the first one warms up
            for count in times:
                seconds = trained(options, Path(root) / f"{repeat}-{count}", count)
                times[count] += [seconds] if repeat else []
        report(times, counted(options, Path(root)))


def recipes(options, folder: Path, count: int) -> list:
    base = {
        "student.model": options.student,
        "teacher": {"model": options.teacher},
        "train.max_steps": options.steps,
        "train.epochs": None,
        "data.validation": None,
        "data.choices": None,
        "validation.every": None,
        "validation.gate": 0,
        "checkpoint.every": None,
        "train.log_every": options.steps,
    }
    file = REPO / "recipes/quickstart/2_distill.yaml"
    return [settings.load_recipe(file, base | arm | {"output_dir": str(folder / str(i))}) for i, arm in enumerate(ARMS[:count])]


def trained(options, folder: Path, count: int) -> float:
    """Seconds of the training loop with `count` students."""
    from llmkd.prepare import prepare
    from llmkd.session import Session
    from llmkd.training import start

    many = recipes(options, folder, count)
    with StopRequest() as stop:
        session = Session(many, many[0], prepare(many[0]), [RunFolder(recipe, False) for recipe in many], start(), stop)
        before = time.perf_counter()
        session.train()
        return time.perf_counter() - before


def counted(options, root: Path) -> dict[int, float]:
    """Operations of a step with 1, 3 and 9 students, up to a factor."""
    from llmkd.prepare import prepare

    prepared = prepare(recipes(options, root / "counted", 1)[0])
    tokens, targets = len(prepared.train.ids), int(prepared.train.supervised.sum())
    student, teachers = cost.shape_of(prepared.student), [cost.shape_of(one.files) for one in prepared.teachers]
    return {count: cost.step_operations(student, teachers, count, tokens, targets, False, False, tokens) for count in (1, 3, 9)}


def report(times: dict[int, list[float]], operations: dict[int, float]) -> None:
    import torch

    one = statistics.median(times[1])
    print(
        "| students side by side | seconds (smallest to largest) | against one | against as many runs | operations against as many runs |"
    )
    print("|---|---|---|---|---|")
    for count, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(
            f"| {count} | {spread} | {median / one:.2f} | {median / (count * one):.2f} | {operations[count] / (count * operations[1]):.2f} |"
        )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
