"""Steps on fake CUDA tensors, as a process of its own: `python -m tests.kit.fake_cuda_steps FOLDER` prints what each launched, as JSON."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from eval.speed.fake_cuda import fake_cuda, install

FULL = {"student.method": "full", "student.lora": None}
COMPILED = {"train.compile": True}
#: Steps of 4,096 tokens: LoRA's products are then those of many rows. The others have 1,024.
LARGE = ("lora", "lora, compiled", "two students, hidden states known")
#: Changes of the recipe, students side by side, whether packed, whether the loss is by the Triton kernel.
STEPS = {
    "lora": ({}, 1, True, True),
    "lora, compiled": (COMPILED, 1, True, True),
    "full, checkpointed": (FULL | {"student.gradient_checkpointing": True}, 1, False, True),
    "without the kernel": (FULL, 1, True, False),
    "fp8, float32 student": ({"teacher.quantization": {"type": "fp8"}, "student.dtype": "float32", "student.mixed_precision": "bf16"}, 1, True, True),
    "two students, hidden states known": ({"teacher.cache": {"path": "/nowhere/cache", "kind": "hidden"}}, 2, True, True),
    "two students, top-k cache": ({"teacher.cache": {"path": "/nowhere/cache", "kind": "topk"}}, 2, True, True),
    "half of the targets, weighted": ({"loss.keep": 0.5, "loss.target_weights": {"by": "teacher_entropy"}}, 1, False, True),
}  # fmt: skip


def steps() -> dict[str, dict]:
    from eval.speed import roofline
    from llmkd.losses import fused

    out = {}
    for name, (changes, students, packing, kernel) in STEPS.items():
        count = 2 if "checkpointed" in name else 1
        recipe = roofline.recipe_of(*roofline.FOLDERS["Llama 8B to 1B"], changes | {"data.packing": packing})
        real, fused._choose_backend = fused._choose_backend, fused._choose_backend if kernel else lambda *_: (None, "")
        try:
            found = roofline.audit(
                recipe, students, roofline.batch_of(4096 if name in LARGE else 1024, 128, packing), lambda whole, count=count: count
            )
        finally:
            fused._choose_backend = real
        out[name] = {op: one.launches for op, one in found.costs.items()} | {"all": found.total.launches, "bytes": found.total.bytes}
    return out


def losses() -> dict[str, dict]:
    """Every divergence, and the head in each type and form, of 24 rows in chunks of 8."""
    import torch

    from eval.speed.roofline import Audit
    from llmkd.head import Head
    from llmkd.losses.divergences import DIVERGENCES, make_divergence
    from llmkd.losses.fused import fused_loss
    from llmkd.losses.objective import Objective
    from llmkd.signals import Dense

    def cases() -> Iterator[tuple]:
        for name in DIVERGENCES:
            yield f"{name}", name, torch.bfloat16, False, {}
        for dtype in (torch.float16, torch.float32, torch.float64):
            yield f"{dtype}", "forward_kl", dtype, True, {}
        yield "a trained head with a bias, softly capped", "reverse_kl", torch.bfloat16, True, {"scale": 0.5, "softcap": 30.0}

    out = {}
    for case, name, dtype, trained, options in cases():
        with fake_cuda(), Audit() as counted:
            project, own = (
                torch.nn.Linear(width, 320, bias=bool(options), dtype=dtype).requires_grad_(train)
                for width, train in ((32, trained), (64, False))
            )
            hidden = torch.empty(24, 32, dtype=dtype, requires_grad=True)
            signal = Dense(torch.empty(24, 64, dtype=dtype), Head(own, 320))
            total, rows = fused_loss(
                hidden,
                Head(project, 320, **options),
                torch.zeros(24, dtype=torch.long),
                Objective(0.5, 2.0, make_divergence(name)),
                signal,
                8,
            )
            total.backward()
            assert total.dtype == (dtype if dtype == torch.float64 else torch.float32) and all(
                x.is_cuda and x.shape == (24,) for x in rows.values()
            )
            for tensor in (hidden, *(project.parameters() if trained else ())):
                assert tensor.grad.dtype == dtype and tensor.grad.is_cuda and tensor.grad.shape == tensor.shape
        out[case] = {op: one.launches for op, one in counted.costs.items()}
    return out  # fmt: skip


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes that import torch again
    install(Path(sys.argv[1]))
    print(json.dumps({"steps": steps(), "losses": losses()}))
