"""Faults in what a run leaves for people: its card, samples, plots, trackers, tables and warnings."""

from tests.planted.fault import in_file

CARD = "output/test_model_card.py"
SHOWN = "output/test_progress.py"

FAULTS = [
    *in_file(
        "llmkd/output/progress.py",
        (
            "left-of-all",
            "the time that is left is that of the whole run",
            "(step - self.first) * (self.total - step)",
            "(step - self.first) * self.total",
            SHOWN,
        ),
        (
            "left-from-the-beginning",
            "a resumed run seems as fast as if it had made all steps itself",
            "/ (step - self.first) *",
            "/ step *",
            SHOWN,
        ),
        ("once-slow", "one slow moment is told of", "if len(self.slow) == IN_A_ROW:", "if self.slow:", SHOWN),
    ),
    *in_file(
        "llmkd/output/plots.py",
        (
            "average-lags",
            "the average of the losses trails them",
            "values[max(0, i - half) : i + half + 1]",
            "values[max(0, i - 2 * half) : i + 1]",
            "output/test_plots.py",
        ),
    ),
    *in_file(
        "llmkd/output/trackers.py",
        (
            "group-of-the-step",
            "validations are drawn among the training's metrics",
            'values = record.get(group, record)\n        metrics = {f"{group}/{k}"',
            'values = record.get(group, record)\n        metrics = {f"train/{k}"',
            "output/test_trackers.py",
        ),
        (
            "records-twice",
            "a resumed run's curve has the records after the checkpoint twice",
            "purge_step=done + 1 if done else 0",
            "purge_step=None",
            "output/test_trackers.py",
        ),
    ),
    *in_file(
        "llmkd/output/samples.py",
        (
            "samples-of-all-steps",
            "the samples that are shown are those of every validation",
            'if record["step"] == found[-1]["step"]]',
            "]",
            "training/test_validation_samples.py output/test_model_card.py",
        ),
    ),
    *in_file(
        "llmkd/output/model_card.py",
        (
            "dropped-are-used",
            "the rows that were used are called dropped",
            'rows - self.found.get("used", rows)',
            'self.found.get("used", rows)',
            CARD,
        ),
        (
            "relation-exchanged",
            "an adapter is called a fine-tuned model",
            '"adapter" if lora else "finetune"} if base',
            '"finetune" if lora else "adapter"} if base',
            CARD,
        ),
        ("licence-of-the-adapter", "no licence is named", "terms = licence(student.base)\n    name", "terms = {}\n    name", CARD),
    ),
    *in_file(
        "llmkd/output/worsening.py",
        (
            "first-validation-lost",
            "the first validation that is left is called that before training",
            "or held_out[0][0] != 0:",
            "or False:",
            "output/test_worsening.py",
        ),
    ),
    *in_file(
        "llmkd/output/markdown.py",
        (
            "fence-of-three",
            "a block of code may end in the middle of a text with backticks",
            'fence = "`" * max(3, 1 + _longest_run(text))',
            'fence = "```"',
            CARD,
        ),
    ),
    *in_file(
        "llmkd/output/model_card.py",
        (
            "drift-with-metrics",
            "the card of a merged student has the metrics of the one on a quantised base",
            "card.data.eval_results = None",
            "pass",
            "models/test_quantization.py::test_merging_goes_into_the_unquantised_base_and_says_how_far_that_is",
        ),
    ),
]
