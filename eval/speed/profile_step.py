"""Profile of a training step of llmkd: time by part and by operator, and on a GPU the idle time.

    python eval/speed/profile_step.py [--packed] [--alone] [--trace FILE.json] [--shapes llama] and the other settings of step.py

torch.profiler over --steps steps after two that warm up, on the models and data of step.py. The parts are calls of llmkd that are wrapped
from outside. On a GPU a kernel belongs to the part in whose time it was launched, whatever thread did it, and the device is idle where
no kernel and no copy runs. The profiler itself takes time, so rely on the shares rather than on the milliseconds. Prints Markdown.
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from eval.speed.step import heading, parser  # noqa: E402
from eval.speed.step_cases import learning  # noqa: E402
from eval.speed.step_setup import Setup  # noqa: E402
from llmkd.batch import Batch  # noqa: E402
from llmkd.data.batch_source import BatchSource  # noqa: E402
from llmkd.data.batching import TokenBudget  # noqa: E402
from llmkd.losses import terms  # noqa: E402
from llmkd.teachers.live import LiveTeacher  # noqa: E402
from llmkd.training import loop  # noqa: E402
from llmkd.training.launch import start  # noqa: E402

WAIT, COPY, TEACHER, STUDENT, HEADS = "waiting for batches", "copies to the device", "teacher's body", "student's body", "heads and loss"
BACKWARD, OPTIMIZER, TERMS = "backward of the student's body", "gradient norm, clipping, optimizer", "sums of the terms, and reading them"
PARTS = (WAIT, COPY, TEACHER, STUDENT, HEADS, BACKWARD, OPTIMIZER, TERMS)
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WARM_UP, LONGEST = 2, 12


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--packed", action="store_true", help="the budget's examples in one row")
    arguments.add_argument("--alone", action="store_true", help="no teacher: cross-entropy")
    arguments.add_argument("--trace", type=Path, help="keep the profiler's trace")
    options = arguments.parse_args()
    if options.float8 or options.peers:
        raise SystemExit("--float8, --peers: found one of them, which step.py measures; leave it out")
    options.steps += WARM_UP
    setup = Setup(options, start())
    if options.compile:
        setup.compile()
    text = "\n".join([*heading(setup, "profile_step"), *profiled(setup, options)])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def profiled(setup: Setup, options: argparse.Namespace) -> list[str]:
    state, teacher = (
        learning(setup, 0.0 if options.alone else 0.5, setup.student),
        None if options.alone else named(TEACHER, LiveTeacher(setup.teacher)),
    )
    source, steps = Waited(setup.source(TokenBudget(options.tokens, packing=options.packed))), 0
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.device.type == "cuda" else [])]
    profiler = profile(activities=kinds)
    with parts_named(setup):
        for progress in loop.train(source, [state], teacher, setup.accelerator):
            if progress.step == WARM_UP:
                profiler.start()
            steps = progress.step - WARM_UP
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = options.trace or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = Trace(json.loads(path.read_text())["traceEvents"])
    device = setup.device.type == "cuda"
    return [*by_part(trace, steps, device), "", *by_operator(profiler, steps, device), "", *(on_device(trace, steps) if device else [])]


def named(part: str, call: Callable) -> Callable:
    @functools.wraps(call, updated=())
    def recorded(*arguments, **keywords):
        with record_function(part):
            return call(*arguments, **keywords)

    return recorded


class Waited:
    """A batch source, with the loop's waits for it recorded."""

    def __init__(self, source: BatchSource):
        self.source, self.seed, self.total_steps = source, source.seed, source.total_steps

    def steps(self, done: int = 0) -> Iterator:
        with contextlib.closing(self.source.steps(done)) as coming:
            while True:
                with record_function(WAIT):
                    item = next(coming, None)
                if item is None:
                    return
                yield item


@contextlib.contextmanager
def parts_named(setup: Setup):
    """While this is open, the calls of a step say which part they are."""
    calls = [
        (Batch, "to", COPY),
        (setup.student, "outputs", STUDENT),
        (terms, "fused_parts", HEADS),
        (setup.accelerator, "backward", BACKWARD),
        (loop, "unscale_and_norm_", OPTIMIZER),
        (loop, "optimizer_step", OPTIMIZER),
        (loop.StepResult, "__init__", TERMS),
        (loop.StepResult, "read", TERMS),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, part in calls:
            stack.enter_context(mock.patch.object(place, name, named(part, getattr(place, name))))
        yield


@dataclass(frozen=True)
class Share:
    host: float = 0.0  # microseconds
    device: float = 0.0
    kernels: int = 0


class Trace:
    """The events of a Chrome trace that the profiler wrote; times in microseconds."""

    def __init__(self, events: list[dict]):
        whole = [e for e in events if e.get("ph") == "X"]
        self.parts = sorted(
            (e["ts"], e["ts"] + e["dur"], e["name"]) for e in whole if e.get("cat") == "user_annotation" and e["name"] in PARTS
        )
        self.begin, self.end = self.parts[0][0], max(end for _, end, _ in self.parts)
        self.calls = [e for e in whole if e.get("cat") in ("cuda_runtime", "cuda_driver")]
        self.work = [e for e in whole if e.get("cat") in _ON_DEVICE]
        self.end = max([self.end, *(e["ts"] + e["dur"] for e in self.work)])

    @property
    def length(self) -> float:
        return self.end - self.begin

    def shares(self) -> dict[str, Share]:
        """Of each part, and of what is in none as ""."""
        launched = {e["args"]["correlation"]: e["ts"] for e in self.calls if "correlation" in e.get("args", {})}
        host, device, kernels = ({part: 0.0 for part in (*PARTS, "")} for _ in range(3))
        for begin, end, part in self.parts:
            host[part] += end - begin
        host[""] = self.length - sum(host.values())
        for e in self.work:
            part = self._part_at(launched.get(e.get("args", {}).get("correlation"), -1.0))
            device[part] += e["dur"]
            kernels[part] += e["cat"] == "kernel"
        return {part: Share(host[part], device[part], int(kernels[part])) for part in host}

    def _part_at(self, moment: float) -> str:
        return next((part for begin, end, part in self.parts if begin <= moment <= end), "")

    def busy(self) -> float:
        """How long anything ran on the device."""
        total, reached = 0.0, self.begin
        for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in self.work):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return total

    def gaps(self) -> list[float]:
        """How long each wait of the device was."""
        found, reached = [], self.begin
        for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in self.work):
            if begin > reached:
                found.append(begin - reached)
            reached = max(reached, end)
        return sorted(found, reverse=True)


def by_part(trace: Trace, steps: int, device: bool) -> list[str]:
    lines = [f"| part | ms a step | of the step |{' ms on the device | of its work | kernels a step |' if device else ''}"]
    lines += [f"| --- | --- | --- |{' --- | --- | --- |' if device else ''}"]
    shares = trace.shares()
    work = sum(share.device for share in shares.values()) or 1.0
    for part, share in shares.items():
        line = f"| {part or 'everything else'} | {share.host / steps / 1e3:.2f} | {share.host / trace.length:.1%} |"
        if device:
            line += f" {share.device / steps / 1e3:.2f} | {share.device / work:.1%} | {share.kernels / steps:.0f} |"
        lines.append(line)
    return [*lines, f"| all | {trace.length / steps / 1e3:.2f} | 100% |{f' {work / steps / 1e3:.2f} | 100% | |' if device else ''}"]


def by_operator(profiler: profile, steps: int, device: bool) -> list[str]:
    """The longest, by the time spent in themselves."""
    spent = (lambda e: e.self_device_time_total) if device else (lambda e: e.self_cpu_time_total)
    found = [e for e in profiler.key_averages() if e.key not in PARTS and spent(e) > 0 and not e.key.startswith("ProfilerStep")]
    total = sum(map(spent, found)) or 1.0
    where = "on the device" if device else "of itself"
    lines = [f"| operator | ms a step {where} | of all | calls a step |", "| --- | --- | --- | --- |"]
    for e in sorted(found, key=spent, reverse=True)[:LONGEST]:
        name = e.key if len(e.key) <= 70 else e.key[:69] + "…"
        lines.append(f"| `{name.replace('|', '/')}` | {spent(e) / steps / 1e3:.2f} | {spent(e) / total:.1%} | {e.count / steps:.1f} |")
    return lines


def on_device(trace: Trace, steps: int) -> list[str]:
    def calls(*words: str) -> float:
        return sum(any(word in e["name"] for word in words) for e in trace.calls) / steps

    def copies(way: str) -> str:
        some = [e for e in trace.work if e["cat"] == "gpu_memcpy" and way in e["name"]]
        return f"{len(some) / steps:.1f} ({sum(e['args'].get('bytes', 0) for e in some) / steps / 1e6:.2f} MB)"

    gaps = trace.gaps()
    return [
        "| on the device | a step |",
        "| --- | --- |",
        f"| idle | {1 - trace.busy() / trace.length:.1%} of the time |",
        f"| longest wait | {(gaps or [0.0])[0] / 1e3:.2f} ms |",
        f"| waits over 20 us | {sum(gap > 20 for gap in gaps) / steps:.0f} |",
        f"| kernels | {sum(e['cat'] == 'kernel' for e in trace.work) / steps:.0f} |",
        f"| copies from host to device | {copies('HtoD')} |",
        f"| copies from device to host | {copies('DtoH')} |",
        f"| synchronisations | {calls('Synchronize'):.1f} |",
    ]


if __name__ == "__main__":
    main()
