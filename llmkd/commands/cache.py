"""`llmkd cache`: write a teacher's outputs at every target of a recipe's data to a teacher cache, which runs then read.

Several processes can write one cache together, each its own shards. Finished shards are kept, so an attempt that was stopped or killed
is continued by the same command. Size and time are printed before the first shard is written.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.recipe import Recipe
from ..config.sharding import sharded_teacher
from ..console import duration, first_process, info
from ..data.batching import make_micro_batches
from ..data.examples import Examples
from ..errors import Stopped, UserError, on_main_process, report_from_any_rank
from ..output.run_folder import lock_folder
from ..process import heartbeat
from ..teachers import resolve
from ..teachers.resolve import TeacherSource
from ..training.prepare import Prepared
from ..training.shutdown import ShutdownRequest
from .cache_selection import MISSING, select_teachers, shard_plan, teacher_examples


def cache(recipe: Recipe, import_file: str | None = None, stop: ShutdownRequest | None = None) -> list[Path]:
    """Write the caches of all of the recipe's teachers that have one, and return their folders.

    import_file   take the log-probabilities from this file, for the one teacher that has a cache, and run no model
    stop          a ShutdownRequest that the caller has entered

    UserError for a user's mistake; Stopped after a signal. Finished shards are kept.
    """
    from ..training.launch import start
    from .cache_import import import_cache

    prepared, sources = select_teachers(recipe, lambda teacher: teacher.cache, MISSING, import_file)
    if import_file:
        return [import_cache(recipe, prepared, sources, import_file, start())]
    entered = contextlib.nullcontext(stop) if stop else ShutdownRequest("finishing this batch; finished shards are kept")
    with entered as stop, contextlib.ExitStack() as locks:
        accelerator = start()  # after `stop` has been entered: torch's timeout depends on whether the processes watch one another
        return [write(recipe, prepared, source, accelerator, stop, locks) for source in sources]


def write(
    recipe: Recipe, prepared: Prepared, source: TeacherSource, accelerator, stop: ShutdownRequest, locks: contextlib.ExitStack
) -> Path:
    """Write one teacher's cache and return its folder. The folder stays locked until `locks` is closed."""
    from ..teachers.cache.shards import Writer

    folder, setting = Path(source.settings.cache.path).expanduser(), f"{source.setting}.cache.path"
    heartbeat.at(f"the writing of {folder}", patient=True)
    examples = teacher_examples(prepared, source, recipe.data.validation_fraction)
    load = _open_server if source.settings.server else _load_recorder
    recorder = load(recipe, prepared, source, examples, accelerator, stop)
    provenance = resolve.provenance(recipe.data, source, prepared.processor.provenance, resolve.data_hashes(prepared))
    plan = shard_plan(examples, recorder.format.bytes)
    writer = Writer(folder, recorder.format, provenance, plan, setting)
    targets, width = int(plan.targets_E.sum()), recorder.format.bytes
    size = f"{len(plan.hash_E):,} examples, {targets:,} targets of {width} bytes, {targets * width / 1e6:,.1f} MB"

    def begin() -> bool:
        locks.callback(lock_folder(folder, setting).close)
        return writer.begin()

    if on_main_process(accelerator, begin):
        info(f"{folder} is complete: {size}; nothing to do")
        return folder
    shards = writer.left(accelerator.process_index, accelerator.num_processes)
    check_disk_space(writer, shards)
    batches = {n: batches_of(examples, plan.first_E[plan.shards[n]], recorder.batch_size) for n in shards}
    time_needed = recorder.time_for([batch for of_shard in batches.values() for batch in of_shard])
    info(f"{folder}: {size}; this process writes {len(shards)} of {len(plan.shards)} shards{time_needed}")
    write_shards(writer, batches, recorder, stop)
    accelerator.wait_for_everyone()
    on_main_process(accelerator, writer.finish)
    info(f"{folder} is complete")
    return folder


@dataclass(frozen=True)
class Recorder:
    """Computes the records of a batch of examples with a live teacher."""

    teacher: Callable
    examples: Examples
    format: object  # a `records.RecordFormat`
    device: object
    batch_size: int  # examples

    def time_for(self, batches: list[list[int]]) -> str:
        return f" in about {duration(estimate_seconds(self, batches, self.examples.lengths))}"

    def __call__(self, batch_examples: list[int]) -> tuple[list[str], list[int], np.ndarray]:
        """The examples' content hashes, their numbers of targets, and the records uint8 [targets, bytes]."""
        batch = self.examples.batch(batch_examples).to(self.device)
        records = self.format.record(self.teacher(batch), batch.labels_N, batch.examples)
        return [one.content_hash for one in batch.examples], [one.num_targets for one in batch.examples], records


@dataclass(frozen=True)
class ServerRecorder:
    """Makes the records of a batch of examples from a server's answers."""

    teacher: object  # a `ServedTeacher`
    examples: Examples
    batch_size: int

    @property
    def format(self):
        return self.teacher.format

    def time_for(self, batches: list[list[int]]) -> str:
        return ""  # the time of one request says little about that of many concurrent ones

    def __call__(self, batch_examples: list[int]) -> tuple[list[str], list[int], np.ndarray]:
        """As `Recorder.__call__`."""
        batch = self.examples.batch(batch_examples)
        return [one.content_hash for one in batch.examples], [one.num_targets for one in batch.examples], self.teacher.kept(batch)


def _open_server(
    recipe: Recipe, prepared: Prepared, source: TeacherSource, examples: Examples, accelerator, stop: ShutdownRequest
) -> ServerRecorder:
    from ..teachers.connect import check_served, open_served

    served = open_served(prepared.teachers, "cpu", prepared.vocab, stop)[source.setting]
    on_main_process(accelerator, lambda: check_served(served, prepared.train, prepared.validation, prepared.tokenizer))
    return ServerRecorder(served, examples, 4 * source.settings.of_server("requests"))


def _load_recorder(
    recipe: Recipe, prepared: Prepared, source: TeacherSource, examples: Examples, accelerator, stop: ShutdownRequest
) -> Recorder:
    from ..models.load import LoadContext, load_models
    from ..teachers.cache.records import make_record_format
    from ..teachers.fidelity import measured_transform, sample_teacher_batches
    from ..teachers.live import LiveTeacher
    from ..training.model_watch import ModelWatch

    device = accelerator.device
    number, size = prepared.teachers.index(source), recipe.validation.micro_batch_size

    def probe(setting: str) -> list:
        return sample_teacher_batches(examples, number, size, device)

    if sharded_teacher(recipe.train, source.settings) and accelerator.num_processes > 1:
        info(f"{source.setting}: is not sharded to write a cache; each of {accelerator.num_processes} processes holds all of it")
    around = functools.partial(measured_transform, probe)
    context = LoadContext(prepared.vocab, device, recipe.seed, around_transform=around, kind=prepared.kind)
    _, (model,) = load_models([], [(source.setting, source.settings)], context)
    with report_from_any_rank():
        ModelWatch(prepared)  # refuses files that changed while they were loaded: the cache records their hashes
    record_format = make_record_format(source.settings.cache, prepared.vocab, model)
    return Recorder(LiveTeacher(model, setting=source.setting), examples, record_format, device, size)


def check_disk_space(writer, shards: list[int]) -> None:
    """UserError if this process's shards do not fit on the disk."""
    plan = writer.plan
    needed = sum(int(plan.targets_E[plan.shards[n]].sum()) for n in shards) * writer.format.bytes
    free = shutil.disk_usage(writer.folder).free
    with report_from_any_rank():
        if needed > free:
            raise UserError(
                f"{writer.setting}: {writer.folder} needs {needed / 1e6:,.1f} MB and has {free / 1e6:,.1f} MB free; "
                "choose another folder or kind"
            )


def write_shards(writer, batches: dict[int, list[list[int]]], recorder: Recorder, stop: Callable[[], bool]) -> None:
    """Compute and write the shards. `batches`: of each shard, by its number, the examples of each batch. Stopped once `stop()` is true."""
    with _progress(sum(len(batch) for of_shard in batches.values() for batch in of_shard)) as shown:
        for n, of_shard in batches.items():
            shard = writer.shard(n)
            for batch in of_shard:
                if stop():
                    raise Stopped(f"stopped by a signal; {writer.folder} is not complete, and the same command continues it")
                heartbeat.going_on()
                with report_from_any_rank():
                    shard.put(*recorder(batch))
                shown.update(len(batch))
            with report_from_any_rank():
                shard.write()


def batches_of(examples: Examples, chosen: np.ndarray, size: int) -> list[list[int]]:
    """The examples `chosen` in batches of at most `size`, each of examples of similar length."""
    return [chosen[batch].tolist() for batch in make_micro_batches(list(range(len(chosen))), examples.lengths[chosen], size)]


def estimate_seconds(recorder: Callable[[list[int]], object], batches: list[list[int]], lengths: np.ndarray) -> float:
    """Seconds for all batches, extrapolated from the batch of median size: the second of two runs of it is timed."""
    if not batches:
        return 0.0
    tokens = [int(lengths[batch].sum()) for batch in batches]
    middle = sorted(range(len(batches)), key=tokens.__getitem__)[len(batches) // 2]
    for _ in range(2):
        start = time.monotonic()
        recorder(batches[middle])
        seconds = time.monotonic() - start
    return seconds * sum(tokens) / tokens[middle]


def _progress(total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc="running the teacher", unit=" examples", leave=False, disable=None if first_process() else True)
