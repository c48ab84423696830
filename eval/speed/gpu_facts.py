"""What `eval/speed/gpu.sh` finds out by itself: `python3 eval/speed/gpu_facts.py imports | primitives | plan | table FOLDER`.

Each line that begins with FACT is one: a name, a value. Without a GPU the same is run on the CPU, in small, to see that it runs.
"""

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[0] = str(REPO)  # instead of eval/speed, whose files are not top-level modules
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "pydantic", "numpy", "bitsandbytes", "liger_kernel", "pytest")


def fact(name: str, find: Callable[[], object]) -> bool:
    """Print what is found, or how it fails; whether it did not."""
    begun = time.perf_counter()
    try:
        found, right = find(), True
    except Exception as error:
        found, right = f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:200]}", False
        traceback.print_exc()
    print(f"FACT {name}\t{found}\t{time.perf_counter() - begun:.1f} s", flush=True)
    return right


def imports() -> bool:
    """Versions, the card, and that llmkd can be imported."""

    def version(name: str) -> str:
        return getattr(importlib.import_module(name), "__version__", "?")

    found = [fact(name, lambda name=name: version(name)) for name in PACKAGES]
    import torch

    if torch.cuda.is_available():
        fact(
            "card",
            lambda: (torch.cuda.get_device_name(), torch.cuda.get_device_capability(), f"{torch.cuda.mem_get_info()[1] / 1e9:.1f} GB"),
        )
    return fact("llmkd", lambda: importlib.import_module("llmkd.training.run").__name__) and found[0]


def primitives() -> bool:
    """Each thing that only a GPU has, by itself, so that one that fails has a name."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from llmkd import head
    from llmkd.config.recipe import Optim
    from llmkd.losses import fused
    from llmkd.models import attention, float8, lora_product, norms
    from llmkd.training import loop
    from llmkd.training import optim as optimizers

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    half = torch.bfloat16
    a, b = torch.randn(512, 1024, device=device, dtype=half), torch.randn(2048, 1024, device=device, dtype=half)

    def product() -> str:
        right = a.double() @ b.double().T
        return f"off by {float((head._product(a, b) - right).norm() / right.norm()):.1e}"

    def eight_bit() -> str:
        layer = torch.nn.Linear(1024, 2048, bias=False, device=device, dtype=half).requires_grad_(False)
        rounded = float8.Float8Linear(layer)
        x, scale = float8.to_float8(a)
        same = float8.reference(x, rounded.weight_OK, scale, rounded.scale_O1)
        y = rounded(a)
        gaps = (float((y - other).norm() / y.norm()) for other in (layer(a), same))
        return (
            "off by {:.1e}, from its definition by {:.1e}; rows 1 and 0: ".format(*gaps)
            + f"{tuple(rounded(a[:1]).shape)} {tuple(rounded(a[:0]).shape)}"
        )

    def adapted() -> str:
        A, B = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((16, 1024), (2048, 16)))
        grad = torch.randn(512, 2048, device=device, dtype=half)
        y = lora_product._Adapted.apply(a, None, b, None, A, B, 2.0)
        found = (y, *torch.autograd.grad(y, (A, B), grad))
        wide = [x.detach().double().requires_grad_() for x in (A, B)]
        right = a.double() @ b.double().T + 2 * (a.double() @ wide[0].T) @ wide[1].T
        right = (right, *torch.autograd.grad(right, wide, grad.double()))
        return "off by " + ", ".join(f"{((x - r).norm() / r.norm()).item():.1e}" for x, r in zip(found, right, strict=True))

    def skipped(name: str) -> str:
        weight = torch.nn.Parameter(torch.ones(128, 128, device=device))
        optimizer = optimizers.build(Optim(name=name), {"a": weight})
        state, means = loop.StudentState(torch.nn.Module(), optimizer, {"a": weight}, lambda step: 1e-3, 1.0), []
        for nonfinite in (0.0, float("nan"), 0.0):
            weight.grad = torch.ones_like(weight)
            norm = loop.unscale_and_norm_(state, 1.0)
            loop.optimizer_step(state, 1, norm, torch.tensor(nonfinite, device=device))
            means.append(weight.mean().item())
        return f"{'right' if means[0] == means[1] != means[2] else 'WRONG'}: {means}"

    found = [
        fact("the Triton kernel is used", lambda: fused.kernels_run(device)),
        *(fact(f"one call of FlashAttention, window {w}", lambda w=w: attention.one_call(device, w)) for w in (False, True)),
        fact("product with a float32 result", product),
        fact("LoRA's products and gradients, 3e-3 and 1e-5", adapted),
        fact("a norm in one call is transformers' own", lambda: norms.agrees(LlamaRMSNorm(2048).to(device, half))),
        fact("product of 8-bit floats", eight_bit),
        *(
            fact(f"a step that is not finite, {name}", lambda name=name: skipped(name))
            for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")
        ),
        fact(
            "a pinned copy", lambda: torch.zeros(4).pin_memory().to(device, non_blocking=True).device if device.type == "cuda" else "no GPU"
        ),
        fact("a sharded model of one process", lambda: _sharded(device)),
    ]
    return all(found)


def _sharded(device) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.batch import View
    from llmkd.models import sharding
    from llmkd.models.language_model import LanguageModel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device)
    student, rows = LanguageModel(model, 320).train(), torch.arange(16, device=device)
    view = View({"input_ids": rows[None]}, rows)
    before = student.hidden(view).detach()
    sharding.shard(model, torch.distributed.device_mesh.init_device_mesh(device.type, (1,)), "student")
    after = student.hidden(view)
    student.head.logits(after).square().mean().backward()
    torch.distributed.destroy_process_group()
    return f"off by {float((after - before).abs().max()):.1e}, gradients {all(p.grad is not None for p in model.parameters())}"


def plan() -> bool:
    """A real step of the largest micro-batch next to its plan: Llama 8B to 1B; on a CPU two layers of SmolLM2."""
    import torch

    from llmkd.config.loader import load_recipe
    from llmkd.planning.build import build
    from llmkd.planning.find import find
    from llmkd.planning.here import times
    from llmkd.planning.measure import measure
    from llmkd.planning.models import Depth, depth_of
    from llmkd.planning.step import OneProcess
    from llmkd.planning.work import work_of

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    folder = "llama3_8b_to_1b" if on_gpu else "laptop_360m_to_135m"
    (path,) = (REPO / "recipes" / folder).glob("2_*.yaml")
    recipe = load_recipe(path, {} if on_gpu else {"data.max_length": 64, "train.micro_batch_size": 1})
    found = find([recipe], path.parent)
    batch = work_of(found.data, recipe).batch
    memory = torch.cuda.mem_get_info()[1] if on_gpu else None
    depth = Depth(depth_of(found.student.config, "student.model") if on_gpu else 2)
    of_teachers = [depth_of(config.config, f"{name}.model") if on_gpu else 2 for name, _, config in found.live]
    if on_gpu:
        planned = measure([recipe], found, batch, False, memory, True)
        fact("planned, GB", lambda: f"{sum(planned.phases[planned.peak].values()) / 1e9:.2f}, of a step with optimizer state")
    with torch.device(device):
        ready = build([recipe], found, depth, of_teachers, memory, on_gpu, OneProcess(device))
    seconds = list(times(ready, batch.to(device), device))
    tokens = batch.student.inputs["input_ids"].numel()
    fact("seconds of steps", lambda: [round(one, 3) for one in seconds])
    fact("tokens a second", lambda: f"{tokens / min(seconds):,.0f}")
    if on_gpu:
        sizes = (
            torch.cuda.max_memory_allocated(),
            torch.cuda.max_memory_reserved(),
            torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0],
        )
        fact("allocated, reserved, used, GB", lambda: [round(size / 1e9, 2) for size in sizes])
    return True


def table(folder: str) -> bool:
    """All parts, their facts and the rows of their own tables as one table: what gpu.sh prints at its end."""
    print("| part | ended | seconds | fact | found |\n|---|---|---|---|---|")
    for line in Path(folder, "parts.tsv").read_text().splitlines():
        name, code, seconds, limit = line.split("\t")
        ended = {"0": "well", "124": "cut off", "137": "cut off", "skipped": "left out", "stopped": "stopped by a signal"}
        print(f"| {name} | {ended.get(code, f'exit code {code}')} | {seconds} of {limit} | | |")
        for fact_name, found in found_by(name, Path(folder), code not in ("0", "skipped")):
            print(f"| | | | {fact_name.replace('|', '/')} | {found.replace('|', '/')} |")
    return True


def found_by(part: str, folder: Path, failed: bool) -> list[tuple[str, str]]:
    """The facts in a part's log, its tests, and the rows of its tables, which are there if it came to their end; where it failed the log's last line."""
    log = folder / f"{part}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = [tuple(one.removeprefix("FACT ").split("\t")[:2]) for one in lines if one.startswith("FACT ")]
    verdicts = [one.split(" ")[:2] for one in lines if one.startswith("tests/") and "::" in one]
    if verdicts:
        counts = {word: sum(word in one for one in verdicts) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
        found.append(("tests", ", ".join(f"{n} {word.lower()}" for word, n in counts.items() if n) or "none ended"))
        found += [("not passed", test) for test, *word in verdicts if word not in (["PASSED"], ["SKIPPED"])]
    if failed and lines:
        found.append(("last line", lines[-1].strip()[:200]))
    for own in sorted(folder.glob(f"*{part}_gpu.md")):
        rows = [[cell.strip() for cell in one.strip("|").split("|")] for one in own.read_text().splitlines() if one.startswith("| ")]
        found += [(f"{own.stem.removesuffix('_gpu')}: {first}", "; ".join(filter(None, rest))) for first, *rest in rows]
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    which, *rest = sys.argv[1:] or ["?"]
    known = {"imports": imports, "primitives": primitives, "plan": plan, "table": table}
    if which not in known:
        sys.exit(__doc__)
    sys.exit(0 if known[which](*rest) else 1)
