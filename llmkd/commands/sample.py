"""`llmkd sample`: answers of the teacher, the student before training and the student after training to the same prompts."""

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import as_tuple, with_setting_names
from ..config.loader import load_recipe
from ..config.recipe import Data, Recipe, Student, Teacher
from ..console import info, progress_bar, several_processes
from ..data.dataset import Dataset, encode_sources, hold_out, join
from ..data.encoding.tokenizer import load_tokenizer, shared_vocab
from ..data.prompt_files import read_prompts
from ..data.prompts import Prompt, decoded, held_out_prompts
from ..data.reading.sources import read_sources
from ..errors import UserError
from ..model_folder.files import ModelFiles, find, positions, rows_of, student_folder
from ..model_folder.identity import identity_of, verify
from ..model_folder.layers import layer_words
from ..output.run_files import IDENTITY, read_identity, recorded_layers
from ..training.prepare import student_files

MODELS = ("teacher", "before", "after")
COUNT = 8  # default number of held-out rows


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt. `finished`: it ended with an end token, and was not cut off."""

    text: str
    tokens: int  # the end token included
    finished: bool


@dataclass(frozen=True)
class Asked:
    """A prompt and the models' answers to it, by name. `teacher_prompt`: the teacher's prompt, if it differs. `reference`: the data's answer."""

    place: str
    prompt: str
    teacher_prompt: str | None
    reference: str | None
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Samples:
    """All answers. `models`: the folder or hub id of each, by name; `sampling`: temperature, max_new_tokens and seed."""

    run: str
    sampling: dict[str, Any]
    models: dict[str, str]
    asked: list[Asked]

    def summary(self) -> list[dict[str, Any]]:
        """A row for each model: the mean length of its answers, and how many of them ended by themselves."""
        answers = {name: [one.answers[name] for one in self.asked] for name in self.models}
        return [
            {
                "model": name,
                "answers": len(of_model),
                "mean tokens": sum(one.tokens for one in of_model) / len(of_model),
                "ended by themselves": sum(one.finished for one in of_model),
                "from": self.models[name],
            }
            for name, of_model in answers.items()
        ]


def sample(
    run: Path,
    prompts: Path | None = None,
    count: int | None = None,
    models: tuple[str, ...] = MODELS,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 8,
) -> Samples:
    """Let the models of a finished run answer prompts. One model is in memory at a time.

    prompts   a file of prompts; None: held-out rows of the run's data, with their answers as reference
    count     the first so many prompts of the file (default all), or so many held-out rows (default 8), the same ones every time
    models    some of MODELS
    """
    if several_processes():
        raise UserError("sample: runs in one process; leave accelerate launch out")
    recipe, student = finished(run)
    wanted = dict(models_to_ask(recipe, student, models))
    files = {name: _files(name, *one) for name, one in wanted.items()}
    tokenizer = load_tokenizer(str(student), "sample")
    data = dataclasses.replace(recipe.data, train_on_input=False)
    found = read_prompts(prompts, as_tuple(data.train), data, tokenizer)[:count] if prompts else _held_out(run, data, tokenizer, count)
    vocab = shared_vocab(tokenizer, {name: rows_of(one.config) for name, one in files.items()})
    refuse_unfit(found, vocab, files, tokenizer)

    from ..rollouts.sampling import Sampling

    sampling = Sampling(temperature, max_new_tokens, seed)
    answers: dict[str, list[Answer]] = {}
    for name, (setting, settings) in wanted.items():
        verify(files[name].base, files[name].adapter, setting)
        _refuse_changed(run, name, setting, files[name])
        answers[name] = _answers(name, setting, settings, files[name], found, sampling, vocab, tokenizer, batch_size)
    asked = [
        Asked(
            one.place,
            decoded(one.ids, tokenizer),
            decoded(one.teacher_ids, tokenizer) if len(one.teacher_ids) != len(one.ids) else None,
            one.reference,
            {name: answers[name][i] for name in wanted},
        )
        for i, one in enumerate(found)
    ]
    return Samples(
        str(run), {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}, described(recipe.student, wanted), asked
    )


def finished(run: Path) -> tuple[Recipe, Path]:
    """The recipe of a finished run, and the folder of its student."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run's output_dir")
    student = student_folder(run)
    if not (run / "recipe.yaml").exists():
        raise UserError(f"{run}: holds no recipe.yaml, so its teacher and its data are not known; name a run's output_dir")
    recipe = load_recipe(run / "recipe.yaml")
    if recipe.student.layers is not None:  # their numbers, also if a measurement chose them
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, layers=recorded_layers(run)))
    return recipe, student


def models_to_ask(recipe: Recipe, student: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, Teacher]]]:
    """(name, (the setting that names it, how it is loaded)) of each model to ask. Prints a line for each that is left out, and why."""
    own = recipe.student
    for setting, teacher in with_setting_names(recipe.teacher, "teacher") if "teacher" in wanted else ():
        if teacher.model_path and teacher.ema is None:
            yield setting, (f"{setting}.model", dataclasses.replace(teacher, cache=None))
        else:
            what = "on a server" if teacher.server else "a moving average of the student" if teacher.ema is not None else "a teacher cache"
            info(f"{setting}: is {what}, not a model that can be loaded; left out")
    if "teacher" in wanted and recipe.teacher is None:
        info("the run had no teacher; left out")
    if "before" in wanted and own.model:
        yield "before", ("student.model", untrained(own))
    elif "before" in wanted:
        info("the student began with new random weights; before is left out")
    if "after" in wanted:
        yield "after", ("sample", trained(student, own.attention))


def described(own: Student, wanted: dict[str, tuple[str, Teacher]]) -> dict[str, str]:
    """The folder or hub id of each model, by name; for a student of some layers, the layers and the model that they were taken from."""
    named = {name: settings.model for name, (_, settings) in wanted.items()}
    cut = {"before": f"{layer_words(own.layers)} of {own.model}"} if "before" in named and own.layers is not None else {}
    return named | cut


def untrained(own: Student) -> Teacher:
    """How a recipe's student is loaded as it is before training. `own.layers` must be numbers or None."""
    return Teacher(
        model=own.model if own.layers is None else str(student_files(own).base),
        revision=own.revision if own.layers is None else None,
        base=own.base,
        quantization=own.quantization,
        dtype=own.dtype,
        attention=own.attention,
    )


def trained(student: Path, attention: str) -> Teacher:
    """How the finished student in a folder is loaded."""
    from ..models.saved_student import as_trained

    is_adapter = (student / "adapter_config.json").exists()
    return dataclasses.replace(as_trained(student) if is_adapter else Teacher(model=str(student)), attention=attention)


def _files(name: str, setting: str, settings: Teacher) -> ModelFiles:
    try:
        return find(settings.model, setting, settings.revision, settings.base)
    except UserError as error:
        others = ",".join(one for one in MODELS if one != name.partition(".")[0])
        raise UserError(*error.problems, f"sample: {name} is not here; --models {others} leaves it out") from None


def _refuse_changed(run: Path, name: str, setting: str, files: ModelFiles) -> None:
    """UserError if a file of the teacher, or of the student before training, has changed since the run was started."""
    what = f"the {'student' if name == 'before' else name}'s"
    known = read_identity(run) if (run / IDENTITY).exists() and name != "after" else {}
    known = {file: value for file, value in known.items() if file.startswith((f"{what} base (", f"{what} adapter ("))}
    if not known:  # a run of an earlier version, or a teacher that was read from a cache
        return
    now = identity_of(what.removesuffix("'s"), setting, files.base, files.adapter)
    for file in (*now, *known):
        if known.get(file) != now.get(file):
            others = ",".join(one for one in MODELS if one != name.partition(".")[0])
            raise UserError(
                f"sample: {file} {'has changed' if file in now else 'is gone'} since the run in {run} was started; restore what it was, or leave "
                f"it out by --models {others}"
            )


def _held_out(run: Path, data: Data, tokenizer, count: int | None) -> list[Prompt]:
    """The prompts of `count` held-out rows of the run."""
    held_out = _validation(run, data, tokenizer)
    if held_out is None:
        raise UserError(
            f"{run}: its recipe has no held-out rows (data.validation, data.validation_fraction); give a file of prompts by --prompts"
        )
    return held_out_prompts(held_out.examples, held_out.places, count or COUNT, tokenizer)


def _validation(run: Path, data: Data, tokenizer) -> Dataset | None:
    of_train = not as_tuple(data.validation)
    setting, sources = ("data.train", data.train) if of_train else ("data.validation", data.validation)
    if of_train and not data.validation_fraction:
        return None
    try:
        rows = read_sources(sources, setting)
    except UserError as error:
        raise UserError(*error.problems, f"{run}: its held-out rows cannot be read; give a file of prompts by --prompts") from None
    whole = join(setting, encode_sources(rows, sources, setting, data, tokenizer))
    return hold_out(whole, data.validation_fraction)[1] if of_train else whole


def refuse_unfit(prompts: list[Prompt], vocab: int, files: dict[str, ModelFiles], tokenizer) -> None:
    """UserError if a prompt leaves a model no position for an answer, or has a token without a row in a model's embeddings."""
    problems = []
    for prompt in prompts:
        longest = max(len(prompt.ids), len(prompt.teacher_ids))
        for name, one in files.items():
            most = positions(one.config)
            if most and longest >= most:
                problems.append(f"{prompt.place}: the prompt has {longest} tokens, and {name} {most} positions; shorten it")
                break
        highest = int(max(prompt.ids.max(), prompt.teacher_ids.max()))
        if highest >= vocab:
            token = tokenizer.convert_ids_to_tokens(highest)
            problems.append(f"{prompt.place}: contains the token {token!r}, for which a model has no row; remove it from the text")
    if problems:
        raise UserError(*problems)


def _answers(name, setting, settings, files, prompts, sampling, vocab, tokenizer, batch_size) -> list[Answer]:
    """A model's answers. The model is loaded here and freed again."""
    import torch

    from ..models.load import LoadContext, load_teacher
    from ..rollouts.generate import generate, stops_of
    from ..training.launch import start

    model = load_teacher(settings, LoadContext(vocab, start().device), setting.removesuffix(".model"), files)
    ends = {tokenizer.eos_token_id, *stops_of(model)}.union(*(prompt.ends for prompt in prompts))
    ids = [prompt.ids if name in ("before", "after") else prompt.teacher_ids for prompt in prompts]
    found = generate(model, ids, sampling, ends, batch_size, progress_bar(name))
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [Answer(decoded(one.ids[: len(one.ids) - one.finished], tokenizer), len(one.ids), one.finished) for one in found]
