"""RMS norms in one call, against the definition in float64 and against transformers' own to the last bit."""

import copy

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llmkd.models import norms


def norm(kind, dtype=torch.bfloat16, H: int = 96):
    torch.manual_seed(0)
    module = kind(H, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(H) * 0.3 + (0 if kind is Gemma3RMSNorm else 1))
    x = (torch.randn(5, 40, H) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    return module, x.requires_grad_(), torch.randn(5, 40, H).to(dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_one_call_is_the_familys_to_the_last_bit(kind, dtype, monkeypatch):
    module, x, g = norm(kind, dtype)
    own = module(x)
    expected = own, *torch.autograd.grad(own, x, g)
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    model = torch.nn.Sequential(module)
    norms.fuse(model)
    norms.fuse(model)  # once is enough
    fused = copy.deepcopy(model)[0]
    assert type(fused) is type(module) is not kind and isinstance(fused, kind)
    found = fused(x)
    for one, other in zip((found, *torch.autograd.grad(found, x, g)), expected, strict=True):
        assert torch.equal(one, other)
    wide = x.detach().double()
    right = module.weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert ((found.double() - right).abs() <= 2.01 * torch.finfo(dtype).eps * right.abs() + 1e-6).all()
    assert fused(x.float()).dtype == torch.float32 and torch.equal(fused(x.float()), kind.forward(fused, x.float()))


def test_other_norms_stay_what_they_are(monkeypatch):
    """Those on a CPU, of float32, of 1 + w, and those that are rounded after the product."""
    on_cpu = norm(LlamaRMSNorm)[0]
    norms.fuse(torch.nn.Sequential(on_cpu))
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    others = [norm(LlamaRMSNorm, torch.float32)[0], norm(Gemma3RMSNorm)[0], norm(Olmo2RMSNorm)[0], torch.nn.LayerNorm(8)]
    norms.fuse(torch.nn.Sequential(*others))
    assert [type(one) for one in (on_cpu, *others)] == [LlamaRMSNorm, LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm, torch.nn.LayerNorm]
