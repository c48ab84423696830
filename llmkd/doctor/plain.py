"""The loss as in textbooks, in float64 and without any of llmkd's own loss code: the run's loss is compared with it.

Slow and wasteful on purpose. log_q and log_p are the log-probabilities [N, E] of student and teacher over E events.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config.target_weights import TargetWeights
from ..head import Head
from ..signals import AttentionInputs, Dense, Signal
from ..teachers.mixture import Mixed
from ..teachers.sparse import Sampled, TopK


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a log(a / b), [N]; 0 where a is 0."""
    return torch.where(log_a == -math.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)


def mix(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    return (share * log_a.exp() + (1 - share) * log_b.exp()).log()


def symmetric_kl(log_q: Tensor, log_p: Tensor, forward_weight: float = 0.5) -> Tensor:
    return forward_weight * kl(log_p, log_q) + (1 - forward_weight) * kl(log_q, log_p)


def generalized_jsd(log_q: Tensor, log_p: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = mix(beta, log_p, log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def adaptive_kl(log_q: Tensor, log_p: Tensor, head_mass: float = 0.5) -> Tensor:
    p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs().detach()
    order = p.argsort(dim=-1, descending=True, stable=True)
    before = p.gather(-1, order).cumsum(-1) - p.gather(-1, order)
    in_head = (gap.gather(-1, order) * (before < head_mass)).sum(-1)
    total = gap.sum(-1)
    weight = torch.where(total > 0, in_head / total.clamp_min(1e-300), 0.5)
    return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)


def alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    if alpha == 0:
        return kl_unnormalised(beta * log_q, beta * log_p) / beta**2
    if beta == 0:
        return kl_unnormalised(alpha * log_p, alpha * log_q) / alpha**2
    p, q, both = log_p.exp(), log_q.exp(), alpha + beta
    return -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both).sum(-1) / (alpha * beta)


def kl_unnormalised(log_a: Tensor, log_b: Tensor) -> Tensor:
    return kl(log_a, log_b) + (log_b.exp() - log_a.exp()).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda log_q, log_p: kl(log_p, log_q),
    "reverse_kl": lambda log_q, log_p: kl(log_q, log_p),
    "symmetric_kl": symmetric_kl,
    "generalized_jsd": generalized_jsd,
    "skewed_forward_kl": lambda log_q, log_p, alpha=0.1: kl(log_p, mix(alpha, log_p, log_q)),
    "skewed_reverse_kl": lambda log_q, log_p, alpha=0.1: kl(log_q, mix(alpha, log_q, log_p)),
    "adaptive_kl": adaptive_kl,
    "total_variation": lambda log_q, log_p: (log_q.exp() - log_p.exp()).abs().sum(-1) / 2,
    "alpha_beta": alpha_beta,
}


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    log_q_NV = logits_NV - logits_NV.logsumexp(-1, keepdim=True)
    return -log_q_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N]


def distance(logits_NV: Tensor, signal: Signal, divergence: str, options: dict[str, float], temperature: float) -> Tensor:
    """T^2 D between the student, by its logits in float64, and a signal about the same targets, [N].

    TypeError for a signal without a textbook form: a top-k record at a temperature for which it does not hold the tail, or whose distribution
    is mixed with another teacher's (its tail then follows the student's).
    """
    log_q_NV = torch.log_softmax(logits_NV / temperature, -1)
    value_N = _distance(log_q_NV, signal, DIVERGENCES[divergence], options, temperature)
    return temperature**2 * value_N


def _distance(log_q_NV: Tensor, signal: Signal, divergence: Callable, options: dict[str, float], temperature: float) -> Tensor:
    match signal:
        case Dense() | Mixed(combine="probabilities" | "log_probabilities"):
            return divergence(log_q_NV, _log_probs(signal, temperature), **options)
        case Mixed(combine="divergences"):
            each = [_distance(log_q_NV, part, divergence, options, temperature) for part in signal.parts]
            return sum(share * value for share, value in zip(_shares(signal), each, strict=True))
        case TopK() if 1 / temperature in signal.tail_exponents:
            kept_NK = signal.log_p_NK > -math.inf
            tail_N = signal.tail_NS[:, signal.tail_exponents.index(1 / temperature)].double()
            log_p_NE = torch.cat([signal.log_p_NK.double() / temperature, tail_N[:, None]], 1).log_softmax(-1)
            q_NV = log_q_NV.exp()
            named_NV = torch.zeros_like(q_NV).scatter(1, signal.ids_NK, kept_NK.to(q_NV.dtype))
            rest_N = (q_NV * (1 - named_NV)).sum(-1).clamp_min(1e-300).log()
            log_q_NK = torch.where(kept_NK, log_q_NV.gather(1, signal.ids_NK), -1e30)
            return divergence(torch.cat([log_q_NK, rest_N[:, None]], 1), log_p_NE, **options)
        case Sampled():
            return -log_q_NV.gather(1, signal.ids_ND).mean(1) - signal.soft_entropy_N.double()
    raise TypeError(type(signal).__name__)


def target_weights(settings: TargetWeights, logits_NV: Tensor, signal: Signal | None, labels_N: Tensor, position_N: Tensor) -> Tensor:
    """The weight of each target by a rule, [N], from the student's logits in float64 and a signal. TypeError for a rule or a signal without a
    textbook form."""
    log_q_NV = torch.log_softmax(logits_NV.detach().double(), -1)
    match settings.by:
        case "teacher_entropy" | "student_entropy":
            log_NV = log_q_NV if settings.by == "student_entropy" else _log_probs(signal, 1.0)
            score_N = torch.where(log_NV == -math.inf, 0.0, -log_NV.exp() * log_NV).sum(-1) / math.log(log_NV.shape[-1])
        case "divergence":  # 1 - the Bhattacharyya coefficient is the square of the Hellinger distance
            score_N = (1 - ((log_q_NV + _log_probs(signal, 1.0)) / 2).exp().sum(-1)).clamp_min(0).sqrt()
        case "confidence":
            score_N = 1 - log_q_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N].exp()
        case "position":
            score_N = 0.5 ** (position_N.to(labels_N.device).double() / (settings.half_life or 64))
        case other:
            raise TypeError(f"rule {other}")
    score_N = score_N.clamp(0, 1)
    return (1 - score_N if settings.invert else score_N) ** settings.power


def precisions(signal: Signal, labels_N: Tensor) -> set[torch.dtype]:
    """The types in which the parts of a signal compute their log-probabilities."""
    if isinstance(signal, Mixed):
        return {dtype for part in signal.parts for dtype in precisions(part, labels_N)}
    return {signal.label_log_probs(slice(None), labels_N).dtype}


def take(signal: Signal, rows_n: Tensor) -> Signal:
    """The signal at some of its targets."""
    if isinstance(signal, Mixed):
        return dataclasses.replace(signal, parts=[take(part, rows_n) for part in signal.parts], labels_N=signal.labels_N[rows_n])
    each = {field.name: getattr(signal, field.name) for field in dataclasses.fields(signal)}
    return dataclasses.replace(signal, **{name: value[rows_n] for name, value in each.items() if isinstance(value, Tensor)})


def _log_probs(signal: Signal, temperature: float) -> Tensor:
    if isinstance(signal, Dense):
        return torch.log_softmax(logits(signal.head, signal.hidden_NH) / temperature, -1)
    if not isinstance(signal, Mixed):
        raise TypeError(f"mixed {type(signal).__name__}")
    parts, shares = [_log_probs(part, temperature) for part in signal.parts], _shares(signal)
    if signal.combine == "log_probabilities":
        return torch.log_softmax(sum(share * log_p for share, log_p in zip(shares, parts, strict=True)), -1)
    return sum(share * log_p.exp() for share, log_p in zip(shares, parts, strict=True)).log()


def _shares(signal: Mixed) -> list[Tensor]:
    """The weight of each part at each target, [N, 1]; they sum to one."""
    weights = [torch.full((len(signal.labels_N), 1), math.exp(one), dtype=torch.float64) for one in signal.log_weights]
    if signal.confidence:
        each = [part.label_log_probs(slice(None), signal.labels_N).double().cpu().exp()[:, None] for part in signal.parts]
        weights = [weight * value for weight, value in zip(weights, each, strict=True)]
    total = sum(weights)
    if signal.combine == "divergences":
        return [(weight / total)[:, 0].to(signal.labels_N.device) for weight in weights]
    return [(weight / total).to(signal.labels_N.device) for weight in weights]


def logits(head: Head, hidden_NH: Tensor) -> Tensor:
    """Logits in float64, [N, V]. The product with a plain linear head is computed in float64; other heads compute it themselves."""
    project = head.project
    if type(project) is not torch.nn.Linear:
        return head.logits(hidden_NH).double()
    weight_VH, hidden_NH = project.weight[: head.vocab], hidden_NH.to(project.weight.dtype)  # rounded as for the head's own product
    blocks = [hidden_NH.double() @ weight_VH[at : at + 8192].double().T for at in range(0, len(weight_VH), 8192)]
    out_NV = torch.cat(blocks, 1)
    if project.bias is not None:
        out_NV = out_NV + project.bias[: head.vocab].double()
    out_NV = out_NV * head.scale
    return torch.tanh(out_NV / head.softcap) * head.softcap if head.softcap else out_NV


def between_states(distance: str, ours_NE: Tensor, theirs_NE: Tensor) -> Tensor:
    """The distance of hidden states, [N]: mse, normalized_mse or cosine."""
    if distance == "mse":
        return ((ours_NE - theirs_NE) ** 2).sum(-1) / ours_NE.shape[-1]
    ours, theirs = ((x * x).sum(-1).sqrt() for x in (ours_NE, theirs_NE))
    cosine_N = (ours_NE * theirs_NE).sum(-1) / (ours * theirs)
    return (1 - cosine_N) * (2 if distance == "normalized_mse" else 1)


def maps_apart(student: AttentionInputs, teacher: AttentionInputs, places: Sequence[int], mean: bool) -> Tensor:
    """KL(teacher's attention || student's), [n], for targets at these places of a single row: the mean over heads, or, with `mean`, of the maps
    averaged over heads."""

    def row(one: AttentionInputs, t: int, first: int) -> Tensor:
        h, g = one.query.shape[1], one.key.shape[1]
        heads = [one.key[0, a * g // h, first : t + 1] @ one.query[0, a, t] * one.scaling for a in range(h)]
        scores_hm = torch.stack(heads)
        p_hm = (scores_hm if one.softcap is None else one.softcap * torch.tanh(scores_hm / one.softcap)).softmax(-1)
        return p_hm.mean(0, keepdim=True) if mean else p_hm

    return _rows_apart(row, student, teacher, places)


def relations_apart(student: AttentionInputs, teacher: AttentionInputs, places: Sequence[int], parts: int) -> Tensor:
    """The same for the relations of queries, of keys and of values with one another (MiniLMv2), each in `parts` heads; the sum of the three."""

    def row(one: AttentionInputs, t: int, first: int, name: str) -> Tensor:
        vectors_Tpd = getattr(one, name)[0].transpose(0, 1).flatten(1).unflatten(1, (parts, -1))
        scores_pm = torch.einsum("pd,mpd->pm", vectors_Tpd[t], vectors_Tpd[first : t + 1])
        return (scores_pm / vectors_Tpd.shape[-1] ** 0.5).softmax(-1)

    return sum(_rows_apart(functools.partial(row, name=name), student, teacher, places) for name in ("query", "key", "value"))


def _rows_apart(row: Callable[..., Tensor], student: AttentionInputs, teacher: AttentionInputs, places: Sequence[int]) -> Tensor:
    windows, found = [one.window for one in (student, teacher) if one.window is not None], []
    student, teacher = (one.each(Tensor.double) for one in (student, teacher))
    for t in places:
        first = max([0, *(t - window + 1 for window in windows)])
        found.append(kl(row(teacher, t, first).log(), row(student, t, first).log()).mean())
    return torch.stack(found)
