"""One flipped bit in a file that a command reads: it is named in one line, or the result is what it is without.

python -m tests.faults.flips                 every byte of small files, many of large ones: an hour or two; prints what is neither
python -m tests.faults.flips --only resume   the files that one command reads
python -m tests.faults.flips --every 16      fewer bytes
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

SMALL = 4096  # bytes of a file of which each is flipped
LARGE = 240  # flips of a larger one


@dataclass(frozen=True)
class Reading:
    """A command that reads files. {root} in its words is the folder of all that `build` made, {victim} a copy of `folder`, whose bits are flipped.

    before   what is done to a copy first
    result   what the command leaves behind or says, to be compared; given the copy, what was said on stdout, and the exit code's files
    spared   files that it may change without a word, with the reason
    """

    folder: str
    words: str
    result: Callable[[Path, str], object]
    before: Callable[[Path], None] = lambda victim: None
    spared: dict[str, str] = field(default_factory=dict)
    few: tuple[str, ...] = ()  #: folders whose files have few flips here, since others read them byte by byte


def content(*names: str) -> Callable[[Path, str], dict]:
    """What files hold: of weights the tensors, of JSON lines all but what differs from run to run, of all else every byte."""

    def go(victim: Path, out: str) -> dict:
        found = [path for name in names for path in sorted(victim.glob(name)) if path.is_file()]
        return {str(path.relative_to(victim)): _comparable(path) for path in found}

    return go


_OWN = ("targets_per_s", "peak_memory", "seconds", "versions", "created", "time", "checksum", "peak_memory_mb")


def _comparable(path: Path) -> object:
    if path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError):
            return {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in load_file(path).items()}
        return "damaged"
    if path.suffix == ".json":  # which version of transformers wrote the student is copied, and read by nobody
        return {name: value for name, value in json.loads(path.read_text()).items() if name != "transformers_version"}
    if path.suffix != ".jsonl":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in _OWN} for row in rows]


def said(victim: Path, out: str) -> str:
    return out.replace(str(victim), "VICTIM")


def unfinished(run: Path) -> None:
    """As a kill after step 2 leaves it."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/step-3")


TRAINED, MODEL = (
    content("adapter/*.safetensors", "metrics.jsonl"),
    content("whole/*.safetensors", "whole/config.json", "whole/generation_config.json"),
)
_CARD = {"adapter/README.md": "a page for people, of which the licence alone is read"}
OUT = "--output_dir {victim}/out"
READINGS = {
    "resume": Reading("run", "train --config {root}/run.yaml --resume --output_dir {victim}", TRAINED, unfinished, few=("checkpoints/",)),
    "finished": Reading("run", "train --config {root}/run.yaml --resume --output_dir {victim}", TRAINED),
    "export": Reading("run", "export {victim} --to {victim}/whole", MODEL, spared=_CARD),
    "best": Reading("run", "export {victim} --to {victim}/whole --checkpoint best", MODEL, spared=_CARD),
    "compare": Reading("run", "compare {root}/other {victim}", said),
    "sweep": Reading("sweep", "sweep --config {root}/sweep.yaml --resume --output_dir {victim}", said),
    "report": Reading("sweep", "report {victim}", content("report.html")),
    "cache": Reading(
        "cache", f"train --config {{root}}/run.yaml --teacher.cache.path {{victim}} {OUT}", content("out/adapter/*.safetensors")
    ),
    "hidden": Reading(
        "hidden", f"train --config {{root}}/run.yaml --teacher.cache.path {{victim}} {OUT}", content("out/adapter/*.safetensors")
    ),
    "merged": Reading(
        "merged",
        f"train --config {{root}}/run.yaml --teacher null --loss.kd_ratio 0 --checkpoint.best_by ce --student.model {{victim}} {OUT}",
        content("out/adapter/*.safetensors"),
    ),
    "answers": Reading(
        "answers",
        f"train --config {{root}}/run.yaml --data.train {{{{path: {{victim}}/rolled.jsonl, format: tokens}}}} {OUT}",
        content("out/adapter/*.safetensors"),
    ),
    "evaluation": Reading("run", "compare {root}/other {victim} --tasks quiz", said),
}


def build(world: Path, root: Path) -> None:
    """The finished folders that are read."""
    from llmkd_eval.harness import record_files

    from llmkd.cli import main
    from tests.conftest import plain_recipe

    recipe = plain_recipe(world, root / "run")
    recipe["data"] |= {"validation": {"path": str(world / "held.jsonl")}}
    recipe |= {"validation": {"every": 1, "samples": 1, "sample_tokens": 2}, "checkpoint": {"every": 1, "keep": 9, "best_by": "ce"}}
    recipe["train"] |= {"max_steps": 3}
    (root / "run.yaml").write_text(json.dumps(recipe))
    shorter = {"train.max_steps": 1, "optim.warmup_steps": 0, "checkpoint.every": None, "checkpoint.best_by": None}
    sweep = {"output_dir": str(root / "sweep"), "recipe": str(root / "run.yaml"), "set": shorter, "grid": {"loss.kd_ratio": [0.0, 0.5]}}
    (root / "sweep.yaml").write_text(json.dumps(sweep))
    config = ["--config", str(root / "run.yaml")]
    for words in (
        ["train", *config],
        ["sweep", "--config", str(root / "sweep.yaml")],
        ["export", str(root / "run"), "--to", str(root / "merged")],
        ["cache", *config, "--teacher.cache", f"{{path: {root}/cache, k: 8}}"],
        ["cache", *config, "--teacher.cache", f"{{path: {root}/hidden, kind: hidden}}"],
        ["roll", "student", *config, "--to", str(root / "answers/rolled.jsonl"), "--max_new_tokens", "6"],
    ):
        assert main(words) == 0, words
    items = [{"id": i, "hash": f"h{i}", "metrics": {"acc": i % 2}} for i in range(4)]
    record = {"task": "quiz", "version": 1, "n": 4, "metrics": {"acc": {"value": 0.5, "higher_is_better": True}}}
    record_files.write_task(root / "run/eval", record, items)
    shutil.copytree(root / "run", root / "other")


def offsets(size: int, every: int = 1) -> list[int]:
    """Of a small file each byte; of a large one its head, its end, and places at equal distances. Then each `every`-th of these."""
    chosen = range(size)
    if size > SMALL:
        third = LARGE // 3
        chosen = sorted({*range(third), *range(size - third, size), *range(0, size, -(-size // third))})
    return list(chosen)[::every]


def flip(path: Path, offset: int) -> str:
    """Flip a bit of a byte, another one from byte to byte; returns what was done, in words."""
    data, bit = bytearray(path.read_bytes()), offset * 5 % 8
    around = bytes(data[max(0, offset - 12) : offset + 13])
    data[offset] ^= 1 << bit
    path.write_bytes(data)
    return f"byte {offset}, bit {bit}, in {around!r}"


class Bench:
    """Runs commands on copies of what `build` made."""

    def __init__(self, root: Path):
        self.root, self.victim, self._clean, self._opened = root, root / "victim", {}, set()
        sys.addaudithook(lambda event, given: self._opened.add(str(given[0])) if event == "open" else None)

    def copy(self, name: str) -> Path:
        shutil.rmtree(self.victim, ignore_errors=True)
        shutil.copytree(self.root / READINGS[name].folder, self.victim)
        READINGS[name].before(self.victim)
        return self.victim

    def files(self, name: str) -> list[str]:
        """Those that the command opens; of safetensors files all, since Python does not see who maps them."""
        self.clean(name)
        self.copy(name)
        self._opened.clear()
        self.call(name)
        opened, victim = set(self._opened), self.copy(name)
        found = [path for path in victim.rglob("*") if path.is_file() and path.stat().st_size]
        return sorted(str(path.relative_to(victim)) for path in found if path.suffix == ".safetensors" or str(path) in opened)

    def call(self, name: str) -> tuple[int, str, list[str], object]:
        """Exit code, stdout, lines of stderr, and the result of a command."""
        from llmkd.cli import main

        out, err = io.StringIO(), io.StringIO()
        words = [word.format(root=self.root, victim=self.victim) for word in _split(READINGS[name].words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        return code, out.getvalue(), err.getvalue().splitlines(), READINGS[name].result(self.victim, out.getvalue()) if code == 0 else None

    def clean(self, name: str) -> object:
        """The result without a flip."""
        if name not in self._clean:
            self.copy(name)
            code, _, lines, self._clean[name] = self.call(name)
            assert code == 0 and self._clean[name], (name, lines)
        return self._clean[name]

    def judge(self, name: str, file: str, offset: int) -> tuple[str, str]:
        """(named, harmless or the kind of problem, what happened)."""
        expected = self.clean(name)
        done = flip(self.copy(name) / file, offset)
        code, _, lines, result = self.call(name)
        ended = [line for line in lines if line.startswith("llmkd: ")]
        naming = [line for line in lines if Path(file).name in line or _stands_for(file, line)]
        told = f"{name}: {file}: {done}: exit {code}: {' | '.join(lines[-3:])[-600:]}"
        if any("bug" in line for line in ended) or code not in (0, 1, 2):
            return "BUG", told
        if code:
            return ("named", told) if len(ended) == 1 and naming else ("UNNAMED", told)
        if result == expected:
            return ("named" if naming else "harmless"), told
        if naming or file in READINGS[name].spared:
            return "named", told
        return "CHANGED", told


def _stands_for(file: str, line: str) -> bool:
    """Whether a line names the checkpoint that a file belongs to."""
    return "checkpoints/" in file and Path(file).parent.name in line


def _split(words: str) -> Iterator[str]:
    """At blanks, but not within braces."""
    depth, word = 0, ""
    for letter in words.replace("{{", "\0").replace("}}", "\1") + " ":
        depth += (letter == "\0") - (letter == "\1")
        if letter == " " and not depth:
            yield word.replace("\0", "{{").replace("\1", "}}")
            word = ""
        else:
            word += letter


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.flips", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(READINGS), choices=list(READINGS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--file", default="", help="files with this in their name")
    options = parser.parse_args()
    import torch

    from llmkd import console
    from tests.conftest import make_world
    from tests.kit.quick_runs import leave_out

    torch.set_num_threads(1)
    console.show_messages()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ |= {"LLMKD_CACHE": str(root / "tokens"), "HF_HUB_OFFLINE": "1"}
        leave_out(setattr)
        (root / "world").mkdir()
        build(make_world(root / "world"), root)
        bench, bad = Bench(root), 0
        for name in options.only:
            for file in bench.files(name):
                if options.file not in file:
                    continue
                size, counts, start = (bench.copy(name) / file).stat().st_size, collections.Counter(), time.monotonic()
                chosen = offsets(size, options.every)
                for offset in chosen[:: max(1, len(chosen) // 12)] if file.startswith(READINGS[name].few) else chosen:
                    verdict, told = bench.judge(name, file, offset)
                    counts[verdict] += 1
                    if verdict.isupper():
                        bad += 1
                        print(f"{verdict} {told}", flush=True)
                print(f"{name:12} {file:45} {size:8,} bytes  {dict(counts)}  {time.monotonic() - start:.0f} s", flush=True)
    print(f"{bad} neither named nor harmless")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
