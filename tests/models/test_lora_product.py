"""LoRA's products in one function, against y = x W^T + b + s (x A^T) B^T in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llmkd.models import lora_product
from llmkd.models.lora_product import LoraLinear, _Adapted


def case(dtype=torch.float64, adapter=torch.float64, bias=True, N=37, K=48, O=80, r=4):  # noqa: E741
    torch.manual_seed(0)
    x, W, b = torch.randn(3, N, K), torch.randn(O, K) / K**0.5, torch.randn(O)
    A, B, g = torch.randn(r, K) / K**0.5, torch.randn(O, r) / r**0.5, torch.randn(3, N, O)
    x, W, b, g = (t.to(dtype) for t in (x, W, b, g))
    return x.requires_grad_(), W, b if bias else None, A.to(adapter).requires_grad_(), B.to(adapter).requires_grad_(), g


def by_hand(x, W, b, A, B, s, mask=None):
    y = x @ W.T + (0 if b is None else b)
    return y + s * ((x if mask is None else x * mask) @ A.T) @ B.T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_it_is_the_product_and_its_gradients(bias, dropped):
    x, W, b, A, B, g = case(bias=bias)
    mask = (torch.arange(48) % 3 > 0) * 1.5 if dropped else None
    y = _Adapted.apply(x, x * mask if dropped else None, W, b, A, B, 3.0)
    right = by_hand(x, W, b, A, B, 3.0, mask)
    for one, other in zip((y, *torch.autograd.grad(y, (x, A, B), g)), (right, *torch.autograd.grad(right, (x, A, B), g)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 3, 4])
def test_what_is_frozen_has_no_gradient_and_the_others_have_theirs(frozen):
    given = case()[:5]
    given[frozen].requires_grad_(False)
    trained = [t for t in given if t is not None and t.requires_grad]
    found = torch.autograd.grad(_Adapted.apply(given[0], None, *given[1:], 3.0).sum(), trained)
    assert len(found) == 2
    for one, other in zip(found, torch.autograd.grad(by_hand(*given, 3.0).sum(), trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_the_low_part_of_either_matrix_is_in_the_product(turned):
    """(1 + 2^-12) 1 - 1 1, where the high parts cancel."""
    left, right, y = torch.tensor([[1 + 2**-12, 1.0]]), torch.tensor([[1.0], [-1.0]]), torch.zeros(1, 1, dtype=torch.bfloat16)
    assert lora_product._add_wide(y, *((right.T, left.T) if turned else (left, right))).item() == 2**-12


def compare_bfloat16(device: str, N: int) -> None:
    """float32 matrices rounded to bfloat16 would be off by 2e-3."""
    x, W, b, A, B, g = (t.detach().to(device) for t in case(torch.bfloat16, torch.float32, N=N))
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    y = _Adapted.apply(x, None, W, b, A, B, 3.0)
    found = y, *torch.autograd.grad(y, (x, A, B), g)
    x, W, b, A, B, g = (t.detach().double() for t in (x, W, b, A, B, g))
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    right = by_hand(x, W, b, A, B, 3.0)
    right = right, *torch.autograd.grad(right, (x, A, B), g)
    off = [((one.double() - other).norm() / other.norm()).item() for one, other in zip(found, right, strict=True)]
    assert max(off[:2]) < 3e-3 and max(off[2:]) < 1e-5, off
    low = _Adapted.apply(x.bfloat16(), None, torch.zeros_like(W).bfloat16(), None, A.float(), B.float(), 3.0).double()
    assert ((low - by_hand(x, 0 * W, None, A, B, 3.0)).norm() / low.norm()) < 2e-3  # the last rounding of y alone
    assert found[2].dtype == found[3].dtype == torch.float32 and found[0].dtype == found[1].dtype == torch.bfloat16


def test_with_bfloat16_weights_the_adapter_keeps_its_sixteen_bits():
    compare_bfloat16("cpu", N=100)


def adapted(**changes) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["0"], "init_lora_weights": False} | changes
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(**options))
    lora_product.add_in_place(model)
    return model


def test_what_is_more_than_one_adapter_on_frozen_weights_is_left_to_peft(monkeypatch):
    x, calls = torch.randn(5, 8), []
    monkeypatch.setattr(_Adapted, "apply", lambda *args: calls.append(args) or args[0].new_zeros(5, 6))
    model = adapted()
    layer = model.base_model.model[0]
    assert type(layer) is LoraLinear
    model(x)
    assert len(calls) == 1
    with model.disable_adapter():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    seen = []
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        for register in (module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook):
            handle = register(lambda *_: seen.append(1))
            model(x)
            handle.remove()
    layer.eval()(x, adapter_names=["__base__"] * 5)
    layer.train().base_layer.__class__ = type("Packed", (nn.Linear,), {})
    model(x)
    layer.base_layer.__class__ = nn.Linear
    model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    model(x)
    model.base_model.set_adapter("default")
    layer.base_layer.weight.requires_grad_(True)
    model(x)
    layer.base_layer.weight.requires_grad_(False)
    model.merge_adapter()
    model(x)
    for changes in ({"use_dora": True}, {"lora_bias": True}):
        adapted(**changes)(x)
    assert len(calls) == 1 and seen == [1] * 6
    model.unmerge_adapter()
    model(x)
    assert len(calls) == 2
