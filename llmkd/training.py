"""One run, from a checked recipe to the folder it leaves behind."""

import functools
import json
import math
import os
import shutil
from pathlib import Path

from . import hub, trackers
from .card import card
from .console import bar, first_process, say
from .data.stream import Stream
from .errors import NonFinite, Stopped, UserError
from .order import Plan, learning_rate
from .prepare import Prepared, prepare
from .recipe import Recipe, sources
from .run_folder import RunFolder, write
from .stopping import StopRequest


def run(recipe: Recipe, resume: bool = False) -> dict:
    """Train, and return the run's summary. Raises UserError, NonFinite or Stopped."""
    folder = RunFolder(recipe, resume)
    folder.check()
    hub.check(recipe.push_to_hub)
    trackers.check(recipe.report_to)
    if resume and folder.finished:
        say(f"{folder.path} is finished; nothing to do" + (" but to upload it" if recipe.push_to_hub else ""))
        return hub.publish(recipe, folder) if first_process() else folder.summary()
    with StopRequest() as stop:
        prepared = prepare(recipe)
        if stop():
            raise Stopped("stopped by a signal before anything was trained; go on with --resume")
        try:
            session = Session(recipe, prepared, folder, start(), stop)
            session.train()
            summary = session.finish()
            return hub.publish(recipe, folder) if session.main and recipe.push_to_hub else summary
        finally:
            folder.release()


def start():
    """The Accelerator, with as many processes as were asked for; refused otherwise."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; use accelerate launch --multi_gpu --num_processes N, also without a GPU"
        )
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not torch.cuda.is_available() and "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch sets OMP_NUM_THREADS=1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timedelta(minutes=10))]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} work together; start with accelerate launch --num_processes {asked} or torchrun"
        )
    return accelerator


class Session:
    """The models, the optimizer and the run's folder together; trains, and does what falls due between steps."""

    def __init__(self, recipe: Recipe, prepared: Prepared, folder: RunFolder, accelerator, stop):
        from . import checkpoint, models
        from .teachers.live import Live
        from .tracking import Tracker

        self.recipe, self.prepared, self.folder, self.accelerator, self.stop = recipe, prepared, folder, accelerator, stop
        self.main, self.pad = accelerator.is_main_process, prepared.tokenizer.eos_token_id
        vocab, device = prepared.vocab, accelerator.device
        packing = recipe.data.packing
        self.teacher = Live(models.load_teacher(recipe.teacher, vocab, device, packing)) if prepared.teacher_wanted else None
        self.student = models.load_student(recipe.student, vocab, device, recipe.seed, packing)
        self.plan = plan(recipe, prepared, accelerator.process_index, accelerator.num_processes)
        self.learner = build_learner(recipe, self.student, self.plan.total_steps, accelerator)
        if self.main:
            folder.claim(prepared.identity)
        self.done, self.best, self.validated = 0, None, None
        saved = checkpoint.newest(folder.checkpoints, say) if folder.resume else None
        if saved:
            checkpoint.load(saved, self.learner.parameters, self.learner.optimizer)
            self.done, self.best, self.validated = saved.step, saved.state["best"], saved.state["validated"]
            if isinstance(prepared.train, Stream):
                prepared.train.expect(saved.state.get("rows"))
        if folder.resume:
            where = f"resuming after step {self.done} of {self.plan.total_steps}"
            say(where if saved else f"{folder.path} has no checkpoint to resume from; starting at step 1")
        self.written = self.done
        self.tracker = Tracker(recipe, folder.path, self.plan.total_steps, self.done, self.main)
        trained = sum(p.numel() for p in self.learner.parameters.values())
        every = sum(p.numel() for p in self.student.parameters())
        self.tracker.say(f"student: {every:,} parameters, {trained:,} of them train; {self.plan.total_steps} steps")

    def train(self) -> None:
        """Every step from where the run stands, with validation, checkpoints and stops as they fall due."""
        from .data.collate import collate
        from .loop import train

        recipe, total, step = self.recipe, self.plan.total_steps, self.done
        try:
            if self.done == 0 or due(recipe.validation.every, self.done):
                self.validate(self.done)
            if self.stop.anywhere(self.accelerator):
                raise self.stopped(self.done)
            batch_of = functools.partial(collate, self.prepared.train, pad=self.pad, packing=recipe.data.packing)
            for progress in train(self.plan, batch_of, [self.learner], self.teacher, self.accelerator, self.done, self.stop):
                step, last = progress.step, progress.step == total
                self.tracker.step(progress, 0, self.learner.learning_rate(step), last or due(recipe.train.log_every, step))
                if last or due(recipe.validation.every, step):
                    self.validate(step)
                if due(recipe.checkpoint.every, step) or (last and recipe.checkpoint.every):
                    self.save(step)
                if progress.stop and not last:
                    raise self.stopped(step)
        except NonFinite as error:
            raise self.explained(error) from None
        except UserError:  # a bad row of a stream: what was learnt so far is kept
            self.save(step)
            raise
        finally:
            self.tracker.close()

    def validate(self, step: int) -> None:
        """Measure on the held-out rows, once a step; keep the best; warn where the teacher is the worse of the two."""
        from .validate import validate

        if self.prepared.validation is None or self.validated == step:
            return
        size = self.recipe.validation.micro_batch_size
        try:
            figures = validate(
                self.student, self.teacher, self.prepared.validation, self.pad, size, self.accelerator, self.stop, bar("validation")
            )
        except Stopped:
            raise self.stopped(step) from None
        self.validated = step
        self.tracker.validation(step, figures)
        if step == 0 and figures.get("teacher_ce", 0) > figures["ce"]:
            self.tracker.say(
                f"warning: on the held-out rows the teacher's CE ({figures['teacher_ce']:.3f}) is worse than the student's ({figures['ce']:.3f}); "
                "tune the teacher on this data first"
            )
        by = self.recipe.checkpoint.best_by
        if by and step:
            sign = -1 if by == "agreement" else 1
            if self.best is None or self.best["by"] != by or sign * figures[by] < sign * self.best["value"]:
                self.best = {"by": by, "step": step, "value": figures[by]}
            self.save(step)

    def save(self, step: int) -> None:
        """A checkpoint, unless this step has one."""
        from . import checkpoint

        if step <= self.written:
            return
        if self.main:
            state = {"best": self.best, "validated": self.validated}
            if isinstance(self.prepared.train, Stream):
                state["rows"] = self.prepared.train.passed(step)
            best = self.best["step"] if self.best else None
            checkpoint.save(
                self.folder.checkpoints, step, self.learner.parameters, self.learner.optimizer, state, self.recipe.checkpoint.keep, best
            )
        self.accelerator.wait_for_everyone()
        self.written = step

    def stopped(self, step: int) -> Stopped:
        self.save(step)
        return Stopped(f"stopped by a signal after step {step} of {self.plan.total_steps}; go on with --resume")

    def explained(self, error: NonFinite) -> NonFinite:
        """The same with the examples' places; also written to the run's folder."""
        places = [self.prepared.places[i] for i in error.examples]
        if self.main:
            write(self.folder.path / "nonfinite.json", json.dumps({"step": error.step, "term": error.term, "examples": places}, indent=1))
        shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        text = f"step {error.step}: {error.term} is not finite at {shown}; the weights are as they were before it"
        return NonFinite(error.step, error.term, error.examples, text)

    def finish(self) -> dict:
        """Write the student, the summary, the plot and the card; print a short table."""
        from . import tracking
        from .validate import accuracy

        questions, scored = self.prepared.questions, {}
        if questions:
            size = self.recipe.validation.micro_batch_size
            scored = accuracy(
                self.student, questions.encoded, questions.answers, questions.counts, self.pad, size, self.accelerator, bar("questions")
            )
        summary = {"steps": self.plan.total_steps, "output": "adapter" if self.recipe.student.method == "lora" else "model"}
        if self.main:
            records = tracking.read(self.folder.path / "metrics.jsonl")
            last = next(r for r in reversed(records) if "loss" in r)
            held_out = [r["validation"] for r in records if "validation" in r] or [{}]
            summary |= {
                "before": held_out[0],
                "train": {k: last[k] for k in ("loss", "ce", "kd") if k in last},
                "validation": held_out[-1] | scored,
                "best": self.best,
            }
            output = self.write_student(summary)
            tracking.plot(self.folder.path)
            write(self.folder.path / "summary.json", json.dumps(summary, indent=1))
            rows = [
                {"held-out": n, "before": held_out[0].get(n), "after": value}
                for n, value in summary["validation"].items()
                if n != "targets"
            ]
            if rows:
                print(tracking.table(rows))
            print(f"{output}  {self.folder.path / 'loss.png'}  {self.folder.path / 'metrics.jsonl'}")
        self.accelerator.wait_for_everyone()
        return summary

    def write_student(self, summary: dict) -> Path:
        """`adapter` or `model` in the run's folder, whole or not at all."""
        from . import models

        output = self.folder.path / summary["output"]
        for leftover in self.folder.path.glob(f"{output.name}.tmp-*"):
            shutil.rmtree(leftover)
        part = output.with_name(f"{output.name}.tmp-{os.getpid()}")
        models.save(self.student, self.prepared.tokenizer, part, self.recipe.student)
        prepared = self.prepared
        text = card(self.recipe, summary, prepared.student, prepared.teacher, prepared.origins)
        (part / "README.md").write_text(text, encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        part.rename(output)
        return output


def plan(recipe: Recipe, prepared: Prepared, rank: int, ranks: int):
    """Which examples make up which step: of a stream, it follows from the rows' order alone."""
    train = recipe.train
    if isinstance(prepared.train, Stream):
        return prepared.train.for_rank(rank, ranks)
    return Plan(
        prepared.train.lengths,
        recipe.seed,
        train.batch_size,
        train.micro_batch_size,
        train.epochs,
        train.max_steps,
        train.length_group,
        rank,
        ranks,
        prepared.train.source,
        tuple(source.weight for source in sources(recipe.data.train)),
    )


def build_learner(recipe: Recipe, student, total_steps: int, accelerator):
    """The student with its objective, optimizer and schedule."""
    from . import optimizers
    from .distiller import Distiller
    from .loop import Learner
    from .losses.divergences import named
    from .losses.objective import Objective

    loss, optim = recipe.loss, recipe.optim
    objective = Objective(loss.kd_ratio, loss.temperature, named(loss.divergence, **loss.divergence_options))
    parameters = student.trainable()
    optimizer = optimizers.build(optim, parameters)
    distiller = accelerator.prepare_model(Distiller(student, objective, loss.chunk_rows))
    return Learner(distiller, optimizer, parameters, schedule(recipe, total_steps), optim.max_grad_norm)


def schedule(recipe: Recipe, total: int):
    optim = recipe.optim
    if optim.warmup_steps and optim.warmup_steps > total:
        raise UserError(
            f"optim.warmup_steps: found {optim.warmup_steps}, and the whole run has {total} steps; lower it, or use optim.warmup_share"
        )
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil((optim.warmup_share or 0) * total)
    return lambda step: learning_rate(step, total, optim.lr, optim.schedule, warmup, optim.min_lr_share)


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
