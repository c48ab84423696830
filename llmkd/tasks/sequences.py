"""Tasks of encoder-decoder models: the encoder reads a source, and the decoder predicts the tokens of a target. Text to text here; speech in
`speech.py`."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.recipe import Data, Source, Student, Teacher, Validation
from ..data.batching import Batching
from ..data.dataset import Dataset, refuse_too_few_positions, teacher_index
from ..data.encoding import token_cache
from ..data.encoding.same_tokenizer import refuse_other_tokens
from ..data.encoding.targets import Frame, frame_of, sequences
from ..data.encoding.tokenizer import load_tokenizer, save_tokenizer, shared_vocab, vocab_size
from ..data.examples import Examples
from ..data.reading.problems import ErrorCollector
from ..data.reading.sources import Rows
from ..data.sequences import SequenceExamples
from ..errors import UserError
from ..model_folder.files import ModelFiles, rows_of
from ..model_folder.generation import generation_settings
from .error_rates import ErrorRates
from .planned import encoded_data
from .readers import Readers, find_readers
from .target_views import PromptReader, is_encoder_decoder, with_same_targets
from .task import EncodedData, FoundModels
from .text_reader import padding_of

if TYPE_CHECKING:
    from ..models.kinds import ModelKind


_ANY = 1 << 31  # more positions than any target has

#: By the kind of source: the transformers class that loads encoder-decoder models, and the pipeline that uses them.
LOADED_BY = {
    "text": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "audio": ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
}


@dataclass(frozen=True)
class SequenceProcessor:
    """The `Processor` of encoder-decoder models: the tokenizer of the targets, which all models share, and the readers of the sources.

    reader    the tokenizer of the targets
    frame     the tokens before and after every target
    pad       the decoder's padding token
    longest   the smallest number of positions of the models' decoders
    others    the tokenizer and frame of each encoder-decoder teacher that reads another column, by setting
    readers   of the sources
    target    the column of the targets
    """

    reader: Any
    vocab: int
    frame: Frame
    pad: int
    longest: int
    others: dict[str, tuple[Any, Frame]]
    readers: Readers
    target: str
    labels: tuple[str, ...] = ()

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        hashes = [
            token_cache.tokenizer_hash(self.reader, template=False),
            *(one.identity for one in self.readers.every if one.kind == "text"),
        ]
        frames = [self.frame, *(frame for _, frame in self.others.values())] if self.others else [*self.frame]
        return self.readers.provenance | {"tokenizer": " ".join(dict.fromkeys(hashes)), "frame": json.dumps(frames)}

    @property
    def identity(self) -> dict[str, str]:
        own = {"the tokenizer": self.provenance["tokenizer"], "what a target begins with": self.provenance["frame"]}
        return self.readers.identity | own

    def save(self, folder: Path) -> None:
        save_tokenizer(self.reader, folder)
        if self.readers.student.kind != "text":
            self.readers.student.save(folder)


class TextToText:
    """See `Task`: rows of format prompt_completion; the encoder reads the prompt, and the decoder predicts the completion."""

    name = "text_to_text"

    def measures(self, processor: SequenceProcessor, validation: Validation) -> ErrorRates:
        rates = validation.error_rates
        most = processor.longest - len(processor.frame.given) + 1  # the last token of a text needs no position: nothing follows it
        if rates and rates.max_tokens > most:
            raise UserError(
                f"validation.error_rates.max_tokens: found {rates.max_tokens}, and the models' {processor.longest} positions have place for {most} "
                f"after the tokens that every target begins with; use at most {most}"
            )
        return ErrorRates(processor, rates, validation.micro_batch_size)

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> SequenceProcessor:
        refuse_too_few_positions(data, models.configs)
        refuse_decoders_alone(self.name, models.configs)
        refuse_messages(rows)
        return SequenceProcessor(*tokens_of_targets(student, models, data), find_readers(student, models, data), "completion")

    def encode(
        self, rows: dict[str, list[Rows]], data: Data, batching: Batching, teachers: tuple[Teacher, ...], processor: SequenceProcessor
    ) -> EncodedData:
        encode = lambda read, source, name: encoded(read, source, name, data, teachers, processor)  # noqa: E731
        return encoded_data(rows, data, batching, encode, end_tokens=frozenset([processor.frame.end]))

    def report(self, data: EncodedData, student: Student, files: ModelFiles | None, processor: SequenceProcessor) -> None:
        pass

    def student_files(self, files: ModelFiles | None, processor: SequenceProcessor) -> ModelFiles | None:
        return files

    def kind(self, processor: SequenceProcessor, examples: Examples | None = None, setting: str = "student.model") -> "ModelKind":
        from ..models.encoder_decoder import EncoderDecoderKind
        from ..models.kinds import CAUSAL

        if isinstance(processor.readers.of(setting), PromptReader):
            return CAUSAL
        return EncoderDecoderKind(LOADED_BY[processor.readers.of(setting).kind][0], len(processor.reader), examples)

    def generation(self, student: Student, files: ModelFiles | None, end_tokens: set[int]) -> dict:
        return generation_of(files.config if files else student.architecture, files)

    def pipeline(self, processor: SequenceProcessor) -> str:
        return LOADED_BY[processor.readers.student.kind][1]


def decoder_positions(config: dict) -> int:
    """The number of positions of a model's decoder, from its configuration; `_ANY` if it has no bound."""
    return config.get("max_target_positions") or config.get("max_position_embeddings") or _ANY


def generation_of(config: dict, files: ModelFiles | None) -> dict:
    """The generation config of the model that a student is trained from, with the decoder's start token."""
    found = generation_settings(config, (files.adapter, files.base) if files else (), "student.model")
    start = config.get("decoder_start_token_id")
    return found if start is None else {"decoder_start_token_id": start} | found


def tokens_of_targets(student: Student, models: FoundModels, data: Data) -> tuple[Any, int, Frame, int, int, dict[str, tuple[Any, Frame]]]:
    """The first six fields of `SequenceProcessor`: tokenizer, vocabulary size, frame, padding token, decoder positions, and the tokenizers and
    frames of teachers that read another column. UserError if the models do not agree in them."""
    config = models.configs["student.model"]
    named, setting = (
        (student.tokenizer, "student.tokenizer") if student.tokenizer else (str(models.student.with_tokenizer), "student.model")
    )
    reader = load_tokenizer(named, setting)
    frame = frame_of(reader, config, generation_of(config, models.student), data.target_prefix, "student.model")
    rows_known = {name: rows_of(one) for name, one in models.configs.items()}
    others, longest = {}, decoder_positions(config)
    for teacher in models.teachers:
        if teacher.cache:
            rows_known[f"{teacher.setting}.cache.path"] = teacher.cache.header["vocab"]
        if not teacher.files:
            continue
        setting, apart = f"{teacher.setting}.model", bool(teacher.settings.reads)
        theirs = load_tokenizer(str(teacher.files.with_tokenizer), setting)
        shared = min(vocab_size(reader), vocab_size(theirs)) if apart else None
        refuse_other_tokens(reader, theirs, setting, "the student's tokenizer", f"{teacher.settings.model}'s", shared)
        its_config = teacher.files.config
        if not is_encoder_decoder(its_config):
            continue
        prefix = None if apart else data.target_prefix
        other = frame_of(theirs, its_config, generation_of(its_config, teacher.files), prefix, setting)
        if apart:  # `with_same_targets` compares its targets row by row
            others[teacher.setting] = theirs, other
        elif other != frame:
            ours, its = (reader.convert_ids_to_tokens([*one.given, one.end]) for one in (frame, other))
            raise UserError(
                f"{setting}: its targets begin and end with {its}, and the student's with {ours}; both are to predict the same tokens: "
                "set data.target_prefix, or use a model of the same kind"
            )
        longest = min(longest, decoder_positions(its_config) - max(0, len(other.given) - len(frame.given)))
    return reader, shared_vocab(reader, rows_known), frame, padding_of(reader, config, "student.model"), longest, others


def encoded(read: Rows, source: Source, setting: str, data: Data, teachers: tuple[Teacher, ...], processor: SequenceProcessor) -> Dataset:
    """The examples of a source: of the rows whose source and target are not too long."""
    own, theirs, kept, longer, counts = processor.readers.inputs(read, data, setting)
    texts, places = [read.rows[i][processor.target] for i in kept], [read.places[i] for i in kept]
    targets, used, too_long = _targets(texts, places, data, processor)
    counts["unsupervised"] = sum(not row[processor.target].strip() for row in read.rows if row.get("train") is not False)
    counts["too_long"] = len({*longer.tolist(), *kept[too_long].tolist()})
    if not len(used):
        raise UserError(
            f"{setting}: none of its {counts['rows']} rows can be used ({counts['too_long']} are too long, {counts['unsupervised']} have no target); "
            "raise data.max_length, or check the rows"
        )
    taken = {id(one): one.take(used) for one in (own, *(one.inputs for one in theirs.values()))}
    theirs = {name: one._replace(inputs=taken[id(one.inputs)]) for name, one in theirs.items()}
    texts, places = [texts[n] for n in used], [places[n] for n in used]
    ids, masks = zip(*(targets[n] for n in used), strict=True)
    supervised = [own_ids[mask] for own_ids, mask in zip(ids, masks, strict=True)]
    counts |= {"examples": len(used), "targets": sum(map(len, supervised))}
    examples = SequenceExamples(
        taken[id(own)],
        np.concatenate(ids),
        np.concatenate(masks),
        np.cumsum([0, *map(len, ids)], dtype=np.int64),
        kept[used],
        texts,
        processor.pad,
        counts,
        of_teachers=with_same_targets(theirs, supervised, texts, places, processor.others, processor.reader),
    )
    examples.teacher_index[:] = teacher_index(source, teachers)
    examples.weigh(vars(source.loss))
    origin = read.origin | {"used": len(used)}
    return Dataset(f"{setting} ({source.path})", examples, places, [origin])


def _targets(
    texts: list[str], places: list[str], data: Data, processor: SequenceProcessor
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
    """The token ids and loss mask of each target, cut with data.too_long: truncate; the indices of the targets that are used, and of those
    that are too long, int64. UserError names the targets that cannot be used."""
    most, given = min(data.max_length, processor.longest), len(processor.frame.given)
    if most <= given:
        raise UserError(
            f"data.max_length: found {data.max_length}, and the {given} tokens that every target begins with leave no place in {most}; raise it"
        )
    out, used, too_long, problems = [], [], [], ErrorCollector()
    for n, (ids, mask) in enumerate(sequences(texts, processor.reader, processor.frame)):
        if unknown := [int(i) for i in ids[mask] if i >= processor.vocab]:
            token = processor.reader.convert_ids_to_tokens(max(unknown))
            problems.add(f"{places[n]}: contains the token {token!r}, for which a model has no row; remove it from the text")
        if len(ids) > most:
            too_long.append(n)
            if data.too_long == "refuse":
                problems.add(
                    f"{places[n]}: its target has {len(ids)} tokens, and at most {most} are used (data.max_length, or the models' positions); shorten it"
                )
        if texts[n].strip() and (len(ids) <= most or data.too_long == "truncate"):
            used.append(n)
        out.append((ids[:most], mask[:most]))
    problems.raise_if_any()
    return out, np.array(used, np.int64), np.array(too_long, np.int64)


def refuse_messages(rows: dict[str, list[Rows]]) -> None:
    """UserError for rows of messages, since encoders have no chat template."""
    problems = ErrorCollector()
    for read in (one for of_setting in rows.values() for one in of_setting):
        for row, place in zip(read.rows, read.places, strict=True):
            if not (isinstance(row["prompt"], str) and isinstance(row["completion"], str)):
                problems.add(f"{place}: prompt or completion is a list of messages, expected texts; write them as texts")
    problems.raise_if_any()


def refuse_decoders_alone(task: str, configs: dict[str, dict]) -> None:
    """UserError for models without an encoder and a decoder, before their weights are read."""
    for setting, config in configs.items():
        if not is_encoder_decoder(config):
            raise UserError(
                f"{setting}: found {config.get('model_type')}, which has no encoder and decoder, as task: {task} needs; use such a model, or "
                "task: causal_lm"
            )
