"""Opens the server that writes in on-policy distillation; before anything is loaded it is asked whether it can."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..config.engine import Engine
from ..config.on_policy import OnPolicy
from ..data.written import Prompts
from ..errors import UserError, on_main_process
from ..models.language_model import LanguageModel
from ..rollouts.engine import PROBED, EngineWriter
from ..rollouts.pushed_adapter import SETTING, PushedAdapter
from ..rollouts.source import OnPolicySource
from ..servers.adapters import refuse_without_loading
from ..servers.client import Server
from ..servers.logprobs import VLLM, ServedModel
from ..teachers.connect import chosen_model


def engine_of(settings: OnPolicy | None) -> Engine | None:
    """The settings of the server that writes; None without one."""
    return settings.engine if settings and settings.share != 0 and isinstance(settings.engine, Engine) else None


def find_base(settings: OnPolicy | None, prompts: Prompts | None, vocab: int) -> ServedModel | None:
    """The student's base as the server has it; None without a server. UserError if it cannot be reached or lacks a needed ability."""
    if not (engine := engine_of(settings)):
        return None
    server = _server(engine)
    base = chosen_model(VLLM(server, vocab), SETTING, engine.model, 0.0)
    refuse_without_loading(server, SETTING)
    longest = int(np.max(np.maximum(prompts.own, 0)[prompts.may])) + settings.max_new_tokens
    if base.positions and longest > base.positions:
        raise UserError(
            f"{SETTING}.server: {server.address} serves {base.name} with {base.positions} tokens, but the longest prompt with its answer may have "
            f"{longest}; start it with a larger --max-model-len, or lower on_policy.max_new_tokens"
        )
    return base


def let_it_write(
    source: OnPolicySource,
    base: ServedModel,
    student: LanguageModel,
    output_dir: Path,
    vocab: int,
    accelerator,
    stop_asked: Callable[[], bool],
) -> EngineWriter:
    """Make the server the writer of `source`. Returns the writer."""
    settings = source.settings.engine
    folder = Path(settings.adapters).expanduser() if settings.adapters else output_dir / "engine"
    adapter = PushedAdapter(_server(settings), student, folder, str(output_dir.absolute()))
    writer = EngineWriter(settings, adapter, base, source.writer.end_ids, vocab, accelerator, stop_asked, source.settings.batch_size)
    source.writer, source.before_writing, source.at_end = writer, writer.start_step, writer.close
    return writer


def check_engine(writer: EngineWriter, source: OnPolicySource, done: int, accelerator) -> None:
    """Before the first step: compare the server's answers to some prompts with the student. UserError, on all ranks, if it is another model."""
    chosen = np.flatnonzero(source.prompts.may)[:PROBED].tolist()
    on_main_process(accelerator, functools.partial(writer.check, source.prompts.ids(source.examples, chosen), source.sampling, done))


def _server(settings: Engine) -> Server:
    return Server(settings.server, f"{SETTING}.server", settings.api_key_env, settings.timeout, settings.patience, settings.requests)
