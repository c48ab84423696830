"""The generation config of a saved student, as JSON: that of the model it was trained from, with the end tokens that it has learnt.

transformers does not write it, as it refuses to save some of the settings that it loads (a temperature without do_sample).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError
from .weights import read_json

NAME = "generation_config.json"


def generation_settings(config: dict, folders: Sequence[Path | None], setting: str) -> dict:
    """The generation config of the first folder that has one, else the special tokens that the model's configuration names."""
    for folder in folders:
        if folder and (folder / NAME).is_file():
            return _checked(read_json(folder / NAME, setting), folder / NAME, setting)
    config = config.get("text_config", {}) | config
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


def _checked(settings: dict, path: Path, setting: str) -> dict:
    if not all(type(i) is int for i in stops_at(settings)):
        raise UserError(
            f"{setting}: {path} has eos_token_id: {settings['eos_token_id']!r}, expected a token's id or a list of them; correct it"
        )
    return settings


def stops_at(settings: dict) -> list[int]:
    """The ids at which generation stops."""
    eos = settings.get("eos_token_id")
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


def stopping_at(settings: dict, end_tokens: Iterable[int]) -> dict:
    """The settings with these ids added to those at which generation stops."""
    known = stops_at(settings)
    new = [i for i in sorted(end_tokens) if i not in known]
    if not new:
        return settings
    eos = known + new
    # left in, _from_model_config would make transformers use the ids of config.json
    rest = {key: value for key, value in settings.items() if key != "_from_model_config"}
    return rest | {"eos_token_id": eos if len(eos) > 1 else eos[0]}


def write_generation(folder: Path, settings: dict) -> None:
    (folder / NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
