"""python eval/speed/head.py [--peers FOLDER] [--only WORDS] [--rows 1024] [--supervised 0.5] [--vocab 32000] ... [--out FILE.md]

Measures the head and the loss alone, forward and backward, on random tensors: time, time relative to the three matrix products that any
implementation needs (the lower bound, measured in the same run), and peak memory. Peers are measured too if FOLDER has them (eval/speed/peers.sh).

On a CPU: CPU time of one thread, and the rise of the process's largest resident size over a second call in a process of its own. On a
GPU: CUDA events, and torch.cuda.max_memory_allocated less what was allocated before. Rounds are interleaved; median, smallest and
largest. Every case's loss and gradient of the student's hidden states, and of its head where that trains, are compared with float64 from
whole logits. KDFlow's loss is not measured: it is not on a package index.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from eval.speed.head_cases import Case, Problem, cases, problem  # noqa: E402
from llmkd.training.launch import keep_freed_memory  # noqa: E402


def exact(p: Problem, divergence: str, kd_ratio: float, trains: bool, weighted: float = 0.0, block: int = 64) -> tuple[float, list[Tensor]]:
    """Loss and gradients in float64 from whole logits, by autograd, some rows at a time."""
    total, grad_NH = 0.0, torch.zeros_like(p.student_NH, dtype=torch.float64)
    W, U = p.student_head.weight.double().requires_grad_(trains), p.teacher_head.weight.double()
    grad_VH = torch.zeros_like(W) if trains else None
    ones = torch.ones(len(p.rows), dtype=torch.float64, device=p.rows.device)
    weights = p.weights(weighted) if weighted else {"ce": ones, "kd": ones}
    for rows, ce_n, kd_n in zip(*(x.split(block) for x in (p.rows, weights["ce"], weights["kd"])), strict=True):
        h = p.student_NH[rows].double().requires_grad_()
        log_q, log_p = (h @ W.T).log_softmax(-1), (p.teacher_NH[rows].double() @ U.T).log_softmax(-1)
        m = torch.logaddexp(log_q, log_p) - math.log(2)
        kl = {
            "forward_kl": lambda q, p: (p.exp() * (p - q)).sum(-1),
            "reverse_kl": lambda q, p: (q.exp() * (q - p)).sum(-1),
            "generalized_jsd": lambda q, p, m=m: ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2,
        }[divergence](log_q, log_p)
        ce = -log_q.gather(1, p.labels_N[rows][:, None])[:, 0]
        loss = ((1 - kd_ratio) * (ce_n.double() * ce).sum() + kd_ratio * (kd_n.double() * kl).sum()) / len(p.rows)
        grad_NH[rows], *of_head = torch.autograd.grad(loss, [h, W] if trains else [h])
        for grad in of_head:
            grad_VH += grad
        total += loss.item()
    return total, [grad_NH, grad_VH] if trains else [grad_NH]


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds."""
    if device == "cpu":
        start = time.process_time()
        call()
        return 1e3 * (time.process_time() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak(call: Callable[[], object], device: str) -> float:
    """MiB over what was there before, of a second call."""
    call()
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def call_of(case: Case, p: Problem) -> Callable[[], object]:
    return functools.partial(case.run, p)


def alone(name: str, arguments: list[str]) -> dict | None:
    """A case's peak memory and its times in a process of its own, which is this script with --alone; None where it fails."""
    run = subprocess.run([sys.executable, __file__, *arguments, "--alone", name], capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None


def peak_of(case: Case, p: Problem, device: str) -> float | None:
    if device == "cuda":  # whose allocator counts exactly, whoever was there before
        return peak(call_of(case, p), device)
    found = alone(case.name, [*sys.argv[1:], "--rounds", "0"])
    return found and found["mib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 1024, "width": 256, "teacher_width": 512, "vocab": 32000, "rounds": 7, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--supervised", type=float, default=0.5)
    parser.add_argument("--chunk", type=int, help="rows per chunk of ours; by default what a run takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by default float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--peers", help="folder that eval/speed/peers.sh filled")
    parser.add_argument("--only", default="", help="cases with these words, and the products alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a run does
    if options.peers:
        sys.path.append(options.peers)
    p, known = problem(options), [case for case in cases(options) if case.lower_bound or options.only in case.name]
    if options.alone:
        call = call_of(next(case for case in known if case.name == options.alone), p)
        print(json.dumps({"mib": peak(call, options.device), "ms": [timed(call, options.device) for _ in range(options.rounds)]}))
        return
    text = "\n".join(report(options, p, known))
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def report(options, p: Problem, known: list[Case]) -> list[str]:
    able, unable, checks = [], [], {}
    right = {key: exact(p, *key) for key in {exact_key(case) for case in known if not case.lower_bound}}
    for case in known:
        try:
            result = call_of(case, p)()
        except Exception as error:
            unable.append(f"Not measured: {case.name} ({type(error).__name__}: {str(error).splitlines()[0][:150]}).")
            continue
        able.append(case)
        if result is not None:
            value, grads = right[exact_key(case)]
            far = max(((g.double() - grad).norm() / grad.norm()).item() for g, grad in zip(result[1], grads, strict=True))
            checks[case.name] = f"gradient {far:.0e}, loss {abs(result[0].item() - value) / value:.0e}"
    times = {case.name: [] for case in able}
    for _ in range(options.rounds):
        for case in able:
            times[case.name].append(timed(call_of(case, p), options.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    lower_bounds = {case.trains: medians[case.name] for case in known if case.lower_bound}
    memory = {case.name: None if case.lower_bound else peak_of(case, p, options.device) for case in able}
    lines = [
        f"{options.rows} rows, {len(p.rows)} of them supervised; widths {options.width} and {options.teacher_width}, {options.vocab} tokens, "
        f"{options.dtype}; student's head frozen, and trained in the rows that say so; loss 0.5 KD + 0.5 CE, or KD alone.",
        "",
        "| case | ms, median (smallest to largest) | x the products | peak MiB | relative distance to float64 | |",
        "|---|---|---|---|---|---|",
    ]
    for case in able:
        name, values = case.name, times[case.name]
        mib = "-" if memory[name] is None else f"{memory[name]:.0f}"
        shown = f"{medians[name]:.0f} ({min(values):.0f} to {max(values):.0f})"
        lines.append(
            f"| {name} | {shown} | {medians[name] / lower_bounds[case.trains]:.2f} | {mib} | {checks.get(name, '')} | {case.remark} |"
        )
    unit = f"CPU time, {options.threads} thread(s)" if options.device == "cpu" else "CUDA events"
    return [*lines, "", *unable, f"{unit}; {options.rounds} interleaved rounds. {machine(options)}"]


def exact_key(case: Case) -> tuple[str, float, bool, float]:
    return case.divergence, case.kd_ratio, case.trains, case.weighted


def machine(options) -> str:
    names = ["torch", "triton", *(["torchtune", "torchao", "liger_kernel", "trl"] if options.peers else [])]
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    chip = torch.cuda.get_device_name() if options.device == "cuda" else f"{len(cpu)} x {cpu[0] if cpu else platform.machine()}"
    given = [f'"{word}"' if " " in word else word for word in sys.argv[1:] if word not in ("--out", str(options.out))]
    command = " ".join(["python eval/speed/head.py", *("PEERS" if word == options.peers else word for word in given)])
    return f"{chip}; Python {platform.python_version()}, {', '.join(versions)}; {datetime.date.today()}. `{command}`"


if __name__ == "__main__":
    main()
