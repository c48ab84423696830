"""`llmkd cache`: what a teacher says at every target of a recipe's data, asked once and kept in a store.

Any number of processes write it together, each its own shards; a shard that is whole stays, so that an attempt that was stopped or
killed goes on where it was. Size and time are said first.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import taught
from .console import first_process, say
from .cost import duration
from .data.encode import Encoded
from .errors import Stopped, UserError
from .order import deal
from .prepare import Prepared, prepare
from .recipe import Recipe, Teacher
from .stopping import StopRequest
from .taught import TeacherFiles


@dataclass(frozen=True)
class Wanted:
    """The examples that a store is to answer: of each its data set, its number there, who it is and how many targets it has."""

    sets: list[Encoded]
    places: list[tuple[int, int]]
    identities: list[str]
    targets: list[int]

    @staticmethod
    def of(prepared: Prepared, number: int) -> "Wanted":
        """Everything that teacher `number` is asked in a run: training and held-out rows that are not left to others."""
        sets = [one for one in (prepared.train, prepared.validation) if one is not None]
        places = [(s, i) for s, encoded in enumerate(sets) for i in taught.mine_of(encoded, number)]
        identities = [sets[s].identity(i) for s, i in places]
        return Wanted(sets, places, identities, [int(sets[s].example(i)[1].sum()) for s, i in places])

    def length(self, n: int) -> int:
        s, i = self.places[n]
        return int(self.sets[s].lengths[i])


def cache(recipe: Recipe, foreign: str | None = None, stop: StopRequest | None = None) -> list[Path]:
    """Write every store that the recipe's teachers name. Raises UserError, or Stopped when a signal came: what is whole is kept.

    `foreign`: a file of answers that came from elsewhere, for the one teacher that has a store.
    """
    from .training import start

    prepared, todo = chosen(recipe, lambda one: one.cache, foreign)
    accelerator = start()
    with stop or StopRequest("finishing this batch; what is whole is kept") as stop:
        return [write(recipe, prepared, teacher, accelerator, stop) for teacher in todo]


def chosen(recipe: Recipe, which: Callable[[Teacher], object], foreign: str | None = None) -> tuple[Prepared, list[TeacherFiles]]:
    """The recipe's data, and those of its teachers that are meant. Refused before a model is loaded."""
    many = taught.named(recipe.teacher)
    if not any(which(one) for _, one in many):
        raise UserError("teacher.cache.path: not given; name the folder of the store, such as --teacher.cache.path runs/cache")
    for setting, one in many:
        if which(one) and not one.model and not foreign:
            raise UserError(f"{setting}.model: not given; name the teacher whose answers {one.cache.path} is to hold")
    if recipe.data.streaming:
        raise UserError("data.streaming: found true, and a store is of rows that are all known; set it to false")
    if not recipe.loss.kd_ratio:
        raise UserError("loss.kd_ratio: found 0, with which no teacher is asked; leave it out here")
    prepared = prepare(recipe, stores=False)
    return prepared, [one for one in prepared.teachers if which(one.settings)]


def write(recipe: Recipe, prepared: Prepared, teacher: TeacherFiles, accelerator, stop: StopRequest) -> Path:
    """One teacher's store."""
    from .teachers.kinds import kind_to_record
    from .teachers.live import Live
    from .teachers.store import Plan, Writer
    from .together import load_together

    folder, device = Path(teacher.settings.cache.path).expanduser(), accelerator.device
    wanted = Wanted.of(prepared, prepared.teachers.index(teacher))
    (model,) = load_together([], [(teacher.setting, teacher.settings)], prepared.vocab, device, recipe.seed)[1]
    kind = kind_to_record(teacher.settings.cache, prepared.vocab, model)
    plan = Plan.of(wanted.identities, wanted.targets, kind.bytes)
    made_of = taught.made_of(recipe, teacher, prepared.tokenizer, taught.contents(prepared))
    writer = Writer(folder, kind, made_of, plan, f"{teacher.setting}.cache.path")
    whole = first_alone(accelerator, writer.begin)
    if whole:
        say(f"{folder} is whole: {plan.header()['targets']:,} targets; nothing to do")
        return folder
    mine = writer.left(accelerator.process_index, accelerator.num_processes)
    left = sum(int(plan.targets_E[plan.shards[n]].sum()) for n in mine)
    free, needs = shutil.disk_usage(folder).free, left * kind.bytes
    if needs > free:
        raise UserError(
            f"{teacher.setting}.cache.path: {folder} needs {needs / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; choose another folder, or another kind"
        )
    live = Live(model)
    batches = [
        (n, batch) for n in mine for batch in dealt(plan.first_E[plan.shards[n]].tolist(), wanted, recipe.validation.micro_batch_size)
    ]
    seconds = time_of(live, kind, wanted, [batch for _, batch in batches], prepared, device)
    whole_size = plan.header()["targets"] * kind.bytes
    say(
        f"{folder}: {len(plan.identity_E):,} examples, {plan.header()['targets']:,} targets of {kind.bytes} bytes ({whole_size / 1e6:,.1f} MB) in "
        f"{len(plan.shards)} shards; {len(mine)} of them to write here, about {duration(seconds)}"
    )
    with progress(sum(len(batch) for _, batch in batches)) as shown:
        for n in mine:
            shard = writer.shard(n)
            for batch in (batch for k, batch in batches if k == n):
                if stop():
                    raise Stopped(f"stopped by a signal; {folder} is not finished, and the same command goes on with it")
                shard.put(*answers(live, kind, wanted, batch, prepared, device))
                shown.update(len(batch))
            shard.write()
    accelerator.wait_for_everyone()
    first_alone(accelerator, writer.finish)
    say(f"{folder} is whole")
    return folder


def first_alone(accelerator, action):
    """What the first process does while the others wait; all get its answer, or its UserError."""
    found: list = [None, None]
    if accelerator.is_main_process:
        try:
            found = [action(), None]
        except UserError as error:
            found = [None, error.problems]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    if found[1]:
        raise UserError(*found[1])
    return found[0]


def dealt(examples: list[int], wanted: Wanted, size: int) -> Iterator[list[int]]:
    """Batches of one shard's examples, of similar length."""
    import numpy as np

    lengths = np.array([wanted.length(n) for n in examples])
    return ([examples[i] for i in batch] for batch in deal(list(range(len(examples))), lengths, size))


def answers(live, kind, wanted: Wanted, examples: list[int], prepared: Prepared, device):
    """(identities, numbers of targets, records) of some examples, from however many data sets."""
    import numpy as np

    from .data.collate import collate

    found: tuple[list, list, list] = ([], [], [])
    for s, encoded in enumerate(wanted.sets):
        mine = [wanted.places[n][1] for n in examples if wanted.places[n][0] == s]
        if mine:
            batch = collate(encoded, mine, prepared.tokenizer.eos_token_id).to(device)
            found[0].extend(one.identity for one in batch.examples)
            found[1].extend(one.targets for one in batch.examples)
            found[2].append(kind.record(live(batch), batch.labels_N, batch.examples))
    return found[0], found[1], np.concatenate(found[2])


def time_of(live, kind, wanted: Wanted, batches: list[list[int]], prepared: Prepared, device) -> float:
    """Seconds for all of them, from one of middle size that is timed after another has warmed up."""
    if not batches:
        return 0.0
    tokens = [sum(wanted.length(n) for n in batch) for batch in batches]
    middle = sorted(range(len(batches)), key=tokens.__getitem__)[len(batches) // 2]
    for _ in range(2):
        start = time.monotonic()
        answers(live, kind, wanted, batches[middle], prepared, device)
        seconds = time.monotonic() - start
    return seconds * sum(tokens) / tokens[middle]


def progress(total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc="asking the teacher", unit=" examples", leave=False, disable=None if first_process() else True)
