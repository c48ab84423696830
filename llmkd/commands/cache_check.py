"""`llmkd cache --check`: what is lost where a teacher is held in 4 or 8 bit, or where its answers were kept in a teacher cache."""

import dataclasses
import gc
from pathlib import Path

import torch

from .. import console as tracking_console
from ..batch import Batch
from ..config.recipe import Recipe
from ..console import info, progress_bar, warn
from ..data.batching import make_micro_batches
from ..data.collate import collate
from ..data.examples import Examples
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.load import load_models
from ..signals import TEACHER_METRICS, Dense
from ..teachers.cache.shards import TeacherCache
from ..teachers.cached import CachedTeacher
from ..teachers.fidelity import sample_examples
from ..teachers.live import LiveTeacher
from ..teachers.resolve import TeacherSource, check_cache, examples_of
from ..training.launch import start
from ..training.prepare import Prepared
from ..training.validate import validate
from .cache import chosen


class RecordedTeacher:
    """A live teacher's hidden states and its head, after its body is gone; found by the examples they are of."""

    metrics = TEACHER_METRICS

    def __init__(self, model: LanguageModel, data: Examples, pad: int, size: int, device):
        live, self.head, self.hidden = LiveTeacher(model), None, {}
        for examples in progress_bar("the unquantised teacher")(make_micro_batches(list(range(len(data))), data.lengths, size)):
            batch = collate(data, examples, pad).to(device)
            signal = live(batch)
            self.head = signal.head
            parts = signal.hidden_NH.split([example.num_targets for example in batch.examples])
            self.hidden |= {example.content_hash: part.cpu() for example, part in zip(batch.examples, parts, strict=True)}

    def __call__(self, batch: Batch) -> Dense:
        return Dense(torch.cat([self.hidden[example.content_hash] for example in batch.examples]).to(batch.labels_N.device), self.head)


def check(recipe: Recipe, examples: int = 64) -> None:
    """Print, for every teacher that is quantised, merged or has a teacher cache, metrics on a sample of the training rows."""
    prepared, todo = chosen(
        recipe,
        lambda one: one.cache or one.held,
        "teacher.quantization, teacher.merge_adapter, teacher.cache.path: none is given, and nothing else loses anything",
    )
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError("--check: runs in one process; leave accelerate launch out")
    for teacher in todo:
        mine = examples_of(prepared.train, prepared.teachers.index(teacher))
        sample = sample_examples(prepared.train.take(mine), examples)
        if not len(sample):
            warn(f"note: {teacher.setting}: no training rows are left to it")
            continue
        stored = opened(recipe, prepared, teacher)
        info(f"on {len(sample)} training examples, {int(sample.loss_mask.sum())} targets; nats per target")
        if teacher.settings.held:
            print(tracking_console.table(quantised(recipe, prepared, teacher, sample, accelerator)))
        if stored:
            print(tracking_console.table(kept(recipe, prepared, stored, sample, accelerator)))


def quantised(recipe: Recipe, prepared: Prepared, teacher: TeacherSource, sample: Examples, accelerator) -> list[dict]:
    """The teacher as it is, and in 4 or 8 bit, or merged. One after the other: only one of them is in memory."""
    size, pad, vocab = recipe.validation.micro_batch_size, prepared.tokenizer.eos_token_id, prepared.vocab
    whole = dataclasses.replace(teacher.settings, quantization=None, merge_adapter=False)
    (model,) = load_models([], [(teacher.setting, whole)], vocab, accelerator.device, recipe.seed)[1]
    before = RecordedTeacher(model, sample, pad, size, accelerator.device)
    del model
    gc.collect()
    (model,) = load_models([], [(teacher.setting, teacher.settings)], vocab, accelerator.device, recipe.seed)[1]
    found = validate([model], before, sample, pad, size, accelerator, progress=progress_bar("the quantised teacher"))[0].metrics()
    row = {name: found[name] for name in ("forward_kl", "reverse_kl", "top1_agreement")}
    itself = {"forward_kl": 0.0, "reverse_kl": 0.0, "top1_agreement": 1.0}
    return [
        {
            teacher.setting: "unquantised" if teacher.settings.quantization else "unmerged",
            "ce": found["teacher_ce"],
            "entropy": found["teacher_entropy"],
        }
        | itself,
        {teacher.setting: teacher.settings.held, "ce": found["ce"], "entropy": found["entropy"]} | row,
    ]


def kept(recipe: Recipe, prepared: Prepared, teacher: TeacherSource, sample: Examples, accelerator) -> list[dict]:
    """The recipe's untrained student before the live teacher, and before the cache of its outputs."""
    size, pad = recipe.validation.micro_batch_size, prepared.tokenizer.eos_token_id
    students, models = load_models([recipe.student], [(teacher.setting, teacher.settings)], prepared.vocab, accelerator.device, recipe.seed)
    rows = []
    for name, one in (
        ("live", LiveTeacher(models[0])),
        (str(teacher.settings.cache.path), CachedTeacher(teacher.cache, accelerator.device)),
    ):
        found = validate(students, one, sample, pad, size, accelerator, progress=progress_bar(name))[0].metrics()
        rows.append({teacher.setting: name} | {figure: found[figure] for figure in TEACHER_METRICS if figure in found})
    return rows


def opened(recipe: Recipe, prepared: Prepared, teacher: TeacherSource) -> TeacherSource | None:
    """The teacher with its cache, which must be its own; None where it names none, or where that is yet to be written and the teacher's
    number format is looked at."""
    cache = teacher.settings.cache
    if not cache or (teacher.settings.held and not Path(cache.path).expanduser().exists()):
        return None
    found = dataclasses.replace(teacher, cache=TeacherCache.open(cache.path, f"{teacher.setting}.cache.path"))
    check_cache(recipe, found, prepared.tokenizer, prepared.vocab)
    return found
