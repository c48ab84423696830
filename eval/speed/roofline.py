"""What a GPU would have to do in one step, counted on fake CUDA tensors: launches, bytes and operations of each kind, and the time below
which no GPU can do them: for every launch the larger of its operations by the rate of products and its bytes by the bandwidth, an H100's.

    python eval/speed/roofline.py --out eval/speed/results/roofline.md        # some minutes on a CPU; no GPU, no weights
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # instead of eval/speed, whose files are not top-level modules

from eval.speed.fake_cuda import WATCHING, fake_cuda, install  # noqa: E402

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    install(Path(tempfile.mkdtemp()))

import numpy as np  # noqa: E402
from torch import Tensor, ops  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from eval.speed.fused_kernels import compiled  # noqa: E402
from llmkd.batch import Batch  # noqa: E402
from llmkd.config.loader import load_recipe  # noqa: E402
from llmkd.config.recipe import Recipe  # noqa: E402
from llmkd.data.examples import Collator, Draw, TokenExamples  # noqa: E402
from llmkd.models.families import layers_of  # noqa: E402
from llmkd.models.language_model import LanguageModel  # noqa: E402
from llmkd.planning.build import build  # noqa: E402
from llmkd.planning.find import find  # noqa: E402
from llmkd.planning.live_memory import LiveMemory, operations  # noqa: E402
from llmkd.planning.models import Depth, depth_of  # noqa: E402
from llmkd.planning.step import OneProcess, watched_step  # noqa: E402

#: An H100's stated rates: operations per second of dense products by the width of their operands in bytes, and bytes per second.
RATES, BANDWIDTH = {1: 1979e12, 2: 989e12, 4: 67e12, 8: 67e12}, 3.35e12


@dataclass
class Cost:
    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, flops: int, size: int, rate: float) -> None:
        self.launches += 1
        self.bytes += size
        self.flops += flops
        self.seconds += max(flops / rate, size / BANDWIDTH)


class Audit(TorchDispatchMode):
    """The cost of each operation by its name. Each is taken as one launch that reads its inputs and writes its results once; what only
    looks at memory in another way, or allocates it, costs nothing."""

    def __init__(self):
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.in_compiled = False  # there only products count: the rest is in kernels that `fused` is told of

    def __enter__(self):
        WATCHING.append(self.launched)
        return super().__enter__()

    def __exit__(self, *error):
        WATCHING.remove(self.launched)
        return super().__exit__(*error)

    def launched(self, name: str, read: list, written: list) -> None:
        self.costs[name].add(0, sum(map(size_of, (*read, *written))), RATES[4])

    def fused(self, name: str, size: int) -> None:
        self.costs[name].add(0, size, RATES[4])

    def running(self, in_compiled: bool) -> None:
        self.in_compiled = in_compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_cuda] for tree in ((args, kwargs), out))
        name = func.overloadpacket.__name__
        if (given or made) and not _is_free(func, name):
            count = operations(func.overloadpacket)
            if self.in_compiled and not count:
                return out
            flops = count(args, kwargs, out) if count else 0
            width = min((x.element_size() for x in given if x.is_floating_point()), default=4) if flops else 4
            self.costs[name].add(flops, sum(map(size_of, (*given, *made))), RATES[width])
        return out

    @property
    def total(self) -> Cost:
        every = list(self.costs.values())
        return Cost(*(sum(getattr(one, part) for one in every) for part in ("launches", "bytes", "flops", "seconds")))

    @property
    def products(self) -> float:
        """Seconds of the matrix products alone, by the rate, whatever they read."""
        return sum(one.seconds for one in self.costs.values() if one.flops)


def size_of(x: Tensor) -> int:
    """Bytes that are read or written: of an expanded tensor only those that it has."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _is_free(func, name: str) -> bool:
    if name in ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"):
        return True
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


#: From torchtune's and llmkd's recipes: 8B to 1B and Qwen 1.5B to 0.5B, their teachers without an adapter.
FOLDERS = {
    "Llama 8B to 1B": ("llama3_8b_to_1b", "meta-llama/Llama-3.1-8B-Instruct"),
    "Qwen 1.5B to 0.5B": ("qwen2.5_1.5b_to_0.5b", "Qwen/Qwen2.5-1.5B-Instruct"),
}
CACHE = {"path": "/nowhere/cache", "kind": "hidden"}
#: What is changed in the recipes, and how many students train side by side.
WAYS = {
    "live teacher": ({}, 1),
    "teacher in fp8": ({"teacher.quantization": {"type": "fp8"}}, 1),
    "hidden states known": ({"teacher.cache": CACHE}, 1),
    "four students": ({}, 4),
}
#: Milliseconds by the same count when LoRA was PEFT's (copies in float32, and products in it), norms were transformers', and every layer in fp8 rounded its
#: own inputs.
BEFORE = dict(
    zip(
        [(models, way) for models in FOLDERS for way in WAYS],
        (650, 614, 325, 1619, 189, 200, 110, 514),
        strict=True,
    )
)
TOKENS, LENGTH, SUPERVISED = 16384, 256, 0.56  # as Alpaca's prompts and answers divide


def batch_of(tokens: int = TOKENS, length: int = LENGTH, packing: bool = True) -> Batch:
    """Examples of one length, of each the last 56 % supervised; in one packed row, or each in its own."""
    count = tokens // length
    one = np.arange(length) >= round((1 - SUPERVISED) * length)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    examples = TokenExamples(np.zeros(tokens, np.int32), np.tile(one, count), offsets, np.arange(count), collator=Collator(packing=packing))
    return examples.batch(range(count), Draw(0, 0, 1))


def recipe_of(folder: str, teacher: str, changes: dict) -> Recipe:
    (path,) = (REPO / "recipes" / folder).glob("2_*.yaml")
    packed = {"data.packing": True, "student.gradient_checkpointing": False, "teacher.model": teacher}
    return load_recipe(path, packed | changes)


def audit(recipe: Recipe, students: int, batch: Batch, layers: Callable[[int], int] = lambda whole: whole) -> Audit:
    """The costs of one step of a micro-batch, as one after the first. `layers`: how many of a model's are run."""
    counted = Audit()
    recipes = [recipe] * students
    found = find(recipes, REPO)
    depth = Depth(layers(depth_of(found.student.config, "student.model")))
    if recipe.student.gradient_checkpointing:
        depth = Depth(depth.layers, depth.layers - 1)
    of_teachers = [layers(depth_of(config.config, f"{name}.model")) for name, _, config in found.live]
    with fake_cuda(), contextlib.ExitStack() as stack:
        ready = build(recipes, found, depth, of_teachers, None, True, OneProcess("cuda"))
        if recipe.train.compile:
            make = stack.enter_context(compiled(counted.fused, counted.running, (Audit, LiveMemory)))
            for model in {
                id(one.base_model): one for one in (*ready.student_models, *ready.teacher_models) if isinstance(one, LanguageModel)
            }.values():
                for layer in layers_of(model.base_model):
                    make(layer)
        for _ in range(1 + recipe.train.compile):  # in the first one layers are compiled, some of them by the backward pass
            with counted:
                watched_step(ready, batch, False, OneProcess("cuda"), before=lambda: counted.costs.clear())
        return counted


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    every = [["models", "way", "layers", "launches", "GB", "TFLOP", "ms", "of it products", "all by products", "ms before"]]
    largest, batch = "", batch_of()
    cases = [(models, way, layers) for models in FOLDERS for way in WAYS for layers in ("as they are", "compiled")]
    for models, way, layers in cases:
        changes, students = WAYS[way]
        changes = changes | {"train.compile": layers == "compiled"}
        found = audit(recipe_of(*FOLDERS[models], changes), students, batch)
        total, products = found.total, found.products
        every.append(
            [models, way, layers, f"{total.launches:,}", f"{total.bytes / 1e9:,.0f}", f"{total.flops / 1e12:,.0f}"]
            + [f"{total.seconds * 1e3:,.0f}", f"{products * 1e3:,.0f}", f"{total.seconds / products:.2f}"]
            + [f"{BEFORE[models, way]:,}" if layers == "as they are" else ""]
        )
        print(" ".join(every[-1]), flush=True)
        costs = sorted(found.costs.items(), key=lambda item: -item[1].seconds)[:10]
        rows = [["operation", "launches", "GB", "TFLOP", "ms"]]
        rows += [
            [f"`{name}`", f"{one.launches:,}", f"{one.bytes / 1e9:,.1f}", f"{one.flops / 1e12:,.1f}", f"{one.seconds * 1e3:,.1f}"]
            for name, one in costs
        ]
        largest += f"\n## {models}, {way}, layers {layers}\n\n{table(rows)}"
    text = HEAD + table(every) + largest
    if words.out:
        words.out.write_text(text, encoding="utf-8")


HEAD = f"""`python eval/speed/roofline.py`

Counted, not measured: nothing of this has run on a GPU. One step of {TOKENS:,} tokens in a packed row ({TOKENS // LENGTH} examples, {SUPERVISED:.0%} supervised) on fake
CUDA tensors. Every launch takes the larger of its operations by the stated rate of an H100 ({RATES[2] / 1e12:.0f} TFLOP/s of dense products in 16 bit,
{RATES[1] / 1e12:,.0f} in 8 bit, {RATES[4] / 1e12:.0f} in float32) and its bytes, each input and result once, by {BANDWIDTH / 1e12:g} TB/s. Real launches reach neither; the waiting of a
GPU for launches is not in it. "all by products": the sum of all by that of the launches that multiply (attention among them). Of compiled layers
(`train.compile`) Inductor's own lowering and scheduler tell which kernels are fused and what each reads and writes ("fused by Inductor"); no kernel
was generated. "ms before": the same count with PEFT's form of LoRA, transformers' norms, and every layer in fp8 rounding its own inputs.

"""

if __name__ == "__main__":
    main()
