"""Settings of a teacher on a server, and their contradictions. A part of `teacher.py`."""

import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from ..console import printable

#: The settings that belong to `teacher.server`, with their defaults.
SERVER_DEFAULTS: dict[str, float | str | None] = {
    "api": "vllm",
    "top_k": 64,
    "requests": 8,
    "timeout": 300.0,
    "patience": 600.0,
    "api_key_env": None,
}
#: Keys: some, such as hf_aBc3..., could also be names of variables.
_LIKE_A_KEY = re.compile(r"(?=.*[a-z])(?=.*[A-Z0-9]).{20,}")
#: The settings of models that are loaded, with their defaults.
_LOADED = {
    "revision": None,
    "base": None,
    "quantization": None,
    "device": None,
    "merge_adapter": False,
    "dtype": "auto",
    "attention": "auto",
}


def server_contradictions(path: str, teacher) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of the `Teacher` at the setting `path`, in the form of `contradictions.contradictions`."""
    if teacher.server is None:
        for name in SERVER_DEFAULTS:
            if getattr(teacher, name) is not None:
                fix = f"name the server ({path}.server: http://host:port), or leave this out" + (
                    "; of a cache it is cache.k" if name == "top_k" else ""
                )
                yield (f"{path}.{name}", f"{path}.server"), f"set without a server; {fix}"
        return
    if problem := address_problem(teacher.server):
        yield (f"{path}.server",), problem
    if teacher.api_key_env is not None and (problem := env_name_problem(teacher.api_key_env)):
        yield (f"{path}.api_key_env",), problem
    for name, default in _LOADED.items():
        if getattr(teacher, name) != default:
            yield (
                (f"{path}.{name}", f"{path}.server"),
                "set with a server, which loads the model itself; leave it out, and start the server so",
            )
    cache = teacher.cache
    if cache is None:
        return
    if cache.kind not in (None, "topk"):
        yield (
            (f"{path}.cache.kind", f"{path}.server"),
            f"found {cache.kind}, and a server gives its most likely tokens only; use topk, or leave it out",
        )
    for name in ("num_samples", "temperature", "seed", "hidden_dtype"):
        if getattr(cache, name) is not None:
            yield (f"{path}.cache.{name}", f"{path}.server"), "set with a server, whose answers are of kind topk; leave it out"
    if teacher.top_k is not None and cache.k not in (None, teacher.top_k):
        yield (f"{path}.cache.k", f"{path}.top_k"), f"found {cache.k}, and {path}.top_k is {teacher.top_k}; leave it out"


def address_problem(address: str) -> str | None:
    """The problem with a server's address, without a password in it; None if there is none."""
    try:
        parts = urlsplit(address)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        return "has no right port or host; expected http://host:port"
    if parts.username is not None or parts.password is not None:
        return "holds a name or a password (not shown); it would be written into files: leave it out, and name a variable in api_key_env"
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right or re.search(r"\s", address):
        return f"found {printable(address)}, expected http://host:port"
    if parts.query or parts.fragment:
        return "has a ? or a # (what follows it is not shown); expected http://host:port, and a key in the variable that api_key_env names"
    return None


def env_name_problem(name: str) -> str | None:
    """The problem with the name of an environment variable, which may be a key by mistake; None if there is none."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and (name in os.environ or not _LIKE_A_KEY.fullmatch(name)):
        return None
    return "is no name of an environment variable (what was found is not shown); put the key into a variable, and its name here"


def key_problem(name: str) -> str | None:
    """The problem with the key in an environment variable, without showing the key; None if there is none."""
    key = os.environ.get(name, "")
    if not key:
        return f"the environment variable {name} is not set; set it to the server's key, or leave the setting out"
    if not key.isascii() or not key.isprintable() or key != key.strip():
        return f"the value of {name} (not shown) has a line break or another character that no key has; set it anew"
    return None


def base_address(address: str) -> str:
    """The address without /v1, with which the paths of requests begin."""
    return address.rstrip("/").removesuffix("/v1").rstrip("/")
