"""8-bit floats: the arithmetic against float64 with a bound, and against torch's own product."""

import pytest
import torch

from llmkd.errors import UserError
from llmkd.models import float8
from llmkd.models.float8 import Float8Linear, reference, to_float8


def operands(N: int, K: int, outputs: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(N + K + outputs)
    linear = torch.nn.Linear(K, outputs).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, K) * torch.logspace(-3, 1, outputs)[:, None])
    return (torch.randn(N, K) * torch.logspace(-4, 3, N)[:, None]).to(dtype), linear.to(dtype)


def rounding(x: torch.Tensor) -> torch.Tensor:
    """What e4m3 may be off by: half a unit of 3 binary places, or of its smallest number."""
    x = x.double()
    return torch.maximum(x.abs() * 2.0**-4, x.abs().amax(-1, keepdim=True) / 448 * 2.0**-10) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_rounded_as_far_as_e4m3_rounds(dtype):
    x_NK = operands(40, 64, 16)[0].to(dtype)
    x_NK[3] = 0
    x_NK[5, 7:] = 0
    rounded_NK, scale_N1 = to_float8(x_NK)
    back_NK = rounded_NK.double() * scale_N1.double()
    assert ((back_NK - x_NK.double()).abs() <= rounding(x_NK)).all()
    assert (rounded_NK.float().abs().amax(1) == 448).sum() == 39 and not back_NK[3].any()
    assert (back_NK - x_NK.double()).norm() > 0.01 * x_NK.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_float64_within_the_bound(dtype):
    x_NK, linear = operands(33, 96, 48, dtype)
    layer = Float8Linear(linear)
    x, w = x_NK.double(), linear.weight.double()
    exact_NO = x @ w.T + linear.bias.double()
    dx, dw = rounding(x_NK), rounding(linear.weight)
    bound_NO = dx @ w.abs().T + x.abs() @ dw.T + dx @ dw.T
    out_NO = layer(x_NK)
    assert out_NO.dtype == dtype
    bound_NO += 2 * torch.finfo(dtype).eps * (x.abs() @ w.abs().T + linear.bias.double().abs() + bound_NO)
    assert ((out_NO.double() - exact_NO).abs() <= bound_NO).all()
    error = ((out_NO.double() - exact_NO).norm(dim=1) / exact_NO.norm(dim=1)).mean()
    assert 0.01 < error < 0.06  # and it is not the unrounded product
    assert torch.equal(layer(x_NK[None]), out_NO[None]) and torch.equal(layer(x_NK[4:5])[0], layer(x_NK)[4])


def test_inputs_of_several_layers_are_rounded_once_and_again_when_they_change(monkeypatch):
    x_NK, linear = operands(8, 32, 16)
    layers, rounded, calls = [Float8Linear(linear) for _ in range(3)], to_float8, []
    monkeypatch.setattr(float8, "to_float8", lambda x: calls.append(1) or rounded(x))
    first = [layer(x_NK) for layer in layers]
    assert len(calls) == 1 and torch.equal(first[0], first[2])
    right = layers[0](x_NK.mul(3.0))
    assert torch.equal(layers[1](x_NK.mul_(3.0)), right) and len(calls) == 3
    with torch.inference_mode():
        layers[0](x_NK + 1)


def test_weight_is_what_is_multiplied_by():
    x_NK, linear = operands(8, 32, 16)
    layer = Float8Linear(linear)
    rounded_NK, scale_N1 = to_float8(x_NK)
    expected = rounded_NK.float() * scale_N1 @ layer.weight.T + linear.bias
    torch.testing.assert_close(layer(x_NK), expected, rtol=1e-5, atol=1e-5)
    assert (
        isinstance(layer, torch.nn.Linear) and layer.weight.dtype == linear.weight.dtype and "weight" not in dict(layer.named_parameters())
    )
    assert sum(t.nbytes for t in layer.state_dict().values()) == 32 * 16 + 2 * 16 * 4


def test_it_is_torchs_own_scaled_product_where_the_cpu_has_it():
    x_NK, linear = operands(33, 96, 48, torch.bfloat16)
    (x8, sx), (w8, sw) = to_float8(x_NK), to_float8(linear.weight)
    try:
        theirs = torch._scaled_mm(x8, w8.T, scale_a=sx, scale_b=sw.T, out_dtype=torch.bfloat16)
    except Exception as error:
        pytest.skip(f"no such product here: {error}")
    torch.testing.assert_close(reference(x8, w8, sx, sw), theirs.float(), rtol=2**-8, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with 8-bit floats")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64, 48), (33, 96, 48), (300, 4096, 1024), (7, 1024, 4096)])
def test_the_gpus_product_is_the_reference(shape, dtype):
    x_NK, linear = operands(*shape, torch.float32)
    x_NK = (x_NK / x_NK.abs().amax(1, keepdim=True)).to(dtype).cuda()
    layer = Float8Linear(linear.to("cuda", dtype))
    found = layer(x_NK)
    expected = reference(*((pair := (to_float8(x_NK), (layer.weight_OK, layer.scale_O1)))[0][0], pair[1][0], pair[0][1], pair[1][1]))
    assert found.dtype == dtype
    size = expected.abs().amax(0, keepdim=True)
    assert ((found.float() - layer.bias.float() - expected).abs() <= 2.0**-7 * (size + layer.bias.float().abs())).all()


def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        UserError, match=r"teacher.quantization.type: found fp8, and cuda:1 has compute capability 8.0, expected 8.9 or more; use"
    ):
        float8.refuse_without_products(torch.device("cuda:1"), "teacher")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    float8.refuse_without_products(torch.device("cuda:1"), "teacher")
    float8.refuse_without_products(torch.device("cpu"), "teacher")
