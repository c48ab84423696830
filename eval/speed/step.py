"""Speed of whole training steps: llmkd with several micro-batch settings, with and without a live teacher, and peers as their authors run them.

    python eval/speed/step.py [--peers FOLDER] [--hidden 128 --layers 2 --vocab 8192] [--batch 32] [--tokens 2048] [--steps 3] [--repeats 2]
    python eval/speed/step.py --shapes llama --tokens 16384 --batch 128     # a GPU: Llama-3.1-8B to Llama-3.2-1B, random weights in bfloat16
    python eval/speed/step.py --shapes qwen --tokens 16384 --batch 128      # Qwen2.5-1.5B to Qwen2.5-0.5B

The models are made on the spot, a teacher twice as wide and deep as the student, and so are the data: random tokens of log-normal lengths,
of which the last 56 % are supervised, roughly as in Alpaca. LoRA of rank 64, forward KL and CE by halves (KL alone where a peer has no
CE), AdamW. The loop is that of a run; rows take turns. Padding is not counted as tokens.

A row is correct if the means of CE and KL over its first step's targets are those of plain transformers with whole logits, on the same
examples from the same weights, and in llmkd's rows the gradient's norm too (ten times the tolerance; peers' gradients are not looked at);
a row that is not correct is marked and gets no relative speed. FOLDER is what eval/speed/peers.sh filled. On a
CPU seconds are of CPU time, so give it one thread (OMP_NUM_THREADS=1). Prints Markdown.
"""

import argparse
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # instead of eval/speed, whose files are not top-level modules
for name in ("TQDM_DISABLE", "TRL_EXPERIMENTAL_SILENCE", "HF_HUB_OFFLINE"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from eval.speed.step_cases import Case, Measurement, cases  # noqa: E402
from eval.speed.step_setup import Setup  # noqa: E402
from llmkd.training.launch import start  # noqa: E402

#: How far the means of CE and KL may be from the reference, relative to it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
HEADER = ("teacher", "row", "tokens/s (slowest to fastest step)", "of the first of llmkd", "of the products alone", "targets/s")
HEADER += ("passes a step", "padding", "peak GB", "distance to the reference", "")


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["small", "llama", "qwen", "quickstart"], default="small")
    parser.add_argument("--equal", action="store_true", help="a teacher of the student's shape")
    parser.add_argument("--family", choices=["llama", "qwen2"], default="llama", help="of small shapes")
    for name, value in (("hidden", 128), ("layers", 2), ("vocab", 8192), ("batch", 32), ("tokens", 2048), ("steps", 3), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="by default float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="a row of packed micro-batches with train.compile")
    parser.add_argument(
        "--float8", action="store_true", help="a row with the teacher in fp8, its KL measured against the teacher as it was"
    )
    parser.add_argument("--peers", help="folder that eval/speed/peers.sh filled")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.peers and not Path(options.peers).is_dir():
        raise SystemExit(f"--peers: there is no folder {options.peers}")
    if options.peers and options.batch % 4:
        raise SystemExit(f"--batch: found {options.batch}, expected a multiple of 4, in which peers take examples")
    warnings.simplefilter("ignore")
    setup = Setup(options, start())
    known = cases(setup)
    if options.peers:
        sys.path.append(options.peers)  # after PEFT has looked for torchao, of which it bears newer versions only
        from eval.speed.step_peers import peers

        known = sorted([*known, *peers(setup)], key=lambda case: not case.teacher)
    text = ""
    for measurements, unable in measured(setup, known):  # what is there after each round, should the next be cut off
        text = "\n".join(report(setup, measurements, unable))
        if options.out:
            options.out.write_text(text + "\n")
    print(text)


def measured(setup: Setup, known: list[Case]) -> Iterator[tuple[dict[Case, list[Measurement]], list[str]]]:
    """Rounds of each case so far, in turns; and a line about each that fails. llmkd's may run out of memory, and may not fail otherwise."""
    measurements, unable = {case: [] for case in known}, []
    for _ in range(setup.options.repeats):
        for case in list(measurements):
            try:
                measurements[case].append(case.run(setup))
            except Exception as error:
                if (case.lower_bound or case.name.startswith("llmkd")) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                unable.append(f"Not measured: {case.name} ({type(error).__name__}: {str(error).splitlines()[0][:200]}).  ")
                del measurements[case]
        yield measurements, unable


def distances(setup: Setup, measurements: list[Measurement]) -> dict[str, float]:
    """Of CE, KL and the norm of the gradient, where a row has them, from the reference about a round's first step; the largest."""
    found = {}
    for one in measurements:
        reference = setup.reference(one.first)
        for name, value, right in (("CE", one.ce, reference.ce), ("KL", one.kl, reference.kl)):
            if value is not None:
                found[name] = max(found.get(name, 0.0), abs(value - right) / right if math.isfinite(value) else math.inf)
        for kd, norm in one.gradient.items():
            off = abs(norm - reference.gradients[kd]) / reference.gradients[kd] if math.isfinite(norm) else math.inf
            found["gradient"] = max(found.get("gradient", 0.0), off)
    return found


def rate(measurements: list[Measurement], counts: str) -> list[float]:
    """Tokens or targets a second, of every step but each round's first."""
    return [n / s for one in measurements for n, s in zip(getattr(one, counts)[1:], one.seconds[1:], strict=True)]


def report(setup: Setup, measurements: dict[Case, list[Measurement]], unable: list[str]) -> list[str]:
    tolerance, rows, bases, lower_bounds = TOLERANCE[setup.dtype], [], {}, {}
    for case, found in measurements.items():
        speeds = rate(found, "tokens")
        middle, last = statistics.median(speeds), found[-1]
        shown = [
            "live" if case.teacher else "none",
            case.name,
            f"{middle:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
            "",
            "",
            f"{statistics.median(rate(found, 'targets')):,.0f}",
            f"{last.passes:.1f}",
            f"{1 - sum(last.tokens) / last.slots:.1%}",
        ]
        if case.lower_bound:
            first = lower_bounds.setdefault(case.teacher, middle)
            rows.append([*shown[:4], f"{middle / first:.0%}", *shown[5:], "", "", case.remark])
            continue
        off = distances(setup, found)
        right = bool(off) and all(value <= (10 if name == "gradient" else 1) * tolerance for name, value in off.items())
        if right:
            base = bases.setdefault(case.teacher, middle)
            shown[3:5] = [f"{middle / base:.2f} x", f"{middle / lower_bounds[case.teacher]:.0%}"]
        said = ", ".join(f"{name} {value:.0e}" for name, value in off.items())
        rows.append([*shown, f"{last.bytes / 1e9:.2f}", said if right else f"**not equal**: {said}", case.remark + last.remark])
    return [*heading(setup), *(f"| {' | '.join(row)} |" for row in [HEADER, ["---"] * len(HEADER), *rows]), "", *unable, *footing(setup)]


def heading(setup: Setup, script: str = "step") -> list[str]:
    options, device = setup.options, setup.device
    given = ["PEERS" if word == options.peers else word for word in sys.argv[1:] if word not in ("--out", str(options.out))]
    where = f"{platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    versions = [f"{name} {version}" for name in ("torchtune", "torchao", "trl") if options.peers and (version := _version(name))]
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}", *versions]
    sizes = [sum(p.numel() for p in model.base_model.parameters()) / 1e6 for model in (setup.teacher, setup.student)]
    weights = sum(p.nbytes for model in (setup.teacher, setup.student) for p in model.parameters()) / 1e9
    return [
        f"`{' '.join([f'python eval/speed/{script}.py', *given])}`  ",
        f"{where}, {', '.join(versions)}, {time.strftime('%Y-%m-%d')}  ",
        f"teacher {sizes[0]:,.1f} M, student {sizes[1]:,.1f} M parameters ({weights:.2f} GB); V = {setup.vocab:,}; {options.batch} examples of "
        f"{setup.data.lengths.mean():.0f} tokens on average a step",
        "",
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def footing(setup: Setup) -> list[str]:
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[setup.dtype]
    return [
        "Medians over all steps but each round's first. Peak: without the weights, of the last round. The last column but one: the relative "
        "difference of the first step's mean CE and KL from those of plain transformers' whole logits; "
        f"{TOLERANCE[setup.dtype]:.0e} is accepted in {name}. The products alone are those of the linear layers of both bodies (frozen weights "
        "have no gradient) and of the heads at the targets, without those of attention. For llmkd's rows the norm of the first step's gradient is "
        "compared too, for peers' it is not. Peers take examples as they come; llmkd sorts those of a step by length, so it pads less."
        + ("" if setup.dtype == torch.float32 else " Small shapes of the same family in float32, on a CPU, hold peers' weights to 1e-05."),
    ]


if __name__ == "__main__":
    main()
