"""`llmkd cache --check`: measure what a teacher loses by quantisation or merging, and by its teacher cache."""

import dataclasses
import gc
from pathlib import Path

import torch

from ..batch import Batch
from ..config.recipe import Recipe, Student
from ..console import info, progress_bar, table, warn
from ..data.batching import make_micro_batches
from ..data.examples import Examples
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.load import LoadContext, load_models
from ..signals import TEACHER_METRICS, Dense
from ..teachers.cache.shards import TeacherCache
from ..teachers.cached import CachedTeacher
from ..teachers.fidelity import sample_examples
from ..teachers.live import LiveTeacher
from ..teachers.resolve import TeacherSource, check_cache, examples_of
from ..training.launch import start
from ..training.prepare import Prepared, signal_use
from ..training.validate import Evaluator
from .cache_selection import select_teachers


class RecordedTeacher:
    """A live teacher's head and its hidden states of some examples, by content hash; the rest of the model can then be freed."""

    metrics = TEACHER_METRICS

    def __init__(self, model: LanguageModel, data: Examples, size: int, device):
        live, self.head, self.hidden = LiveTeacher(model), None, {}
        for examples in progress_bar("the unquantised teacher")(make_micro_batches(list(range(len(data))), data.lengths, size)):
            batch = data.batch(examples).to(device)
            signal = live(batch)
            self.head = signal.head
            parts = signal.hidden_NH.split([example.num_targets for example in batch.examples])
            self.hidden |= {example.content_hash: part.cpu() for example, part in zip(batch.examples, parts, strict=True)}

    def __call__(self, batch: Batch) -> Dense:
        hidden_NH = torch.cat([self.hidden[example.content_hash] for example in batch.examples])
        return Dense(hidden_NH.to(batch.labels_N.device), self.head)


def check(recipe: Recipe, examples: int = 64) -> dict[str, dict]:
    """Print and return metrics, by setting, of every teacher that is quantised, merged or cached, on a sample of `examples` training examples."""
    prepared, sources = select_teachers(
        recipe,
        lambda teacher: (teacher.cache and not teacher.server) or teacher.held,
        "teacher.quantization, teacher.merge_adapter, teacher.cache.path: none is given of a teacher that can be loaded, and nothing else can be compared",
    )
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UserError("--check: runs in one process; leave accelerate launch out")
    context = LoadContext(prepared.vocab, accelerator.device, recipe.seed, kind=prepared.kind)
    evaluator = Evaluator(
        accelerator, recipe.validation.micro_batch_size, measures=prepared.task.measures(prepared.processor, recipe.validation)
    )
    out: dict[str, dict] = {}
    for source in sources:
        mine = examples_of(prepared.train, prepared.teachers.index(source))
        sample = sample_examples(prepared.train.take(mine), examples)
        if not len(sample):
            warn(f"note: {source.setting}: no training rows use this teacher")
            continue
        cached = open_cache(recipe, prepared, source)
        info(f"on {len(sample)} training examples with {int(sample.num_targets.sum())} targets; nats per target")
        found = out[source.setting] = {"examples": len(sample), "targets": int(sample.num_targets.sum())}
        if source.settings.held:
            found["held"] = compare_transformed(source, sample, context, evaluator)
            print(table(found["held"]))
        if cached:
            found["cached"] = compare_cached(recipe.student, cached, sample, context, evaluator)
            print(table(found["cached"]))
    return out


def compare_transformed(source: TeacherSource, sample: Examples, context: LoadContext, evaluator: Evaluator) -> list[dict]:
    """Two rows of metrics: of the teacher as it was saved, and quantised or merged. Only one of the two is in memory at a time."""
    whole = dataclasses.replace(source.settings, quantization=None, merge_adapter=False)
    (model,) = load_models([], [(source.setting, whole)], context)[1]
    before = RecordedTeacher(model, sample, evaluator.micro_batch_size, context.device)
    del model
    gc.collect()
    (model,) = load_models([], [(source.setting, source.settings)], context)[1]
    found = evaluator.validate([model], before, sample, progress_bar("the quantised teacher"))[0].metrics()
    row = {name: found[name] for name in ("forward_kl", "reverse_kl", "top1_agreement")}
    itself = {"forward_kl": 0.0, "reverse_kl": 0.0, "top1_agreement": 1.0}
    return [
        {
            source.setting: "unquantised" if source.settings.quantization else "unmerged",
            "ce": found["teacher_ce"],
            "entropy": found["teacher_entropy"],
        }
        | itself,
        {source.setting: source.settings.held, "ce": found["ce"], "entropy": found["entropy"]} | row,
    ]


def compare_cached(student: Student, source: TeacherSource, sample: Examples, context: LoadContext, evaluator: Evaluator) -> list[dict]:
    """Two rows of metrics of the untrained student: against the live teacher, and against its cache."""
    students, models = load_models([student], [(source.setting, source.settings)], context)
    rows = []
    for name, teacher in (
        ("live", LiveTeacher(models[0], setting=source.setting)),
        (str(source.settings.cache.path), CachedTeacher(source.cache, context.device)),
    ):
        found = evaluator.validate(students, teacher, sample, progress_bar(name))[0].metrics()
        rows.append({source.setting: name} | {metric: found[metric] for metric in TEACHER_METRICS if metric in found})
    return rows


def open_cache(recipe: Recipe, prepared: Prepared, source: TeacherSource) -> TeacherSource | None:
    """The source with its cache open and checked against the recipe. None if it names no cache, or a cache that is not written yet for a
    teacher whose quantisation or merging is measured anyway."""
    cache = source.settings.cache
    if not cache or (source.settings.held and not Path(cache.path).expanduser().exists()):
        return None
    found = dataclasses.replace(source, cache=TeacherCache.open(cache.path, f"{source.setting}.cache.path"))
    check_cache(found, recipe.data, signal_use(recipe), prepared.processor.provenance, prepared.vocab)
    return found
