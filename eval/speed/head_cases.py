"""The cases of eval/speed/head.py: the matrix products alone, llmkd's head, and peers' heads as their authors run them."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkd.batch import zeros_of
from llmkd.head import Head
from llmkd.losses import ratio
from llmkd.losses.divergences import make_divergence
from llmkd.losses.fused import default_chunk, fused_loss
from llmkd.losses.objective import Objective
from llmkd.signals import Dense

IGNORE = -100
#: Mean loss over the targets, and gradients of the student's hidden states [N, H] and, if it trains, of the student's head.
Result = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Problem:
    student_NH: Tensor
    teacher_NH: Tensor
    student_head: torch.nn.Linear
    teacher_head: torch.nn.Linear
    labels_N: Tensor  # IGNORE where not supervised

    @functools.cached_property
    def rows(self) -> Tensor:
        return (self.labels_N != IGNORE).nonzero()[:, 0]

    def weights(self, share: float) -> dict[str, Tensor]:
        """Of CE and KD at the supervised rows [n]: for that share of them numbers from 0.5 to 1.5, 0 for the others."""
        place = torch.arange(len(self.rows), device=self.rows.device)
        some = place % 4 < round(4 * share)
        return {"ce": some * (0.5 + place % 7 / 6), "kd": some * (0.5 + place % 5 / 4)}


@dataclass(frozen=True)
class Case:
    name: str
    divergence: str
    kd_ratio: float
    run: Callable[[Problem], Result | None]
    remark: str = ""
    trains: bool = False  # the student's head
    weighted: float = 0.0  # the share of rows with a weight, where rows have weights
    lower_bound: bool = False  # the products alone


def problem(options) -> Problem:
    dtype, device = getattr(torch, options.dtype), options.device
    torch.manual_seed(0)

    def head(width: int) -> torch.nn.Linear:
        layer = torch.nn.Linear(width, options.vocab, bias=False, device=device, dtype=dtype).requires_grad_(False)
        layer.weight.normal_(0, 2 * width**-0.5)
        return layer

    hidden = [torch.randn(options.rows, width, device=device).to(dtype) for width in (options.width, options.teacher_width)]
    labels = torch.randint(options.vocab, (options.rows,), device=device)
    labels[torch.randperm(options.rows, device=device)[: round(options.rows * (1 - options.supervised))]] = IGNORE
    return Problem(*hidden, head(options.width), head(options.teacher_width), labels)


def backward(problem: Problem, loss: Callable[[Tensor], Tensor]) -> Result:
    hidden_NH = problem.student_NH.detach().requires_grad_()
    value = loss(hidden_NH)
    weights = [problem.student_head.weight] if problem.student_head.weight.requires_grad else []
    return value.detach(), list(torch.autograd.grad(value, [hidden_NH, *weights]))


def with_head(run: Callable[[Problem], Result | None]) -> Callable[[Problem], Result | None]:
    """The same with a student's head that trains."""

    def trained(p: Problem) -> Result | None:
        p.student_head.requires_grad_(True)
        try:
            return run(p)
        finally:
            p.student_head.requires_grad_(False)

    return trained


def ours(divergence: str, kd_ratio: float, chunk: int | None, weighted: float = 0.0) -> Callable[[Problem], Result]:
    objective = Objective(kd_ratio, 1.0, make_divergence(divergence))

    def run(p: Problem) -> Result:
        V, rows, weights = p.student_head.out_features, p.rows, p.weights(weighted) if weighted else {}
        known = (weights, zeros_of(weights)) if weights else ()  # as a batch has them

        def loss(hidden_NH):
            signal = Dense(p.teacher_NH.index_select(0, rows), Head(p.teacher_head, V))
            hidden_nH, labels_n = hidden_NH.index_select(0, rows), p.labels_N.index_select(0, rows)
            return fused_loss(hidden_nH, Head(p.student_head, V), labels_n, objective, signal, chunk, *known)[0] / len(rows)

        return backward(p, loss)

    return run


def in_general_form(run: Callable[[Problem], Result]) -> Callable[[Problem], Result]:
    """The same without the shorter form of CE and forward KL that a CPU has (`losses/ratio.py`)."""

    def general(p: Problem) -> Result:
        own, ratio.applies = ratio.applies, lambda *_: False
        try:
            return run(p)
        finally:
            ratio.applies = own

    return general


def products(p: Problem) -> None:
    """The three of a compact, frozen head, into tensors that are there; the fourth is the gradient of one that trains."""
    h, t, W, U = p.student_NH[p.rows], p.teacher_NH[p.rows], p.student_head.weight.detach(), p.teacher_head.weight
    wide = {"out_dtype": torch.float32} if h.is_cuda and h.dtype != torch.float32 else {}
    if "tiles" not in p.__dict__:
        shape = len(p.rows), W.shape[0]
        p.__dict__["tiles"] = [torch.empty(shape, dtype=torch.float32 if wide else h.dtype, device=h.device) for _ in range(2)]
        p.__dict__["grad"] = p.tiles[0].to(W.dtype) if wide else p.tiles[0]
    torch.mm(h, W.T, **wide, out=p.tiles[0])
    torch.mm(t, U.T, **wide, out=p.tiles[1])
    torch.mm(p.grad, W)
    if p.student_head.weight.requires_grad:
        torch.mm(p.grad.T, h)


def torchtune(p: Problem) -> Result:
    """As recipes/knowledge_distillation_single_device.py does it: 8 chunks of logits, CE and KL of each."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    ce, kd = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()

    def loss(hidden_NH):
        logits = [p.student_head(chunk) for chunk in hidden_NH[None].chunk(8, dim=1)]
        with torch.no_grad():
            teacher_chunks = [p.teacher_head(chunk) for chunk in p.teacher_NH[None].chunk(8, dim=1)]
        kd_loss = kd(logits, teacher_chunks, p.labels_N[None])
        return 0.5 * ce(logits, p.labels_N[None]) + 0.5 * kd_loss

    return backward(p, loss)


def liger(compiled: bool, chunk: int = 1024) -> Callable[[Problem], Result]:
    def run(p: Problem) -> Result:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(compiled=compiled, chunk_size=chunk)
        weights = p.student_head.weight, p.teacher_NH, p.teacher_head.weight
        return backward(p, lambda hidden_NH: loss(hidden_NH, *weights, p.labels_N))

    return run


def liger_triton(p: Problem) -> Result:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5, ignore_index=IGNORE)
    weights = p.student_head.weight, p.teacher_NH, p.teacher_head.weight
    return backward(p, lambda hidden_NH: loss(hidden_NH, *weights, p.labels_N))


def trl_gkd(beta: float) -> Callable[[Problem], Result]:
    """GKDTrainer's loss on both models' whole logits."""

    def run(p: Problem) -> Result:
        from trl.experimental.gkd import GKDTrainer

        def loss(hidden_NH):
            with torch.no_grad():
                teacher_logits = p.teacher_head(p.teacher_NH[None])
            return GKDTrainer.generalized_jsd_loss(
                p.student_head(hidden_NH[None]), teacher_logits, p.labels_N[None], beta, num_items_in_batch=len(p.rows)
            )

        return backward(p, loss)

    return run


def trl_chunked(beta: float) -> Callable[[Problem], Result]:
    def run(p: Problem) -> Result:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        weights, mask = (p.student_head.weight, p.teacher_head.weight), (p.labels_N != IGNORE)[None]
        return backward(p, lambda hidden_NH: _chunked_divergence_loss(hidden_NH[None], p.teacher_NH[None], *weights, mask, beta)[0])

    return run


def cases(options) -> list[Case]:
    FKL, RKL, JSD = "forward_kl", "reverse_kl", "generalized_jsd"
    chunk = f"chunk {options.chunk or default_chunk(options.vocab, options.device)}"
    mine = [(FKL, 0.5), (RKL, 0.5), (JSD, 0.5), (FKL, 1.0), (JSD, 1.0)]
    found = [Case("the three matrix products", "", 0, products, lower_bound=True)]
    found += [Case(f"llmkd {d}{' + CE' if kd < 1 else ''}", d, kd, ours(d, kd, options.chunk), chunk) for d, kd in mine]
    for share, words in ((1.0, "every row weighted"), (0.5, "half of the rows without a weight")):
        found.append(Case(f"llmkd {FKL} + CE, {words}", FKL, 0.5, ours(FKL, 0.5, options.chunk, share), chunk, weighted=share))
    if options.device == "cpu":
        found.append(Case(f"llmkd {FKL} + CE, general form", FKL, 0.5, in_general_form(ours(FKL, 0.5, options.chunk)), chunk))
    no_entropy, makes_it = "its loss leaves out the teacher's entropy", "makes the head's gradient too"
    chunked_jsd = Case("Liger chunked JSD + CE, compiled", JSD, 0.5, liger(True, options.chunk or 1024), makes_it)
    peers = [
        Case("torchtune chunked forward KL + chunked CE", FKL, 0.5, torchtune, no_entropy),
        chunked_jsd,
        Case("Liger chunked JSD + CE, compiled, 256 rows a chunk", JSD, 0.5, liger(True, 256), makes_it),
        Case("Liger chunked JSD + CE, eager", JSD, 0.5, liger(False), makes_it),
        Case("TRL GKD forward KL", FKL, 1.0, trl_gkd(0.0)),
        Case("TRL GKD JSD", JSD, 1.0, trl_gkd(0.5)),
        Case("TRL chunked forward KL", FKL, 1.0, trl_chunked(0.0), "skips unsupervised rows on a GPU only"),
        Case("TRL chunked JSD", JSD, 1.0, trl_chunked(0.5), "skips unsupervised rows on a GPU only"),
    ]
    if options.device == "cuda":
        peers.append(Case("Liger Triton JSD", JSD, 1.0, liger_triton, makes_it))
    shown = found + (peers if options.peers else [])
    trained = [one for one in shown if one.name in (found[1].name, found[3].name, peers[0].name, chunked_jsd.name)]
    shown.append(Case("the four matrix products, of a head that trains", "", 0, with_head(products), trains=True, lower_bound=True))
    remarks = {chunked_jsd.name: ""}
    return shown + [
        dataclasses.replace(
            one, name=f"{one.name}, head trained", run=with_head(one.run), remark=remarks.get(one.name, one.remark), trains=True
        )
        for one in trained
    ]
