"""What differs on a GPU: half-precision products with float32 results, the fused optimizer, whole runs in bfloat16."""

import pytest
import torch

from llmkd.head import Head
from llmkd.losses import fused
from llmkd.losses.divergences import make_divergence
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.signals import Dense
from llmkd.training.run import run
from tests.conftest import distance, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def linear(rows: int, columns: int, device: str, dtype: torch.dtype) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(rows + columns)
    layer = torch.nn.Linear(columns, rows, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, columns, generator=generator) * columns**-0.5 * 3)
    return layer.to(device, dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_bfloat16_on_the_gpu_is_float64_of_the_same_operands(divergence):
    N, V, H = 300, 32_000, 128
    torch.manual_seed(0)
    hidden, labels = torch.randn(N, H).bfloat16(), torch.randint(V, (N,))
    teacher_hidden = hidden + 0.02 * torch.randn(N, H).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        weight = linear(V, H, device, torch.bfloat16).to(dtype)
        h = hidden.to(device, dtype).requires_grad_()
        signal = Dense(teacher_hidden.to(device, dtype), Head(weight, V))
        total, rows = fused_loss(h, Head(weight, V), labels.to(device), Objective(1.0, 1.0, make_divergence(divergence)), signal, 128)
        total.backward()
        assert (rows["kd"] >= 0).all()
        results.append((total.item(), h.grad.double().cpu()))
    (value, grad), (expected, exact) = results
    assert value == pytest.approx(expected, rel=1e-2)
    assert (grad - exact).norm() <= 2e-2 * exact.norm()


def test_memory_of_the_head_is_a_few_chunks():
    N, V, H = 8192, 128_256, 256
    head = Head(linear(V, H, "cuda", torch.bfloat16), V)
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V, (N,), device="cuda")
    signal = Dense(hidden.detach().clone(), head)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_loss(hidden, head, labels, Objective(0.5), signal)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 3 << 29


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric_kl", "generalized_jsd"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_the_kernel_is_the_pytorch_path(monkeypatch, dtype, bound, divergence, temperature):
    pytest.importorskip("triton")
    N, V, H = 300, 32_001, 128
    torch.manual_seed(0)
    hidden, labels = torch.randn(N, H, device="cuda", dtype=dtype), torch.randint(V, (N,), device="cuda")
    weight, other = linear(V, H, "cuda", dtype), linear(V, 2 * H, "cuda", dtype)
    signal, objective = (
        Dense(torch.randn(N, 2 * H, device="cuda", dtype=dtype), Head(other, V)),
        Objective(0.4, temperature, make_divergence(divergence)),
    )
    results = []
    for by_kernel in (True, False):
        monkeypatch.setattr(fused, "kernels_run", lambda device, by_kernel=by_kernel: by_kernel)
        h = hidden.clone().requires_grad_()
        total, rows = fused.fused_loss(h, Head(weight, V), labels, objective, signal, 128)
        total.backward()
        results.append((rows["ce"], rows["kd"], h.grad.float()))
    for found, right in zip(*results, strict=True):
        assert (found - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_in_bfloat16(make_recipe, world, method):
    recipe = make_recipe(
        student__dtype="bfloat16",
        teacher__dtype="bfloat16",
        student__method=method,
        data__validation__path=str(world / "held.jsonl"),
        train__epochs=8,
    )
    summary = run(recipe)
    assert summary["validation"]["forward_kl"] < 2.0 and summary["train"]["loss"] > 0


def test_resume_on_the_gpu(make_recipe, tmp_path):
    from tests.conftest import distance, weights
    from tests.training.test_resume import LONG, unfinish

    changes = LONG | {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"}
    run(make_recipe("a", **changes))
    run(make_recipe("b", **changes))
    unfinish(tmp_path / "b", 3)
    run(make_recipe("b", **changes), resume=True)
    assert distance(weights(tmp_path / "b"), weights(tmp_path / "a")) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_qlora_with_an_eight_bit_teacher_resumes(make_recipe, world, tmp_path, optimizer):
    pytest.importorskip("bitsandbytes")
    from tests.conftest import distance, weights
    from tests.training.test_resume import LONG, unfinish

    changes = LONG | {
        "student__dtype": "bfloat16",
        "student__quantization": {"type": "nf4"},
        "student__lora": {"rank": 64},
        "teacher__dtype": "bfloat16",
        "teacher__quantization": {"type": "int8"},
        "optim__name": optimizer,
    }
    run(make_recipe("a", **changes))
    run(make_recipe("b", **changes))
    unfinish(tmp_path / "b", 3)
    run(make_recipe("b", **changes), resume=True)
    assert distance(weights(tmp_path / "b"), weights(tmp_path / "a")) == 0


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_packed_rows_on_the_gpu(make_recipe, tmp_path, attention):
    from tests.conftest import distance, weights

    changes = {
        f"{who}__{name}": value for who in ("student", "teacher") for name, value in (("dtype", "float32"), ("attention", attention))
    }
    run(make_recipe("a", **changes))
    run(make_recipe("b", data__packing=True, **changes))
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-3


@pytest.mark.parametrize("windowed", [False, True])
def test_variable_length_attention_in_one_call(windowed):
    from llmkd.models import attention

    way = attention.one_call(torch.device("cuda", 0), windowed)
    assert way and not way.keywords["repeat"]  # heads in groups as they are


@pytest.mark.parametrize("share", [False, True])
def test_packed_rows_in_half_precision(make_recipe, tmp_path, share):
    """The figures of every step: weights would tell rounding from AdamW's first steps, which go by the gradient's sign."""
    from llmkd.files import read_jsonl

    changes = {f"{who}__dtype": "bfloat16" for who in ("student", "teacher")}
    run(make_recipe("a", **changes))
    run(make_recipe("b", data__packing=True, data__share_prefixes=share, **changes))
    apart, packed = ([record for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in record] for name in ("a", "b"))
    assert len(apart) == len(packed) > 1
    for name in ("ce", "kd"):
        assert [one[name] for one in packed] == pytest.approx([one[name] for one in apart], rel=2e-2)


@pytest.mark.parametrize("checkpointing", [False, 0.5])
def test_a_compiled_run_on_the_gpu_is_the_plain_one(make_recipe, tmp_path, checkpointing):
    from llmkd.files import read_jsonl

    changes = {"student__dtype": "float32", "teacher__dtype": "float32", "student__gradient_checkpointing": checkpointing}
    changes |= {"student__lora__dropout": 0.3}
    run(make_recipe("a", **changes))
    run(make_recipe("b", train__compile=True, **changes))
    losses = [[record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in record] for name in ("a", "b")]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_offloaded_inputs_of_layers_change_no_bit_on_the_gpu(make_recipe, tmp_path):
    """Over several micro-batches of a step, whose copies to and from the host overlap with the layers."""
    found = []
    for name, how in (("a", True), ("b", "offload")):
        recipe = make_recipe(name, student__gradient_checkpointing=how, student__lora__dropout=0.3, train__micro_batch_size=2)
        run(recipe)
        found.append(weights(tmp_path / name))
    assert distance(*found) == 0


def test_the_last_layer_at_the_rows_alone_on_the_gpu(world):
    from llmkd.config.recipe import Lora, Student
    from tests.kit.models import load_student
    from tests.models.test_last_layer import gap, results, stirred, view

    for dtype, bound in (("float64", 1e-12), ("bfloat16", 5e-2)):
        model = stirred(load_student(Student(model=str(world / "student"), dtype=dtype, lora=Lora(rank=4)), 640, "cuda", 0))
        on = view().each(lambda x: x.cuda())
        assert gap(results(model, True, on), results(model, False, on)) < bound


def test_loras_products_and_norms_on_the_gpu():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from llmkd.models import norms
    from tests.models.test_lora_product import compare_bfloat16

    compare_bfloat16("cuda", N=1000)
    module = LlamaRMSNorm(2048).to("cuda", torch.bfloat16)
    assert norms.agrees(module) and not norms.agrees(torch.nn.LayerNorm(2048, device="cuda", dtype=torch.bfloat16))
