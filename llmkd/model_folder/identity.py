"""Checks that a model's files have not changed, by hashes of everything it consists of and the record that llmkd writes with a student. No torch."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..console import warn
from ..errors import ChangedFiles, UserError, fix_of
from ..files import open_file, sha256_file
from .hashes import stamp, tensor_hashes
from .weights import INDEX, read_json, tensors, weight_files

RECORD = "llmkd.json"  # in a student's folder that llmkd wrote: the hashes of its files, and of the base of an adapter
WHOLE = "sha256:"  # the beginning of fingerprints of all bytes, which those of earlier versions do not have
CONFIGS = ("adapter_config.json", "config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

#: Fields of a model's or an adapter's configuration that do not change what it computes.
_BOOKKEEPING = {
    *("_name_or_path", "architectures", "auto_mapping", "base_model_name_or_path", "dtype", "inference_mode", "peft_version"),
    *("quantization_config", "revision", "task_type", "torch_dtype", "transformers_version", "use_cache"),
}


def fingerprint(folder: Path, setting: str) -> str:
    """A hash of all weights in a folder: names, shapes, types and every byte. UserError for a damaged file.

    It depends neither on how the tensors are spread over files, nor on the type that they are loaded in. The files are read whole once, and
    again only after a change (see hashes.py).
    """
    return WHOLE + _digest(row for rows in _hashes(folder, setting).values() for row in rows)


def _hashes(folder: Path, setting: str) -> dict[str, list[str]]:
    """{weight file: ["tensor dtype shape sha256", ...]}."""
    paths = weight_files(folder, setting)
    try:
        found = tensor_hashes(paths)
    except (ValueError, OSError) as error:
        raise UserError(f"{setting}: {error}; {fix_of(error, 'fetch or copy it again')}") from error
    return {
        str(path.relative_to(folder)): [f"{name} {about}" for name, about in one.items()] for path, one in zip(paths, found, strict=True)
    }


def _digest(rows) -> str:
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def same_weights(recorded: str, folder: Path, setting: str) -> bool:
    """Whether a folder holds the weights of a recorded fingerprint. Those of earlier versions, which were made of samples, are compared as such."""
    return recorded == (fingerprint if recorded.startswith(WHOLE) else sampled_fingerprint)(folder, setting)


def sampled_fingerprint(folder: Path, setting: str) -> str:
    """The fingerprint of earlier versions: names, shapes, types and three samples of 1 KiB of every tensor."""
    rows = []
    for path in sorted(folder.glob("*.safetensors")):  # earlier versions counted all of them
        with open_file(path) as file:
            for name, t in tensors(path).items():
                digest = hashlib.sha256()
                for where in (t["start"], (t["start"] + t["stop"]) // 2, max(t["start"], t["stop"] - 1024)):
                    file.seek(where)
                    digest.update(file.read(min(1024, t["stop"] - where)))
                rows.append(f"{name} {t['dtype']} {t['shape']} {digest.hexdigest()}")
    return _digest(rows)


def config_hash(folder: Path, setting: str) -> str:
    """A hash of the configuration next to the weights: the same adapter weights with another lora_alpha are another model."""
    return _config_hash(folder / next(name for name in CONFIGS if (folder / name).exists()), setting)


def base_config_hash(folder: Path, setting: str) -> str:
    """The same for an adapter's base, without its token ids: the end tokens of the adapter's texts are saved with the adapter."""
    return _config_hash(folder / "config.json", setting, "_token_id")


def _config_hash(path: Path, setting: str, without: str | None = None) -> str:
    """`without`: the ending of the names of further fields that do not count."""
    said = {key: value for key, value in read_json(path, setting).items() if key not in _BOOKKEEPING}
    said = {key: value for key, value in said.items() if without is None or not key.endswith(without)}
    if isinstance(modules := said.get("target_modules"), list):  # a set, written in any order
        said["target_modules"] = sorted(map(str, modules))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def identity_of(what: str, setting: str, base: Path, adapter: Path | None) -> dict[str, str]:
    """The hashes that `--resume` compares: {"the student's base (model.safetensors)": hash of its tensors, "... (config.json)": ...}."""
    found = {}
    for kind, folder in (("base", base), ("adapter", adapter)):
        if folder:
            found |= {f"{what}'s {kind} ({name})": _digest(rows) for name, rows in _hashes(folder, setting).items()}
            found |= {f"{what}'s {kind} ({name})": sha256_file(folder / name) for name in (*CONFIGS, INDEX) if (folder / name).is_file()}
    return found


def weights_of(base: Path, adapter: Path | None, setting: str) -> dict[str, str | None]:
    """A text for the weights and configuration of the base, and one for those of the adapter (None without one): {"base": ..., "adapter": ...}."""
    folders = {"base": base, "adapter": adapter}
    return {name: folder and f"{fingerprint(folder, setting)} {config_hash(folder, setting)}" for name, folder in folders.items()}


def record_of(folder: Path, setting: str = "model") -> dict:
    """The record in the folder of a student that llmkd wrote, checked against its own hash; empty for other models.

    Of an adapter it has base_fingerprint, base_config, dtype and quantization; of every student weights and files, which are hashes.
    """
    if not (folder / RECORD).exists():
        return {}
    record = read_json(folder / RECORD, setting)
    own = record.pop("record", None)
    if own is not None and own != _record_hash(record):
        raise UserError(f"{setting}: {folder / RECORD} is damaged (it does not match its own hash); copy it again")
    return record


def is_made_here(base: Path) -> bool:
    """Whether llmkd has made a base from another model, with fewer layers or a new head, say: it exists nowhere else."""
    return record_of(base).get("student") == "base"


def _record_hash(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, setting: str, **record) -> None:
    """Write `record` and the hashes of weights and files to llmkd.json. To be called when all other files of a student are written."""
    files = {name: _file_hash(folder / name, setting) for name in (*CONFIGS, *TOKENIZER_FILES) if (folder / name).is_file()}
    record |= {"weights": fingerprint(folder, setting), "files": files}
    text = json.dumps(record | {"record": _record_hash(json.loads(json.dumps(record)))}, indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def _file_hash(path: Path, setting: str) -> str:
    return _config_hash(path, setting) if path.name in CONFIGS else sha256_file(path)


def verify(base: Path, adapter: Path | None, setting: str) -> None:
    """UserError unless the model, the adapter and the adapter's base match the records in their folders. All weights are read."""
    for folder in (base, adapter):
        if folder and (record := record_of(folder, setting)):
            _verify_files(folder, record, setting)
    if not adapter:
        return
    record = record_of(adapter, setting)
    trained_on, configured = record.get("base_fingerprint"), record.get("base_config")
    if not trained_on:
        _note(f"note: {adapter} has no record of the weights that it was trained on; taking {base} as its base")
    elif not same_weights(str(trained_on), base, setting):
        raise UserError(
            f"{setting}: the adapter {adapter} was trained on other weights than {base} holds; name the base that it was trained on, "
            "or fetch that one again if it has changed"
        )
    elif configured and configured != base_config_hash(base, setting):
        raise UserError(
            f"{setting}: {base / 'config.json'} is another configuration than that with which the adapter {adapter} was trained, though the "
            f"weights are the same; put it back as it was, or name the base that it was trained on (after a change of your own delete {adapter / RECORD})"
        )
    elif not str(trained_on).startswith(WHOLE):
        _note(f"note: {adapter / RECORD} is of an earlier version, which recorded samples of the base's weights; only those are compared")


@contextlib.contextmanager
def unchanged(folders: Sequence[Path], setting: str) -> Iterator[None]:
    """ChangedFiles if a weight file of the folders is written to while the block reads them, whatever error that leads to."""
    paths = [path for folder in folders for path in weight_files(folder, setting)]
    before = [stamp(path)[:3] for path in paths]  # not the time of change, which a new link to the file sets too
    try:
        yield
    finally:
        for path, then in zip(paths, before, strict=True):
            if not path.exists() or stamp(path)[:3] != then:
                raise ChangedFiles(f"{setting}: {path} was changed while it was being loaded; start again when it is whole")


def verify_small_files(folder: Path, setting: str) -> None:
    """UserError if the configurations or tokenizer files of a student have changed since llmkd wrote them. Weights are not read."""
    if record := record_of(folder, setting):
        _verify_small_files(folder, record, setting)


def _hint(folder: Path) -> str:
    return f"copy it again; if you have changed it yourself, delete {folder / RECORD}"


def _verify_small_files(folder: Path, record: dict, setting: str) -> None:
    files = record.get("files") or {}
    if record.get("student") == "adapter" and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{setting}: {folder} has no adapter_config.json, which was written with it; copy it again")
    for name, expected in files.items():
        if (folder / name).is_dir():
            raise UserError(f"{setting}: {folder / name} is a folder, and was written as a file; copy it again")
        if not (folder / name).is_file():
            _note(f"note: {folder} lacks {name}, which was written with it; copy it again unless you have removed it")
        elif _file_hash(folder / name, setting) != expected:
            raise UserError(f"{setting}: {folder / name} has changed since llmkd wrote it; {_hint(folder)}")


def _verify_files(folder: Path, record: dict, setting: str) -> None:
    _verify_small_files(folder, record, setting)
    weights = record.get("weights")
    if weights and weights != fingerprint(folder, setting):
        named: Sequence[str] = [path.name for path in weight_files(folder, setting)]
        raise UserError(
            f"{setting}: {folder / named[0]}{' or another file' if named[1:] else ''} has changed since llmkd wrote it; {_hint(folder)}"
        )


@functools.cache
def _note(text: str) -> None:
    """Print a note, once in a process."""
    warn(text)
