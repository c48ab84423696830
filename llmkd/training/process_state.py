"""Settings of torch and Accelerate that a program (a notebook, sitecustomize) made before it called llmkd and that would change results."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..console import info
from ..errors import UserError


@dataclass(frozen=True)
class Setting:
    """One setting of torch: `read` returns its value from the torch module, `expected` are the values that change nothing, `fix` resets it."""

    name: str
    read: Callable
    expected: tuple
    fix: str


#: Other values than the expected ones are refused.
SETTINGS = (
    Setting("default dtype", lambda t: str(t.get_default_dtype()), ("torch.float32",), "torch.set_default_dtype(torch.float32)"),
    Setting("default device", lambda t: str(t.get_default_device()), ("cpu",), "torch.set_default_device(None)"),
    Setting("gradients", lambda t: t.is_grad_enabled(), (True,), "torch.set_grad_enabled(True), or leave torch.no_grad()"),
    Setting("inference mode", lambda t: t.is_inference_mode_enabled(), (False,), "leave torch.inference_mode()"),
    Setting("autocast on the CPU", lambda t: t.is_autocast_enabled("cpu"), (False,), "leave torch.autocast"),
    Setting("autocast on a GPU", lambda t: t.is_autocast_enabled("cuda"), (False,), "leave torch.autocast"),
    Setting(
        "precision of float32 matrix products",
        lambda t: t.get_float32_matmul_precision(),
        ("highest",),
        "torch.set_float32_matmul_precision('highest'); student.mixed_precision: bf16 makes a run faster and leaves the loss alone",
    ),
    Setting("TF32", lambda t: t.backends.cuda.matmul.allow_tf32, (False,), "torch.backends.cuda.matmul.allow_tf32 = False"),
    Setting(
        "sums in float16",
        lambda t: getattr(t.backends.cuda.matmul, "allow_fp16_accumulation", False),
        (False,),
        "torch.backends.cuda.matmul.allow_fp16_accumulation = False",
    ),
    Setting(
        "precision of oneDNN's matrix products",
        lambda t: getattr(getattr(t.backends.mkldnn, "matmul", None), "fp32_precision", "none"),
        ("none", "ieee"),
        "torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
    ),
)

#: Allowed, since they affect only the last bits of results; a run reports them.
SAID = (
    ("deterministic algorithms are on", lambda t: t.are_deterministic_algorithms_enabled()),
    ("numbers below the normal range count as 0 (torch.set_flush_denormal, or a library built with -ffast-math)", lambda t: _flushes(t)),
    ("a kernel of scaled_dot_product_attention is switched off", lambda t: not all(_attention_kernels(t))),
)


def check_process_state() -> None:
    """UserError that names every setting of torch that changes results. Does nothing before torch is imported."""
    if (torch := sys.modules.get("torch")) is None or not hasattr(torch, "get_default_device"):
        return
    problems = list(_problems(torch))
    if problems:
        raise UserError(*problems)
    for text, found in SAID:
        if found(torch) and text not in told:
            told.add(text)
            info(f"torch: {text}")


told: set[str] = set()


def _problems(torch) -> Iterator[str]:
    for setting in SETTINGS:
        found = _read(torch, setting)
        if found not in setting.expected:
            yield (
                f"torch: {setting.name}: found {found}, expected {setting.expected[0]}; a program (a notebook, sitecustomize) has set it, "
                f"and it changes results: {setting.fix}"
            )


def _read(torch, setting: Setting):
    try:
        return setting.read(torch)
    except RuntimeError:  # torch refuses to read allow_tf32 if the newer fp32_precision was set
        return "fp32_precision" if torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee") else setting.expected[0]


def _flushes(torch) -> bool:
    return not bool(torch.full((1,), 1e-40, dtype=torch.float32, device="cpu").mul(1.0).ne(0).item())


def _attention_kernels(torch) -> Iterator[bool]:
    for name in ("flash", "mem_efficient", "math"):
        yield getattr(torch.backends.cuda, f"{name}_sdp_enabled")()


def check_accelerator(accelerator) -> None:
    """UserError if Accelerate would do more than split the batch over processes, whatever configured it."""
    found = {
        "gradient_accumulation_steps": (accelerator.gradient_accumulation_steps, (1,)),
        "mixed_precision": (accelerator.mixed_precision, ("no",)),
        "dynamo_backend": (accelerator.state.dynamo_plugin.backend.value.lower(), ("no",)),
        "distributed_type": (accelerator.distributed_type.value, ("NO", *(f"MULTI_{kind}" for kind in ("CPU", "GPU")))),
        "device": (accelerator.device.type, ("cpu", "cuda")),
        "gradient scaler": (accelerator.scaler, (None,)),
    }
    problems = [
        f"Accelerate: {name}: found {value}, expected {' or '.join(map(str, expected))}; unset Accelerate's environment variables, and restart "
        "the program where it has made an Accelerator of its own"
        for name, (value, expected) in found.items()
        if value not in expected
    ]
    if problems:
        raise UserError(*problems)
