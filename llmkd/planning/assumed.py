"""Assumed examples for classifiers and encoder-decoder models whose data is not on this machine: all of maximal length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.data import Data
from ..data.examples import Draw, Examples
from ..data.inputs import Inputs, Reading
from ..data.labelled import LabelledExamples, TextInputs
from ..data.sequences import PromptedTargets, SequenceExamples
from ..errors import UserError
from ..tasks.readers import Reader
from ..tasks.sequences import SequenceProcessor
from ..tasks.sound import inputs_of, limit_of
from ..tasks.target_views import PromptReader
from .work import assumed_examples

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Alike:
    """Inputs (as `data.inputs.Inputs`) of examples that are all the same sound or image. `one`: a model's inputs for it, [1, ...] each."""

    one: "dict[str, Tensor]"
    lengths: np.ndarray
    positions = False

    def take(self, chosen: np.ndarray) -> "Alike":
        return Alike(self.one, self.lengths[chosen])

    def content(self, i: int) -> bytes:
        return str(i).encode()

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        return {name: x.expand(len(indices), *x.shape[1:]).contiguous() for name, x in self.one.items()}


def assumed_of(processor: Any, data: Data, count: int) -> Examples:
    """`count` examples like those that a task's `Processor` makes. UserError for a model that reads sounds of any length."""
    targets, given = 1, 0
    if isinstance(processor, SequenceProcessor):
        given = len(processor.frame.given)
        targets = max(1, min(data.max_length, processor.longest) - given)
    inputs = {id(one): _inputs(one, data, count, targets) for one in processor.readers.every}
    own, theirs = processor.readers.student, {}
    for name, reader in processor.readers.teachers.items():
        if reader is not own:
            others = getattr(processor, "others", {})
            theirs[name] = Reading(inputs[id(reader)], given=others[name][1].given if name in others else None)
    rows = np.arange(count)
    if not given:
        return LabelledExamples(inputs[id(own)], np.zeros(count, np.int64), rows, processor.labels, of_teachers=theirs)
    mask = np.arange(given + targets) >= given
    flat = np.zeros(count * len(mask), np.int32), np.tile(mask, count), np.arange(count + 1) * len(mask)
    return SequenceExamples(inputs[id(own)], *flat, rows, [""] * count, processor.pad, of_teachers=theirs)


def _inputs(reader: Reader, data: Data, count: int, targets: int) -> Inputs:
    import torch

    if isinstance(reader, PromptReader):
        examples = assumed_examples(count, max(data.max_length, targets + 1))
        examples.loss_mask[:] = np.tile(np.arange(examples.lengths[0]) >= examples.lengths[0] - targets, count)
        return PromptedTargets(examples)
    if reader.kind == "text":
        return TextInputs(np.zeros(count * data.max_length, np.int32), np.arange(count + 1) * data.max_length, None, reader.pad)
    if reader.kind == "image":
        pixels = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        return Alike(
            dict(reader.reader(list(pixels.numpy()), return_tensors="pt", input_data_format="channels_last")), np.ones(count, np.int64)
        )
    rate = reader.reader.sampling_rate
    samples = limit_of(reader.reader, rate)
    if samples is None:
        raise UserError("data.train: its sounds are not on this machine, but the model reads sounds of any length; put them in place")
    return Alike(inputs_of(reader.reader, [np.zeros(samples, np.float32)], rate), np.full(count, samples * 100 // rate))
