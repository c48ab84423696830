"""The trainer: runs the training loop for one student, or for several that share a teacher, and validates, saves and stops between steps.

build.py builds the parts, in the order that it states. A `StudentRun` is one student with its own recipe and folder.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
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
from .loop import Progress, StepHooks, StudentState, no_retry, train, unwrap
from .own_text import own_metrics
from .shutdown import ShutdownRequest
from .student_run import StudentRun
from .teacher_check import message
from .validate import Evaluator, HeldOut


@dataclass(frozen=True)
class TrainerSettings:
    """The sections of the recipe that all students share."""

    train: Train
    validation: Validation
    checkpoint: Checkpoint


class Trainer:
    """Runs a finished setup: the training steps, and the validation, checkpoints and stops between them."""

    def __init__(self, setup: TrainingSetup, settings: TrainerSettings, accelerator, stop: ShutdownRequest):
        self.settings, self.accelerator, self.stop, self.main = settings, accelerator, stop, accelerator.is_main_process
        self.prepared, self.source, self.teacher, self.students = setup.prepared, setup.source, setup.teacher, setup.students
        self.fidelity, self.done, self.written, self.watch = setup.fidelity, setup.done, setup.done, setup.watch
        self.own_text, self.together = setup.own_text, setup.together
        measures = self.prepared.task.measures(self.prepared.processor, settings.validation)
        self.evaluator = Evaluator(accelerator, settings.validation.micro_batch_size, stop, measures)
        self.timed: TimedTeacher | None = None
        self.step = setup.done  # the last step that was taken
        self.display = ProgressDisplay(self.source.total_steps, self.done, self.main)
        for student in self.students:
            student.open_metrics(self.done, self.display.info)
        self.display.info(f"{parameter_counts(self.students)}; {self.source.total_steps} steps")

    @property
    def active(self) -> list[StudentRun]:
        return [student for student in self.students if not student.failure]

    def train(self) -> None:
        """Train to the last step, with validation, checkpoints and stops when they are due. Raises Stopped, UserError or OSError."""
        try:
            self.begin()
            with contextlib.closing(self.steps()) as steps:
                for progress in steps:
                    self.step = progress.step
                    self.after_step(progress)
        except (UserError, OSError, Stopped):
            self.save_after_error()
            raise
        finally:
            self.display.close()
            for student in self.students if self.main else ():
                student.record.close()

    def begin(self) -> None:
        """Before the first step: the records of step 0, the teacher check and the first validation, unless a resumed run has them already."""
        if self.done == 0:
            for student in self.students if self.main else ():
                for name, found in {"fidelity": self.fidelity, "unexplained": student.unexplained}.items():
                    if found:
                        student.record.write({"step": 0, name: found})
            self.check_teacher()
        if self.done in (0, self.source.total_steps) or due(self.settings.validation.every, self.done):
            self.validate(self.done)
        if self.stop.any_rank(self.accelerator):
            raise self.stopped(self.done)

    def steps(self) -> Iterator[Progress]:
        """The training loop over the remaining steps."""
        states = [student.state for student in self.students]
        teacher = self.teacher if any(unwrap(state).needs_teacher for state in states) else None
        measured = self.settings.train.micro_batch_tokens == "auto" and self.done < self.source.total_steps
        retry = self.auto_batch(states, teacher) if measured else no_retry
        self.timed = TimedTeacher(teacher, self.accelerator.device) if teacher else None
        hooks = StepHooks(lambda: self.stop() or self.watch.changed() is not None, retry, self.is_read)
        return train(self.source, states, self.timed, self.accelerator, self.done, hooks)

    def after_step(self, progress: Progress) -> None:
        """Record a step, then validate, save or stop where that is due. Nothing is due after every student has failed."""
        step, last = progress.step, progress.step == self.source.total_steps
        for k, error in progress.failures.items():
            self.fail(self.students[k], error)
            if len(self.students) > 1:
                self.display.info(f"{self.students[k].folder.path.name} stops here: {self.students[k].failure}")
        self.show(progress, last)
        if self.main and (texts := self.source.texts(step)):
            self.students[0].record_texts(step, texts)
        if not self.active:
            return
        if last or due(self.settings.validation.every, step):
            self.validate(step)
        if due(self.settings.checkpoint.every, step) or (last and self.settings.checkpoint.every):
            self.save(step)
        if progress.stop and not last:
            raise self.stopped(step)

    def save_after_error(self) -> None:
        """Save the steps so far after a bad row of a stream, or when a file or a server is gone, if the last step is known to be finite."""
        if self.is_read(self.step) and all(student.state.strategy.alone for student in self.students):
            with contextlib.suppress(OSError):  # writing may fail for the same reason
                self.write_checkpoint(self.step)  # without waiting for the other processes, which may not have met the error

    def fail(self, student: StudentRun, error: NonFinite) -> None:
        """End a student at the step in `error`. That step left its weights as they were, so they are saved as of the step before."""
        good = error.step - 1
        if good > self.written:
            heartbeat.at(f"the checkpoint of step {good}", patient=True)
            student.save(good, self.source.state(good))
            student.prune()
        path = student.folder.checkpoints / f"step-{good}"
        saved = f", and {path} holds them" if path.is_dir() else ""
        student.fail(error, f"the weights are as they were before it{saved}")
        self.accelerator.wait_for_everyone()  # else the launcher would end the first process when another one exits

    def is_read(self, step: int) -> bool:
        """Whether the metrics of that step are read, and so show whether it is finite: something is due after it, or the next may fail."""
        settings = self.settings
        every = (settings.train.log_every, settings.validation.every, settings.checkpoint.every)
        return self.source.reads_while_training or any(due(one, step) for one in every)

    def auto_batch(self, states: list[StudentState], teacher: Teacher | None) -> Callable:
        """Measure how large micro-batches may be. Returns the loop's `retry_on_oom`; several processes do not retry."""
        chunked = [unwrap(student.state) for student in self.students if student.recipe.loss.chunk_size is None]
        auto = AutoBatchSize(self.source, states, teacher, self.accelerator, self.display.info, chunked, self.together)
        heartbeat.at("the measuring of micro-batches", patient=True)
        auto.measure(self.settings.train.batch_size)
        self.display.speed()  # leave this time out of training's
        return auto if self.accelerator.num_processes == 1 else no_retry

    def show(self, progress: Progress, last: bool) -> None:
        """Count the step's targets; record and show its metrics every `log_every` steps and after the last."""
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
        distils = any(unwrap(student.state).needs_teacher for student in self.students)
        if not distils or not self.settings.validation.teacher_check:
            return
        train = self.prepared.train
        labelled = train.subset(train.weight("ce") > 0) if "ce" in train.weights else train
        if not len(labelled):
            self.display.info(
                "teacher check: skipped, since no training row has labels with a positive weight (loss.ce of its source is not above 0)"
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
        """Evaluate every student on all of `data`. Students that are still their common base are evaluated once. A stop signal raises Stopped."""
        alike = [student for student in students if student.is_untouched()] if len(students) > 1 else []
        asked = [student for student in students if student not in alike[1:]]
        try:
            found = self.evaluator.validate(asked, self.teacher, data, progress_bar(name))
            by_student = dict(zip(asked, found, strict=True))
            return [by_student[alike[0] if student in alike else student] for student in students]
        except Stopped:
            raise self.stopped(step) from None
        finally:
            self.display.speed()  # leave this time out of training's

    def validate(self, step: int) -> None:
        """Measure the students on the held-out rows, unless this step did, and save a checkpoint where `best_by` needs one."""
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
        self.display.speed()  # leave the time of samples out, too
        if self.settings.checkpoint.best_by and step:
            self.save(step)

    def measure_own_text(self, student: StudentRun, step: int) -> dict[str, float]:
        """Metrics of an on-policy student's answers to held-out prompts: divergence from the teacher, mean length, share that is finished."""
        data, found = self.own_text.write(self.accelerator.process_index, self.accelerator.num_processes)
        (measured,) = self.measure([student.model], data, "own text", step) if len(data) else ({},)
        return found | (own_metrics(measured.metrics()) if measured else {})

    def save(self, step: int) -> None:
        """Write a checkpoint of every student, unless this step has one; older ones are removed when all are written."""
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
        """Save, and return the exception for a run that was asked to stop or whose model files have changed."""
        self.save(step)
        if change := self.watch.changed(every=0):
            return ChangedFiles(f"{change}; the run is saved after step {step}: restore the file, then --resume")
        return Stopped(f"stopped by a signal after step {step} of {self.source.total_steps}; continue with --resume")

    def finish(self) -> None:
        """Write every student; for a single one also print a short table. ChangedFiles if its card would name other weights than it was made of."""
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


def parameter_counts(students: Sequence[StudentRun]) -> str:
    """A line with the parameters of the first student: all, those that train, and those of loss terms; and the number of further students."""
    first = students[0]
    every, trained, with_terms = (
        sum(p.numel() for p in parameters)
        for parameters in (first.model.parameters(), first.model.trainable().values(), first.state.parameters.values())
    )
    maps = f", and {with_terms - trained:,} of maps that are no part of it" if with_terms > trained else ""
    more = len(students) - 1
    others = f", and {more} more student{'s' * (more > 1)}" if more else ""
    return f"student: {every:,} parameters, {trained:,} of them train{maps}{others}"


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
