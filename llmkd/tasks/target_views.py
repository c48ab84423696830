"""Teachers that read another column than an encoder-decoder student. Their targets must be the student's, token by token; other rows are refused.

Such a teacher is an encoder-decoder model of text, whose decoder may begin with other tokens, or a causal language model, which reads the
column and the target as one text.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config.recipe import Data, Source, Student
from ..data.dataset import refuse_too_few_positions
from ..data.encoding import token_cache
from ..data.encoding.encode import encode
from ..data.encoding.targets import Frame, sequences
from ..data.encoding.tokenizer import load_tokenizer
from ..data.inputs import Reading
from ..data.reading.problems import ErrorCollector
from ..data.reading.sources import Rows
from ..data.sequences import PromptedTargets
from ..errors import UserError
from ..model_folder.files import ModelFiles
from .text_reader import TextReader


@dataclass(frozen=True)
class PromptReader:
    """A causal language model's tokenizer as a `Reader` of a prompt followed by its target, as in task causal_lm with format prompt_completion.

    target   the column of the targets
    """

    column: str
    reader: Any
    target: str
    kind = "text"
    pad = None

    @property
    def tokens(self) -> int:
        return len(self.reader)

    @functools.cached_property
    def identity(self) -> str:
        return f"prompt and target: {token_cache.tokenizer_hash(self.reader, template=False)}"

    def inputs(
        self, rows: Sequence[dict], places: Sequence[str], data: Data, setting: str
    ) -> tuple[PromptedTargets, np.ndarray, np.ndarray]:
        """See `Reader.inputs`. Texts that are too long are left out even with data.too_long: truncate, since the target is at their end."""
        texts = Rows([{"prompt": row[self.column], "completion": row[self.target]} for row in rows], list(places), "")
        whole = dataclasses.replace(data, too_long="refuse" if data.too_long == "refuse" else "drop", packing=False)
        examples = encode(texts, Source(path=setting, format="prompt_completion"), whole, self.reader)
        if not len(examples):
            raise UserError(
                f"{setting}: with {self.column!r} before it, every target is too long or empty; raise data.max_length, or check the rows"
            )
        longer = [i for i in sorted({*range(len(rows))} - {*examples.row.tolist()}) if rows[i][self.target].strip()]
        return PromptedTargets(examples), examples.row, np.array(longer, np.int64)

    def save(self, folder) -> None:
        self.reader.save_pretrained(folder)


def text_readers(target: str) -> Callable[..., TextReader | PromptReader]:
    """A function that makes the reader of a text column, as in `readers.READERS`: by whether the model is an encoder-decoder model. `target`: the
    column of the targets."""

    def of(column: str, files: ModelFiles | None, config: dict, setting: str, student: Student | None, data: Data, clips):
        if is_encoder_decoder(config):
            return TextReader.of(column, files, config, setting, student, data, clips)
        refuse_too_few_positions(data, {setting: config})
        return PromptReader(column, load_tokenizer(str(files.with_tokenizer), setting), target)

    return of


#: Model types that are encoder-decoder models, even if their config.json does not say is_encoder_decoder.
_BY_DEFAULT = ("t5", "mt5", "umt5", "longt5", "bart", "mbart", "marian", "pegasus", "m2m_100", "whisper", "speech_to_text", "moonshine")


def is_encoder_decoder(config: dict) -> bool:
    return bool(config.get("is_encoder_decoder")) or config.get("model_type") in _BY_DEFAULT


def with_same_targets(
    theirs: dict[str, Reading],
    targets: list[np.ndarray],
    texts: list[str],
    places: Sequence[str],
    others: dict[str, tuple[Any, Frame]],
    reader: Any,
) -> dict[str, Reading]:
    """The teachers' readings, by setting, with the tokens that their decoders are given. UserError names the rows where a teacher's targets are not
    the student's.

    targets   the student's targets: the token ids of each example
    texts     the same as text
    others    the tokenizer and the frame of each encoder-decoder teacher that reads another column
    reader    the student's tokenizer
    """
    problems, out = ErrorCollector(), {}
    for setting, one in theirs.items():
        written = None
        if isinstance(one.inputs, PromptedTargets):
            written = [one.inputs.targets(i) for i in range(len(targets))]
        elif setting in others:
            tokenizer, frame = others[setting]
            one = one._replace(given=frame.given)
            written = [ids[mask][: len(own)] for (ids, mask), own in zip(sequences(texts, tokenizer, frame), targets, strict=True)]
        for place, own, other in zip(places, targets, written or targets, strict=True):
            if not np.array_equal(own, other):
                pairs = itertools.zip_longest(other.tolist(), own.tolist())
                found, expected = (_token(i, reader) for i in next(pair for pair in pairs if pair[0] != pair[1]))
                problems.add(
                    f"{place}: the targets of {setting} are not the student's: {found} where the student has {expected}; change the row, or use a "
                    "teacher whose tokenizer writes the same",
                    alike=f"targets of {setting}",
                )
        out[setting] = one
    problems.raise_if_any()
    return out


def _token(i: int | None, tokenizer) -> str:
    return "no more" if i is None else repr(tokenizer.convert_ids_to_tokens(i))
