"""Checks, before data is read, that a server can be reached and serves the teacher's model. No torch."""

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path

from ..config.data import Data
from ..config.served import base_address
from ..config.teacher import Teacher
from ..data.encoding import token_cache
from ..errors import UserError
from ..files import Damaged, read_object
from ..servers.client import Refused, Server
from ..servers.logprobs import INTERFACES, LogProbs, ServedModel, WrongAnswer, explain


def server_of(settings: Teacher, setting: str) -> Server:
    """The server that a teacher's settings name."""
    numbers = (settings.of_server(name) for name in ("timeout", "patience", "requests"))
    return Server(settings.server, f"{setting}.server", settings.api_key_env, *numbers)


def chosen_model(interface: LogProbs, setting: str, wanted: str | None, patience: float | None) -> ServedModel:
    """The model with the name `wanted`, or for None the only one that is no adapter. UserError, with the names that the server has, if there is none."""
    server = interface.server
    try:
        models = interface.models(patience)
    except WrongAnswer as error:
        raise UserError(f"{setting}.server: {server.address} {error}") from None
    except Refused as error:
        raise explain(error, setting) from None
    names = ", ".join(one.name for one in models) or "none"
    if wanted is None:
        whole = [one for one in models if not one.parent]
        if len(whole) == 1:
            return whole[0]
        raise UserError(f"{setting}.model: not given, and {server.address} serves several models; name one of: {names}")
    if found := next((one for one in models if one.name == wanted), None):
        return found
    near = difflib.get_close_matches(wanted, [one.name for one in models], 1, 0.6)
    hint = (
        f"did you mean {near[0]}?" if near else "name one of them, or serve it (an adapter of vLLM: --enable-lora --lora-modules NAME=PATH)"
    )
    raise UserError(f"{setting}.model: found {wanted}, and {server.address} serves: {names}; {hint}")


def served_model(setting: str, one: Teacher) -> ServedModel:
    """A teacher's model, from its server's list. ServerFailed if the server cannot be reached, UserError as `chosen_model`."""
    return chosen_model(INTERFACES[one.of_server("api")](server_of(one, setting), 0), setting, one.model, 0)


def refuse_absent(teachers: Iterable[tuple[str, Teacher]], data: Data) -> None:
    """Ask each server for its models, unless answers of it are stored. Raises the same errors as `served_model`."""
    asked = set()
    for setting, one in teachers:
        if one.server and (one.server, one.model) not in asked and not has_answers(one, data):
            served_model(setting, one)
            asked.add((one.server, one.model))


def has_answers(one: Teacher, data: Data) -> bool:
    """Whether there is a cache, or stored answers of a model with that name, so that the server may not be needed."""
    if one.cache and one.cache.is_written:
        return True
    folders = [Path(one.cache.path).expanduser()] if one.cache else token_cache.answers_root(data).glob("*")
    return any(_model_of(folder / "answers.json") == (one.model or base_address(one.server)) for folder in folders)


def _model_of(header: Path) -> str | None:
    with contextlib.suppress(OSError, Damaged, KeyError, TypeError):
        return read_object(header)["provenance"]["model"]
    return None
