"""`llmkd roll`: a model answers the prompts of a recipe's training rows; the answers become a data file of `format: tokens`, with the sampled ids."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.fields import as_tuple, with_setting_names
from ..config.recipe import Recipe, Teacher
from ..console import count, first_process, info, several_processes, warn
from ..data.dataset import encode_sources, hold_out, join
from ..data.encoding import template_process
from ..data.encoding.same_tokenizer import refuse_other_tokens
from ..data.encoding.token_rows import vocabulary_hash
from ..data.encoding.tokenizer import load_tokenizer, shared_vocab, student_tokenizer
from ..data.prompt_files import read_prompts
from ..data.prompts import Prompt, decoded, prompts_of
from ..data.reading.sources import Rows, read_sources
from ..errors import Stopped, UserError
from ..model_folder.files import ModelFiles, find, loaded_dtype, rows_of
from ..model_folder.generation import generation_settings, stops_at
from ..model_folder.identity import verify
from ..output.run_folder import refuse_unwritable
from ..rollouts.answer_file import AnswerFile, refuse_foreign
from ..rollouts.batches import by_length
from ..rollouts.sampling import Sampling
from ..teachers.resolve import TeacherSource
from ..teachers.served_models import served_model, server_of
from ..training.rolled_data import learnt_from
from ..training.shutdown import ShutdownRequest
from .sample import finished, refuse_unfit, trained, untrained

if TYPE_CHECKING:
    from ..rollouts.writer import Writer

BATCH = 32  # answers that are generated at a time


@dataclass(frozen=True)
class Source:
    """The model that writes.

    part       student or teacher of the recipe, or model
    setting    the setting that names it, or roll
    settings   how it is loaded
    run        the folder of its run, if it is the student of one
    """

    part: str
    setting: str
    settings: Teacher
    run: Path | None = None


@dataclass(frozen=True)
class Asked:
    """One answer to write: the prompt, its ids as the writer reads it, and the answer's key, 16 hex digits."""

    prompt: Prompt
    ids: np.ndarray
    key: str


def roll(
    writer: str,
    recipe: Recipe,
    to: Path,
    sampling: Sampling,
    samples: int = 1,
    prompts: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
    stop: ShutdownRequest | None = None,
) -> dict[str, Any]:
    """Write the answers that are not in the file `to` yet, and return counts of all answers in it.

    writer    student or teacher (teacher.0, ...) of the recipe, the folder of a run, a model or an adapter, or a hub id
    samples   answers to each prompt
    prompts   a file of prompts, read as for `llmkd sample`, instead of the recipe's training rows
    limit     only the first so many prompts
    stop      a ShutdownRequest that the caller has entered

    UserError for a user's mistake; Stopped after a signal: what is written is kept, and the same call continues.
    """
    if several_processes():
        raise UserError("roll: runs in one process; leave accelerate launch out")
    if recipe.data.streaming and not prompts:
        raise UserError("data.streaming: found true, and roll reads all rows before it writes; set it to false")
    refuse_unwritable(to.parent, "--to")
    refuse_foreign(to, "--to")
    source = source_of(writer, recipe)
    settings = source.settings
    if settings.server and not to.exists():  # otherwise all answers may be in the file, and no server is needed
        served_model(source.setting, settings)
    rows = [] if prompts else read_sources(recipe.data.train, "data.train")
    tokenizer = student_tokenizer(recipe.student)
    files = None if settings.server else _files(source, tokenizer)
    vocab = shared_vocab(tokenizer, {source.setting: rows_of(files.config)} if files else {})
    found, left_out = _prompts(recipe, prompts, rows, tokenizer)
    stops = stops_at(generation_settings(files.config, (files.adapter, files.base), source.setting)) if files else []
    ends = sorted({tokenizer.eos_token_id, *stops}.union(*(prompt.ends for prompt in found)))  # of all prompts, also beyond `limit`
    found = found[:limit]
    refuse_unfit(found, vocab, {source.setting: files} if files else {}, tokenizer)
    weights = TeacherSource(source.setting.removesuffix(".model"), settings, files, None).weights
    depends = _depends_on(source, files, weights, sampling, tokenizer, ends)
    asked = list(_asked(found, samples, depends, source.part == "teacher"))
    about = {"writer": {"part": source.part, "model": settings.label, "weights": weights}, "learnt_from": learnt_from(source.run)}
    file, started = AnswerFile(to, depends, about), time.monotonic()
    entered = contextlib.nullcontext(stop) if stop else ShutdownRequest("finishing this batch; what is written is kept")
    with entered as stop, file.open([one.key for one in asked]):
        there = len(file.written)
        if left := [
            batch for batch in by_length(asked, batch_size, lambda one: len(one.ids)) if any(one.key not in file.written for one in batch)
        ]:
            _write(left, file, source, files, sampling, ends, vocab, tokenizer, len(asked), stop)
        file.complete()
    return _counts(file, source, len(found), samples, left_out, there, recipe.data.max_length, time.monotonic() - started)


def source_of(writer: str, recipe: Recipe) -> Source:
    """The model that writes. UserError if there is none that could."""
    own, named = recipe.student, dict(with_setting_names(recipe.teacher, "teacher"))
    if writer == "student":
        if not own.model:
            raise UserError("roll: the student begins with new random weights, which write nothing of use; name a finished run")
        if own.layers is not None and not isinstance(own.layers, tuple):
            raise UserError(
                f"roll: which layers the student keeps is chosen when it trains ({own.layers.by}); name a finished run, or list them"
            )
        run = Path(own.model).expanduser().parent
        return Source("student", "student.model", untrained(own), run if (run / "recipe.yaml").exists() else None)
    if writer in named or writer == "teacher":
        if not named:
            raise UserError("roll: the recipe names no teacher; give --teacher.model, or name a model's folder")
        if writer not in named:
            raise UserError(f"roll: the recipe has several teachers; name one of them: {', '.join(named)}")
        if named[writer].server:
            if named[writer].of_server("api") != "vllm":
                raise UserError(
                    f"roll: {writer}.api: found {named[writer].api}, and text is written by vLLM servers only; use one, or name a model"
                )
            return Source("teacher", writer, named[writer])
        if named[writer].ema is not None:
            raise UserError(f"roll: {writer} is a moving average of the student, which there is only while it trains; name a finished run")
        if not named[writer].model:
            raise UserError(f"roll: {writer} is a teacher cache, and no model that could write; give {writer}.model")
        return Source("teacher", f"{writer}.model", dataclasses.replace(named[writer], cache=None))
    if (run := Path(writer).expanduser()) and (run / "recipe.yaml").exists():
        of_run, student = finished(run)
        return Source("student", "roll", trained(student, of_run.student.attention), run)
    if (run / "adapter_config.json").exists():
        return Source("model", "roll", trained(run, own.attention))
    parts = ["student", *(named or ["teacher"])]
    if not run.exists() and "/" not in writer and (near := difflib.get_close_matches(writer, parts, 1, 0.7)):
        raise UserError(f"roll: found {writer}, which is neither a folder nor a part of the recipe; did you mean {near[0]}?")
    return Source("model", "roll", Teacher(model=writer, attention=own.attention))


def _files(source: Source, tokenizer) -> ModelFiles:
    """The writer's files. UserError if they are not complete, or its tokenizer is not the student's."""
    files = find(source.settings.model, source.setting, source.settings.revision, source.settings.base)
    verify(files.base, files.adapter, source.setting)
    folder = files.adapter if files.adapter and (files.adapter / "tokenizer.json").exists() else files.base
    if source.setting != "student.model":
        theirs = load_tokenizer(str(folder), source.setting)
        refuse_other_tokens(tokenizer, theirs, source.setting, "the student's tokenizer", f"{source.settings.model}'s")
    return files


def _prompts(recipe: Recipe, file: Path | None, rows: list[Rows], tokenizer) -> tuple[list[Prompt], int]:
    """The prompts, and the number of examples without one: those with no supervised token within data.max_length."""
    data = dataclasses.replace(recipe.data, train_on_input=False)
    if file:
        return read_prompts(file, as_tuple(data.train), data, tokenizer), 0
    if data.too_long != "split":  # the end of the data's own answer does not matter
        data = dataclasses.replace(data, too_long="truncate")
    parts = encode_sources(rows, data.train, "data.train", data, tokenizer)
    template_process.close()
    whole, _ = hold_out(join("train", parts), data.validation_fraction)
    return prompts_of(whole.examples, whole.places, tokenizer), sum(part.examples.counts["unsupervised"] for part in parts)


def _depends_on(source: Source, files: ModelFiles | None, weights: dict, sampling: Sampling, tokenizer, ends: list[int]) -> dict[str, Any]:
    """Everything that an answer depends on apart from its prompt, as values of JSON."""
    one = source.settings
    return {
        "the writer's base": weights["base"],
        "the writer's adapter": weights["adapter"],
        "dtype": loaded_dtype(files.config, one.dtype) if files else None,
        "quantization": one.quantization and one.quantization.type,
        "merge_adapter": one.merge_adapter,
        "the tokenizer": vocabulary_hash(tokenizer),
        "end tokens": ends,
        **dataclasses.asdict(sampling),
    }


def _asked(prompts: Sequence[Prompt], samples: int, depends: dict[str, Any], by_teacher: bool) -> Iterator[Asked]:
    """Every answer to write. Equal prompts get different keys, and so different samples."""
    before: Counter = Counter()
    settings = json.dumps(depends, sort_keys=True).encode()
    for prompt in prompts:
        ids = prompt.teacher_ids if by_teacher else prompt.ids
        same = prompt.ids.astype(np.int32).tobytes() + b"|" + ids.astype(np.int32).tobytes()
        for _ in range(samples):
            number, before[same] = before[same], before[same] + 1
            yield Asked(prompt, ids, hashlib.blake2b(settings + b"|" + same + b"|%d" % number, digest_size=8).hexdigest())


def _write(
    batches: list[list[Asked]],
    file: AnswerFile,
    source: Source,
    files: ModelFiles | None,
    sampling: Sampling,
    ends: list[int],
    vocab: int,
    tokenizer,
    total: int,
    stop: ShutdownRequest,
) -> None:
    """Write the missing answers of the batches. Whole batches are computed, so that each answer is the same as without an interruption."""
    from tqdm import tqdm

    writer = _writer(source, files, set(ends), vocab, max(map(len, batches)), stop)
    named = vocabulary_hash(tokenizer)
    bar = {"desc": f"{source.part} writes", "unit": " answers", "leave": False, "disable": None if first_process() else True}
    with tqdm(total=total, initial=len(file.written), **bar) as shown:
        for batch in batches:
            if stop():
                raise Stopped(f"stopped by a signal; {file.path} has {len(file.written)} of {total} answers, and the same command goes on")
            found = writer.write([one.ids for one in batch], [int(one.key, 16) for one in batch], sampling)
            rows = [_row(one, answer, named, tokenizer) for one, answer in zip(batch, found, strict=True) if one.key not in file.written]
            file.add(rows)
            shown.update(len(rows))


def _writer(source: Source, files: ModelFiles | None, ends: set[int], vocab: int, batch_size: int, stop: ShutdownRequest) -> "Writer":
    """The writer: a model loaded into this process, or a server."""
    if files is None:
        from ..rollouts.server_writer import ServerWriter

        one, server = source.settings, server_of(source.settings, source.setting)
        return ServerWriter(server, served_model(source.setting, one), source.setting, ends, vocab, one.of_server("requests"), stop)
    from ..models.load import LoadContext, load_teacher
    from ..rollouts.writer import LocalWriter
    from ..training.launch import start

    model = load_teacher(source.settings, LoadContext(vocab, start().device), source.setting.removesuffix(".model"), files)
    return LocalWriter(model, ends, batch_size)


def _row(asked: Asked, answer, named: str, tokenizer) -> dict[str, Any]:
    """A row of `format: tokens`, with the text added for people."""
    before, own = asked.prompt.ids.tolist(), list(answer.ids)
    return {
        "prompt": decoded(before, tokenizer),
        "answer": decoded(own[: len(own) - answer.finished], tokenizer),
        "finished": answer.finished,
        "input_ids": [*before, *own],
        "loss_mask": [0] * len(before) + [1] * len(own),
        "tokenizer": named,
        "key": asked.key,
    }


def _counts(
    file: AnswerFile, source: Source, prompts: int, samples: int, left_out: int, there: int, max_length: int, seconds: float
) -> dict[str, Any]:
    answers = list(file.written.values())
    finished, tokens = sum(one.finished for one in answers), sum(one.tokens for one in answers)
    found = {
        "file": str(file.path),
        "writer": source.settings.label,
        "prompts": prompts,
        "samples": samples,
        "answers": len(answers),
        "new": len(answers) - there,
        "finished": finished,
        "cut_off": len(answers) - finished,
        "empty": sum(one.finished and one.tokens == 1 for one in answers),
        "too_long": sum(one.length > max_length for one in answers),
        "without_prompt": left_out,
        "mean_tokens": tokens / max(1, len(answers)),
        "seconds": seconds,
    }
    report(found, max_length)
    return found


def report(found: dict[str, Any], max_length: int) -> None:
    """Print one line on what was written, and a note or warning on each thing that may be unintended."""
    info(
        f"{found['file']}: {count(found['answers'], 'answer')} to {count(found['prompts'], 'prompt')} by {found['writer']}, {found['new']:,} of them new, "
        f"{found['mean_tokens']:.1f} tokens on average; {found['finished']:,} ended by themselves, {found['cut_off']:,} were cut off, "
        f"{found['empty']:,} are empty"
    )
    if found["without_prompt"]:
        fix = "have no answer to begin at, or a prompt that fills data.max_length; prompts alone are read by --prompts"
        warn(f"note: {count(found['without_prompt'], 'example')} left out: they {fix}")
    if found["too_long"]:
        warn(
            f"note: {count(found['too_long'], 'answer')} with the prompt longer than data.max_length ({max_length}): data.too_long decides what becomes of them"
        )
    if found["answers"] and 2 * found["cut_off"] > found["answers"]:
        fix = "raise --max_new_tokens, or fine-tune the writer on answers first; where: {finished: true} trains on the others alone"
        warn(f"warning: {found['cut_off']:,} of {found['answers']:,} answers did not end by themselves; {fix}")
    if found["answers"] and 2 * found["empty"] > found["answers"]:
        warn(f"warning: {found['empty']:,} of {found['answers']:,} answers are empty; look at the prompts in {found['file']}")
