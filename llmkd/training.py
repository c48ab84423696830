"""One run, from a checked recipe to the folder it leaves behind."""

import functools
import json
import math
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from .data import token_cache
from .data.encode import Encoded, with_answer
from .data.sources import Rows, read_source
from .errors import NonFinite, Stopped, UserError
from .model_files import ModelFiles, find, fingerprint
from .order import Plan, learning_rate
from .recipe import Data, Recipe, Source
from .run_folder import RunFolder, write


@dataclass(frozen=True)
class Questions:
    """Multiple choice: the encoded choices, how many each question has, and which is right."""

    encoded: Encoded
    counts: list[int]
    answers: list[int]


@dataclass(frozen=True)
class Prepared:
    """Everything that is read and checked before a model is loaded."""

    tokenizer: object
    train: Encoded
    places: list[str]  # of each training example
    validation: Encoded | None
    questions: Questions | None
    teacher_wanted: bool
    identity: dict[str, str]


def run(recipe: Recipe, resume: bool = False) -> dict:
    """Train, and return the run's summary. Raises UserError, NonFinite or Stopped."""
    folder = RunFolder(recipe, resume)
    folder.check()
    if resume and folder.finished:
        say(f"{folder.path} is finished; nothing to do")
        return folder.summary()
    prepared = prepare(recipe)
    from .stopping import StopRequest

    with StopRequest() as stop:
        try:
            return fit(recipe, prepared, folder, start(recipe.train.mixed_precision), stop)
        finally:
            folder.release()


def prepare(recipe: Recipe) -> Prepared:
    """Read and check data, tokenizers and model folders. No weights are loaded."""
    data = recipe.data
    train_rows = read_source(data.train, "data.train")
    held_rows = read_source(data.validation, "data.validation") if data.validation else None
    choice_rows = read_source(data.choices, "data.choices", choices=True) if data.choices else None
    teacher_wanted = recipe.teacher is not None and recipe.loss.kd_ratio > 0
    student = find(recipe.student.model, "student.model", recipe.student.revision) if recipe.student.model else None
    teacher = find(recipe.teacher.model, "teacher.model", recipe.teacher.revision, recipe.teacher.base) if teacher_wanted else None
    for setting, files in (("student.model", student), ("teacher.model", teacher)):
        longest = files.config.get("max_position_embeddings") if files else None
        if longest and data.max_length > longest:
            raise UserError(f"data.max_length: found {data.max_length}, and {setting} ({files.base}) has {longest} positions; lower it")

    tokenizer = _tokenizer(recipe, student)
    if teacher:
        _same_tokenizer(tokenizer, teacher, recipe.teacher.model)
    train = token_cache.encoded(train_rows, data.train, data, tokenizer, "data.train", say)
    if held_rows:
        held_out = token_cache.encoded(held_rows, data.validation, data, tokenizer, "data.validation", say)
    else:
        train, held_out = hold_out(train, data.validation_share, recipe.seed)
    report(train, "train")
    if held_out:
        report(held_out, "validation")
    identity = {"the training data": train_rows.content, "the tokenizer": token_cache.tokenizer_hash(tokenizer)}
    for name, setting, files in (("the student's base", "student.model", student), ("the teacher", "teacher.model", teacher)):
        if files:
            identity[name] = " ".join(fingerprint(folder, setting) for folder in (files.base, files.adapter) if folder)
    questions = encode_choices(choice_rows, data.choices, data, tokenizer) if choice_rows else None
    return Prepared(tokenizer, train, [train_rows.places[i] for i in train.row], held_out, questions, teacher_wanted, identity)


def _tokenizer(recipe: Recipe, student: ModelFiles | None):
    from .data.tokenizer import load_tokenizer

    if recipe.student.tokenizer:
        return load_tokenizer(recipe.student.tokenizer, "student.tokenizer")
    return load_tokenizer(str(student.base), "student.model")


def _same_tokenizer(tokenizer, teacher: ModelFiles, name: str) -> None:
    from .data.tokenizer import load_tokenizer, tokenizer_differences

    with_tokenizer = teacher.adapter if teacher.adapter and (teacher.adapter / "tokenizer.json").exists() else teacher.base
    differences = tokenizer_differences(tokenizer, load_tokenizer(str(with_tokenizer), "teacher.model"))
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise UserError(f"teacher.model: the student's tokenizer and {name}'s are not the same: {'; '.join(differences[:3])}{more}; token-by-token distillation needs one tokenizer")


def hold_out(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded | None]:
    """Part off a share of the examples, drawn by seed."""
    import random

    import numpy as np

    count = round(share * len(encoded))
    if not count:
        if share:
            raise UserError(f"data.validation_share: {share:g} of {len(encoded)} examples is none; raise it")
        return encoded, None
    if count == len(encoded):
        raise UserError(f"data.validation_share: {share:g} of {len(encoded)} examples leaves none to train on; lower it")
    held = np.zeros(len(encoded), bool)
    held[random.Random(f"validation {seed}").sample(range(len(encoded)), count)] = True
    return encoded.subset(~held), encoded.subset(held)


def encode_choices(rows: Rows, source: Source, data: Data, tokenizer) -> Questions:
    """One example for each choice of each question; the answer's tokens are supervised."""
    expanded = Rows(
        [with_answer(row, source.format, choice) for row in rows.rows for choice in row["choices"]],
        [place for row, place in zip(rows.rows, rows.places, strict=True) for _ in row["choices"]],
        rows.content + " choices",
    )
    encoded = token_cache.encoded(expanded, source, data, tokenizer, "data.choices", say)
    if len(encoded) != len(expanded.rows):
        raise UserError(f"data.choices: {len(expanded.rows) - len(encoded)} of {len(expanded.rows)} choices do not fit into data.max_length = {data.max_length}; raise it")
    return Questions(encoded, [len(row["choices"]) for row in rows.rows], [row["answer"] for row in rows.rows])


def report(encoded: Encoded, name: str) -> None:
    c = encoded.counts
    dropped = [f"{c[k]} {words}" for k, words in (("too_long", "too long"), ("unsupervised", "with nothing supervised, dropped")) if c.get(k)]
    say(f"{name}: {len(encoded)} examples, {len(encoded.ids)} tokens, {int(encoded.supervised.sum())} targets" + (f" ({', '.join(dropped)})" if dropped else ""))


def say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def start(mixed_precision: str = "no"):
    """The Accelerator, with as many processes as were asked for; refused otherwise."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise UserError("accelerate launch --cpu starts one process, whatever --num_processes says; use accelerate launch --multi_gpu --num_processes N, also without a GPU")
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not torch.cuda.is_available() and "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch sets OMP_NUM_THREADS=1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timedelta(minutes=10))]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision, kwargs_handlers=handlers)
    if accelerator.num_processes != asked:
        raise UserError(f"{asked} processes were asked for and {accelerator.num_processes} work together; start with accelerate launch --num_processes {asked} or torchrun")
    return accelerator


def fit(recipe: Recipe, prepared: Prepared, folder: RunFolder, accelerator, stop) -> dict:
    """Build the models, train with validation and checkpoints as they fall due, and leave the results in the folder."""
    from . import checkpoint, models
    from .data.collate import collate
    from .loop import Learner, train
    from .teachers.live import Live
    from .tracking import Tracker
    from .validate import validate

    vocab, pad = len(prepared.tokenizer), prepared.tokenizer.eos_token_id
    teacher = Live(models.load_teacher(recipe.teacher, vocab, accelerator.device)) if prepared.teacher_wanted else None
    student = models.load_student(recipe.student, vocab, accelerator.device, recipe.seed)
    learner = build(recipe, student, accelerator, Learner)
    plan = Plan(
        prepared.train.lengths, recipe.seed, recipe.train.batch_size, recipe.train.micro_batch_size, recipe.train.epochs, recipe.train.max_steps,
        recipe.train.length_group, accelerator.process_index, accelerator.num_processes,
    )
    learner.learning_rate = schedule(recipe, plan.total_steps)
    if accelerator.is_main_process:
        folder.claim(prepared.identity)
    saved = checkpoint.newest(folder.checkpoints, say) if folder.resume else None
    done, state = 0, {"best": None, "validated": -1}
    if saved:
        checkpoint.load(saved, learner.parameters, learner.optimizer)
        done, state = saved.step, {k: saved.state[k] for k in state}
        say(f"resuming after step {done} of {plan.total_steps}")
    tracker = Tracker(folder.path, plan.total_steps, done, accelerator.is_main_process)
    trained = sum(p.numel() for p in learner.parameters.values())
    tracker.say(f"student: {sum(p.numel() for p in student.parameters()):,} parameters, {trained:,} of them train; {plan.total_steps} steps")
    written = done

    def save(step: int) -> None:
        nonlocal written
        if step > written:
            if accelerator.is_main_process:
                best = state["best"]["step"] if state["best"] else None
                checkpoint.save(folder.checkpoints, step, learner.parameters, learner.optimizer, state, recipe.checkpoint.keep, best)
            accelerator.wait_for_everyone()
            written = step

    def stopped(step: int) -> Stopped:
        save(step)
        return Stopped(f"stopped by a signal after step {step} of {plan.total_steps}; go on with --resume")

    def look(step: int) -> None:
        if prepared.validation is None or state["validated"] == step:
            return
        try:
            figures = validate(student, teacher, prepared.validation, pad, recipe.validation.micro_batch_size, accelerator, stop, bar("validation", accelerator))
        except Stopped:
            raise stopped(step) from None
        state["validated"] = step
        tracker.validation(step, figures)
        if step == 0 and teacher and figures["teacher_ce"] > figures["ce"]:
            tracker.say(f"warning: on the held-out rows the teacher's CE ({figures['teacher_ce']:.3f}) is worse than the student's ({figures['ce']:.3f}); tune the teacher on this data first")
        by = recipe.checkpoint.best_by
        if by:
            better = -figures[by] if by == "agreement" else figures[by]
            if state["best"] is None or better < state["best"]["value"]:
                state["best"] = {"step": step, "value": better}
            save(step)

    try:
        if done == 0 or due(recipe.validation.every, done):
            look(done)
        if stop.anywhere(accelerator):
            raise stopped(done)
        batches = functools.partial(collate, prepared.train, pad=pad)
        for progress in train(plan, batches, [learner], teacher, accelerator, done, stop):
            step, last = progress.step, progress.step == plan.total_steps
            record = last or step % recipe.train.log_every == 0
            tracker.step(step, progress.epoch, progress.terms[0], learner.learning_rate(step), progress.grad_norms[0], progress.targets, record)
            if last or due(recipe.validation.every, step):
                look(step)
            if due(recipe.checkpoint.every, step) or (last and recipe.checkpoint.every):
                save(step)
            if progress.stop and not last:
                raise stopped(step)
    except NonFinite as error:
        raise explained(error, prepared, folder, accelerator) from None
    finally:
        tracker.close()
    return finish(recipe, prepared, folder, student, plan, state, accelerator)


def build(recipe: Recipe, student, accelerator, Learner):
    """The student with its objective and optimizer. Weight decay is for matrices; biases and norms go without."""
    import torch

    from .distiller import Distiller
    from .losses.divergences import named
    from .losses.objective import Objective

    loss, optim = recipe.loss, recipe.optim
    objective = Objective(loss.kd_ratio, loss.temperature, named(loss.divergence, **loss.divergence_options))
    parameters = student.trainable()
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    plain = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}] + ([{"params": plain, "weight_decay": 0.0}] if plain else [])
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    distiller = accelerator.prepare_model(Distiller(student, objective, loss.chunk_rows))
    return Learner(distiller, optimizer, parameters, lambda step: optim.lr, optim.max_grad_norm)


def schedule(recipe: Recipe, total: int):
    optim = recipe.optim
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil((optim.warmup_share or 0) * total)
    return lambda step: learning_rate(step, total, optim.lr, optim.schedule, warmup, optim.min_lr_share)


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def bar(name: str, accelerator):
    from tqdm import tqdm

    return lambda batches: tqdm(batches, name, leave=False, disable=None if accelerator.is_main_process else True)


def explained(error: NonFinite, prepared: Prepared, folder: RunFolder, accelerator) -> NonFinite:
    """The same with the examples' places; also written to the run's folder."""
    places = [prepared.places[i] for i in error.examples]
    if accelerator.is_main_process:
        write(folder.path / "nonfinite.json", json.dumps({"step": error.step, "term": error.term, "examples": places}, indent=1))
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    return NonFinite(error.step, error.term, error.examples, f"step {error.step}: {error.term} is not finite at {shown}; the weights are as they were before it")


def finish(recipe: Recipe, prepared: Prepared, folder: RunFolder, student, plan: Plan, state: dict, accelerator) -> dict:
    """Write the student, the summary, the plot and the card; print a short table."""
    from . import models, tracking
    from .card import card
    from .validate import accuracy

    pad, questions = prepared.tokenizer.eos_token_id, prepared.questions
    scored = {}
    if questions:
        scored = accuracy(student, questions.encoded, questions.answers, questions.counts, pad, recipe.validation.micro_batch_size, accelerator, bar("questions", accelerator))
    summary = {"steps": plan.total_steps, "output": "adapter" if recipe.student.method == "lora" else "model"}
    if accelerator.is_main_process:
        records = tracking.read(folder.path / "metrics.jsonl")
        final = next((r["validation"] for r in reversed(records) if "validation" in r), {})
        first = next((r["validation"] for r in records if "validation" in r), {})
        summary |= {"train": {k: records_last(records)[k] for k in ("loss", "ce", "kd") if k in records_last(records)}, "validation": final | scored, "best": state["best"]}
        for leftover in folder.path.glob(f"{summary['output']}.tmp-*"):
            shutil.rmtree(leftover)
        part = folder.path / f"{summary['output']}.tmp-{os.getpid()}"
        models.save(student, prepared.tokenizer, part)
        (part / "README.md").write_text(card(recipe, summary), encoding="utf-8")
        shutil.rmtree(folder.path / summary["output"], ignore_errors=True)
        part.rename(folder.path / summary["output"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # matplotlib's, about fonts
            tracking.plot(folder.path)
        write(folder.path / "summary.json", json.dumps(summary, indent=1))
        if final:
            names = [n for n in final if n != "targets"]
            print(tracking.table([{"held-out": n, "before": first.get(n), "after": final[n]} for n in names] + [{"held-out": n, "before": None, "after": scored[n]} for n in scored]))
        print(f"{folder.path / summary['output']}  {folder.path / 'loss.png'}  {folder.path / 'metrics.jsonl'}")
    accelerator.wait_for_everyone()
    return summary


def records_last(records: list[dict]) -> dict:
    return next((r for r in reversed(records) if "loss" in r), {})
