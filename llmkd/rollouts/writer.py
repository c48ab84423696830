"""Writers, which complete prompts: the protocol, and a model in this process. Batch sources and commands accept any writer."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Protocol

from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.sharding import is_sharded
from ..process.machine_errors import is_out_of_memory
from .generate import Completion, Mix, generate
from .sampling import Sampling


class Writer(Protocol):
    """Writes answers to prompts, with the current weights of its model."""

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling) -> list[Completion]:
        """A completion of each prompt, in order.

        prompts  token ids, at least one each
        keys     for each prompt a number from 0 to 2^64 - 1, see `text_key`. A completion is a function of (weights, prompt, key, sampling),
                 and of nothing else, such as the other prompts
        """


class LocalWriter:
    """A model in this process. It writes in eval mode and without gradients, and is in its former mode afterwards.

    end_ids     a completion ends with the first of these
    batch_size  prompts at a time. It changes speed and memory, not the text (in float32, up to rounding); running out of memory halves it
    mix         other models that write together with this one
    """

    def __init__(self, model: LanguageModel, end_ids: Collection[int], batch_size: int = 32, mix: Mix | None = None):
        self.model, self.end_ids, self.batch_size, self.mix = model, frozenset(end_ids), batch_size, mix

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling) -> list[Completion]:
        while True:
            try:
                return generate(self.model, prompts, sampling, self.end_ids, self.batch_size, keys=keys, mix=self.mix)
            except Exception as error:
                # With a sharded model the other processes are in the middle of the pass that failed here.
                sharded = any(is_sharded(one.model) for one in (self.model, *(self.mix.models if self.mix else ())))
                if not is_out_of_memory(error) or self.batch_size == 1 or len(prompts) < 2 or sharded:
                    raise
            # After the `except` block, which keeps the tensors of the failed pass alive.
            self.batch_size = min(self.batch_size, len(prompts)) // 2


def write_on_all_ranks(
    writer: Writer, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, rank: int, ranks: int
) -> list[Completion]:
    """`writer.write` with the prompts distributed over the ranks, longest first; every rank gets all completions.

    A UserError on one rank is raised on all.
    """
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    mine, found = order[rank::ranks], []
    try:
        written = writer.write([prompts[n] for n in mine], [keys[n] for n in mine], sampling)
        found = [list(zip(mine, written, strict=True))]
    except UserError as error:
        if ranks == 1:
            raise
        found = [error]
    if ranks > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
        if error := next((one for one in found if isinstance(one, UserError)), None):
            raise error
    by_place = dict(pair for part in found for pair in part)
    return [by_place[n] for n in range(len(prompts))]


def text_key(*parts: int | str) -> int:
    """The key of a text, 0 to 2^64 - 1, from the parts of its name, such as (step, content hash of the example, number of the sample)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")
