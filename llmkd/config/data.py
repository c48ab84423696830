"""Settings of the data: sources of rows, and how rows become examples. A part of `recipe.py`."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .divergences import DIVERGENCES, option_contradictions
from .fields import Count, OneOrMany, Seed, as_tuple, changeable, config_dataclass, fixed
from .formats import FORMATS, ROLES
from .media import Augment, InputFeatures, pattern_problem
from .where import where_contradictions

BUILTIN_SOUNDS = "builtin:sounds"

Weight = Annotated[float, Field(ge=-1000, le=1000)]


@config_dataclass
class SourceLoss:
    """The weights of a source's targets in the parts of the loss."""

    ce: Weight = fixed(
        1.0, description="Weight of the cross-entropy at every target of this source; 0: its answers are not trusted as labels."
    )
    kd: Weight = fixed(1.0, description="Weight of the distillation term at every target of this source; 0: the teacher is not used there.")
    features: Weight = fixed(
        1.0, description="Weight of loss.features at every target of this source; 0: hidden states are not compared there."
    )
    attention: Weight = fixed(
        1.0, description="Weight of loss.attention at every target of this source; 0: attention is not compared there."
    )


@config_dataclass
class Source:
    path: str = fixed(
        path="data",
        description="A .json, .jsonl, .parquet, .arrow or .csv file, a folder of them or of sound or image files, a hub data set, builtin:skills "
        "(a generated corpus) or builtin:sounds (generated clips).",
    )
    format: Literal[tuple(FORMATS)] = fixed(
        "alpaca",
        shapes=("tokens",),
        description="Columns of a row. alpaca: instruction, input, output; chat: messages with role and content; prompt_completion: prompt, completion; "
        "text: text; tokens: input_ids of the student's tokenizer, and loss_mask or labels. With task: classification, labelled: text, label, and "
        "text_pair for pairs; audio: audio (the path of a sound file, or its bytes) and label, or a folder of sound files; image: the same for images. "
        "With task: speech_recognition, speech: audio, and its transcript text.",
    )
    pattern: str | None = fixed(
        None,
        description="For a folder of sounds or images: a regular expression for the whole name of each file, or for its whole path in the folder "
        "if the expression contains a slash. Its named groups are columns: (?P<label>\\d)_(?P<speaker>[a-z]+)\\.wav. null: the folder "
        "of a file is its label.",
    )
    fields: dict[str, str] = fixed(
        default_factory=dict,
        description="The file's own names for the format's columns: {messages: conversations, role: from, content: value}. For a value inside an "
        "object give its path, translation.de.",
    )
    roles: dict[str, str] = fixed(
        default_factory=dict,
        description="The file's own names for the roles of a chat: {user: human, assistant: gpt}.",
    )
    ignore: tuple[str, ...] = fixed(
        (),
        description="Columns of the file, and keys of its messages, to leave out on purpose. Unlisted ones that change the meaning are refused.",
    )
    chat_template: bool = fixed(
        False,
        shapes=("tokens",),
        description="alpaca and prompt_completion: render the prompt as a user turn and the answer as an assistant turn, in the tokenizer's chat template.",
    )
    answers: Literal["all", "last"] = fixed(
        "all",
        shapes=("tokens",),
        description="Which assistant turns of a conversation are supervised: all, or only the last. With last, a row is one example even if the "
        "chat template would make one of each turn.",
    )
    call_values: Literal["refuse", "template", "json"] = fixed(
        "refuse",
        shapes=("tokens",),
        description="For chat templates that write true, false, null, lists and objects in a tool call's arguments as Python does (True, None, "
        "['a']), such as Qwen3-Coder's. refuse: refuse the row; template: train on the template's text; json: give such values to the"
        " template as JSON text.",
    )
    name: str | None = fixed(
        None,
        description="Configuration of a hub data set. For builtin:skills: questions (conversations), prose (plain text) or kinds (sentences, "
        "labelled with the kind of thing they name).",
    )
    split: str = fixed("train", description="Split of a hub data set, of a folder whose files are named by split, or of builtin:skills.")
    revision: str | None = fixed(None, description="Revision of a hub data set.")
    where: dict[str, Any] = fixed(
        default_factory=dict,
        description="Rows to use, selected by the file's columns (inside an object: meta.score) before any limit. A condition is a value, a list "
        "of values, or above, at_least, below, at_most and not; all must hold: {clean: true, lang: [en, de], score: {above: 0.5}}.",
    )
    noise: float = fixed(
        0.0,
        ge=0,
        le=1,
        description="For builtin:skills: share of the answers that are replaced by wrong ones of the same kind. The column clean is true for the "
        "others.",
    )
    limit: Count | None = fixed(None, description="Number of rows to use: the first ones, or with seed a random sample.")
    seed: Seed | None = fixed(None, description="Seed of the random sample of limit rows; null: the first rows.")
    weight: float = fixed(
        1.0,
        gt=0,
        le=1000,
        description="Passes over this source per epoch. 2: every row is used twice; 0.5: half of the rows, drawn anew each epoch.",
    )
    teacher: str | None = fixed(None, description="Name of the teacher of these rows; null: all teachers, combined by mixture.")
    loss: SourceLoss = Field(default_factory=SourceLoss)
    divergence: Literal[tuple(DIVERGENCES)] | None = fixed(
        None, description="For a training source: the divergence at its targets, instead of loss.divergence; null: loss.divergence."
    )
    divergence_options: dict[str, float] = fixed(
        default_factory=dict, description="Options of this divergence, as in loss.divergence_options."
    )


@config_dataclass
class Data:
    train: OneOrMany[Source] = fixed(None, description="Training rows: one source, or a list of sources.")
    validation: OneOrMany[Source] = fixed(None, description="Held-out rows: one source, or a list of sources. Or set validation_fraction.")
    validation_fraction: float = fixed(
        0.0, ge=0, lt=1, description="Fraction of the training rows that is held out for validation, drawn by seed."
    )
    choices: Source | None = changeable(
        None,
        description="Multiple-choice questions, scored at the end of the run. Rows have the format's columns except the answer's, and also "
        "choices (a list of texts) and answer (an index).",
    )
    max_length: Annotated[int, Field(ge=2)] = fixed(512, shapes=("tokens", "teacher"), description="Longest example in tokens.")
    too_long: Literal["drop", "truncate", "split", "refuse"] = fixed(
        "drop",
        shapes=("tokens", "teacher"),
        description="Longer examples: drop them, truncate them at the end, split them into several (text only), or refuse the run.",
    )
    target_prefix: str | None = fixed(
        None,
        description="With task: text_to_text or speech_recognition: control tokens at the beginning of every target, which are given to the model"
        " and not trained on, such as <|en|><|transcribe|><|notimestamps|>; null: those of the tokenizer.",
    )
    train_on_input: bool = fixed(
        False, shapes=("tokens", "teacher"), description="Train on the prompt's tokens too, not only on the answer's."
    )
    teacher_context: str | None = fixed(
        None,
        shapes=("tokens", "teacher"),
        description="Text before each example that only the teacher reads (in a chat: the system message). A row's own column teacher_context is added after it.",
    )
    packing: bool = changeable(
        False,
        description="Concatenate the examples of a micro-batch into one row without padding. Examples do not attend to one another, so the result is the same.",
    )
    share_prefixes: bool = changeable(
        False,
        description="With packing: compute a prefix that several examples of a micro-batch share, such as the start of a template, only once. The"
        " result is the same up to rounding; dropout in the prefix is that of one of the examples.",
    )
    streaming: bool = fixed(
        False, description="Read and tokenise training rows during training instead of before it; needs train.max_steps."
    )
    shuffle_buffer: Count = fixed(10_000, description="With streaming: number of rows that are shuffled together.")
    features: InputFeatures | None = fixed(
        None,
        description="For a new student without a feature extractor or image processor (builtin_cnn): the features of a clip or an image that it "
        "reads.",
    )
    augment: Augment | None = fixed(
        None, description="Augmentation: other versions of the training examples in every epoch, drawn by seed; null: none."
    )
    workers: Annotated[int, Field(ge=1, le=256)] = changeable(
        1,
        description="For sounds and images: processes that decode and augment ahead of training. Their number does not change the result.",
    )
    cache_dir: str | None = changeable(
        None, path="output", description="Folder of the token cache; null: LLMKD_CACHE, or else ~/.cache/llmkd."
    )


def no_context_with(data: Data) -> Iterator[tuple[str, str]]:
    """Settings that cannot be used with a context for the teacher: yields (setting, problem and fix)."""
    if data.too_long == "split":
        yield "data.too_long", "too_long: split: only the first part of a split text would have the context; use drop, truncate or refuse"
    if data.train_on_input:
        yield "data.train_on_input", "train_on_input, but teacher and student have different inputs; set it to false"


def data_contradictions(data: Data, max_steps: int | None, group_by_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of the data's settings, in the form of `contradictions.contradictions`."""
    if not as_tuple(data.train):
        yield ("data.train",), "not given; name the training data, such as {path: train.jsonl, format: alpaca}"
    if data.validation == ():
        yield ("data.validation",), "found an empty list; name a source, or leave it out"
    if as_tuple(data.validation) and data.validation_fraction:
        yield ("data.validation_fraction", "data.validation"), "given together with data.validation; keep one of them"
    if data.teacher_context is not None:
        if not data.teacher_context.strip():
            yield ("data.teacher_context",), "found no text; give the text for the teacher, or leave it out"
        for setting, problem in no_context_with(data):
            yield ("data.teacher_context", setting), f"cannot be used with {problem}"
        if any(FORMATS[s.format].supervised == "marked" for s in (*as_tuple(data.train), *as_tuple(data.validation))):
            yield (
                ("data.teacher_context", "data.train", "data.validation"),
                "cannot be used with format: tokens, whose rows are no text that a context could be put before; leave it out",
            )
    every = (*as_tuple(data.train), *as_tuple(data.validation))
    if data.too_long == "split" and any(FORMATS[s.format].supervised != "all" for s in every):
        whole = " and ".join(name for name, one in FORMATS.items() if one.supervised == "all")
        yield (
            ("data.too_long", "data.train", "data.validation"),
            f"found split, which works with format: {whole} only; use drop or truncate",
        )
    for setting, value in (("data.train", data.train), ("data.validation", data.validation), ("data.choices", data.choices)):
        for i, source in enumerate(as_tuple(value)):
            path = f"{setting}.{i}" if isinstance(value, tuple) else setting
            for name, problem in (
                *_origin_contradictions(source, setting),
                *_use_contradictions(source, setting),
                *_name_contradictions(source, setting),
            ):
                yield (f"{path}.{name}",), problem
            if source.divergence:
                yield from option_contradictions(source.divergence, source.divergence_options, path)
    if data.share_prefixes and not data.packing:
        yield (
            ("data.share_prefixes", "data.packing"),
            "found true without data.packing; prefixes are shared in packed rows only; set data.packing to true",
        )
    if data.streaming:
        yield from _streaming_contradictions(data, max_steps, group_by_length)


def _origin_contradictions(source: Source, setting: str) -> Iterator[tuple[str, str]]:
    """Contradictions of the rows' origin and choice: yields (setting of the source, problem and fix), as the next two functions do."""
    choices, row_format = setting == "data.choices", FORMATS[source.format]
    if source.path == "builtin:skills" and not row_format.file and (source.name == "kinds") != (row_format.supervised == "label"):
        fix = "set name: kinds" if row_format.supervised == "label" else "set format: labelled, with task: classification"
        yield "name", f"found {source.name or 'questions'} with format: {source.format}; {fix}"
    own = {"audio": (BUILTIN_SOUNDS,), "labelled": ("builtin:skills", BUILTIN_SOUNDS)}
    builtin = own.get(source.format, () if row_format.file else ("builtin:skills",))
    if source.path.startswith("builtin:") and source.path not in builtin:
        known = (
            f"the only built-in corpus of format {source.format} is {' or '.join(builtin)}"
            if builtin
            else f"format {source.format} has no built-in corpus"
        )
        yield "path", f"found {source.path!r}; {known}"
    if source.pattern is not None and not row_format.file:
        yield "pattern", f"found {source.pattern!r} with format: {source.format}, whose rows are in files; leave it out"
    elif source.pattern is not None and (problem := pattern_problem(source.pattern, row_format.file)):
        yield "pattern", problem
    if source.noise and source.path != "builtin:skills":
        yield (
            "noise",
            f"found {source.noise:g}, and only builtin:skills has answers that can be replaced by others of their kind; leave it out",
        )
    elif source.noise and (choices or source.split == "test" or source.name in ("prose", "kinds")):
        what = "multiple-choice questions" if choices or source.split == "test" else f"{source.name}, which has no answers"
        yield "noise", f"found {source.noise:g} with {what}; only the questions of the splits train and validation take it; leave it out"
    for path, problem in where_contradictions(source.where):
        yield f"where.{path}".rstrip("."), problem


def _use_contradictions(source: Source, setting: str) -> Iterator[tuple[str, str]]:
    """Contradictions of rendering, weights and training."""
    choices, row_format = setting == "data.choices", FORMATS[source.format]
    if choices and row_format.supervised != "answer":
        *others, last = (name for name, one in FORMATS.items() if one.supervised == "answer")
        yield "format", f"found {source.format}, which has no answer that choices could replace; use {', '.join(others)} or {last}"
    if source.weight != 1 and setting != "data.train":
        yield "weight", f"found {source.weight:g}, but only training sources have weights; leave it out"
    if choices and source.loss != SourceLoss():
        yield "loss", "given, but choices are scored and not trained on; leave it out"
    if source.divergence and setting != "data.train":
        yield "divergence", f"found {source.divergence}, but only training rows are learnt from; leave it out"
    if source.divergence and not source.loss.kd:
        yield "divergence", f"found {source.divergence} with loss.kd 0, by which no divergence counts in these rows; leave one of them out"
    if source.divergence_options and not source.divergence:
        yield "divergence_options", "given without divergence; name the divergence that they are of"
    if source.seed is not None and source.limit is None:
        yield "seed", "set without limit; it is the seed of the sample that limit takes; set limit, or leave it out"
    if source.chat_template and row_format.template != "optional":
        why = "is always rendered by it" if row_format.template == "always" else "has no turns to render"
        yield "chat_template", f"found true with format: {source.format}, which {why}; leave it out"
    if source.answers == "last" and not row_format.has_messages:
        yield "answers", f"found last with format: {source.format}, whose rows have one answer each; leave it out"
    if source.call_values != "refuse" and not row_format.has_messages:
        yield "call_values", f"found {source.call_values} with format: {source.format}, whose rows have no calls; leave it out"


def _name_contradictions(source: Source, setting: str) -> Iterator[tuple[str, str]]:
    """Contradictions of the names of columns and roles."""
    choices, row_format = setting == "data.choices", FORMATS[source.format]
    known, columns = row_format.names(choices), row_format.columns | row_format.views
    for column in source.fields:
        if column not in known:
            yield f"fields.{column}", f"format {source.format} has no such column; it has {', '.join(known)}"
    taken = {source.fields.get(c, c) for c in (*(c for c in columns if c in source.fields or not columns[c].optional), "role", "content")}
    for name in source.ignore:
        if name in taken and not (choices and name == row_format.answer):
            yield "ignore", f"found {name!r}, which format {source.format} reads; remove it from the list"
    without = ("role", "content", "train", *([row_format.answer] if choices else []))
    for group in (("role", "content", *(["train"] if "train" in source.fields else [])), tuple(c for c in known if c not in without)):
        theirs = {c: source.fields.get(c, c) for c in group if c in source.fields or not (c in columns and columns[c].optional)}
        twice = next((c for c in source.fields if c in theirs and list(theirs.values()).count(theirs[c]) > 1), None)
        if twice:
            other = next(c for c in theirs if c != twice and theirs[c] == theirs[twice])
            yield f"fields.{twice}", f"found {theirs[twice]!r}, which is also read as {other}; give each its own column"
    if source.roles and not row_format.has_messages:
        yield "roles", f"set with format: {source.format}, which has no roles; leave it out"
    for role, name in source.roles.items():
        if role not in ROLES:
            yield f"roles.{role}", f"no such role; the roles are {', '.join(ROLES)}"
        elif name in {source.roles.get(other, other) for other in ROLES if other != role}:
            yield f"roles.{role}", f"found {name!r}, which also stands for another role; give each role its own name"


def _streaming_contradictions(data: Data, max_steps: int | None, group_by_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
    if not max_steps:
        yield (
            ("data.streaming", "train.max_steps"),
            "found true without train.max_steps; the length of a stream is not known; set train.max_steps",
        )
    if data.validation_fraction:
        yield (
            ("data.validation_fraction", "data.streaming"),
            "cannot be used with data.streaming, where no rows are read before training; use data.validation",
        )
    if isinstance(data.train, tuple) and len(data.train) > 1:
        yield (
            ("data.train", "data.streaming"),
            "found several sources, but data.streaming reads only one; write them to one folder, or set data.streaming to false",
        )
    for source in as_tuple(data.train):
        if source.weight != 1:
            yield (
                ("data.train", "data.streaming"),
                "found a weight, but with data.streaming one source is read over and over; leave the weight out",
            )
        if source.seed is not None:
            yield (
                ("data.train", "data.streaming"),
                "found limit with seed, but data.streaming cannot sample from rows that are not read yet; leave seed out",
            )
    if group_by_length > 1:
        yield (
            ("train.group_by_length", "data.streaming"),
            f"found {group_by_length} with data.streaming, where lengths are not known in advance; use 1",
        )
