"""Models with a new head: a base model on which the head of a classifier is put.

The model is written as files before anything is loaded, so that it is an ordinary classifier for everything that follows: adapters,
checkpoints, resuming and other tools. It is cached next to the token cache, and written again if it is missing or damaged. The head's
weights are drawn with the run's seed when the student is loaded.
"""

import json
from pathlib import Path

import torch

from ..console import info, warn
from ..errors import UserError, brief
from ..files import remove_leftovers, write_folder
from ..model_folder.files import ModelFiles, find
from ..model_folder.identity import config_hash, fingerprint, record_of, verify, write_record
from .classifier import _layers, labelled
from .depth import key_of, locked, model_cache, named

RECORD = "new_head"


def new_modules(base: Path) -> list[str]:
    """The names of the modules with new weights in such a model; [] for any other."""
    return record_of(base).get(RECORD, [])


def with_head(files: ModelFiles, names: tuple[str, ...], auto: str, pad: int | None, setting: str) -> ModelFiles:
    """The files of a model with a new head for the classes `names`, which are written unless cached. UserError if the base allows none."""
    base = files.base
    verify(base, None, setting)
    key = [fingerprint(base, setting), config_hash(base, setting), list(names), auto, pad, str(base.resolve())]
    folder = model_cache() / "models" / key_of(key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not _is_whole(folder, setting):
                remove_leftovers(folder.parent, folder.name)
                with write_folder(folder, replace=True) as part:
                    new = _write(base, part, names, auto, pad, setting)
                    write_record(part, setting, student="base", headed_from=named(base), **{RECORD: new})
    except OSError as error:
        raise UserError(
            f"{setting}: the model with its new head cannot be written to {folder.parent} ({error.strerror}); set LLMKD_CACHE to another folder"
        ) from error
    info(f"student: a new head for {len(names)} classes on {named(base)}: {', '.join(new_modules(folder))}")
    return find(str(folder), setting)


def _is_whole(folder: Path, setting: str) -> bool:
    if not folder.is_dir():
        return False
    try:
        verify(folder, None, setting)
        return bool(new_modules(folder))
    except UserError as error:
        warn(f"warning: {error.problems[0]}; it is written again")
        return False


def _write(base: Path, folder: Path, names: tuple[str, ...], auto: str, pad: int | None, setting: str) -> list[str]:
    """Write the model, and return the names of its modules with new weights. UserError if more than a head would be new."""
    import transformers

    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **labelled(names))
            if pad is not None and getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = pad
            model, report = getattr(transformers, auto).from_pretrained(
                base, config=config, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:
        kind = json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise UserError(f"{setting}: a {kind} with the head of a classifier cannot be built ({brief(error)}); use another model") from error
    new = sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
    layers = {id(module) for module in _layers(model, setting).modules()}
    lacking = [where for where in new if id(module := model.get_submodule(where)) in layers or isinstance(module, torch.nn.Embedding)]
    if lacking or report["mismatched_keys"]:
        what = lacking or sorted(map(str, report["mismatched_keys"]))
        raise UserError(
            f"{setting}: {base} lacks weights of its body, such as {what[0]}; its config.json and weights do not belong together"
        )
    model.save_pretrained(folder)
    return new
