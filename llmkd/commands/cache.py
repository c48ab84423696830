"""`llmkd cache`: what a teacher says at every target of a recipe's data, asked once and kept in a teacher cache.

Any number of processes write it together, each its own shards; a shard that is whole stays, so that an attempt that was stopped or
killed goes on where it was. Size and time are said first.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..config.fields import with_setting_names
from ..config.recipe import Recipe, Teacher
from ..config.teacher import CACHE_KINDS, Cache
from ..console import duration, first_process, info, progress_bar
from ..data.batching import make_micro_batches
from ..data.examples import Examples, concat
from ..errors import Stopped, UserError, on_main_process, report_from_any_rank
from ..files import sha256_file
from ..output.run_folder import lock_folder
from ..teachers import resolve as taught
from ..teachers.resolve import TeacherSource
from ..training.prepare import Prepared, prepare
from ..training.shutdown import ShutdownRequest


def cache(recipe: Recipe, foreign: str | None = None, stop: ShutdownRequest | None = None) -> list[Path]:
    """Write every cache that the recipe's teachers name. Raises UserError, or Stopped when a signal came: what is whole is kept.

    `foreign`: a file of answers that came from elsewhere, for the one teacher that has a teacher cache.
    """
    from ..training.launch import start

    nothing = "teacher.cache.path: not given; name the folder of the cache, such as --teacher.cache.path runs/cache"
    prepared, todo = chosen(recipe, lambda one: one.cache, nothing, foreign)
    accelerator = start()
    if foreign:
        return [read_foreign(recipe, prepared, todo, foreign, accelerator)]
    with stop or ShutdownRequest("finishing this batch; what is whole is kept") as stop, contextlib.ExitStack() as held:
        return [write(recipe, prepared, teacher, accelerator, stop, held) for teacher in todo]


def chosen(
    recipe: Recipe, which: Callable[[Teacher], object], nothing: str, foreign: str | None = None
) -> tuple[Prepared, list[TeacherSource]]:
    """The recipe's data, and those of its teachers that are meant; `nothing` is what is wrong with one that has none. Refused before a model is
    loaded."""
    many = with_setting_names(recipe.teacher, "teacher")
    if not any(which(one) for _, one in many):
        raise UserError(nothing)
    for setting, one in many:
        if which(one) and not one.model and not foreign:
            raise UserError(f"{setting}.model: not given; name the teacher whose answers {one.cache.path} is to hold")
    if recipe.data.streaming:
        raise UserError("data.streaming: found true, and a teacher cache is of rows that are all known; set it to false")
    if not recipe.loss.kd_ratio:
        raise UserError("loss.kd_ratio: found 0, with which no teacher is asked; leave it out here")
    for setting, one in many:
        if one.cache and which(one):
            check_cache_settings(one.cache, f"{setting}.cache")
    prepared = prepare(recipe, open_caches=False)
    todo = [one for one in prepared.teachers if which(one.settings)]
    for one in todo:
        if one.settings.cache and not len(asked(recipe, prepared, one)):
            raise UserError(f"{one.setting}: no source leaves it any rows, so there is nothing to keep of it; leave it out")
    return prepared, todo


def check_cache_settings(cache: Cache, setting: str) -> None:
    """Options of another kind than the default, where kind is not given; a path that is no folder's."""
    if cache.kind is None:
        for kind, options in CACHE_KINDS.items():
            for name in options:
                if name not in CACHE_KINDS["topk"] and getattr(cache, name) is not None:
                    raise UserError(
                        f"{setting}.{name}: is of kind {kind}, and kind is not given, which is topk; set {setting}.kind: {kind}"
                    )
    folder = Path(cache.path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{setting}.path: {cache.path} is a file; name a folder")


def asked(recipe: Recipe, prepared: Prepared, teacher: TeacherSource) -> Examples:
    """Everything that a teacher is asked in a run: training and held-out rows that are not left to others, in the rows' order.

    Rows of data.validation are numbered on behind those of data.train.
    """
    parts = [one for one in (prepared.train, prepared.validation) if one is not None]
    before = [0, 0 if recipe.data.validation_fraction else sum(source["rows"] for source in prepared.origins["data.train"])]
    whole = concat(parts, before[: len(parts)], {})
    mine = taught.examples_of(whole, prepared.teachers.index(teacher))
    return whole.take(mine[np.argsort(whole.row[mine], kind="stable")])


def planned(encoded: Examples, bytes_per_target: int):
    from ..teachers.cache.shards import ShardPlan

    return ShardPlan.of([encoded.content_hash(i) for i in range(len(encoded))], encoded.num_targets.tolist(), bytes_per_target)


def write(
    recipe: Recipe, prepared: Prepared, teacher: TeacherSource, accelerator, stop: ShutdownRequest, held: contextlib.ExitStack
) -> Path:
    """One teacher's cache; `held` keeps other attempts out of its folder."""
    from ..data.collate import collate
    from ..models.load import load_models
    from ..teachers.cache.records import make_record_format
    from ..teachers.cache.shards import Writer
    from ..teachers.fidelity import measured_transform, sample_teacher_batches
    from ..teachers.live import LiveTeacher

    setting, device, rank, ranks = teacher.setting, accelerator.device, accelerator.process_index, accelerator.num_processes
    folder, encoded = Path(teacher.settings.cache.path).expanduser(), asked(recipe, prepared, teacher)
    number, size, pad = prepared.teachers.index(teacher), recipe.validation.micro_batch_size, prepared.tokenizer.eos_token_id

    def some(_) -> list:
        return sample_teacher_batches(encoded, number, size, pad, device)

    around = functools.partial(measured_transform, some)
    (model,) = load_models([], [(setting, teacher.settings)], prepared.vocab, device, recipe.seed, around_transform=around)[1]
    record_format = make_record_format(teacher.settings.cache, prepared.vocab, model)
    plan = planned(encoded, record_format.bytes)
    provenance = taught.provenance(recipe, teacher, prepared.tokenizer, taught.contents(prepared))
    writer = Writer(folder, record_format, provenance, plan, f"{setting}.cache.path")
    size = f"{len(plan.hash_E):,} examples, {plan.targets_E.sum():,} targets of {record_format.bytes} bytes, {plan.targets_E.sum() * record_format.bytes / 1e6:,.1f} MB"

    def begin() -> bool:
        held.callback(lock_folder(folder, f"{setting}.cache.path").close)
        return writer.begin()

    if on_main_process(accelerator, begin):
        info(f"{folder} is whole: {size}; nothing to do")
        return folder
    mine = writer.left(rank, ranks)
    needs, free = sum(int(plan.targets_E[plan.shards[n]].sum()) for n in mine) * record_format.bytes, shutil.disk_usage(folder).free
    with report_from_any_rank():
        if needs > free:
            raise UserError(
                f"{setting}.cache.path: {folder} needs {needs / 1e6:,.1f} MB and has {free / 1e6:,.1f} MB free; choose another folder or kind"
            )

    def answers(examples: list[int]):
        batch = collate(encoded, examples, prepared.tokenizer.eos_token_id).to(device)
        records = record_format.record(live(batch), batch.labels_N, batch.examples)
        return [one.content_hash for one in batch.examples], [one.num_targets for one in batch.examples], records

    live = LiveTeacher(model)
    batches = {n: dealt(encoded, plan.first_E[plan.shards[n]], recipe.validation.micro_batch_size) for n in mine}
    every = [batch for of_shard in batches.values() for batch in of_shard]
    seconds = time_of(answers, every, encoded.lengths)
    info(f"{folder}: {size}; {len(mine)} of {len(plan.shards)} shards to write here, about {duration(seconds)}")
    with progress(sum(map(len, every))) as shown:
        for n, of_shard in batches.items():
            shard = writer.shard(n)
            for batch in of_shard:
                if stop():
                    raise Stopped(f"stopped by a signal; {folder} is not finished, and the same command goes on with it")
                with report_from_any_rank():
                    shard.put(*answers(batch))
                shown.update(len(batch))
            with report_from_any_rank():
                shard.write()
    accelerator.wait_for_everyone()
    on_main_process(accelerator, writer.finish)
    info(f"{folder} is whole")
    return folder


def read_foreign(recipe: Recipe, prepared: Prepared, todo: list[TeacherSource], file: str, accelerator) -> Path:
    """A teacher cache of answers that came from elsewhere: see `teachers.foreign` for what the file holds."""
    from ..teachers.cache import import_logprobs as foreign
    from ..teachers.cache.shards import Writer

    if len(todo) > 1 or accelerator.num_processes > 1:
        raise UserError("--import: fills the cache of one teacher, in one process; leave the others out")
    (teacher,) = todo
    cache, where = teacher.settings.cache, f"{teacher.setting}.cache"
    if cache.kind not in (None, "topk"):
        raise UserError(f"{where}.kind: found {cache.kind}, and answers from elsewhere are likeliest tokens; use topk, or leave it out")
    encoded, defaults = asked(recipe, prepared, teacher), CACHE_KINDS["topk"]
    record_format = foreign.record_format(prepared.vocab, cache.k or defaults["k"], cache.value_bits or defaults["value_bits"])
    provenance = taught.provenance(recipe, teacher, prepared.tokenizer, taught.contents(prepared)) | {"read from": content_of(file)}
    writer = Writer(Path(cache.path).expanduser(), record_format, provenance, planned(encoded, record_format.bytes), f"{where}.path")
    counts = foreign.write(file, encoded, prepared.tokenizer, writer, progress_bar("reading"))
    notes = {
        "unknown_tokens": "tokens are no single token of the vocabulary, and part of the rest",
        "unknown_targets": "last targets have no answer, and add nothing to the loss",
        "unused": "lines are of rows that have no example",
    }
    info(
        "; ".join(
            [
                f"{writer.folder} is whole: {len(encoded):,} examples",
                *(f"{counts[name]:,} {words}" for name, words in notes.items() if counts.get(name)),
            ]
        )
    )
    return writer.folder


def content_of(file: str) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise UserError(f"--import: {file}: {error.strerror}; name the file of answers") from None


def dealt(encoded: Examples, examples: np.ndarray, size: int) -> list[list[int]]:
    """Batches of examples of similar length."""
    return [examples[batch].tolist() for batch in make_micro_batches(list(range(len(examples))), encoded.lengths[examples], size)]


def time_of(answers: Callable[[list[int]], object], batches: list[list[int]], lengths: np.ndarray) -> float:
    """Seconds for all of them, from one of middle size that is timed after it has warmed up."""
    if not batches:
        return 0.0
    tokens = [int(lengths[batch].sum()) for batch in batches]
    middle = sorted(range(len(batches)), key=tokens.__getitem__)[len(batches) // 2]
    for _ in range(2):
        start = time.monotonic()
        answers(batches[middle])
        seconds = time.monotonic() - start
    return seconds * sum(tokens) / tokens[middle]


def progress(total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc="asking the teacher", unit=" examples", leave=False, disable=None if first_process() else True)
