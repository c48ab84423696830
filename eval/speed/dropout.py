"""What LoRA's dropout costs: a step without, with PEFT's own, whose masks are drawn, and with that whose masks follow the example.

    python eval/speed/dropout.py [--hidden 576 --layers 4 --vocab 8192] [--batch 16] [--steps 10] [--repeats 2]

and the other settings of step.py. One student, whose dropout is changed between the steps; the three loops take their steps in turns, as in
terms.py, on the models and data of step.py, packed. Prints Markdown.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

from torch import nn  # noqa: E402

from eval.speed.step import heading, parser  # noqa: E402
from eval.speed.step_cases import learning  # noqa: E402
from eval.speed.step_setup import Setup  # noqa: E402
from eval.speed.turns import in_turns, report  # noqa: E402
from llmkd.data.batching import TokenBudget  # noqa: E402
from llmkd.models.dropout import dropout_masks_of, follow_examples  # noqa: E402
from llmkd.teachers.live import LiveTeacher  # noqa: E402
from llmkd.training.launch import start  # noqa: E402
from llmkd.training.loop import train  # noqa: E402
from llmkd.training.step_result import StepResult  # noqa: E402

P = 0.05
ROWS = {"without": nn.Identity, "PEFT's dropout": lambda: nn.Dropout(P), "dropout by the example": lambda: nn.Dropout(P)}


def main() -> None:
    options = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    setup = Setup(options, start())
    text = "\n".join([*heading(setup, "dropout"), *report(measured(setup), f"dropout of {P}")])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measured(setup: Setup) -> dict[str, list[float]]:
    """Seconds of each measured step by row, turn by turn."""
    size = TokenBudget(setup.options.tokens, packing=True)

    def loop_of(row: str) -> Iterator[StepResult]:
        return train(setup.source(size), [learning(setup, 0.5, setup.student)], LiveTeacher(setup.teacher), setup.accelerator)

    return in_turns(setup, list(ROWS), loop_of, before=lambda row: put_on(setup, row))


def put_on(setup: Setup, row: str) -> None:
    """Give every adapter of the student the row's dropout."""
    for module in setup.student.model.modules():
        for name in getattr(module, "lora_dropout", {}):
            module.lora_dropout[name] = ROWS[row]().train()
    if row == "dropout by the example":
        follow_examples(setup.student.model)
    setup.student.dropout_masks = dropout_masks_of(setup.student.model)


if __name__ == "__main__":
    main()
