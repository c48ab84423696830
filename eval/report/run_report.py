"""Writes the report of one run from the files of its folder: its settings, its curves, what its student has written, its held-out metrics."""

from pathlib import Path

import numpy as np

from llmkd.config.dotted import flatten
from llmkd.config.loader import read_placed
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.output.metrics import is_count
from llmkd.output.run_files import RECIPE, SUMMARY
from llmkd.tasks.metrics.classification import accuracy, class_f1, confusion, macro_f1

from .document import Heading, Items, Para, Span, Table
from .own_text import own_text
from .sections import settings_of
from .sweep_files import Arm, Run, SweepFolder
from .sweep_samples import sweep_samples
from .write import learning, write_pages


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file() and not (folder / "sweep.json").exists()


def read_run(folder: Path) -> SweepFolder:
    """A run's folder, whatever state it is in, as a sweep of one arm. UserError where its recipe cannot be read."""
    name, base = folder.resolve().name, flatten(read_placed(folder / RECIPE))
    status = "done" if (folder / SUMMARY).exists() else "not finished"
    run = Run(name, name, base.get("seed"), folder, {}, status, None, 0.0, base)
    run.check_files()
    if not run.records:
        raise UserError(f"{folder}: has no metrics yet; wait for the first logged step")
    return SweepFolder(folder, {}, base, {name: Arm(name, 0, [run])}, name)


def write(sweep: SweepFolder) -> tuple[Path, Path]:
    """Write report.html and report.md into the run's folder."""
    return write_pages(sweep.path, f"Report of the run {sweep.baseline}", document(sweep))


def document(sweep: SweepFolder) -> list:
    (run,) = sweep.runs
    told, every = settings_of(sweep.base)
    last = next((record["step"] for record in reversed(run.records)), 0)
    state = run.status if run.status == "done" else f"{run.status}: recorded up to step {last}"
    out: list = [Heading("What was run", "run"), Table(["", ""], [["state", state], *told], left=2), every]
    if warnings := run.summary.get("warnings"):
        out += [Heading("Warnings"), Items(list(warnings))]
    colours = {sweep.baseline: 0}
    out += learning(sweep, colours)
    out += own_text(sweep, colours)
    return [*out, *_held_out(run), *_confusion(run), *sweep_samples(sweep)]


def _held_out(run: Run) -> list:
    """The metrics of the held-out rows, at the first validation and the last."""
    found = [(record["step"], record["validation"]) for record in run.records if "validation" in record]
    if not found:
        return []
    (first, before), (last, after) = found[0], found[-1]
    rows = [
        [Span(name), f"{before[name]:.4f}" if name in before else "", f"{value:.4f}"] for name, value in after.items() if not is_count(name)
    ]
    note = Para(f"Means over {after['targets']:,} targets; own_ is of the student's own text.", "small")
    return [Heading("Held-out rows", "held-out"), Table(["metric", f"step {first}", f"step {last}"], rows, words=1), note]


def _confusion(run: Run) -> list:
    """Of a classifier, how the last validation's rows were answered: a row for each class, a column for each answer."""
    names, found = (
        run.summary.get("labels"),
        list(read_jsonl(run.folder / "held_out.jsonl")) if (run.folder / "held_out.jsonl").exists() else [],
    )
    if not names or not found or "answer" not in found[0]["sums"]:
        return []
    label, answer = (np.array([line["sums"][name] for line in found], np.int64) for name in ("label", "answer"))
    weights = np.array([line.get("weights", {}).get("ce", 1.0) for line in found])
    matrix = confusion(label, answer, len(names), weights)
    rows = [
        [Span(name), *(f"{count:g}" for count in of), f"{f1:.3f}"] for name, of, f1 in zip(names, matrix, class_f1(matrix), strict=True)
    ]
    note = Para(f"A row is a class, a column the answer; accuracy {accuracy(matrix):.4f}, macro F1 {macro_f1(matrix):.4f}.", "small")
    return [Heading("Confusion matrix", "confusion"), Table(["class", *names, "F1"], rows), note]


def numbers(sweep: SweepFolder) -> dict:
    """The run with its results, unrounded."""
    (run,) = sweep.runs
    kept = {name: run.summary.get(name) for name in ("before", "validation", "train", "best", "seconds", "warnings")}
    return {"name": run.name, "status": run.status, "folder": run.folder} | kept
