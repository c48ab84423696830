"""Size of a teacher cache on disk, error of the loss that it gives, and time to read it.

    python eval/speed/cache.py [--vocab 128256] [--targets 96] [--cache_mb 100] [--threads 1]

Sizes and errors are of distributions over --vocab tokens, drawn after Zipf's law with entropies of 0.8 to 7.6 nats, for a student
whose distribution differs from the teacher's. The loss of a step and its gradient with respect to the student's logits are compared with those
from the whole distribution in float64. Reading is timed on a teacher cache of --cache_mb, in batches of 8 examples of 70 targets in random order, decoding
included, next to the time of one forward and backward pass of the fused head on the same targets. Whole training steps are in
epoch.py. Prints Markdown.
"""

import argparse
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmkd.batch import Batch, Example, View
from llmkd.config.teacher import Cache
from llmkd.head import Head
from llmkd.losses.divergences import forward_kl
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.signals import Dense, FullDistribution
from llmkd.teachers.cache.records import make_record_format
from llmkd.teachers.cache.shards import ShardPlan, TeacherCache, Writer
from llmkd.teachers.cached import CachedTeacher

KINDS = [
    Cache(path="-", kind="topk", k=50, value_bits=4),
    Cache(path="-", kind="topk", k=50, value_bits=6),
    Cache(path="-", kind="topk", k=50, value_bits=8),
    Cache(path="-", kind="topk", k=64, value_bits=8),
    Cache(path="-", kind="topk", k=128, value_bits=6),
    Cache(path="-", kind="topk", k=128, value_bits=8),
    Cache(path="-", kind="sampled", num_samples=50),
    Cache(path="-", kind="sampled", num_samples=12),
    Cache(path="-", kind="hidden", hidden_dtype="bfloat16"),
    Cache(path="-", kind="hidden", hidden_dtype="int8"),
]


@dataclass(frozen=True)
class Whole(FullDistribution):
    log_p_NV: torch.Tensor

    def log_probs(self, rows, log_q_nV=None, temperature: float = 1.0) -> torch.Tensor:
        return (self.log_p_NV[rows] / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Fitted:
    """The form that DistillKit's README recommends, made here from its description: the first `exact` of K sorted log-probabilities in
    bfloat16, a least-squares curve with `terms` of the rank through the others, ids at full width, and the rest taken as zero."""

    ids_NK: torch.Tensor
    log_p_NK: torch.Tensor

    @staticmethod
    def of(log_p_NV: torch.Tensor, k: int, exact: int, terms: tuple) -> "Fitted":
        log_p_NK, ids_NK = log_p_NV.topk(k)
        rank = torch.arange(k - exact, dtype=torch.float64)
        basis_KT = torch.stack([rank.sqrt() if term == "sqrt" else rank**term for term in terms], 1)
        weights_TN = torch.linalg.lstsq(basis_KT, log_p_NK[:, exact:].T.double(), driver="gelsd").solution
        curve_NK = (basis_KT @ weights_TN).T
        return Fitted(ids_NK, torch.cat([log_p_NK[:, :exact].bfloat16().double(), curve_NK], 1))

    def divergence(self, divergence, rows, log_q_nV, temperature=1.0) -> torch.Tensor:
        return (self.log_p_NK.exp() * (self.log_p_NK - log_q_nV.gather(1, self.ids_NK))).sum(1)

    @staticmethod
    def bytes(vocab: int, k: int, exact: int, terms: tuple) -> int:
        return (2 * exact + 4 * len(terms)) + -(-k * (vocab - 1).bit_length() // 8)


PEERS = [(50, 1, (0, 1, "sqrt")), (128, 16, (0, 1, 2, 3, 4, "sqrt"))]


class Body:
    """Enough of a LanguageModel for `make_record_format`."""

    def __init__(self, width: int, vocab: int):
        torch.manual_seed(0)
        self.dtype = torch.bfloat16
        self.head = Head(torch.nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16).requires_grad_(False), vocab)


def named(cache: Cache) -> str:
    return {
        "topk": f"topk, K = {cache.k}, {cache.value_bits} bits",
        "sampled": f"sampled, {cache.num_samples} draws",
        "hidden": f"hidden, {cache.hidden_dtype}",
    }[cache.kind]


def distributions(targets: int, vocab: int) -> torch.Tensor:
    """[targets, vocab] logits: -a log(rank), ranks dealt anew for each target, a little noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(targets, vocab, dtype=torch.float64)
    for n in range(targets):
        steep = 1.0 + 2.5 * (n + 1) / targets
        order = torch.randperm(vocab, generator=generator)
        logits[n, order] = -steep * torch.arange(1, vocab + 1, dtype=torch.float64).log()
    return logits + 0.3 * torch.randn(targets, vocab, generator=generator, dtype=torch.float64)


def losses(options) -> list[dict]:
    """Bytes, error of the loss and of its gradient, of each kind that is not exact by construction."""
    logits_NV = distributions(options.targets, options.vocab)
    labels_N = torch.distributions.Categorical(logits=logits_NV).sample()
    student_NV = logits_NV + torch.randn(logits_NV.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    examples = [Example(f"{n:016x}", 1, -1) for n in range(options.targets)]
    truth = Whole(logits_NV.log_softmax(-1))

    def loss_and_gradient(signal):
        z_NV = student_NV.clone().requires_grad_()
        kd_N = signal.divergence(forward_kl, slice(None), z_NV.log_softmax(-1), 1.0)
        return kd_N.detach(), torch.autograd.grad(kd_N.sum(), z_NV)[0]

    dense, dense_gradient = loss_and_gradient(truth)
    rows = []
    for k, exact, terms in PEERS:
        found, gradient = loss_and_gradient(Fitted.of(truth.log_p_NV, k, exact, terms))
        error = (gradient - dense_gradient).norm() / dense_gradient.norm()
        name, size = f"DistillKit's form, K = {k}", Fitted.bytes(options.vocab, k, exact, terms)
        rows.append(_row(name, size, found.sum() / dense.sum(), error))
    for cache in KINDS:
        body = Body(64, options.vocab)
        record_format = make_record_format(cache, options.vocab, body)
        if cache.kind == "hidden":
            torch.manual_seed(3)
            body.head.project.weight.data.mul_(8)
            hidden = torch.randn(options.targets, 64).bfloat16()
            told, signal = Dense(hidden, body.head), None
            exact, exact_gradient = loss_and_gradient(told)
            signal = record_format.signal(torch.from_numpy(record_format.record(told, labels_N, examples)), "cpu")
            found, gradient = loss_and_gradient(signal)
            size = {"bfloat16": 2 * 4096, "int8": 4096 + 4}[cache.hidden_dtype]  # of Llama-3.1-8B; the error hardly depends on the width
        else:
            exact, exact_gradient = dense, dense_gradient
            signal = record_format.signal(torch.from_numpy(record_format.record(Whole(truth.log_p_NV.float()), labels_N, examples)), "cpu")
            found, gradient = loss_and_gradient(signal)
            size = record_format.bytes
        error = (gradient - exact_gradient).norm() / exact_gradient.norm()
        rows.append(_row(named(cache), size, found.sum() / exact.sum(), error))
    return rows


def _row(name: str, size: int, share: float, error: float) -> dict:
    return {"kind": name, "bytes per target": size, "loss, of the whole's": f"{share:.4f}", "error of the gradient": f"{error:.2%}"}


def reading(options) -> list[dict]:
    """Targets a second from a teacher cache on disk, decoded, and of the fused head on as many."""
    rows, vocab, width = [], options.vocab, 2048
    head = Head(torch.nn.Linear(256, vocab, bias=False).requires_grad_(False), vocab)
    hidden = torch.randn(560, 256, requires_grad=True)
    for cache in (KINDS[3], KINDS[6], KINDS[8], KINDS[9]):
        body = Body(width, vocab)
        record_format = make_record_format(cache, vocab, body)
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            count = options.cache_mb * 10**6 // record_format.bytes // 70
            hashes = [f"{i:016x}" for i in range(count)]
            writer = Writer(folder / "cache", record_format, {}, ShardPlan.of(hashes, [70] * count, record_format.bytes))
            writer.begin()
            some = [Example(f"{i:016x}", 1, -1) for i in range(70)]
            told = Dense(torch.randn(70, width).bfloat16(), body.head)
            records = record_format.record(told, torch.zeros(70, dtype=torch.long), some)
            for n in writer.left():
                shard = writer.shard(n)
                shard.put([hashes[i] for i in shard.examples], shard.targets_E.tolist(), np.tile(records, (len(shard.examples), 1)))
                shard.write()
            writer.finish()
            before = time.perf_counter()
            written = TeacherCache.open(folder / "cache")
            opened = time.perf_counter() - before
            teacher, seconds = CachedTeacher(written, "cpu"), []
            view, labels = View({}, torch.zeros(0)), torch.zeros(560, dtype=torch.long)
            generator = np.random.default_rng(0)
            for _ in range(40):
                chosen = generator.integers(0, count, 8)
                batch = Batch(labels, labels, view, view, tuple(Example(hashes[i], 70, -1) for i in chosen))
                before = time.perf_counter()
                signal = teacher(batch)
                seconds.append(time.perf_counter() - before)
            before = time.perf_counter()
            total, _ = fused_loss(hidden, head, labels, Objective(0.5), signal if cache.kind != "hidden" else None)
            total.backward()
            step = time.perf_counter() - before
            median = statistics.median(seconds[5:])
            rows.append(
                {
                    "kind": named(cache),
                    "MB on disk": f"{sum(f.stat().st_size for f in (folder / 'cache').iterdir()) / 1e6:.0f}",
                    "checked and opened in": f"{opened:.2f} s",
                    "a batch of 560 targets in": f"{median * 1e3:.1f} ms",
                    "targets/s": f"{560 / median:,.0f}",
                    "of the head alone": f"{median / step:.2%}",
                }
            )
        finally:
            shutil.rmtree(folder)
    return rows


def table(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--targets", type=int, default=96)
    parser.add_argument("--cache_mb", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where the cache is written while it is timed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"`python eval/speed/cache.py {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print(
        f"{platform.machine()}, {options.threads} thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; V = {options.vocab:,}\n"
    )
    print(table(losses(options)), "\n")
    print(table(reading(options)))


if __name__ == "__main__":
    main()
