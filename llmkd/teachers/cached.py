"""A teacher whose answers were written down: it reads them, and needs no weights but a head."""

import torch

from ..signals import Batch, Signal
from .kinds import kind_of
from .store import Store


class Cached:
    """Reads 560 targets (8 examples of 70) in a few milliseconds, decoding included; see `kinds` for what each kind is."""

    def __init__(self, store: Store, device):
        self.store, self.device = store, device
        self.kind = kind_of(store.header["kind"], store.header["vocab"], store.folder)
        self.figures = self.kind.figures

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        records_NR = self.store.read([e.identity for e in batch.examples], [e.targets for e in batch.examples])
        return self.kind.signal(torch.from_numpy(records_NR), self.device)
