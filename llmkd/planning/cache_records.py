"""Teacher caches for a plan: records without values, in the format that an existing cache has or a future one will have."""

from pathlib import Path

import torch

from ..batch import Batch
from ..config.recipe import Teacher
from ..errors import UserError
from ..model_folder.files import loaded_dtype, width_of
from ..models.classifier import ClassifierKind
from ..models.kinds import CAUSAL, ModelKind
from ..models.quantization import DTYPES
from ..signals import Signal
from ..teachers.cache.records import HiddenFormat, RecordFormat, make_record_format, read_record_format
from ..teachers.cache.shards import read_header
from ..teachers.cache.stored_head import StoredHead
from ..teachers.resolve import listed_format
from .model_configs import ModelConfig


class RecordsWithoutValues:
    """Like `CachedTeacher`, but made from a record format only."""

    def __init__(self, format: RecordFormat, device):
        self.format, self.device, self.metrics = format, device, format.metrics

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        return self.format.signal(torch.empty(batch.num_targets, self.format.bytes, dtype=torch.uint8), self.device)


def format_of(settings: Teacher, setting: str, vocab: int, found: ModelConfig | None, kind: ModelKind = CAUSAL) -> RecordFormat:
    """The record format of a teacher's cache, or of the cache that `llmkd cache` would write for it; a server's answers have that of kind topk.

    found   the teacher's configuration, if it is known
    kind    of the student; the caches of classifiers hold logits as hidden states
    """
    if settings.cache is None:
        return listed_format(settings, vocab)
    folder = Path(settings.cache.path).expanduser()
    if (folder / "cache.json").is_file():
        return read_record_format(read_header(folder, f"{setting}.cache.path")["kind"], vocab, folder)
    classes = isinstance(kind, ClassifierKind)
    if (settings.cache.kind or ("hidden" if classes else "topk")) != "hidden":
        return make_record_format(settings.cache, vocab)
    if found is None:
        raise UserError(f"{setting}.cache.path: there is no teacher cache at {settings.cache.path}; a plan then needs {setting}.model")
    width, dtype = vocab if classes else width_of(found.config), loaded_dtype(found.config, settings.dtype)
    head = StoredHead({"weight": torch.empty(vocab, width, dtype=DTYPES[dtype])}, 1.0, None)
    kept = {"float64": "float32"}.get(dtype, dtype)
    wanted = settings.cache.hidden_dtype
    return HiddenFormat(vocab, width, kept if wanted in (None, "auto") else wanted, head)
