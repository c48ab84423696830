"""The samples of a sweep's runs in its report: the last validation's, for the same prompts, and nothing where there are none."""

import json

from llmkd_eval.report.sweep_files import read_sweep
from llmkd_eval.report.sweep_samples import RUNS, sweep_samples

from tests.kit.sweep_report import TWO, Checked, lines, written


def sampled(step: int, text: str, prompt: str = "Say 7", finished: bool = True) -> dict:
    return {"step": step, "place": "held.jsonl:7", "prompt": prompt, "reference": "seven", "text": text, "tokens": 3, "finished": finished}


def test_the_last_answers_of_every_run_stand_below_their_prompt(made):
    folder = made(TWO)
    lines(
        folder / "arms/sft/samples.jsonl",
        [sampled(0, "early"), sampled(9, "<b>six\n\x1b[2J", finished=False), sampled(9, "owl", "Say owl")],
    )
    lines(folder / "arms/kd/samples.jsonl", [sampled(0, "early"), sampled(9, "seven")])
    page, text = written(folder)
    rows = [row for row in Checked(page).rows if row and row[0] in ("the data", "sft", "kd")]
    assert ["the data", "", "seven"] in rows and ["sft", "3, cut off", "<b>six\n\\x1b[2J"] in rows and ["kd", "3", "seven"] in rows
    assert "<b>six" not in page and "early" not in page and "Say owl" in page and "## Samples" in text
    assert rows.index(["kd", "3", "seven"]) < rows.index(["sft", "3", "owl"]), "of the second prompt one run has an answer"


def test_the_benchmarks_say_whether_a_chat_template_was_applied(made):
    folder = made(TWO)
    for arm in TWO:
        path = folder / "arms" / arm / "eval/quiz.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": True}))
    assert "Measured with lm-evaluation-harness 0.4.13, quiz version 1, in the model&#39;s chat template." in written(folder)[0]


def test_without_samples_there_is_no_section_and_of_many_runs_some_are_shown(made):
    folder = made({f"a{n}": ({"optim.lr": n / 100}, 0.5) for n in range(1, RUNS + 3)})
    assert sweep_samples(read_sweep(folder)) == [] and "Samples" not in written(folder)[0]
    for n in range(1, RUNS + 3):
        lines(folder / f"arms/a{n}/samples.jsonl", [sampled(1, "owl")])
    page = written(folder)[0]
    assert page.count('"text">owl') == RUNS and "2 more runs have samples" in page
