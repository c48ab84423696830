"""Everything that is read and checked before a model is loaded: rows, tokenizers, model folders."""

import dataclasses
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .console import say
from .data import token_cache
from .data.encode import EVERYONE, Encoded, merge
from .data.formats import with_answer
from .data.sources import Rows, named, read_sources
from .data.stream import Stream
from .data.tokenizer import load_tokenizer, shared_vocab, tokenizer_differences, vocab_size
from .errors import UserError
from .model_files import ModelFiles, find, fingerprint
from .order import MOST_TOKENS, Budget, draws
from .recipe import Data, Recipe, Source, Teacher, distils, sources, teachers
from .recipe_teacher import named as named_teachers
from .taught import TeacherFiles, check_examples, check_store, find_teachers, made_of


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
    vocab: int  # entries that the tokenizer and all models have
    train: Encoded | Stream
    places: Sequence[str] | Stream  # of each training example
    validation: Encoded | None
    validation_places: Sequence[str]
    questions: Questions | None
    identity: dict[str, str]
    origins: dict[str, list[dict]]  # of each setting (data.train, ...) its sources: path, name, split, resolved revision, rows
    student: ModelFiles | None  # None for new weights
    teachers: tuple[TeacherFiles, ...]

    def of(self, recipe: Recipe) -> "Prepared":
        """The same for a recipe that differs in its student, and perhaps learns without the teacher that others have."""
        student, teachers = student_files(recipe), self.teachers if distils(recipe) else ()
        identity = self.identity | identity_of("the student's base", "student.model", student)
        if not teachers:
            identity.pop("the teacher", None)
        return dataclasses.replace(self, student=student, teachers=teachers, identity=identity)


def prepare(recipe: Recipe, stores: bool = True) -> Prepared:
    """Read and check data, tokenizers, model folders and stores of teachers' answers. No weights are loaded.

    Without `stores` these are left alone, being yet to be written.
    """
    check_packages(recipe)
    data = recipe.data
    rows = read_data(data)
    student = student_files(recipe)
    taught = find_teachers(recipe, stores)
    configs = {"student.model": student.config if student else recipe.student.architecture}
    configs |= {f"{teacher.setting}.model": teacher.files.config for teacher in taught if teacher.files}
    refuse_too_long(data, configs)

    tokenizer = _tokenizer(recipe, student)
    for teacher in taught:
        if teacher.files:
            _same_tokenizer(tokenizer, teacher)
    rows_known = {setting: rows_of(config) for setting, config in configs.items()}
    rows_known |= {f"{teacher.setting}.cache.path": teacher.store.header["vocab"] for teacher in taught if teacher.store}
    vocab = shared_vocab(tokenizer, rows_known)
    for teacher in taught:
        if teacher.store:
            check_store(recipe, teacher, tokenizer, vocab)
    held_out = encode_sources(rows, "data.validation", data, tokenizer, teachers(recipe.teacher))
    train, places = _training(recipe, rows, tokenizer)
    refuse_beyond(vocab, train, places, tokenizer)
    held_out_places = [place for read in rows.get("data.validation", ()) for place in read.places]
    if isinstance(train, Encoded):
        if data.validation_share:
            report(train, "rows to part")
            train, held_out = hold_out(train, data.validation_share)
            held_out_places = places
        refuse_no_draws(train, data)
        report(train, "train")
        places = [places[i] for i in train.row]
    if held_out:
        report(held_out, "validation")
        if not data.validation_share:
            refuse_beyond(vocab, held_out, held_out_places, tokenizer)
    content = train.content if isinstance(train, Stream) else "\n".join(source.content for source in rows["data.train"])
    identity = {"the training data": content, "the held-out data": " ".join(source.content for source in rows["data.validation"])}
    held_out_places = [held_out_places[i] for i in held_out.row] if held_out else []
    for number, teacher in enumerate(taught):
        if teacher.store:
            parts = {"data.train": (train, places), "the held-out rows": (held_out, held_out_places)}
            check_examples(teacher, number, parts, made_of(recipe, teacher, tokenizer, identity))
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


def identity_of(name: str, setting: str, files: ModelFiles | None) -> dict[str, str]:
    """{name: fingerprints of a model's weights}; empty where there is no such model."""
    return {name: " ".join(fingerprint(folder, setting) for folder in (files.base, files.adapter) if folder)} if files else {}


def read_data(data: Data) -> dict[str, list[Rows]]:
    """The rows of every setting that names any, all of them checked; but those of a stream are read when they are trained on."""
    wanted = {"data.train": None if data.streaming else data.train, "data.validation": data.validation, "data.choices": data.choices}
    out, problems = {}, []
    for setting, value in wanted.items():
        try:
            out[setting] = read_sources(value, setting, choices=setting == "data.choices")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    _warn_of_shared(out, data)
    return out


def _warn_of_shared(rows: dict[str, list[Rows]], data: Data) -> None:
    """Rows that are trained on say little when they are measured on as well."""

    def read(setting: str, value) -> list[tuple[str, str, str]]:
        of_setting = zip(named(value, setting), rows[setting], strict=False)  # a stream's rows are not read yet
        return [(name, source.path, one.content.partition(" [")[0]) for (name, source), one in of_setting]  # whatever its limit

    train, held_out = read("data.train", data.train), read("data.validation", data.validation)
    pairs = [(a, b) for a in held_out for b in train]
    if data.validation_share:
        pairs += [(b, a) for i, a in enumerate(train) for b in train[i + 1 :]]
    for (name, path, content), (other, _, others) in pairs:
        if content == others:
            say(
                f"warning: {name} and {other} are read from the same data ({path}), so held-out figures would be of rows that are trained on"
            )


def encode_sources(
    rows: dict[str, list[Rows]], setting: str, data: Data, tokenizer, teachers: tuple[Teacher, ...] = (), said=say
) -> Encoded | None:
    """A setting's examples, from all its sources; where there are several, each is reported."""
    parts = []
    of_setting = named(data.train if setting == "data.train" else data.validation, setting)
    for (name, source), read in zip(of_setting, rows[setting], strict=True):
        parts.append(token_cache.encoded(read, source, data, tokenizer, name, said))
        parts[-1].taught_by[:] = taught_by(source, teachers)
        read.origin["used"] = len(set(parts[-1].row.tolist()))
        if len(of_setting) > 1 and said:
            report(parts[-1], f"{name} ({source.path})")
    return merge(parts) if parts else None


def taught_by(source: Source, teachers: tuple[Teacher, ...]) -> int:
    """The number of the teacher that a source's rows are left to, or EVERYONE."""
    if source.teacher is None or len(teachers) < 2:
        return EVERYONE
    return [teacher.name for teacher in teachers].index(source.teacher)


def _training(recipe: Recipe, rows: dict[str, list[Rows]], tokenizer) -> tuple[Encoded | Stream, Sequence[str] | Stream]:
    """The training examples, or a stream of them; and the place of every row."""
    data, train, who = recipe.data, recipe.train, teachers(recipe.teacher)
    if not data.streaming:
        return encode_sources(rows, "data.train", data, tokenizer, who), [place for read in rows["data.train"] for place in read.places]
    (source,) = sources(data.train)
    asked = taught_by(source, who)
    stream = Stream(source, data, tokenizer, recipe.seed, train.batch_size, micro_batch(recipe), train.max_steps, asked)
    say(f"train: streaming {source.path}")
    return stream, stream


def micro_batch(recipe: Recipe) -> int | Budget:
    """How large a micro-batch may be; of `auto` the bound, until it is measured."""
    tokens = recipe.train.micro_batch_tokens
    return Budget(MOST_TOKENS if tokens == "auto" else tokens, recipe.data.packing) if tokens else recipe.train.micro_batch_size


def refuse_no_draws(train: Encoded, data: Data) -> None:
    """A source whose weight leaves none of its examples in an epoch is a mistake; so is one that is held out as a whole."""
    for i, (setting, source) in enumerate(named(data.train, "data.train")):
        count = int((train.source == i).sum())
        if not count:
            raise UserError(f"{setting}: data.validation_share leaves none of its rows to train on; lower it, or leave the source out")
        if not draws(count, source.weight):
            raise UserError(f"{setting}.weight: {source.weight:g} of {count} examples is none; raise it, or leave the source out")


def check_packages(recipe: Recipe) -> None:
    """What a recipe asks for and an installation may lack."""
    wanted = {
        "student.quantization": recipe.student.quantization,
        "optim.name": recipe.optim.name != "adamw",
    } | {f"{setting}.quantization": teacher.loaded_in for setting, teacher in named_teachers(recipe.teacher)}
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


def _same_tokenizer(tokenizer, teacher: TeacherFiles) -> None:
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


def positions(config: dict) -> int | None:
    """How many positions a model has, by whatever name its family gives the number; None where it has no bound."""
    config = config.get("text_config", config)
    return next((config[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx") if config.get(name)), None)


def refuse_too_long(data: Data, configs: dict[str, dict]) -> None:
    """Examples may not be longer than what a model has positions for; `configs` are those of each setting's model."""
    for setting, config in configs.items():
        longest = positions(config)
        if longest and data.max_length > longest:
            raise UserError(f"data.max_length: found {data.max_length}, and {setting} has {longest} positions; lower it")
        text = config.get("text_config", config)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        short = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if rope.get("rope_type", rope.get("type")) == "longrope" and short and data.max_length > short:
            say(
                f"note: {setting}: its rotary positions (longrope) are others for all of a micro-batch whose longest example exceeds {short} tokens, "
                "so results depend on what stands together; a lower data.max_length, or train.micro_batch_size: 1 without packing, avoids it"
            )


def rows_of(config: dict) -> int | None:
    """How many tokens a model has rows for, as its configuration says."""
    return config.get("text_config", config).get("vocab_size")


def refuse_beyond(vocab: int, encoded: Encoded | Stream, places: Sequence[str] | Stream, tokenizer) -> None:
    """Tokens that the tokenizer has and a model has not would be an index error, or on a GPU worse."""
    for i in range(len(encoded)) if vocab < vocab_size(tokenizer) else ():
        ids = np.concatenate([of.example(i)[0] for of in (encoded, encoded.for_teacher) if of is not None])
        if (ids >= vocab).any():
            token = tokenizer.convert_ids_to_tokens(int(ids.max()))
            place = encoded[i] if isinstance(encoded, Stream) else places[encoded.row[i]]
            raise UserError(f"{place}: holds {token!r}, which the tokenizer knows and a model has no row for; remove it from the text")


def hold_out(encoded: Encoded, share: float) -> tuple[Encoded, Encoded | None]:
    """Part off a share of the rows, the same ones whatever the run's seed, so that seeds can be compared on them.

    Pieces of one text, or turns of one conversation, stay together.
    """
    rows = sorted(set(encoded.row.tolist()))
    count = round(share * len(rows))
    if not count:
        if share:
            raise UserError(f"data.validation_share: {share:g} of {len(rows)} rows is none; raise it")
        return encoded, None
    if count == len(rows):
        raise UserError(f"data.validation_share: {share:g} of {len(rows)} rows leaves none to train on; lower it")
    held = np.isin(encoded.row, random.Random("held out").sample(rows, count))
    return encoded.subset(~held), encoded.subset(held)


def encode_choices(rows: Rows, source: Source, data: Data, tokenizer) -> Questions:
    """One example for each choice of each question; the answer's tokens are supervised."""
    asked = [{column: value for column, value in row.items() if column != "teacher_context"} for row in rows.rows]  # the student alone
    answered = [with_answer(row, source.format, choice) for row in asked for choice in row["choices"]]
    source = dataclasses.replace(source, format=answered[0][1])
    expanded = Rows(
        [row for row, _ in answered],
        [place for row, place in zip(rows.rows, rows.places, strict=True) for _ in row["choices"]],
        rows.content + " choices",
    )
    whole = dataclasses.replace(
        data, too_long="refuse", train_on_input=False, teacher_context=None
    )  # a choice cut short would look the likelier
    encoded = token_cache.encoded(expanded, source, whole, tokenizer, "data.choices", say)
    if len(encoded) != len(expanded.rows):
        raise UserError(
            f"data.choices: {len(expanded.rows) - len(encoded)} of {len(expanded.rows)} choices are empty; give every choice a text"
        )
    return Questions(encoded, [len(row["choices"]) for row in rows.rows], [row["answer"] for row in rows.rows])


_NOTES = {
    "as_characters": "{} with the characters of a control token, which stay characters",
    "endless": "{} that the chat template ends with no control token: the student will not learn from them where to stop",
}


def report(encoded: Encoded, name: str) -> None:
    c = encoded.counts
    dropped = [
        f"{c[k]} {words}" for k, words in (("too_long", "too long"), ("unsupervised", "with nothing supervised, dropped")) if c.get(k)
    ]
    say(
        f"{name}: {len(encoded)} examples, {len(encoded.ids)} tokens, {int(encoded.supervised.sum())} targets"
        + (f", {len(encoded.for_teacher.ids)} tokens for the teacher with its context" if encoded.for_teacher is not None else "")
        + (f" ({', '.join(dropped)})" if dropped else "")
    )
    note(encoded, name)


def note(encoded: Encoded, name: str) -> None:
    """What a person should know of the examples, said once."""
    c = encoded.counts
    for key, words in _NOTES.items():
        if c.get(key):
            say(f"note: {name}: {words.format(c[key])}")
