"""The work of a run: its largest micro-batch, and the tokens and targets of the whole run, from the data or from a stated assumption."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..batch import Batch
from ..config.fields import as_tuple
from ..config.on_policy import writes
from ..config.paths import is_local
from ..config.recipe import Data, Recipe
from ..data.batching import TokenBudget, make_micro_batches
from ..data.dataset import read_data
from ..data.encoding.tokenizer import load_tokenizer
from ..data.examples import Draw, Examples, TokenExamples
from ..errors import UserError
from ..tasks.causal_lm import encode_data
from ..tasks.planned import batch_plan
from ..training.prepare import batching
from .model_configs import ModelConfig
from .writing import as_written, with_samples

_ANY = 1 << 31  # a vocabulary size without limit: the start of a run checks that the models have a row for each token
ASSUMED = 64  # examples of assumed data, or as many as a step has


#: Folders of data that `llmkd make` will write, as absolute paths, each with the name of the stage.
Made = Mapping[Path, str]


@dataclass(frozen=True)
class KnownData:
    """The training examples of a recipe, or assumed ones.

    tokenizer   None if it is not on this machine
    complete    whether `examples` are all examples of an epoch
    assumed     the assumption, in words; "" if the data was read
    """

    examples: Examples
    tokenizer: object | None
    complete: bool
    assumed: str = ""


@dataclass(frozen=True)
class Work:
    """The work of a run. Sums over the run are None if the data is unknown.

    batch      the largest micro-batch: the most tokens, padding included, and of these the most targets
    later      the largest micro-batch that is not the first of its step, so that gradients are in memory; None without one
    cost       of `batch`: its tokens, padding included; for sounds hundredths of a second, for images their number
    in_step    the largest cost of a process's micro-batches in a step, as a multiple of `cost`
    tokens, targets, micro_batches, steps, examples   sums over the run; tokens include padding
    """

    batch: Batch
    later: Batch | None
    cost: int
    in_step: float
    tokens: int | None
    targets: int | None
    micro_batches: int | None
    steps: int | None
    examples: int | None

    @property
    def cases(self) -> list[tuple[Batch, bool]]:
        """The micro-batches that may have the peak, each with whether gradients of earlier ones of its step are in memory."""
        one, other = self.batch, self.later
        if other is None:
            return [(one, False)]
        same = one.student.shape == other.student.shape
        return [(one, True)] if same and one.num_targets == other.num_targets else [(one, False), (other, True)]

    @property
    def batch_tokens(self) -> int:
        return self.batch.student.size


def known_data(recipe: Recipe, student: ModelConfig, made: Made = MappingProxyType({})) -> KnownData:
    """The data of a recipe. Answers that are written during training are assumed to have maximal length."""
    known = _known_data(recipe, student, made)
    if not writes(recipe.on_policy):
        return known
    written = as_written(known.examples, recipe.on_policy, recipe.data.max_length)
    assumed = f"on_policy: written answers are assumed to have {recipe.on_policy.max_new_tokens:,} tokens (on_policy.max_new_tokens), if there is room"
    return dataclasses.replace(known, examples=written, assumed="; ".join(filter(None, (known.assumed, assumed))))


def _known_data(recipe: Recipe, student: ModelConfig, made: Made) -> KnownData:
    """The recipe's training examples, if data and tokenizer are on this machine; otherwise examples of data.max_length tokens."""
    tokenizer = _tokenizer_here(recipe, student)
    if (lacking := lacking_data(recipe, made)) or tokenizer is None:
        lacking = lacking or "the student's tokenizer is not on this machine"
        length = recipe.data.max_length
        assumed = f"{lacking}: every example is assumed to have {length:,} tokens (data.max_length), all of them supervised"
        return KnownData(assumed_examples(max(ASSUMED, recipe.train.batch_size), length), tokenizer, False, assumed)
    alone = Data(**{**vars(recipe.data), "validation": None, "choices": None})
    rows = read_data(alone)
    order = batching(recipe.train, recipe.seed, alone.packing)
    data = encode_data(rows, alone, order, as_tuple(recipe.teacher), tokenizer, _ANY)
    if data.source.complete:
        return KnownData(data.train, tokenizer, True)
    return KnownData(data.train, tokenizer, False, "data.streaming: the rows of the first step represent all")


def lacking_data(recipe: Recipe, made: Made) -> str:
    """A sentence on training data that is not on this machine; "" if all of it is."""
    sources = as_tuple(recipe.data.train)
    for path in (Path(os.path.abspath(source.path)) for source in sources):
        if path.parent in made and not path.exists():
            return f"{path} is made by the stage {made[path.parent]}, which has not run yet"
    remote = (source.path for source in sources if not is_local(source.path, "data") and not source.path.startswith("builtin:"))
    return next((f"{path} is not on this machine" for path in remote), "")


def _tokenizer_here(recipe: Recipe, student: ModelConfig):
    """The tokenizer of the run, from a folder or the hub's cache; None if it is in neither."""
    name = recipe.student.tokenizer or (student.files and str(student.files))
    if name is None:
        return None
    if not recipe.student.tokenizer and not any(
        (Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return None
    try:
        return load_tokenizer(name, "student.tokenizer" if recipe.student.tokenizer else "student.model")
    except UserError:
        if Path(name).is_dir() or name.startswith("builtin:"):
            raise
        return None


def assumed_examples(count: int, length: int) -> TokenExamples:
    """Examples of equal length, with every token supervised."""
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return TokenExamples(np.zeros(count * length, np.int32), np.ones(count * length, bool), offsets, np.arange(count))


def work_of(known: KnownData, recipe: Recipe, ranks: int = 1) -> Work:
    """The work of a run with `ranks` processes: the largest micro-batch of one, and the sums over all of them."""
    examples, train, data = known.examples, recipe.train, recipe.data
    order = batching(train, recipe.seed, data.packing)
    size = 1 if train.micro_batch_tokens == "auto" else order.micro_batch_size
    lengths, targets = examples.max_lengths, examples.num_targets
    if known.complete:
        plan = batch_plan(order, examples, tuple(source.weight for source in as_tuple(data.train)))
        steps, total = list(plan.step_batches(0)), plan.total_steps
        share = total / len(steps)
    else:
        steps, total, share = [list(range(min(train.batch_size, len(examples))))], train.max_steps, train.max_steps
    steps = [with_samples(step, recipe.on_policy, train) for step in steps]
    cut = [make_micro_batches(step, lengths, size, rank, ranks) for step in steps for rank in range(ranks)]
    weigh = {id(micro): (_tokens(lengths[micro], data.packing), int(targets[micro].sum())) for step in cut for micro in step}
    largest = max((micro for step in cut for micro in step), key=lambda micro: weigh[id(micro)])
    later = max((micro for step in cut for micro in step[1:]), key=lambda micro: weigh[id(micro)], default=None)
    sums = np.array([weigh[id(micro)] for step in cut for micro in step]).sum(0)
    known_sums = [None, None, None] if share is None else [math.ceil(share * n) for n in (*sums, sum(map(len, cut)))]
    number = None if share is None else math.ceil(share * sum(map(len, steps)))
    draw = Draw(recipe.seed, 0, 1)
    later = None if later is None else examples.batch(later, draw)
    cost = weigh[id(largest)][0]
    in_step = max(sum(weigh[id(micro)][0] for micro in step) for step in cut) / cost
    return Work(examples.batch(largest, draw), later, cost, in_step, *known_sums, total, number)


def _tokens(lengths: np.ndarray, packing: bool) -> int:
    return TokenBudget(0, packing).of(lengths)
