"""What students side by side before one teacher cost: a step of one, of nine, and of nine that compute the teacher's head once each.

    python eval/speed/students.py [--students 9] [--shapes quickstart --batch 64] [--steps 5] [--repeats 2]

and the other settings of step.py. The three loops take their steps in turns, as in terms.py, on the models and data of step.py, packed, on one
thread with OMP_NUM_THREADS=1. Prints Markdown.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # instead of eval/speed, whose files are not top-level modules

from eval.speed.step import heading, parser  # noqa: E402
from eval.speed.step_cases import learning  # noqa: E402
from eval.speed.step_setup import Setup  # noqa: E402
from eval.speed.turns import in_turns, report  # noqa: E402
from llmkd import signals  # noqa: E402
from llmkd.data.batching import TokenBudget  # noqa: E402
from llmkd.teachers.live import LiveTeacher  # noqa: E402
from llmkd.training.launch import start  # noqa: E402
from llmkd.training.loop import train  # noqa: E402
from llmkd.training.step_result import StepResult  # noqa: E402


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--students", type=int, default=9)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    setup = Setup(options, start())
    text = "\n".join([*heading(setup, "students"), *report(measured(setup, options.students), "students", "a step of one")])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measured(setup: Setup, count: int) -> dict[str, list[float]]:
    """Seconds of each measured step by row, turn by turn."""
    alone, shared, apart = "one", f"{count}", f"{count}, each with the teacher's head computed for itself"
    kept, size = signals.MOST_KEPT, TokenBudget(setup.options.tokens, packing=True)

    def loop_of(row: str) -> Iterator[StepResult]:
        students = [setup.student] if row == alone else setup.students_on_one_base(count)
        states = [learning(setup, 0.5, student) for student in students]
        return train(setup.source(size), states, LiveTeacher(setup.teacher), setup.accelerator)

    def before(row: str) -> None:
        signals.MOST_KEPT = 0 if row == apart else kept

    try:
        return in_turns(setup, [alone, shared, apart], loop_of, before)
    finally:
        signals.MOST_KEPT = kept


if __name__ == "__main__":
    main()
