"""StudentRun: one student with its recipe, folder and results."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..config.recipe import HIGHER_IS_BETTER, Recipe
from ..console import info, warn
from ..data.batch_source import WrittenText
from ..data.examples import ALL_TEACHERS
from ..errors import NonFinite
from ..files import remove_leftovers, sha256_file, write_atomic, write_folder, write_sealed
from ..model_folder.files import ModelFiles
from ..models import saved_student
from ..models.depth import in_cache
from ..models.model import Model
from ..output import metrics, plots, worsening
from ..output.model_card import model_card
from ..output.run_files import RECIPE, SUMMARY
from ..output.run_folder import RunFolder
from ..output.trackers import Trackers, configuration
from . import checkpoint
from .loop import StudentState
from .prepare import Prepared
from .validate import HeldOut
from .validation_samples import write_samples, write_training_samples


class StudentRun:
    """One student of a trainer: its recipe, folder, training state, metrics and output. Only the first process writes files.

    It has the whole recipe because trackers and the model card record all of it.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared, folder: RunFolder, model: Model, state: StudentState, main: bool):
        self.recipe, self.prepared, self.folder, self.model, self.state, self.main = recipe, prepared, folder, model, state, main
        self.best, self.validated, self.record, self.failure = None, None, None, None
        self.measured: dict[str, float] = {}  # the metrics of the newest validation
        self.unexplained: dict[str, float] = {}  # by pair of layers, see `start_features`
        self.held_out_hash: str | None = None  # of held_out.jsonl
        self.samples_hash: str | None = None  # of samples.jsonl
        self.recorded: dict | None = None  # size and hash of metrics.jsonl at the checkpoint that the run resumes from

    def open_metrics(self, done: int, info) -> None:
        if self.main:
            recipe, folder = self.recipe, self.folder.path
            trackers = Trackers(recipe.report_to, recipe.output_dir, configuration(recipe), folder, done, info)
            self.record = metrics.MetricsLog(folder, done, trackers, self.recorded, self.folder.check_there)

    def restore(self, saved: checkpoint.Saved) -> None:
        checkpoint.load(saved, self.state.kept, self.state.optimizer)
        self.best, self.validated = saved.state["best"], saved.state["validated"]
        self.held_out_hash, self.samples_hash = saved.state.get("held_out"), saved.state.get("samples")
        self.recorded = saved.state.get("metrics")

    def record_validation(self, step: int, held_out: HeldOut) -> dict[str, float]:
        """Write the held-out metrics, and remember the step if it is the best so far."""
        values, by = held_out.metrics(), self.recipe.checkpoint.best_by
        self.validated, self.measured = step, values
        if self.main:
            self.record.write({"step": step, "validation": values})
            self.write_held_out(held_out)
        if self.recipe.validation.samples and (self.main or not self.state.strategy.alone):
            self.samples_hash = write_samples(self.folder.path, step, self.model, self.prepared, self.recipe.validation, self.main)
        if by and step and not math.isnan(values[by]):
            sign = -1 if by in HIGHER_IS_BETTER else 1
            if self.best is None or self.best["by"] != by or sign * values[by] < sign * self.best["value"]:
                self.best = {"by": by, "step": step, "value": values[by]}
        return values

    def record_texts(self, step: int, texts: Sequence[WrittenText]) -> None:
        """Add some of the answers that this step trained on to samples.jsonl. Called by the first process."""
        self.samples_hash = write_training_samples(self.folder.path, step, texts, self.prepared.tokenizer)

    def write_held_out(self, held_out: HeldOut) -> None:
        """held_out.jsonl: the sums of each example, so that two students can be compared example by example."""
        data, places = self.prepared.validation, self.prepared.validation_places
        parts = [one.part for one in self.prepared.teachers]
        everyone = " and ".join(sorted({part for part in parts if part}))
        lines = []
        for i, targets in enumerate(held_out.targets.tolist()):
            sums = {name: float(values[i]) for name, values in held_out.sums.items()}
            line = {"id": i, "hash": data.student_hash(i), "place": places[i], "targets": targets, "sums": sums}
            if weights := {part: float(w_E[i]) for part, w_E in held_out.weights.items()}:
                line["weights"] = weights
            teacher = data.teacher_index[i]
            if "forward_kl" in sums and (part := everyone if teacher == ALL_TEACHERS else parts[teacher]):
                line["teacher_part"] = part  # a divergence from a part of the distribution is not comparable with one from all of it
            lines.append(json.dumps(line) + "\n")
        content = "".join(lines)
        write_atomic(self.folder.path / "held_out.jsonl", content)
        self.held_out_hash = hashlib.sha256(content.encode()).hexdigest()

    def save(self, step: int, source_state: dict) -> None:
        """Write a checkpoint of the student after `step` steps; none if a value is not finite. The first process writes it."""
        learnt = self.state.strategy.snapshot(self.state, self.main)
        if learnt is None:
            return
        if not learnt.is_finite():
            warn(f"warning: no checkpoint of step {step} in {self.folder.path}: its update left weights that are not finite")
            return
        self.folder.check_there()
        with contextlib.suppress(FileNotFoundError):  # a missing metrics.jsonl does not cost the checkpoint
            self.record.sync()
        state = {"best": self.best, "validated": self.validated, **source_state}
        state |= {"metrics": self.record.state, "held_out": self.held_out_hash, "samples": self.samples_hash}
        checkpoint.save(self.folder.checkpoints, step, learnt, state, self.folder.run)

    def prune(self) -> None:
        if self.main:
            checkpoint.prune(self.folder.checkpoints, self.recipe.checkpoint.keep, self.best["step"] if self.best else None)

    def fail(self, error: NonFinite, left: str) -> None:
        """Record the failure, here and in the run's folder: the examples' places, and in `left` the state that the student is left in."""
        places = error.places
        if self.main:
            write_sealed(self.folder.path / "nonfinite.json", {"step": error.step, "term": error.term, "examples": places})
        shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        where = f" at {shown}" if places else ""
        text = f"step {error.step}: {error.term} is not finite{where}; {left}"
        self.failure = NonFinite(error.step, error.term, places, text)

    def finish(self, steps: int, scored: dict[str, float], student: Model) -> Path:
        """Write the student, the summary, the plot and the card. `scored`: the multiple-choice accuracy; empty without questions."""
        records = metrics.read_metrics(self.folder.path, warn)
        last = next((r for r in reversed(records) if "loss" in r), None)
        held_out = [(r["step"], r["validation"]) for r in records if "validation" in r]
        summary = {
            "steps": steps,
            "output": "adapter" if self.recipe.student.method == "lora" else "model",
            "before": next((values for step, values in held_out if step == 0), {}),
            "train": metrics.terms(last) if last else {},
            "validation": (held_out[-1][1] if held_out else {}) | scored,
            "best": self.best,
            "files": {name: value for name, value in self.hashes().items() if value},
            **({"layers": list(self.prepared.layers)} if self.prepared.layers else {}),
            **({"labels": list(labels)} if (labels := self.prepared.processor.labels) else {}),
            **({"seconds": spent} if (spent := metrics.seconds_of(records)) else {}),
            "warnings": list(worsening.sentences(records, self.recipe.loss, self.recipe.optim)),
        }
        (self.folder.path / "nonfinite.json").unlink(missing_ok=True)  # from an earlier attempt
        output = self.write_student(summary, student)
        plots.plot_losses(self.folder.path)
        write_sealed(self.folder.path / SUMMARY, summary)
        if self.best and self.best["step"] != steps:
            best = f"{self.best['by']} was best at step {self.best['step']} ({self.best['value']:.4f})"
            info(f"{best}, and {output} holds the last step; llmkd export {self.folder.path} --checkpoint best writes the best one")
        return output

    def hashes(self) -> dict[str, str | None]:
        """The hashes of the files that comparisons and reports read together with the summary."""
        recipe = sha256_file(self.folder.path / RECIPE)
        return {
            RECIPE: recipe,
            "metrics.jsonl": self.record.state["sha256"],
            "held_out.jsonl": self.held_out_hash,
            "samples.jsonl": self.samples_hash,
        }

    def write_student(self, summary: dict, student: Model) -> Path:
        """Write `adapter` or `model` in the run's folder, whole or not at all. Returns its path."""
        output, files = self.folder.path / summary["output"], self.prepared.student
        if files and in_cache(files.base) and summary["output"] == "adapter":
            files = self.write_base(student)
        remove_leftovers(self.folder.path, output.name)
        with write_folder(output, replace=True) as part:
            task, processor, end_tokens = self.prepared.task, self.prepared.processor, self.prepared.end_tokens
            processor.save(part)
            generation = task.generation(self.recipe.student, self.prepared.student, end_tokens)
            saved_student.save(student, part, self.recipe.student, generation)
            ends = None if generation is None else processor.reader.convert_ids_to_tokens(sorted(end_tokens))
            text = model_card(self.recipe, summary, files, self.prepared.teachers, self.prepared.origins, ends, task.pipeline(processor))
            (part / "README.md").write_text(text, encoding="utf-8")
        return output

    def write_base(self, student: Model) -> ModelFiles:
        """Write `base` in the run's folder: the adapter's base, if it is some layers of another model and exists only in a cache."""
        base = self.folder.path / "base"
        remove_leftovers(self.folder.path, base.name)
        with write_folder(base, replace=True) as part:
            shutil.copytree(self.prepared.student.base, part, dirs_exist_ok=True)
            if not (part / "tokenizer_config.json").exists():  # transformers' pipeline looks for it here
                self.prepared.processor.save(part)
        student.model.peft_config[student.adapter or "default"].base_model_name_or_path = str(base.resolve())
        return dataclasses.replace(self.prepared.student, base=base.resolve())
