"""Loads adapters into a running vLLM server. Written from vLLM's source, and not tested against a real server. No torch.

The server must be started with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment.
"""

import re

from ..errors import UserError
from .client import Refused, Server
from .logprobs import explain

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_NOBODY = "llmkd-nobody"  # a name that no adapter has


def load_adapter(server: Server, name: str, path: str, rank: int, setting: str) -> None:
    """Have the server load the adapter in the folder `path` under `name`, unless it has one of that name. UserError if it refuses.

    rank      of the adapter, for messages
    setting   the section that names the server, for messages
    """
    try:
        server.tell(_LOAD, {"lora_name": name, "lora_path": path})
    except Refused as error:
        if "already been loaded" not in error.text:
            raise _explained(error, server, path, rank, setting) from None


def unload_adapter(server: Server, name: str, patience: float | None = None) -> None:
    """Have the server unload an adapter, if it has one of that name."""
    try:
        server.tell(_UNLOAD, {"lora_name": name}, patience)
    except Refused as error:
        if error.status not in (400, 404):
            raise


def refuse_without_loading(server: Server, setting: str) -> None:
    """UserError if the server cannot load adapters while it runs. Tested by one request to unload an adapter that it does not have."""
    try:
        server.tell(_UNLOAD, {"lora_name": _NOBODY}, 0.0)
    except Refused as error:
        if error.status in (404, 405) and _NOBODY not in error.text:
            raise UserError(
                f"{setting}.server: {server.address} loads no adapters while it runs; start vLLM with --enable-lora, and with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            ) from None
        if error.status in (401, 403):
            raise explain(error, setting) from None


def _explained(error: Refused, server: Server, path: str, rank: int, setting: str) -> UserError:
    if re.search(r"max_lora_rank|LoRA rank", error.text):
        fix = f"start it with --max-lora-rank {rank} or more, or lower student.lora.rank"
    elif re.search(r"no adapter found|no such file|not exist|cannot be found|HFValidationError|repo id", error.text, re.I):
        fix = f"name a folder that it sees under the same path as {setting}.adapters"
    elif error.status in (404, 405):
        fix = "start vLLM with --enable-lora, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
    else:
        fix = "start it for such an adapter, or use engine: local"
    return UserError(f"{setting}.server: {server.address} does not load the adapter {path} (it {error}); {fix}")
