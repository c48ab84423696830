"""The trainer: trains one student, or several side by side before one teacher, and does what falls due between steps.

The parts are built in build.py, in the order that is stated there. A `StudentRun` is one student with its own recipe and folder.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config.recipe import Checkpoint, Train, Validation, scheduled
from ..console import progress_bar, table
from ..data.examples import Examples
from ..errors import ChangedFiles, NonFinite, Stopped, UserError
from ..models.model import Model
from ..output import metrics
from ..output.progress import ProgressDisplay
from ..process import heartbeat
from ..signals import Teacher
from ..teachers.fidelity import sample_examples
from ..teachers.timed import TimedTeacher
from .auto_batch import AutoBatchSize
from .build import TrainingSetup
from .loop import StepHooks, StudentState, no_retry, train, unwrap
from .own_text import own_metrics
from .shutdown import ShutdownRequest
from .student_run import StudentRun
from .teacher_check import message
from .validate import Evaluator, HeldOut


@dataclass(frozen=True)
class TrainerSettings:
    """The sections of a recipe that all students of a trainer have in common."""

    train: Train
    validation: Validation
    checkpoint: Checkpoint


class Trainer:
    """Drives a setup of finished parts: training steps, and the validation, checkpoints and stops that fall due between them."""

    def __init__(self, setup: TrainingSetup, settings: TrainerSettings, accelerator, stop: ShutdownRequest):
        self.settings, self.accelerator, self.stop, self.main = settings, accelerator, stop, accelerator.is_main_process
        self.prepared, self.source, self.teacher, self.students = setup.prepared, setup.source, setup.teacher, setup.students
        self.fidelity, self.done, self.written, self.watch = setup.fidelity, setup.done, setup.done, setup.watch
        self.own_text, self.together = setup.own_text, setup.together
        measures = self.prepared.task.measures(self.prepared.processor, settings.validation)
        self.evaluator = Evaluator(accelerator, settings.validation.micro_batch_size, stop, measures)
        self.timed: TimedTeacher | None = None
        self.display = ProgressDisplay(self.source.total_steps, self.done, self.main)
        for student in self.students:
            student.open_metrics(self.done, self.display.info)
        first = self.students[0]
        every, trained, both = (
            sum(p.numel() for p in ps)
            for ps in (first.model.parameters(), first.model.trainable().values(), first.state.parameters.values())
        )
        maps = f", and {both - trained:,} of maps that are no part of it" if both > trained else ""
        more = len(self.students) - 1
        others = f", and {more} more student{'s' * (more > 1)}" if more else ""
        self.display.info(f"student: {every:,} parameters, {trained:,} of them train{maps}{others}; {self.source.total_steps} steps")

    @property
    def active(self) -> list[StudentRun]:
        return [student for student in self.students if not student.failure]

    def train(self) -> None:
        """Every step from where the run stands, with validation, checkpoints and stops as they fall due."""
        settings, total, step = self.settings, self.source.total_steps, self.done
        try:
            if self.done == 0:
                for student in self.students if self.main else ():
                    for name, found in {"fidelity": self.fidelity, "unexplained": student.unexplained}.items():
                        if found:
                            student.record.write({"step": 0, name: found})
                self.check_teacher()
            if self.done in (0, total) or due(settings.validation.every, self.done):
                self.validate(self.done)
            if self.stop.any_rank(self.accelerator):
                raise self.stopped(self.done)
            states = [student.state for student in self.students]
            teacher = self.teacher if any(unwrap(state).needs_teacher for state in states) else None
            retry = self.auto_batch(states, teacher) if settings.train.micro_batch_tokens == "auto" and self.done < total else no_retry
            self.timed = TimedTeacher(teacher, self.accelerator.device) if teacher else None
            hooks = StepHooks(lambda: self.stop() or self.watch.changed() is not None, retry, self.is_read)
            with contextlib.closing(train(self.source, states, self.timed, self.accelerator, self.done, hooks)) as steps:
                for progress in steps:
                    step, last = progress.step, progress.step == total
                    for k, error in progress.failures.items():
                        self.fail(self.students[k], error)
                        if len(self.students) > 1:
                            self.display.info(f"{self.students[k].folder.path.name} stops here: {self.students[k].failure}")
                    self.show(progress, last)
                    if self.main and (texts := self.source.texts(step)):
                        self.students[0].record_texts(step, texts)
                    if not self.active:
                        return
                    if last or due(settings.validation.every, step):
                        self.validate(step)
                    if due(settings.checkpoint.every, step) or (last and settings.checkpoint.every):
                        self.save(step)
                    if progress.stop and not last:
                        raise self.stopped(step)
        except (UserError, OSError, Stopped):
            # A bad row of a stream, a file or a server that is gone: the steps so far are saved, if the last one is known to be finite.
            if self.is_read(step) and all(student.state.strategy.alone for student in self.students):
                with contextlib.suppress(OSError):  # what failed may fail again
                    self.write_checkpoint(step)  # no waiting: the others may not have met it
            raise
        finally:
            self.display.close()
            for student in self.students if self.main else ():
                student.record.close()

    def fail(self, student: StudentRun, error: NonFinite) -> None:
        """A student ends before the step in `error`. What it had learnt until then, which is what its weights still are, is saved."""
        good = error.step - 1
        if good > self.written:
            heartbeat.at(f"the checkpoint of step {good}", patient=True)
            student.save(good, self.source.state(good))
            student.prune()
        saved = f", and {path} holds them" if (path := student.folder.checkpoints / f"step-{good}").is_dir() else ""
        student.fail(error, f"the weights are as they were before it{saved}")
        self.accelerator.wait_for_everyone()  # the launcher ends the first process when another one has ended

    def is_read(self, step: int) -> bool:
        """Whether the metrics of that step are read, so that it is known to be finite: something falls due after it, or the next may fail."""
        settings = self.settings
        every = (settings.train.log_every, settings.validation.every, settings.checkpoint.every)
        return self.source.reads_while_training or any(due(one, step) for one in every)

    def auto_batch(self, states: list[StudentState], teacher: Teacher | None) -> Callable:
        """Measure how large micro-batches may be. Returns the loop's `retry_on_oom`, which works with one process."""
        chunked = [unwrap(student.state) for student in self.students if student.recipe.loss.chunk_size is None]
        auto = AutoBatchSize(self.source, states, teacher, self.accelerator, self.display.info, chunked, self.together)
        heartbeat.at("the measuring of micro-batches", patient=True)
        auto.measure(self.settings.train.batch_size)
        self.display.speed()  # what was spent here is not training's
        return auto if self.accelerator.num_processes == 1 else no_retry

    def show(self, progress, last: bool) -> None:
        """Count the step; record and show it where that is due."""
        self.display.count(progress.num_targets)
        if not (last or due(self.settings.train.log_every, progress.step)):
            return
        measured = self.source.measured()
        writing = metrics.writing_seconds(measured)
        speed = self.display.speed(writing)
        of_teacher = self.timed.seconds() if self.timed else 0.0
        measured |= {"training_seconds": round(self.display.seconds, 3), "teacher_seconds": round(of_teacher, 3)} if measured else {}
        going = [k for k in progress.terms if not self.students[k].failure]
        rates = {k: self.students[k].state.learning_rate(progress.step) for k in going}
        for k in going if self.main else ():
            terms, norm = progress.terms[k], progress.grad_norms[k]
            values = {"lr": rates[k]} | scheduled(self.students[k].recipe.loss, progress.step, self.source.total_steps)
            self.students[k].record.step(progress.step, progress.epoch, terms, values | measured, norm, progress.num_targets, speed)
        if len(self.students) == 1 and going:
            shown = {name: f"{value:.4f}" for name, value in progress.terms[0].items() if not metrics.is_count(name)}
            latest = self.students[0].measured
            shown |= {name: f"{latest[name]:.4f}" for name in self.evaluator.measures.shown if name in latest}
            shown |= {"lr": f"{rates[0]:.1e}"}
            if "written" in measured:
                shown |= {"written": f"{measured['written_length']:.0f} tokens, {measured['written_tokens_per_s']:.0f}/s"}
                shown |= {"entropy": f"{measured['written_entropy']:.2f}"} if "written_entropy" in measured else {}
                shown |= {"finished": f"{measured['written_finished']:.0%}"}
                shown |= {"writing": f"{writing:.1f} s of {writing + self.display.seconds:.1f} s"}
        else:
            losses = [progress.terms[k]["loss"] for k in going] or [math.nan]
            shown = {"students": str(len(going)), "loss": f"{min(losses):.4f} to {max(losses):.4f}"}
        self.display.show(progress.step, shown, speed)

    def check_teacher(self) -> None:
        """Before the first step: compare the cross-entropy of teacher and student on training examples."""
        learning = any(unwrap(student.state).needs_teacher for student in self.students)
        if not learning or not self.settings.validation.teacher_check:
            return
        train = self.prepared.train
        labelled = train.subset(train.weight("ce") > 0) if "ce" in train.weights else train
        if not len(labelled):
            self.display.info(
                "teacher check: left out, since no training rows have labels that count (loss.ce of their source is not above 0)"
            )
            return
        sample = sample_examples(labelled, self.settings.validation.teacher_check)
        found = [one.metrics() for one in self.measure([one.model for one in self.students], sample, "teacher check", 0)]
        for student, values in zip(self.students if self.main else (), found, strict=False):
            student.record.write(
                {"step": 0, "teacher_check": {"examples": len(sample)} | {name: values[name] for name in ("ce", "teacher_ce")}}
            )
        self.source.checked(found[0])
        self.display.info(message(found, len(sample), self.prepared.teachers, self.prepared.student))

    def measure(self, students: list[Model], data: Examples, name: str, step: int) -> list[HeldOut]:
        """Every student on all of the data, those side by side that are still their base once; a signal that arrives meanwhile stops the run."""
        alike = [student for student in students if student.is_untouched()] if len(students) > 1 else []
        asked = [student for student in students if student not in alike[1:]]
        try:
            found = self.evaluator.validate(asked, self.teacher, data, progress_bar(name))
            by_student = dict(zip(asked, found, strict=True))
            return [by_student[alike[0] if student in alike else student] for student in students]
        except Stopped:
            raise self.stopped(step) from None
        finally:
            self.display.speed()  # what was spent here is not training's

    def validate(self, step: int) -> None:
        """Measure on the held-out rows, once a step, and keep the best."""
        waiting = [student for student in self.active if student.validated != step]
        if self.prepared.validation is None or not waiting:
            return
        found = self.measure([one.model for one in waiting], self.prepared.validation, "validation", step)
        heartbeat.at(f"the validation of step {step}, texts of the student", patient=True)
        for student, held_out in zip(waiting, found, strict=True):
            own = self.measure_own_text(student, step) if self.own_text else {}
            own |= self.evaluator.measures.of_texts(student.model, self.prepared.validation, self.accelerator)
            values = student.record_validation(step, dataclasses.replace(held_out, own_text=own))
            self.source.validated(values)
            name = f" of {student.folder.path.name}" if len(self.students) > 1 else ""
            shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if not metrics.is_count(k))
            self.display.info(f"validation{name} at step {step}: {shown}")
        self.display.speed()  # neither is what samples took
        if self.settings.checkpoint.best_by and step:
            self.save(step)

    def measure_own_text(self, student: StudentRun, step: int) -> dict[str, float]:
        """What an on-policy student writes to held-out prompts: its divergence from the teacher there, its length and how much of it is finished."""
        data, found = self.own_text.write(self.accelerator.process_index, self.accelerator.num_processes)
        (measured,) = self.measure([student.model], data, "own text", step) if len(data) else ({},)
        return found | (own_metrics(measured.metrics()) if measured else {})

    def save(self, step: int) -> None:
        """A checkpoint of every student, unless this step has one; older ones are removed when all are written."""
        if step > self.written:
            heartbeat.at(f"the checkpoint of step {step}", patient=True)
            self.write_checkpoint(step)
            self.accelerator.wait_for_everyone()

    def write_checkpoint(self, step: int) -> None:
        """`save` without waiting for the other processes."""
        if step > self.written:
            for student in self.active:
                student.save(step, self.source.state(step))
            for student in self.active:
                student.prune()
        self.written = step

    def stopped(self, step: int) -> Stopped | ChangedFiles:
        """The exception for a run that was asked to stop, or whose models' files have changed. What it has learnt is saved."""
        self.save(step)
        if change := self.watch.changed(every=0):
            return ChangedFiles(f"{change}; it is saved after step {step}: put the file back as it was, then --resume")
        return Stopped(f"stopped by a signal after step {step} of {self.source.total_steps}; continue with --resume")

    def finish(self) -> None:
        """Write every student; of a single one also print a short table. ChangedFiles if it would be named after other weights."""
        if self.watch.changed(every=0):
            raise self.stopped(self.source.total_steps)
        for student in self.active:
            if not student.state.strategy.is_finite(student.state, self.accelerator):
                error = NonFinite(self.source.total_steps, "a weight after the update", [])
                student.fail(error, f"lower optim.lr; {student.folder.checkpoints} keeps what was saved before")
        questions, evaluator = self.prepared.questions, dataclasses.replace(self.evaluator, stop=None)
        for student in self.active:
            scored = evaluator.accuracy(student.model, questions, progress_bar("questions")) if questions else {}
            heartbeat.at("the writing of the student", patient=True)
            if whole := student.state.strategy.to_write(student.model, self.main):
                output = student.finish(self.source.total_steps, scored, whole)
                for text in student.folder.summary()["warnings"]:
                    self.display.info(f"{student.folder.path.name}: {text}")
                if len(self.students) == 1:
                    self.print(student, output)
        self.accelerator.wait_for_everyone()

    def print(self, student: StudentRun, output: Path) -> None:
        summary, folder = student.folder.summary(), student.folder.path
        after = {name: value for name, value in summary["validation"].items() if not metrics.is_count(name)}
        if after:
            print(table([{"held-out": n, "before": summary["before"].get(n), "after": value} for n, value in after.items()]))
        print(f"{output}  {folder / 'loss.png'}  {folder / 'metrics.jsonl'}")


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
