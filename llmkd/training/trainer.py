"""Models, optimizers and folders together: trains one student, or several side by side before one teacher.

`Session` holds what students share (teacher, data, plan, the bar) and does what falls due between steps; an `Arm` is one
student with its own recipe and folder. An ordinary run is a session with one arm.
"""

import contextlib
import functools
import math
from pathlib import Path

from .. import console as tracking_console
from ..batch import Batch
from ..config.recipe import Recipe, distils
from ..console import bar, say
from ..data.collate import collate
from ..data.examples import Examples
from ..data.prefetch import ahead
from ..data.stream import Stream
from ..errors import Stopped, UserError, blamed_on, first_alone
from ..models import language_model as models
from ..output import progress as tracking_progress
from ..output.run_folder import RunFolder
from ..signals import Teacher
from ..teachers.cached import Cached
from ..teachers.fidelity import measured_transform, sample_examples, sample_teacher_batches
from ..teachers.live import Live
from ..teachers.mixture import combined
from . import checkpoint
from .auto_batch import Fitting, chunk_rows
from .build import build_learner, load, plan
from .loop import Learner, train, unwrapped
from .prepare import Prepared
from .student_run import Arm
from .teacher_check import verdict
from .validate import HeldOut, accuracy, validate


class Session:
    """Several recipes may differ in student.lora, loss and optim only, and in the adapter that student.model names on one base.

    `lead` is the recipe that `prepared` was made of, and that the teacher is of: where no student learns from it, it measures them.
    """

    def __init__(self, recipes: list[Recipe], lead: Recipe, prepared: Prepared, folders: list[RunFolder], accelerator, stop):
        recipe = recipes[0]
        self.recipe, self.prepared, self.accelerator, self.stop = recipe, prepared, accelerator, stop
        self.main, self.pad = accelerator.is_main_process, prepared.tokenizer.eos_token_id
        live = [(one.setting, one.settings) for one in prepared.teachers if one.store is None]
        try:
            around_transform = functools.partial(measured_transform, self.asked)
            students, spoken = load(recipes, live, prepared.vocab, accelerator.device, around_transform)
        except UserError:
            if stop():  # a signal to the whole group ends a compiler too, which is nobody's mistake
                raise Stopped("stopped by a signal before the first step; the same command starts again") from None
            raise
        self.teacher = self.teachers(lead, spoken)
        self.fidelity = {f"{name}.{k}": v for (name, _), model in zip(live, spoken, strict=True) for k, v in model.fidelity.items()}
        self.plan = plan(recipe, prepared, accelerator.process_index, accelerator.num_processes)
        self.arms, rows = [], chunk_rows(prepared.vocab, accelerator.device, say)
        for k, (own, folder, student) in enumerate(zip(recipes, folders, students, strict=True)):
            with blamed_on(k):
                learner = build_learner(own, student, self.plan.total_steps, accelerator, rows)
                self.arms.append(Arm(own, prepared if own is lead else prepared.of(own), folder, student, learner, self.main))
        self.claim()
        self.done = self.written = self.resume(folders)
        self.display = tracking_progress.Display(self.plan.total_steps, self.done, self.main)
        for arm in self.arms:
            arm.begin(self.done, self.display.say)
        trained, every = (sum(p.numel() for p in ps) for ps in (self.arms[0].learner.parameters.values(), students[0].parameters()))
        others = f", beside {len(students) - 1} more students" if len(students) > 1 else ""
        self.display.say(f"student: {every:,} parameters, {trained:,} of them train{others}; {self.plan.total_steps} steps")

    def teachers(self, recipe: Recipe, live: list[models.LanguageModel]) -> Teacher | None:
        """Who answers: models in memory, and stores of what others have answered."""
        found, rest = self.prepared.teachers, iter(live)
        device = self.accelerator.device
        each = [Cached(one.store, device) if one.store else Live(next(rest)) for one in found]
        return combined(each, [one.settings for one in found], recipe.mixture) if each else None

    def asked(self, setting: str) -> list[Batch]:
        """Some of what the teacher of that name will be asked."""
        number = [one.setting for one in self.prepared.teachers].index(setting)
        size = self.recipe.validation.micro_batch_size
        return sample_teacher_batches(self.prepared.train, number, size, self.pad, self.accelerator.device)

    def claim(self) -> None:
        """The first process takes the arms' folders, and all hear of one that cannot be had."""

        def take() -> None:
            for k, arm in enumerate(self.arms):
                with blamed_on(k):
                    arm.folder.claim(arm.prepared.identity)

        first_alone(self.accelerator, take)

    def resume(self, folders: list[RunFolder]) -> int:
        """Take up the newest checkpoint that all arms have; the step it stands at."""
        if not folders[0].resume:
            return 0
        saved = checkpoint.newest([folder.checkpoints for folder in folders], say)
        done = saved[0].step if saved else 0
        for arm, one in zip(self.arms, saved, strict=False):
            arm.restore(one)
        for folder in folders if self.main and saved else ():
            checkpoint.drop_after(folder.checkpoints, done)
        where = f"resuming after step {done} of {self.plan.total_steps}"
        say(where if saved else f"{folders[0].path} has no checkpoint to resume from; starting at step 1")
        return done

    @property
    def active(self) -> list[Arm]:
        return [arm for arm in self.arms if not arm.failure]

    def train(self) -> None:
        """Every step from where the run stands, with validation, checkpoints and stops as they fall due."""
        recipe, total, step = self.recipe, self.plan.total_steps, self.done
        stream = isinstance(self.plan, Stream)  # is itself ahead, and holds one step's rows
        try:
            if self.done == 0:
                for arm in self.arms if self.main and self.fidelity else ():
                    arm.record.write({"step": 0, "fidelity": self.fidelity})
                self.gate()
            if self.done in (0, total) or due(recipe.validation.every, self.done):
                self.validate(self.done)
            if self.stop.anywhere(self.accelerator):
                raise self.stopped(self.done)
            batch_of = functools.partial(
                collate, self.prepared.train, pad=self.pad, packing=recipe.data.packing, share=recipe.data.share_prefixes
            )
            learners = [arm.learner for arm in self.arms]
            teacher = self.teacher if any(distils(arm.recipe) for arm in self.arms) else None
            options = {"ahead": iter if stream else ahead, "asked": lambda step: stream or self.falls_due(step)}
            if recipe.train.micro_batch_tokens == "auto" and self.done < total:
                options |= self.fitted(batch_of, learners, teacher)
            with contextlib.closing(
                train(self.plan, batch_of, learners, teacher, self.accelerator, self.done, self.stop, **options)
            ) as steps:
                for progress in steps:
                    step, last = progress.step, progress.step == total
                    for k, error in progress.failures.items():
                        self.arms[k].fail(error)
                        if len(self.arms) > 1:
                            self.display.say(f"{self.arms[k].folder.path.name} is given up: {self.arms[k].failure}")
                    self.show(progress, last)
                    if not self.active:
                        return
                    if last or due(recipe.validation.every, step):
                        self.validate(step)
                    if due(recipe.checkpoint.every, step) or (last and recipe.checkpoint.every):
                        self.save(step)
                    if progress.stop and not last:
                        raise self.stopped(step)
        except UserError:  # a bad row of a stream: what was learnt so far is kept, if it is known that it was learnt
            if stream or self.falls_due(step):
                self.save(step)
            raise
        finally:
            self.display.close()
            for arm in self.arms if self.main else ():
                arm.record.close()

    def falls_due(self, step: int) -> bool:
        """Whether something falls due after that step."""
        recipe = self.recipe
        return any(due(every, step) for every in (recipe.train.log_every, recipe.validation.every, recipe.checkpoint.every))

    def fitted(self, batch_of, learners: list[Learner], teacher: Teacher | None) -> dict:
        """Measure how large micro-batches may be. What the loop is told of it: on one process, to mind when memory runs out."""
        size, data = self.plan.micro_batch_size, self.prepared.train
        chunked = [unwrapped(arm.learner) for arm in self.arms if arm.recipe.loss.chunk_size is None]
        fitting = Fitting(size, self.plan, data, batch_of, learners, teacher, self.accelerator, self.display.say, chunked)
        fitting.measure(self.recipe.train.batch_size)
        self.display.speed()  # what was spent here is not training's
        return {"within_memory": fitting} if self.accelerator.num_processes == 1 else {}

    def show(self, progress, last: bool) -> None:
        """Count the step; record and show it where that is due."""
        self.display.count(progress.targets)
        if not (last or due(self.recipe.train.log_every, progress.step)):
            return
        speed = self.display.speed()
        going = [k for k in progress.terms if not self.arms[k].failure]
        rates = {k: self.arms[k].learner.learning_rate(progress.step) for k in going}
        for k in going if self.main else ():
            terms, norm = progress.terms[k], progress.grad_norms[k]
            self.arms[k].record.step(progress.step, progress.epoch, terms, rates[k], norm, progress.targets, speed)
        if len(self.arms) == 1 and going:
            shown = {name: f"{value:.4f}" for name, value in progress.terms[0].items()} | {"lr": f"{rates[0]:.1e}"}
        else:
            losses = [progress.terms[k]["loss"] for k in going] or [math.nan]
            shown = {"students": str(len(going)), "loss": f"{min(losses):.4f} to {max(losses):.4f}"}
        self.display.show(progress.step, shown, speed)

    def gate(self) -> None:
        """Before the first step: does the teacher know the rows that it is to teach, and better than the student?"""
        if self.teacher is None or not self.recipe.validation.teacher_check:
            return
        sample = sample_examples(self.prepared.train, self.recipe.validation.teacher_check)
        found = [one.metrics() for one in self.measure([arm.student for arm in self.arms], sample, "gate", 0)]
        for arm, metrics in zip(self.arms if self.main else (), found, strict=False):
            arm.record.write({"step": 0, "gate": {"examples": len(sample)} | {name: metrics[name] for name in ("ce", "teacher_ce")}})
        self.display.say(verdict(found, len(sample), self.prepared.teachers, self.prepared.student))

    def measure(self, students: list[models.LanguageModel], data: Examples, name: str, step: int) -> list[HeldOut]:
        """Every student on all of the data; a stop is heard meanwhile."""
        size = self.recipe.validation.micro_batch_size
        try:
            return validate(students, self.teacher, data, self.pad, size, self.accelerator, self.stop, bar(name))
        except Stopped:
            raise self.stopped(step) from None
        finally:
            self.display.speed()  # what was spent here is not training's

    def validate(self, step: int) -> None:
        """Measure on the held-out rows, once a step, and keep the best."""
        waiting = [arm for arm in self.active if arm.validated != step]
        if self.prepared.validation is None or not waiting:
            return
        found = self.measure([arm.student for arm in waiting], self.prepared.validation, "validation", step)
        for arm, held_out in zip(waiting, found, strict=True):
            metrics = arm.measured(step, held_out)
            name = f" of {arm.folder.path.name}" if len(self.arms) > 1 else ""
            shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k != "targets")
            self.display.say(f"validation{name} at step {step}: {shown}")
        if self.recipe.checkpoint.best_by and step:
            self.save(step)

    def save(self, step: int) -> None:
        """A checkpoint of every arm, unless this step has one; older ones go when all are written."""
        if step <= self.written:
            return
        if self.main:
            for arm in self.active:
                arm.save(step)
            for arm in self.active:
                arm.prune()
        self.accelerator.wait_for_everyone()
        self.written = step

    def stopped(self, step: int) -> Stopped:
        self.save(step)
        return Stopped(f"stopped by a signal after step {step} of {self.plan.total_steps}; go on with --resume")

    def finish(self) -> None:
        """Write every student; of a single one also print a short table."""
        questions = self.prepared.questions
        for arm in self.active:
            scored = {}
            if questions:
                size = self.recipe.validation.micro_batch_size
                args = (questions.examples, questions.answers, questions.counts, self.pad, size, self.accelerator, bar("questions"))
                scored = accuracy(arm.student, *args)
            if self.main:
                output = arm.finish(self.plan.total_steps, scored)
                if len(self.arms) == 1:
                    self.print(arm, output)
        self.accelerator.wait_for_everyone()

    def print(self, arm: Arm, output: Path) -> None:
        summary, folder = arm.folder.summary(), arm.folder.path
        after = {name: value for name, value in summary["validation"].items() if name != "targets"}
        if after:
            print(
                tracking_console.table([{"held-out": n, "before": summary["before"].get(n), "after": value} for n, value in after.items()])
            )
        print(f"{output}  {folder / 'loss.png'}  {folder / 'metrics.jsonl'}")


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
