"""Settings of the engine that generates in on-policy distillation: the model in this process, or a server. A part of `on_policy.py`."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from .fields import Count, Patience, Seconds, changeable, config_dataclass, fixed
from .served import address_problem


@config_dataclass
class Engine:
    """A server that writes the student's answers: its base is served there, and its adapter is pushed to it while it trains."""

    server: str = changeable(
        min_length=1,
        description="Address of a vLLM server that serves the student's base with --enable-lora, and is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: "
        "http://host:port.",
    )
    api: Literal["vllm"] = changeable("vllm", description="The server's API. SGLang loads adapters differently and is not supported.")
    model: str | None = changeable(
        None, description="Name under which the server serves the student's base; null: its only model that is not an adapter."
    )
    push_every: Count = fixed(
        1,
        description="Optimizer steps between pushes of the adapter. With n above 1 the text is that of a student up to n - 1 steps older.",
    )
    importance: float | None = fixed(
        None,
        ge=1,
        le=1e6,
        description="Weigh each target of a written answer by the probability that the student now gives to the answer's earlier tokens, divided "
        "by the probability that the server gave to them, capped at this number. null: no correction.",
    )
    tolerance: float = changeable(
        0.1,
        ge=1e-6,
        le=1000,
        description="Largest mean difference, in nats, between the server's log-probabilities of its new text and the student's own, with the "
        "same adapter. Above it the run is refused or stopped.",
    )
    adapters: str | None = changeable(
        None,
        path="output",
        description="Folder for pushed adapters, which the server must see under the same path; null: engine in output_dir.",
    )
    requests: Count = changeable(32, description="Maximum number of concurrent requests of each process.")
    timeout: Seconds = changeable(300.0, description="Seconds that one request may take.")
    patience: Patience = changeable(
        600.0,
        description="Seconds for which a request is retried while the server is gone or busy, so that it can be restarted meanwhile.",
    )
    api_key_env: str | None = changeable(
        None, description="The environment variable that holds the server's key, which is written nowhere; null: no key is sent."
    )


#: The model in this process, or the settings of a server. The tags make pydantic report the errors of the given form alone.
LocalOrEngine = Annotated[
    Annotated[Literal["local"], Tag("local")] | Annotated[Engine, Tag("settings")],
    Discriminator(lambda value: "settings" if isinstance(value, dict | Engine) else "local"),
]

_HERE = "on_policy.engine"


def engine_contradictions(settings: Any, student: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of a server that generates, in the form of `contradictions.contradictions`. `settings`: those of `on_policy`."""
    engine = settings.engine
    if engine == "local":
        return
    server = f"{_HERE}.server"
    if settings.share == 0:
        yield (server, "on_policy.share"), "set, but on_policy.share is 0, so the student writes nothing; leave it out"
    if problem := address_problem(engine.server):
        yield (server,), problem
    if engine.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", engine.api_key_env):
        yield (
            (f"{_HERE}.api_key_env",),
            "is no name of an environment variable (what was found is not shown); put the key into a variable, and its name here",
        )
    yield from _student_contradictions(student, server)
    yield from _staleness_contradictions(settings, engine)


def _student_contradictions(student: Any, server: str) -> Iterator[tuple[tuple[str, ...], str]]:
    if student.method == "full":
        yield (
            (server, "student.method"),
            "set with student.method: full, which has no adapter that could be pushed to a server; use method: lora, or engine: local",
        )
    if student.layers is not None:
        yield (
            (server, "student.layers"),
            "set with student.layers, whose base no server has; write it with llmkd export and name that folder as student.model, or use engine: local",
        )
    for name in ("dora", "modules_to_save") if student.lora else ():
        if getattr(student.lora, name):
            yield (
                (server, f"student.lora.{name}"),
                f"set with student.lora.{name}, which vLLM does not load; leave one of them out, or use engine: local",
            )


def _staleness_contradictions(settings: Any, engine: Engine) -> Iterator[tuple[tuple[str, ...], str]]:
    here = f"{_HERE}.importance"
    cut = settings.temperature != 1 or settings.top_p != 1 or settings.top_k is not None or settings.min_p != 0
    if engine.importance is not None and cut:
        yield (
            (here, "on_policy.temperature"),
            "set with another sampling than from the student itself, whose probabilities a server does not say; leave temperature, top_p, top_k and min_p "
            "of on_policy out, or importance",
        )
    if engine.importance is not None and settings.replay:
        yield (here, "on_policy.replay"), "set with on_policy.replay, whose answers it does not correct; leave one of them out"
    if settings.long_horizon is None:
        return
    if engine.importance is not None:
        yield (here, "on_policy.long_horizon"), "set with on_policy.long_horizon, whose weights it would not correct; leave one of them out"
    if settings.long_horizon.teacher_mix:
        yield (
            (f"{_HERE}.server", "on_policy.long_horizon.teacher_mix"),
            "set with on_policy.long_horizon.teacher_mix, and a server writes as the student alone; leave one of them out",
        )
    if engine.push_every > 1:
        yield (
            (f"{_HERE}.push_every", "on_policy.long_horizon"),
            f"found {engine.push_every} with on_policy.long_horizon, which needs text of the student as it is; use 1, or leave long_horizon out",
        )
