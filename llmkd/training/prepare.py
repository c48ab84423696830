"""Everything that is read and checked before a model is loaded: rows, tokenizers, model folders."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import as_tuple, with_setting_names
from ..config.recipe import Recipe, distils
from ..console import info
from ..data.batching import MOST_TOKENS, TokenBudget
from ..data.dataset import (
    Questions,
    encode_choices,
    encode_sources,
    hold_out,
    read_data,
    refuse_empty_sources,
    refuse_too_few_positions,
    refuse_unknown_tokens,
    report_examples,
    teacher_index,
)
from ..data.encoding import token_cache
from ..data.encoding.tokenizer import load_tokenizer, shared_vocab, tokenizer_differences
from ..data.examples import Examples
from ..data.reading.sources import Rows
from ..data.stream import Stream
from ..errors import UserError
from ..model_files import ModelFiles, find, identity_of, rows_of
from ..teachers.resolve import TeacherSource, check_cache, check_coverage, provenance, resolve_teachers


@dataclass(frozen=True)
class Prepared:
    """Everything that is read and checked before a model is loaded."""

    tokenizer: object
    vocab: int  # entries that the tokenizer and all models have
    train: Examples | Stream
    places: Sequence[str] | Stream  # of each training example
    validation: Examples | None
    validation_places: Sequence[str]
    questions: Questions | None
    identity: dict[str, str]
    origins: dict[str, list[dict]]  # of each setting (data.train, ...) its sources: path, name, split, resolved revision, rows
    student: ModelFiles | None  # None for new weights
    teachers: tuple[TeacherSource, ...]

    def of(self, recipe: Recipe) -> "Prepared":
        """The same for a recipe that differs in its student, and perhaps learns without the teacher that others have."""
        student, teachers = student_files(recipe), self.teachers if distils(recipe) else ()
        identity = self.identity | identity_of("the student's base", "student.model", student)
        if not teachers:
            identity.pop("the teacher", None)
        return dataclasses.replace(self, student=student, teachers=teachers, identity=identity)


def prepare(recipe: Recipe, open_caches: bool = True) -> Prepared:
    """Read and check data, tokenizers, model folders and caches of teachers' answers. No weights are loaded.

    Without `open_caches` these are left alone, being yet to be written.
    """
    check_packages(recipe)
    data = recipe.data
    rows = read_data(data)
    student = student_files(recipe)
    taught = resolve_teachers(recipe, open_caches)
    configs = {"student.model": student.config if student else recipe.student.architecture}
    configs |= {f"{teacher.setting}.model": teacher.files.config for teacher in taught if teacher.files}
    refuse_too_few_positions(data, configs)

    tokenizer = _tokenizer(recipe, student)
    for teacher in taught:
        if teacher.files:
            _same_tokenizer(tokenizer, teacher)
    rows_known = {setting: rows_of(config) for setting, config in configs.items()}
    rows_known |= {f"{teacher.setting}.cache.path": teacher.cache.header["vocab"] for teacher in taught if teacher.cache}
    vocab = shared_vocab(tokenizer, rows_known)
    for teacher in taught:
        if teacher.cache:
            check_cache(recipe, teacher, tokenizer, vocab)
    held_out = encode_sources(rows, "data.validation", data, tokenizer, as_tuple(recipe.teacher))
    train, places = _training(recipe, rows, tokenizer)
    refuse_unknown_tokens(vocab, train, places, tokenizer)
    held_out_places = [place for read in rows.get("data.validation", ()) for place in read.places]
    if isinstance(train, Examples):
        if data.validation_fraction:
            report_examples(train, "rows to part")
            train, held_out = hold_out(train, data.validation_fraction)
            held_out_places = places
        refuse_empty_sources(train, data)
        report_examples(train, "train")
        places = [places[i] for i in train.row]
    if held_out:
        report_examples(held_out, "validation")
        if not data.validation_fraction:
            refuse_unknown_tokens(vocab, held_out, held_out_places, tokenizer)
    content = train.content if isinstance(train, Stream) else "\n".join(source.content for source in rows["data.train"])
    identity = {"the training data": content, "the held-out data": " ".join(source.content for source in rows["data.validation"])}
    held_out_places = [held_out_places[i] for i in held_out.row] if held_out else []
    for number, teacher in enumerate(taught):
        if teacher.cache:
            parts = {"data.train": (train, places), "the held-out rows": (held_out, held_out_places)}
            check_coverage(teacher, number, parts, provenance(recipe, teacher, tokenizer, identity))
    identity |= {"the tokenizer": token_cache.tokenizer_hash(tokenizer)} | identity_of("the student's base", "student.model", student)
    identity |= {"the teacher": " ".join(teacher.identity for teacher in taught)} if taught else {}
    questions = encode_choices(rows["data.choices"][0], data.choices, data, tokenizer) if data.choices else None
    origins = {setting: [source.origin for source in read] for setting, read in rows.items()}
    if isinstance(train, Stream):
        origins["data.train"] = [train.origin]
    return Prepared(tokenizer, vocab, train, places, held_out, held_out_places, questions, identity, origins, student, taught)


def student_files(recipe: Recipe) -> ModelFiles | None:
    student = recipe.student
    return find(student.model, "student.model", student.revision, student.base) if student.model else None


def _training(recipe: Recipe, rows: dict[str, list[Rows]], tokenizer) -> tuple[Examples | Stream, Sequence[str] | Stream]:
    """The training examples, or a stream of them; and the place of every row."""
    data, train, who = recipe.data, recipe.train, as_tuple(recipe.teacher)
    if not data.streaming:
        return encode_sources(rows, "data.train", data, tokenizer, who), [place for read in rows["data.train"] for place in read.places]
    (source,) = as_tuple(data.train)
    asked = teacher_index(source, who)
    stream = Stream(source, data, tokenizer, recipe.seed, train.batch_size, micro_batch(recipe), train.max_steps, asked)
    info(f"train: streaming {source.path}")
    return stream, stream


def micro_batch(recipe: Recipe) -> int | TokenBudget:
    """How large a micro-batch may be; of `auto` the bound, until it is measured."""
    tokens = recipe.train.micro_batch_tokens
    return TokenBudget(MOST_TOKENS if tokens == "auto" else tokens, recipe.data.packing) if tokens else recipe.train.micro_batch_size


def check_packages(recipe: Recipe) -> None:
    """What a recipe asks for and an installation may lack."""
    wanted = {
        "student.quantization": recipe.student.quantization,
        "optim.name": recipe.optim.name != "adamw",
    } | {f"{setting}.quantization": teacher.loaded_in for setting, teacher in with_setting_names(recipe.teacher, "teacher")}
    lacking = [setting for setting, value in wanted.items() if value and importlib.util.find_spec("bitsandbytes") is None]
    if lacking:
        raise UserError(
            *(f"{setting}: needs bitsandbytes, which is not installed; pip install 'llmkd[quantization]'" for setting in lacking)
        )


def _tokenizer(recipe: Recipe, student: ModelFiles | None):
    if not recipe.student.tokenizer:
        return load_tokenizer(str(student.base), "student.model")
    tokenizer = load_tokenizer(recipe.student.tokenizer, "student.tokenizer")
    if student and (student.base / "tokenizer.json").exists():
        _refuse_differences(
            tokenizer, load_tokenizer(str(student.base), "student.model"), "student.tokenizer", "it", f"{student.base}'s own"
        )
    return tokenizer


def _same_tokenizer(tokenizer, teacher: TeacherSource) -> None:
    files, setting = teacher.files, f"{teacher.setting}.model"
    with_tokenizer = files.adapter if files.adapter and (files.adapter / "tokenizer.json").exists() else files.base
    theirs = load_tokenizer(str(with_tokenizer), setting)
    _refuse_differences(tokenizer, theirs, setting, "the student's tokenizer", f"{teacher.settings.model}'s")


def _refuse_differences(ours, theirs, setting: str, our_name: str, their_name: str) -> None:
    differences = tokenizer_differences(ours, theirs)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise UserError(
            f"{setting}: {our_name} and {their_name} are not the same: {'; '.join(differences[:3])}{more}; token ids must mean the same to all models; "
            "use a teacher and a student of one tokenizer family"
        )
