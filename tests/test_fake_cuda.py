"""The code that runs on a GPU, without one: steps on fake CUDA tensors, with the types and arguments that they have there. Values are looked
at where a GPU is (`test_gpu.py`)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from llmkd.losses.divergences import DIVERGENCES

LACKS = not shutil.which("g++") or not importlib.util.find_spec("triton") or torch.backends.cuda.is_built()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(LACKS, reason="for a CPU-only PyTorch, with g++ and triton")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict:
    """How often each operation was launched, by step and by loss. A process of its own: what it loads must come before torch."""
    folder = str(tmp_path_factory.mktemp("fake_cuda"))
    words = [sys.executable, "-m", "tests.kit.fake_cuda_steps", folder]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


#: Of each step: calls of FlashAttention forward and backward (student and teacher, one layer or two and recomputed once), of the loss's
#: kernel for 2,336 targets (two chunks) or 584, of 8-bit products (seven matrices of the teacher's layer), and of AdamW for each of its groups.
EXPECTED = {
    "lora": {
        "_varlen_attn": 2,
        "_varlen_attn_backward": 1,
        "triton rows_kernel": 2,
        "_fused_adamw_": 1,
        "_fused_rms_norm": 6,
        "_fused_rms_norm_backward": 2,
    },
    "lora, compiled": {"_varlen_attn": 2, "_varlen_attn_backward": 1, "triton rows_kernel": 2, "_fused_adamw_": 1},
    "full, checkpointed": {
        "_scaled_dot_product_flash_attention": 5,
        "_scaled_dot_product_flash_attention_backward": 2,
        "triton rows_kernel": 1,
        "_fused_adamw_": 2,
    },
    "without the kernel": {"_varlen_attn": 2, "_varlen_attn_backward": 1, "_fused_adamw_": 2},
    "fp8, float32 student": {"_varlen_attn": 2, "_varlen_attn_backward": 1, "_scaled_mm": 7, "triton rows_kernel": 1, "_fused_adamw_": 1},
    "two students, hidden states known": {"_varlen_attn": 2, "_varlen_attn_backward": 2, "triton rows_kernel": 4, "_fused_adamw_": 2},
    "two students, top-k cache": {"_varlen_attn": 2, "_varlen_attn_backward": 2, "_fused_adamw_": 2},
    "half of the targets, weighted": {
        "_scaled_dot_product_flash_attention": 2,
        "_scaled_dot_product_flash_attention_backward": 1,
        "_fused_adamw_": 1,
    },
}
NORMS = {"_fused_rms_norm", "_fused_rms_norm_backward"}
COUNTED = set().union(*EXPECTED.values()) - NORMS


@pytest.mark.parametrize("step", EXPECTED)
def test_a_step_calls_what_a_gpu_has_for_it(launched, step):
    found = launched["steps"][step]
    assert {name: count for name, count in found.items() if name in COUNTED | EXPECTED[step].keys()} == EXPECTED[step]
    assert "_local_scalar_dense" not in found and "nonzero" not in found  # nothing waits for the device


def test_every_divergence_and_form_of_the_head(launched):
    """Three chunks: the student's product and its gradient, the teacher's, and the trained weight's gradient; the kernel where it has the loss."""
    losses = launched["losses"]
    assert losses.keys() >= DIVERGENCES.keys()
    for name, found in losses.items():
        trained = name.startswith(("torch.float16", "torch.float32", "torch.float64", "a trained"))
        products = found["mm"] + found.get("addmm_", 0)
        assert products == 3 * (4 if trained else 3), (name, found)
    by_kernel = {name for name, found in losses.items() if found.get("triton rows_kernel") == 3}
    assert by_kernel == {"forward_kl", "reverse_kl", "symmetric_kl", "generalized_jsd", "torch.float16", "torch.float32"}


#: Launches and GB of a step of Llama 8B to 1B, one layer of each: they may only go down.
CEILINGS = {
    "lora": (442, 21.34),
    "lora, compiled": (278, 19.42),
    "fp8, float32 student": (371, 11.38),
    "two students, hidden states known": (768, 30.32),
}


@pytest.mark.parametrize("step", CEILINGS)
def test_launches_and_bytes_do_not_grow(launched, step):
    found, (launches, size) = launched["steps"][step], CEILINGS[step]
    assert 0.9 * launches < found["all"] <= launches and 0.9 * size < found["bytes"] / 1e9 <= size, (found["all"], found["bytes"])
