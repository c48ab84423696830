"""What loss.features and loss.attention cost: a step with each against the same step without.

    python eval/speed/terms.py [--equal] [--layers 6] [--shapes quickstart --batch 64] [--only features] [--steps 10] [--repeats 3]

and the other settings of step.py. `--only` takes the rows with that word.

On the models and data of step.py, LoRA, half CE and half forward KL, packed. Each row has a training loop of its own; the loops take their
steps in turns, so that what else runs on the machine slows all of them, and a step is compared with the one without of its own turn.
On a CPU seconds are of CPU time (all threads), so give it one thread (OMP_NUM_THREADS=1). Prints Markdown.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

from eval.speed.step import heading, parser  # noqa: E402
from eval.speed.step_cases import learning  # noqa: E402
from eval.speed.step_setup import Setup  # noqa: E402
from eval.speed.turns import in_turns, report  # noqa: E402
from llmkd.config.features import Features  # noqa: E402
from llmkd.config.terms import AttentionLoss  # noqa: E402
from llmkd.data.batching import TokenBudget  # noqa: E402
from llmkd.losses.terms import Term  # noqa: E402
from llmkd.signals import NO_TAPS  # noqa: E402
from llmkd.teachers.live import LiveTeacher  # noqa: E402
from llmkd.training.attention import attention_terms  # noqa: E402
from llmkd.training.features import feature_terms  # noqa: E402
from llmkd.training.launch import start  # noqa: E402
from llmkd.training.loop import train  # noqa: E402
from llmkd.training.step_result import StepResult  # noqa: E402

HEADS = 8
ROWS: dict[str, Features | AttentionLoss | None] = {
    "without": None,
    "features, the middle layers": Features(init="xavier", layers="middle"),
    "features, every layer": Features(init="xavier", layers="uniform"),
    "attention maps, the last layers": AttentionLoss(heads="mean"),
    f"attention relations in {HEADS} parts, the last layers": AttentionLoss(what="relations", relation_heads=HEADS),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", default="", help="rows with that word, and the one without a term")
    options = arguments.parse_args()
    if options.float8 or options.peers or options.compile:
        raise SystemExit("--float8, --peers, --compile: found one of them, which step.py measures; leave it out")
    warnings.simplefilter("ignore")
    setup = Setup(options, start())
    text = "\n".join([*heading(setup, "terms"), *report(measured(setup), "further term")])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def terms_of(setup: Setup, settings: Features | AttentionLoss | None) -> Sequence[Term]:
    match settings:
        case Features():
            return [term.to(setup.device) for term in feature_terms(settings, "teacher", setup.student, {"teacher": setup.teacher}, seed=0)]
        case AttentionLoss():
            return attention_terms(settings, setup.student, [setup.teacher])
    return []


def measured(setup: Setup) -> dict[str, list[float]]:
    """Seconds of each measured step by row, turn by turn."""
    rows = {row: settings for row, settings in ROWS.items() if settings is None or getattr(setup.options, "only", "") in row}
    size = TokenBudget(setup.options.tokens, packing=True)

    def loop_of(row: str) -> Iterator[StepResult]:
        terms = terms_of(setup, rows[row])
        taps = terms[0].teacher_taps if terms else NO_TAPS
        state = learning(setup, 0.5, setup.student, terms)
        return train(setup.source(size), [state], LiveTeacher(setup.teacher, taps), setup.accelerator)

    return in_turns(setup, list(rows), loop_of, check=_has_its_terms)


def _has_its_terms(row: str, found: StepResult) -> None:
    if found.terms[0].keys() != {"ce", "kd", "loss", *(name for name in ("features", "attention") if name in row)}:
        raise ValueError(f"{row}: the loss has the terms {', '.join(found.terms[0])}")


if __name__ == "__main__":
    main()
