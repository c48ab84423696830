"""The cost of `llmkd cache` for a teacher: memory and operations of its passes, and the size of the cache."""

from dataclasses import dataclass

import torch

from ..config.recipe import Recipe, Teacher
from ..losses.fused import default_chunk
from ..model_folder.files import loaded_dtype
from ..signals import Dense
from ..teachers.cache.records import HiddenFormat
from ..teachers.live import LiveTeacher
from .cache_records import format_of
from .fakes import fake_tensors
from .find import Found
from .live_memory import LiveMemory
from .measure import ROUND_ON_GPU, Measured, extended
from .model_configs import ModelConfig
from .models import build_teacher, depth_of, layer_sizes
from .step import TEACHER
from .work import KnownData

_FEW = 2  # layers that are run, of a deeper teacher


@dataclass(frozen=True)
class Caching:
    """The cost of caching one teacher in one process. `flops`, `targets` and `batches` are None if the data is unknown.

    setting   the teacher's setting
    parts     bytes in memory at the peak, by part
    flops     operations of all passes
    dtype     of the matrix products
    targets   the number of records
    width     bytes of a record
    batches   the number of passes
    layers    the teacher's number of layers
    """

    setting: str
    parts: dict[str, float]
    flops: float | None
    dtype: str
    targets: int | None
    width: int
    batches: int | None
    layers: int

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


def cachings(recipe: Recipe, found: Found, gpu: bool) -> list[Caching]:
    """The cost for each teacher with a cache whose model is known."""
    return [_caching(recipe, found, setting, one, config, gpu) for setting, one, config in found.teachers if one.cache and config]


def _caching(recipe: Recipe, found: Found, setting: str, one: Teacher, config: ModelConfig, gpu: bool) -> Caching:
    size, known = recipe.validation.micro_batch_size, found.data
    with fake_tensors(gpu):
        format = format_of(one, setting, found.vocab, config, found.kind())
    hidden, width = isinstance(format, HiddenFormat), format.bytes
    longest = sorted(range(len(known.examples)), key=lambda i: -known.examples.max_lengths[i])[:size]
    batch = known.examples.batch(longest)

    def passed(counts) -> Measured:
        with fake_tensors(gpu):
            model = build_teacher(one, config, setting, found.vocab, counts[0], 0, found.kind(f"{setting}.model"))
            memory = LiveMemory(ROUND_ON_GPU if gpu else 1)
            for tensor in (*model.parameters(), *model.buffers()):
                memory.add(tensor, "teacher's weights")
            with memory, torch.no_grad():
                memory.enter(TEACHER, TEACHER)
                signal = LiveTeacher(model)(batch)
                if not hidden:
                    _probabilities(signal, gpu)
        return Measured({TEACHER: dict(memory.phases[TEACHER].parts)}, {TEACHER: memory.phases[TEACHER].flops})

    whole = depth_of(config.config, f"{setting}.model")
    alike = not found.whole and len(set(layer_sizes(config.config, f"{setting}.model"))) == 1
    measured = extended((min(_FEW, whole),), (whole,), passed) if alike and whole > _FEW + 1 else passed((None if found.whole else whole,))
    targets, batches, flops = _all(known, size, batch.num_targets, batch.teacher.size, measured.flops[TEACHER])
    return Caching(setting, measured.phases[TEACHER], flops, loaded_dtype(config.config, one.dtype), targets, width, batches, whole)


def _probabilities(signal: Dense, gpu: bool) -> None:
    """Compute the tensors from which records other than hidden states are made, for one chunk of rows."""
    rows = slice(0, min(len(signal.hidden_NH), default_chunk(signal.head.vocab, "cuda" if gpu else "cpu")))
    signal.log_probs(rows).sort(-1)


def _all(known: KnownData, size: int, targets: int, tokens: int, flops: int) -> tuple[int | None, int | None, float | None]:
    """Targets, batches and operations for all data, estimated from one batch; None if the data is unknown."""
    if not known.complete:
        return None, None, None
    examples = known.examples
    return int(examples.num_targets.sum()), -(-len(examples) // size), flops * int(examples.max_lengths.sum()) / tokens
