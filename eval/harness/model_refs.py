"""Finds the models to evaluate without loading them: a run, an adapter, a merged model, a base or a hub id."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from llmkd.config.loader import read_placed
from llmkd.config.recipe import Teacher
from llmkd.errors import UserError
from llmkd.model_folder.files import ModelFiles, find, refuse_mistyped_folder, student_folder
from llmkd.model_folder.identity import config_hash, fingerprint, record_of, verify
from llmkd.model_folder.weights import read_json
from llmkd.output.run_folder import refuse_unwritable


@dataclass(frozen=True)
class ModelToEvaluate:
    name: str  # as it was given
    files: ModelFiles
    settings: Teacher  # the settings to load it: type and quantisation as in training
    identity: dict  # the `model` of its records
    out: Path  # the folder for them


def find_models(
    names: list[str], out: str | Path | None = None, dtype: str | None = None, chat_template: bool = False
) -> list[ModelToEvaluate]:
    """Each model's files and the folder for its results. UserError if a model or its chat template is missing, or the folder cannot be written."""
    located = [_locate(name) for name in names]  # all models are located before the weights of the first are read
    templates = [
        {"chat_template": _template(files, name)} if chat_template else {} for name, (*_, files) in zip(names, located, strict=True)
    ]
    refs = [_find(name, *where, out and Path(out), len(names) > 1, dtype) for name, where in zip(names, located, strict=True)]
    refs = [dataclasses.replace(ref, identity=ref.identity | template) for ref, template in zip(refs, templates, strict=True)]
    places: dict[Path, ModelToEvaluate] = {}
    for ref in refs:
        other = places.setdefault(ref.out.resolve(), ref)
        if other is not ref:
            raise UserError(
                f"{ref.name}: its results and those of {other.name} would both go to {ref.out}; evaluate them one by one, each with --out"
            )
    return refs


def refuse_missing(names: list[str], out: str | Path | None) -> None:
    """UserError for a missing local model or run, and for a folder that cannot be written to. Nothing is hashed or downloaded."""
    for name in names:
        refuse_mistyped_folder(name, "eval")
        folder, run = _folder(name)
        if folder.is_dir() and not (folder / "adapter_config.json").exists():  # an adapter's base may have to be downloaded
            find(str(folder), "eval")
        refuse_unwritable(_out(name, folder, run, out and Path(out), len(names) > 1), "--out")


def weights_of(files: ModelFiles) -> str:
    """A fingerprint of the weights and configurations of base and adapter. The files are read whole unless their hashes are known."""
    return "+".join(f"{fingerprint(folder, 'eval')}.{config_hash(folder, 'eval')}" for folder in (files.base, files.adapter) if folder)


def tokenizer_of(files: ModelFiles, name: str):
    """The tokenizer of a model, or of its adapter if that has one."""
    from llmkd.data.encoding.tokenizer import load_tokenizer

    own = files.adapter and (files.adapter / "tokenizer.json").exists()
    return load_tokenizer(str(files.adapter if own else files.base), name)


def _template(files: ModelFiles, name: str) -> str:
    """A hash of the model's chat template. UserError if it has none."""
    tokenizer = tokenizer_of(files, name)
    if not tokenizer.chat_template:
        raise UserError(f"--chat_template: the tokenizer of {name} has no chat template; leave it out, or evaluate a model that has one")
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def _locate(name: str) -> tuple[Path, Path | None, ModelFiles]:
    """(folder, run, files) of a model. UserError if they are missing."""
    folder, run = _folder(name)
    return folder, run, find(str(folder) if folder.is_dir() else name, "eval")


def _folder(name: str) -> tuple[Path, Path | None]:
    """(folder, run) of a model by its name. UserError for a run without a model."""
    folder, run = Path(name).expanduser(), None
    if folder.is_dir():
        is_model = any((folder / config).exists() for config in ("config.json", "adapter_config.json"))
        if not is_model and ((folder / "recipe.yaml").exists() or (folder / "adapter").is_dir()):
            run, folder = folder, student_folder(folder)
        elif folder.name in ("adapter", "model") and (folder.parent / "recipe.yaml").exists():
            run = folder.parent
    return folder, run


def _find(
    name: str, folder: Path, run: Path | None, files: ModelFiles, out: Path | None, several: bool, dtype: str | None
) -> ModelToEvaluate:
    """UserError if a file of the model does not match the record in its folder."""
    from llmkd.models.saved_student import as_trained

    settings = as_trained(files.adapter) if files.adapter else Teacher(model=str(files.base))
    if files.adapter:
        kind = "adapter"
    elif run:
        kind = "full"
    else:
        made = record_of(files.base, "eval")
        kind = "full" if made.get("student") == "full" else "merged" if made or "merged" in folder.name else "base"
    saved = files.dtype
    own = (files.config.get("quantization_config") or {}).get("quant_method")
    verify(files.base, files.adapter, "eval")
    wanted = dtype or settings.dtype
    identity = {
        "path": name,
        "kind": kind,
        "base": _base(name, kind, folder, run),
        "fingerprint": weights_of(files),
        "dtype": saved or wanted if wanted == "auto" else wanted,
        "quantization": settings.quantization.type if settings.quantization else own,
    }
    return ModelToEvaluate(name, files, settings, identity, _out(name, folder, run, out, several))


def _base(name: str, kind: str, folder: Path, run: Path | None) -> str | None:
    """The model that a model was made from, if the files in its folder say so; for a base the base itself."""
    adapter = (folder if kind == "adapter" else folder.parent / "adapter") / "adapter_config.json"
    if kind == "full" and (run / "recipe.yaml").exists():
        return read_placed(run / "recipe.yaml").get("student", {}).get("model")
    if kind != "base" and adapter.exists():
        return read_json(adapter, "eval").get("base_model_name_or_path")
    return name if kind == "base" else None


def _out(name: str, folder: Path, run: Path | None, out: Path | None, several: bool) -> Path:
    """RUN/eval for a run; --out for one model and --out/NAME for several; else runs/eval/NAME."""
    parts = (run or folder).resolve().parts[-2:] if folder.is_dir() else name.split("/")
    short = "--".join(part for part in parts if part != os.sep)
    if out:
        return out / short if several else out
    return run / "eval" if run else Path("runs/eval") / short
