"""`Objective.loss_and_grad` for a chunk of logits as one Triton kernel: cross-entropy, the KLs and JSD, and their gradient in place.

One program handles one row. It reads both models' logits once for the statistics of their softmaxes and once more for the
terms and the gradient (twice more for JSD, whose gradient needs a sum over the row first), and writes the gradient over the
student's logits in the type of the head's weights. It allocates nothing else of the vocabulary's width.

It has run in Triton's interpreter, compared with float64, and compiles for sm_80 and sm_90; it has not yet run on a GPU. The reference is
`objective.py`. `fused.py` decides whether it is used, and imports it only then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import builtin_name, make_divergence
from .objective import Objective

NONE, KL, JSD = 0, 1, 2
#: For each divergence, a function from its options to the kernel's KIND and the weight of p.
_KINDS = {
    "forward_kl": lambda: (KL, 1.0),
    "reverse_kl": lambda: (KL, 0.0),
    "symmetric_kl": lambda forward_weight=0.5: (KL, forward_weight),
    "generalized_jsd": lambda beta=0.5: (JSD, beta) if 0 < beta < 1 else (KL, 1.0 - beta),
}


def kind(objective: Objective) -> tuple[int, float] | None:
    """The kernel's KIND and weight for an objective's divergence; None if the kernel does not support it."""
    find = _KINDS.get(builtin_name(objective.divergence))
    return find and find(**getattr(objective.divergence, "keywords", {}))


def loss_and_grad(
    objective: Objective,
    logits_nV: Tensor,
    labels_n: Tensor,
    grad_nV: Tensor | None,
    teacher_nV: Tensor | None,
    shares: dict[str, float] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """As `Objective.loss_and_grad`, from both models' raw logits, the student's in float32; `grad_nV` may share their memory, row by row."""
    n, V = logits_nV.shape
    ce_n, kd_n = (torch.empty(n, dtype=torch.float32, device=logits_nV.device) for _ in range(2))
    which, share = kind(objective) if teacher_nV is not None else (NONE, 0.0)
    shares = {"kd": 0.0} | (shares or objective.shares(which != NONE))
    by_row = {name: w_n.float().contiguous() for name, w_n in (weights or {}).items()}
    T = objective.temperature
    teacher_nV = logits_nV if teacher_nV is None else teacher_nV.float()
    written_nV = logits_nV if grad_nV is None else grad_nV
    block = min(4096, triton.next_power_of_2(V))
    if n:
        rows_kernel[(n,)](
            logits_nV,
            teacher_nV,
            labels_n,
            written_nV,
            ce_n,
            kd_n,
            V,
            logits_nV.stride(0),
            teacher_nV.stride(0),
            written_nV.stride(0),
            by_row.get("ce", ce_n),
            by_row.get("kd", kd_n),
            shares["ce"],
            shares["kd"],
            1.0 / T,
            share,
            KIND=which,
            FORWARD=share > 0,
            REVERSE=share < 1,
            SOFT=T != 1,
            GRADIENT=grad_nV is not None,
            HARD=shares["ce"] != 0,
            TAUGHT=shares["kd"] != 0,
            CE_BY_ROW="ce" in by_row,
            KD_BY_ROW="kd" in by_row,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )
    return {"ce": ce_n} | ({"kd": kd_n} if which else {})


def agrees(device: torch.device) -> bool:
    """Whether the kernel on this device agrees with `Objective.loss_and_grad` in float64 on a few rows, up to the rounding of a bfloat16 gradient."""
    generator = torch.Generator().manual_seed(0)
    student_nV, teacher_nV = (3 * torch.randn(6, 5001, generator=generator, dtype=torch.float64) for _ in range(2))
    labels_n = torch.arange(6) * 800
    weights = {"ce": torch.tensor([0.0, 1.0, -2.0, 1.0, 0.5, 3.0]), "kd": torch.tensor([1.0, 1.0, 0.5, -1.0, 0.0, 2.0])}
    for name, given in (("forward_kl", {}), ("reverse_kl", weights), ("generalized_jsd", weights)):
        objective, exact_nV = Objective(0.5, 2.0, make_divergence(name)), torch.empty_like(student_nV)
        tile = lambda _: torch.empty_like(student_nV)  # noqa: E731
        expected = objective.loss_and_grad(student_nV, labels_n, tile, exact_nV, teacher_nV / 2, weights=given)
        logits_nV = student_nV.float().to(device)
        grad_nV = logits_nV.view(torch.bfloat16)[:, : logits_nV.shape[1]]  # over the logits, as in training
        on_device = {term: w_n.to(device) for term, w_n in given.items()}
        found = loss_and_grad(objective, logits_nV, labels_n.to(device), grad_nV, teacher_nV.float().to(device), weights=on_device)
        if not all(torch.allclose(found[term].cpu().double(), expected[term], rtol=1e-4, atol=1e-5) for term in expected):
            return False
        if (grad_nV.cpu().double() - exact_nV).norm() > 0.01 * exact_nV.norm():
            return False
    return True


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, accurate also near 0."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.35, near, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) for -1 <= x <= 0, accurate also near 0."""
    s = x / (2 + x)
    s2 = s * s
    near = 2 * s * (1 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 / 9))))
    return tl.where(x > -0.3, near, tl.log(1 + x))


@triton.jit
def _online(x, top, total):
    """One block of an online softmax: the new maximum, the new sum, this block's exponentials, and the factor for earlier ones."""
    new = tl.maximum(top, tl.max(x, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    e, shrink = tl.exp(x - base), tl.exp(top - base)
    return new, total * shrink + tl.sum(e, 0), e, shrink


@triton.jit
def _difference(x, y):
    """x - y, 0 where both are -inf (where neither has any weight)."""
    d = x - y
    return tl.where(d == d, d, 0.0)


@triton.jit
def _over_mixture(d, share):
    """log(q/m) and -log(p/m) for m = share p + (1 - share) q, d = log(q/p): see `closed_form.py`."""
    log_m = _log1p(tl.where(d <= 0, 1 - share, share) * _expm1(-tl.abs(d)))
    return tl.minimum(d, 0.0) - log_m, tl.maximum(d, 0.0) + log_m


@triton.jit
def rows_kernel(
    logits, teacher, labels, grad, ce, kd, V, logits_stride, teacher_stride, grad_stride, ce_weights, kd_weights, w_ce, w_kd,
    inverse_T, share,
    KIND: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, SOFT: tl.constexpr, GRADIENT: tl.constexpr,
    HARD: tl.constexpr, TAUGHT: tl.constexpr, CE_BY_ROW: tl.constexpr, KD_BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row, y_row, g_row = logits + row * logits_stride, teacher + row * teacher_stride, grad + row * grad_stride
    label = tl.load(labels + row)
    z_label = tl.load(z_row + label)
    columns = tl.arange(0, BLOCK)
    if CE_BY_ROW:
        w_ce *= tl.load(ce_weights + row)
    if KD_BY_ROW:
        w_kd *= tl.load(kd_weights + row)

    # statistics of the softmaxes: the student's at 1 and at T, the teacher's at T; and the mean log-ratio under the student
    top_z, sum_z, top_q, sum_q, top_p, sum_p, mean = float("-inf"), 0.0, float("-inf"), 0.0, float("-inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        here = start + columns < V
        z = tl.load(z_row + start + columns, mask=here, other=float("-inf"))
        x = z * inverse_T
        if SOFT:
            top_z, sum_z, _, _ = _online(z, top_z, sum_z)
        if KIND > 0 or not SOFT:
            top_q, sum_q, e, shrink = _online(x, top_q, sum_q)
        if KIND > 0:
            y = tl.load(y_row + start + columns, mask=here, other=float("-inf")) * inverse_T
            top_p, sum_p, _, _ = _online(y, top_p, sum_p)
            if KIND == 1 and REVERSE:
                mean = mean * shrink + tl.sum(tl.where(e > 0, e * _difference(x, y), 0.0), 0)
    log_q, log_p = tl.log(sum_q), tl.log(sum_p)
    log_z, top = log_q, top_q
    if SOFT:
        log_z, top = tl.log(sum_z), top_z
    tl.store(ce + row, log_z - (z_label - top))
    offset = log_q - log_p

    # the row sum of the divergence's slope
    slopes = 0.0
    if KIND == 1 and REVERSE:
        slopes = (1 - share) * (mean / sum_q - (top_q - top_p) - offset)
    if KIND == 2:
        for start in range(0, V, BLOCK):
            here = start + columns < V
            a = tl.load(z_row + start + columns, mask=here, other=float("-inf")) * inverse_T - top_q
            b = tl.load(y_row + start + columns, mask=here, other=float("-inf")) * inverse_T - top_p
            q = tl.exp(a - log_q)
            of_q, _ = _over_mixture(_difference(a, b) - offset, share)
            slopes += tl.sum(tl.where(q > 0, q * of_q, 0.0), 0)
        slopes *= 1 - share
    slopes += 0 * offset  # NaN where either model's logits hold one

    value = 0 * offset
    for start in range(0, V, BLOCK):
        here = start + columns < V
        z = tl.load(z_row + start + columns, mask=here, other=float("-inf"))
        total = tl.zeros([BLOCK], tl.float32)
        if HARD:
            total += w_ce * (tl.exp(z - top - log_z) - tl.where(start + columns == label, 1.0, 0.0))
        if KIND > 0:
            a = z * inverse_T - top_q
            b = tl.load(y_row + start + columns, mask=here, other=float("-inf")) * inverse_T - top_p
            q, p, d = tl.exp(a - log_q), tl.exp(b - log_p), _difference(a, b) - offset
            slope, terms = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            if KIND == 1:
                gap = tl.maximum(p, q) * _expm1(-tl.abs(d))
                gap = tl.where(d > 0, -gap, gap)
                if FORWARD:
                    slope += share * gap
                    terms += share * (gap - tl.where(p > 0, p * d, 0.0))
                if REVERSE:
                    slope += (1 - share) * tl.where(q > 0, q * d, 0.0)
                    terms += (1 - share) * (tl.where(q > 0, q * d, 0.0) - gap)
            else:
                of_q, of_p = _over_mixture(d, share)
                slope += (1 - share) * tl.where(q > 0, q * of_q, 0.0)
                terms += slope - share * tl.where(p > 0, p * of_p, 0.0)
            value += tl.sum(tl.maximum(terms, 0.0), 0)
            if TAUGHT:  # a slope may be infinite where it has no weight
                total += tl.where(w_kd == 0, 0.0, w_kd / inverse_T * (slope - q * slopes))
        if GRADIENT:
            tl.debug_barrier()  # a gradient in half precision lies over logits that another thread of the row may still have to read
            tl.store(g_row + start + columns, total, mask=here)
    if KIND > 0:
        tl.store(kd + row, value / (inverse_T * inverse_T))
