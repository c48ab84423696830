"""Rules that weigh the targets of a term by the two models' distributions there: a function for each, and the weight made from its score.

A rule is a function `(labels_n, log_p_nV, log_q_nV, position_n) -> [n]` of the targets of one chunk: their tokens, the log-probabilities of
teacher and student at temperature 1 over the V tokens, and the number of each target within its example, from 0. `log_p_nV` is None for a
rule that does not read the teacher, and `log_q_nV` for one that reads neither model. It returns a score from 0 to 1, which depends on that
target alone, so that nothing depends on chunks, micro-batches or processes. The score carries no gradient.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Rows
from ..config.target_weights import RULES
from ..config.target_weights import TargetWeights as Settings
from ..errors import ArgumentError
from ..signals import Signal

Rule = Callable[[Tensor, Tensor | None, Tensor | None, Tensor], Tensor]


def teacher_entropy(labels_n: Tensor, log_p_nV: Tensor | None, log_q_nV: Tensor | None, position_n: Tensor) -> Tensor:
    """H(p) / log V. Jin et al. 2026, Entropy-Aware On-Policy Distillation (arXiv 2603.07079), choose the divergence by the teacher's entropy,
    since a distillation loss behaves differently where the teacher is uncertain; here it weighs the term."""
    return _entropy(log_p_nV)


def student_entropy(labels_n: Tensor, log_p_nV: Tensor | None, log_q_nV: Tensor | None, position_n: Tensor) -> Tensor:
    """H(q) / log V. Xu et al. 2026, TIP (arXiv 2604.14084), keep the targets where it is high."""
    return _entropy(log_q_nV)


def divergence(labels_n: Tensor, log_p_nV: Tensor | None, log_q_nV: Tensor | None, position_n: Tensor) -> Tensor:
    """The Hellinger distance sqrt(1/2 sum (sqrt p - sqrt q)^2): the difficulty of a target in AdaKD (Xie et al. 2025, arXiv 2510.11615)."""
    return ((log_p_nV / 2).exp() - (log_q_nV / 2).exp()).square().sum(-1).div(2).sqrt()


def confidence(labels_n: Tensor, log_p_nV: Tensor | None, log_q_nV: Tensor | None, position_n: Tensor) -> Tensor:
    """1 - q(label): with `power` the factor of the focal loss (Lin et al. 2017, arXiv 1708.02002, section 3.2)."""
    return -torch.expm1(log_q_nV.gather(-1, labels_n[:, None])[:, 0])


def position(labels_n: Tensor, log_p_nV: Tensor | None, log_q_nV: Tensor | None, position_n: Tensor, half_life: float = 64.0) -> Tensor:
    """2^(-i / half_life) at target i of an example. Early targets teach more than late ones: "On the Position Bias of On-Policy Distillation" (2026,
    arXiv 2606.22600), whose own weights fall with the models' accumulated discrepancy instead."""
    return torch.exp2(-position_n.double() / half_life)  # float32 exp2 may round a value differently by its place in memory


def _entropy(log_p_nV: Tensor) -> Tensor:
    return torch.special.entr(log_p_nV.exp()).sum(-1) / math.log(max(2, log_p_nV.shape[-1]))


_FUNCTIONS: dict[str, Rule] = {one.__name__: one for one in (teacher_entropy, student_entropy, divergence, confidence, position)}
_BEFORE_THE_HEAD = {"position"}
_WITHOUT_THE_STUDENT = {"position", "teacher_entropy"}


def register_target_weights(name: str, rule: Rule, needs_teacher: bool = False) -> None:
    """Register a rule for `loss.target_weights.by`, in this process. ArgumentError for a name that is taken.

    needs_teacher   whether it reads `log_p_nV`, which is None otherwise
    """
    if name in RULES:
        raise ArgumentError(f"name: found {name!r}, which is a rule already; choose another name")
    if not name or not callable(rule):
        raise ArgumentError(f"rule: found {rule!r} for {name!r}, expected a name and a function of four tensors")
    _FUNCTIONS[name], RULES[name] = rule, needs_teacher


@dataclass(frozen=True)
class TargetWeights:
    """A rule with its options. The weight is s^power for the score s, clamped to [0, 1]; with `invert` (1 - s)^power.

    terms           the terms that it weighs
    needs_teacher   whether it reads the teacher's distribution
    needs_logits    whether it reads one of the distributions; otherwise the weights are known before the head is computed
    needs_student   whether it reads the student's distribution
    setting         the setting that names it, for messages
    """

    name: str
    rule: Rule
    terms: tuple[str, ...] = ("kd",)
    power: float = 1.0
    invert: bool = False
    needs_teacher: bool = False
    needs_logits: bool = True
    needs_student: bool = True
    setting: str = "loss.target_weights.by"

    @staticmethod
    def of(settings: Settings, setting: str = "loss.target_weights.by") -> "TargetWeights":
        rule, by = _FUNCTIONS[settings.by], settings.by
        if settings.half_life is not None:
            rule = functools.partial(rule, half_life=settings.half_life)
        needs = RULES[by], by not in _BEFORE_THE_HEAD, by not in _WITHOUT_THE_STUDENT
        return TargetWeights(by, rule, settings.terms, settings.power, settings.invert, *needs, setting)

    @torch.no_grad()
    def scores(
        self,
        labels_n: Tensor,
        rows: Rows,
        position_n: Tensor | None,
        signal: Signal | None = None,
        log_p_nV: Tensor | None = None,
        log_q_nV: Tensor | None = None,
        vocab: int = 0,
    ) -> Tensor:
        """The scores of some rows, [n], float32 or as wide as the log-probabilities; NaN where the rule returns NaN.

        rows         their indices among the signal's targets
        position_n   the number of each target within its example, from 0
        log_p_nV     the teacher's log-probabilities at temperature 1, if they are known; otherwise they come from the signal
        log_q_nV     the student's, if the rule reads them
        vocab        V

        ArgumentError if the rule reads a teacher and there is no signal, or returns anything but a tensor [n].
        """
        score_n = None
        if not self.needs_teacher:
            log_p_nV = None
        elif log_p_nV is None:
            if signal is None:
                raise ArgumentError(f"{self.setting}: {self.name} reads the teacher, which some targets do not have")
            if self.rule is teacher_entropy:  # a cache record of a part of the distribution may hold the entropy of all of it
                score_n = signal.exact_metrics(rows, labels_n, log_q_nV).get("teacher_entropy")
            if score_n is None:
                log_p_nV = signal.log_probs(rows, log_q_nV)
            else:
                score_n = score_n / math.log(max(2, vocab))
        if score_n is None:
            score_n = self.rule(labels_n, log_p_nV, log_q_nV, position_n)
        if not isinstance(score_n, Tensor) or score_n.shape != labels_n.shape:
            shape = tuple(score_n.shape) if isinstance(score_n, Tensor) else type(score_n).__name__
            raise ArgumentError(f"{self.setting}: {self.name} returned {shape}, expected one score for each of {len(labels_n)} targets")
        return score_n.to(torch.promote_types(score_n.dtype, torch.float32)).clamp(0, 1)

    def weights(self, score_n: Tensor) -> Tensor:
        """The weights [n] for scores [n]."""
        return (1 - score_n if self.invert else score_n) ** self.power
