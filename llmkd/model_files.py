"""The files of a model or an adapter, read without torch and without loading weights."""

import contextlib
import functools
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import yaml

from .console import info
from .errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]  # the files of a model that its tokenizer needs
_HUB_HINTS = {
    "GatedRepoError": "ask for access on its page at the hub, then log in by hf auth login or set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; a private one needs hf auth login or HF_TOKEN",
    "RevisionNotFoundError": "check the revision",
}
RECORD = "llmkd.json"  # beside an adapter: the base that it was trained on


@dataclass(frozen=True)
class ModelFiles:
    """The folders of a model: a base, and perhaps an adapter on it."""

    base: Path
    adapter: Path | None
    config: dict  # the base's config.json

    @property
    def dtype(self) -> str | None:
        """See `saved_dtype`."""
        return saved_dtype(self.config)


def saved_dtype(config: dict) -> str | None:
    """The type of a model's weights on disk by its config.json, for every version of transformers; None if it is not recorded."""
    return config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")


def loaded_dtype(config: dict, wanted: str) -> str:
    """The type of the weights in memory: the wanted one, or for `auto` the saved one; float32 where that is not known."""
    return (saved_dtype(config) or "float32") if wanted == "auto" else wanted


def find(name: str, setting: str, revision: str | None = None, base: str | None = None) -> ModelFiles:
    """The files of a model or an adapter, by a folder or a hub id. UserError where they are missing or do not belong together.

    base  the folder or hub id of an adapter's base, where the one in its adapter_config.json is not to be used
    """
    folder = locate(name, setting, revision)
    if not (folder / "adapter_config.json").exists():
        if base is not None:
            raise UserError(f"{setting}: {name} is not an adapter (it has no adapter_config.json), so it has no base to name")
        return ModelFiles(folder, None, _config(folder, name, setting))
    adapter = read_json(folder / "adapter_config.json", setting)
    base_name = base or adapter.get("base_model_name_or_path")
    if not base_name or not isinstance(base_name, str):
        raise UserError(f"{setting}: {name}/adapter_config.json names no base model; set {setting.removesuffix('.model')}.base to it")
    if not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{setting}: {name} has no adapter_model.safetensors (pickled weights are not loaded); save it with safetensors")
    try:
        base_folder = locate(base_name, setting, adapter.get("revision"))
    except UserError as error:
        raise UserError(f"{setting}: the adapter {name} was trained on a base that is not here: {error}") from None
    files = ModelFiles(base_folder, folder, _config(base_folder, base_name, setting))
    record = folder / RECORD
    trained_on = read_json(record, setting).get("base_fingerprint") if record.exists() else None
    if not trained_on:
        _note(f"note: {name} has no record of the weights that it was trained on; taking {base_name} as its base")
    if trained_on and trained_on != fingerprint(base_folder, setting):
        raise UserError(
            f"{setting}: the adapter {name} was trained on other weights than {base_name} holds; name the base that it was trained on"
        )
    return files


@functools.cache
def _note(text: str) -> None:
    """A note, once in a process, however often a model is located."""
    info(text)


def locate(name: str, setting: str, revision: str | None = None, wanted: list[str] = _WANTED) -> Path:
    """The folder of a name: itself, or a hub id's, downloaded or from the hub's cache. A mistyped path never goes to the network."""
    if (path := Path(name).expanduser()).is_dir():
        return path
    refuse_mistyped_folder(name, setting)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        kind, reason = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
        hint = _HUB_HINTS.get(kind, "check the name and the connection")
        raise UserError(
            f"{setting}: {name} is no folder here and could not be downloaded from the hub ({kind}: {reason[:160]}); {hint}"
        ) from None
    with contextlib.suppress(Exception):  # the card, for the licence: apart, since a filled cache may lack it
        snapshot_download(name, revision=folder.name, allow_patterns=["README.md"])
    return folder


def refuse_mistyped_folder(name: str, setting: str) -> None:
    """Raise UserError for a name that is neither a folder nor can be a hub id; nothing is loaded or downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.is_file():
        raise UserError(f"{setting}: {name} is a file; name the folder that holds the model")
    looks_local = name.startswith((".", "/", "~", "runs/")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    if looks_local or not _HUB_ID.fullmatch(name):
        raise UserError(f"{setting}: there is no folder {name}; check the path")


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """The repository's id and the commit of a folder in the hub's cache; None for any other folder."""
    match = re.search(r"/models--([^/]+)/snapshots/([^/]+)$", folder.as_posix())
    return (match[1].replace("--", "/"), match[2]) if match else None


def licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the folder's model card gives them; empty where it does not."""
    try:
        front_matter = re.match(r"\s*---\s*\n(.*?)\n---", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        card = yaml.safe_load(front_matter[1]) if front_matter else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: card[name] for name in names if isinstance(card.get(name), str)} if isinstance(card, dict) else {}


def read_json(path: Path, setting: str) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{setting}: {path} holds {type(found).__name__}, expected an object of settings; copy it again")
    return found


def _config(folder: Path, name: str, setting: str) -> dict:
    if not (folder / "config.json").exists():
        inside = next(
            (f"; did you mean {name}/{n}?" for n in ("adapter", "model", "merged") if (folder / n).is_dir()), f"; it holds {_some(folder)}"
        )
        raise UserError(f"{setting}: {name} has neither config.json nor adapter_config.json{inside}")
    if not list(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        why = (
            f"only pickled weights ({pickled[0].name}), which are not loaded; convert them to safetensors"
            if pickled
            else f"no weights; it holds {_some(folder)}"
        )
        raise UserError(f"{setting}: {name} has {why}")
    config = read_json(folder / "config.json", setting)
    if "auto_map" in config:
        raise UserError(
            f"{setting}: {name} asks to run its own code (auto_map), which llmkd never does; use a model whose architecture is in transformers"
        )
    return config


def _some(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"


def tensors(path: Path) -> dict[str, dict]:
    """The header of a safetensors file: {name: {dtype, shape, data_offsets}}. ValueError if it is damaged."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is truncated")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if end != size:
        raise ValueError(f"{path} is {size} bytes and should be {end}")
    return {name: dict(t, start=8 + length + t["data_offsets"][0], stop=8 + length + t["data_offsets"][1]) for name, t in header.items()}


def fingerprint(folder: Path, setting: str) -> str:
    """A hash of names, shapes, types and three samples of every tensor, which distinguishes different weights in a fraction of a second.

    It does not depend on how the tensors are spread over files, nor on the type they are loaded in. UserError for a damaged file.
    """
    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = tensors(path)
        except ValueError as error:
            raise UserError(f"{setting}: {error}; fetch or copy it again") from None
        with open(path, "rb") as file:
            for name, t in header.items():
                digest = hashlib.sha256()
                for where in (t["start"], (t["start"] + t["stop"]) // 2, max(t["start"], t["stop"] - 1024)):
                    file.seek(where)
                    digest.update(file.read(min(1024, t["stop"] - where)))
                rows.append(f"{name} {t['dtype']} {t['shape']} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def record_of(adapter: Path) -> dict:
    """The record beside an adapter that llmkd trained: base_fingerprint, dtype, quantization. Empty for other adapters."""
    return read_json(adapter / RECORD, "model") if (adapter / RECORD).exists() else {}


def identity_of(name: str, setting: str, files: ModelFiles | None) -> dict[str, str]:
    """{name: fingerprints of a model's weights}; empty without a model."""
    return {name: " ".join(fingerprint(folder, setting) for folder in (files.base, files.adapter) if folder)} if files else {}


def positions(config: dict) -> int | None:
    """The longest sequence of a model in tokens, under the name of its family; None where it has no bound."""
    config = config.get("text_config", config)
    return next((config[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx") if config.get(name)), None)


def rows_of(config: dict) -> int | None:
    """The rows of a model's embedding, by its configuration."""
    return config.get("text_config", config).get("vocab_size")
