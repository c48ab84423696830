"""FSDP in Accelerate's config file or the environment: FSDP2 is `train.shard: full`; other settings of FSDP are refused. No torch here."""

import contextlib
import os
from collections.abc import Iterator, Mapping

from ..errors import UserError

ASKED = "ACCELERATE_USE_FSDP"
_OFF = ("", "0", "false", "no", "off", "n", "f")
_ON = ("1", "true", "yes", "on", "y", "t")
#: Options of FSDP: the values that match what llmkd does, and how to fix any other.
OPTIONS = {
    "FSDP_VERSION": (("2",), "set fsdp_version: 2; llmkd has only FSDP2"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        ("", *_ON, "full_shard"),
        "set fsdp_reshard_after_forward: true; layers are gathered again in the backward pass",
    ),
    "FSDP_OFFLOAD_PARAMS": (_OFF, "set fsdp_offload_params: false; sharded weights stay on their GPUs"),
    "FSDP_AUTO_WRAP_POLICY": (("", "transformer_based_wrap"), "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP; every layer is a unit"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        _OFF,
        "set fsdp_activation_checkpointing: false, and student.gradient_checkpointing: true in the recipe",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (_OFF, "set fsdp_activation_checkpointing_offload: false; activations stay on their GPUs"),
    "FSDP_IGNORED_MODULES": (("",), "take fsdp_ignored_modules out of the file; all of the student is sharded"),
}


def fsdp2_asked(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether FSDP2 is requested. UserError for FSDP1, and for options that llmkd does not support."""
    if variables.get(ASKED, "").strip().lower() in _OFF:
        return False
    problems = []
    for name, (allowed, fix) in OPTIONS.items():
        found = variables.get(name, "1" if name == "FSDP_VERSION" else "")  # Accelerate's own default
        if found.strip().lower() not in allowed:
            problems.append(f"{name}: found {found}; {fix} (Accelerate's config file, or the environment)")
    if problems:
        raise UserError(*problems)
    return True


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Hide the request for FSDP from the libraries: Accelerate would look for a GPU and prepare models itself, and transformers would load
    weights on the first process only."""
    before = os.environ.get(ASKED)
    os.environ[ASKED] = "false"
    try:
        yield
    finally:
        os.environ.pop(ASKED)
        if before is not None:
            os.environ[ASKED] = before
