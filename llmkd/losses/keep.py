"""Selection of the targets that count: the share of each example's targets that a rule of `target_weights` scores highest."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..batch import Batch
from ..config.fields import part_of
from ..config.target_weights import Keep as Settings
from ..config.target_weights import TargetWeights as RuleSettings
from ..head import Head
from ..signals import Signal
from .fused import Tiles, block_rows, default_chunk, has_full_distribution, teacher_log_probs
from .target_weights import TargetWeights


@dataclass(frozen=True)
class Keep:
    """Keeps ceil(share n) of the n targets of each example: those with the highest scores, or with `invert` the lowest; of equal scores the earlier.

    Targets are chosen within each example, so that the choice does not depend on micro-batches or ranks. Xu et al. 2026, TIP (arXiv
    2604.14084), train only on the tokens with the highest student entropy and find half of them enough.

    Scores carry no gradient. A rule that reads the student's distribution computes the head for every target, before the loss does.
    """

    share: float
    rule: TargetWeights
    invert: bool = False

    @staticmethod
    def of(settings: Settings, setting: str) -> "Keep":
        """From complete settings, as `chosen_by` returns them. `setting`: the name of the setting that names the rule, for messages."""
        return Keep(settings.share, TargetWeights.of(RuleSettings(by=settings.by), setting), settings.invert)

    @torch.no_grad()
    def __call__(self, hidden_NH: Tensor, head: Head, signal: Signal | None, batch: Batch, chunk: int | None = None) -> Batch:
        """The batch with `kept` set. `chunk`: rows of the head at a time. ValueError if `batch.examples` do not cover its targets."""
        counts = [example.num_targets for example in batch.examples]
        if sum(counts) != batch.num_targets:
            raise ValueError(
                f"a share of each example's targets is kept, and the batch's examples have {sum(counts)} of its {batch.num_targets}"
            )
        most = [part_of(self.share, n) for n in counts]
        if most == counts:
            return batch
        score_N = self.scores(hidden_NH, head, signal, batch, chunk or default_chunk(head.vocab, hidden_NH.device.type))
        key_N = torch.where(score_N.isnan(), -torch.inf, score_N if self.invert else -score_N)  # NaN is kept and so reaches the loss
        device, starts = key_N.device, [0, *accumulate(counts)]
        owner_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts), output_size=sum(counts)).to(device)
        best_N = key_N.argsort(stable=True)
        best_N = best_N[owner_N[best_N].argsort(stable=True)]  # by example, and in each by score
        first = torch.cat([torch.arange(start, start + k) for start, k in zip(starts, most, strict=False)]).to(device)
        return batch.keeping(best_N[first].sort().values)

    def scores(self, hidden_NH: Tensor, head: Head, signal: Signal | None, batch: Batch, chunk: int) -> Tensor:
        """The score of every target, [N]. Logits are computed for a chunk, and everything else for a block of a few rows."""
        rule, N, device = self.rule, batch.num_targets, hidden_NH.device
        if not rule.needs_logits:
            return rule.scores(batch.labels_N, slice(0, N), batch.position_N).to(device)
        found, position_N, tiles = [], batch.position_N.to(device), Tiles(head.vocab, device)
        whole, block = rule.needs_teacher and has_full_distribution(signal), block_rows(head.vocab, device.type, signal)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, chunk):
                rows = slice(start, min(start + chunk, N))
                z_nV = y_nV = None
                if rule.needs_student:
                    out = tiles("student", rows.stop - start, head.dtype) if head.is_affine else None
                    z_nV = head.logits(hidden_NH[rows], out, rows)
                if whole:
                    y_nV = teacher_log_probs(signal, rows, 1.0, tiles, soften=False)
                for first in range(start, rows.stop, block):
                    part = slice(first, min(first + block, rows.stop))
                    log_q_nV, log_p_nV = (x if x is None else x[first - start : part.stop - start].log_softmax(-1) for x in (z_nV, y_nV))
                    found.append(rule.scores(batch.labels_N[part], part, position_N[part], signal, log_p_nV, log_q_nV, head.vocab))
        return torch.cat(found)
