"""The files of a model or an adapter, read without torch and without loading weights."""

import contextlib
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import UserError
from ..files import read_file
from .weights import read_json, refuse_what_is_no_file, some, weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]  # the files of a model that its tokenizer needs
_HUB_HINTS = {
    "GatedRepoError": "ask for access on its page at the hub, then log in by hf auth login or set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; a private one needs hf auth login or HF_TOKEN",
    "RevisionNotFoundError": "check the revision",
}


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

    @property
    def with_tokenizer(self) -> Path:
        """The folder of the tokenizer: the adapter's if it has a tokenizer, else the base's."""
        return self.adapter if self.adapter and (self.adapter / "tokenizer.json").exists() else self.base


def saved_dtype(config: dict) -> str | None:
    """The type of a model's weights on disk according to its config.json, of any version of transformers; None if it is not recorded."""
    return config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")


def loaded_dtype(config: dict, wanted: str) -> str:
    """The type of the weights in memory: the wanted one, or for `auto` the saved one; float32 if that is not recorded."""
    return (saved_dtype(config) or "float32") if wanted == "auto" else wanted


def find(name: str, setting: str, revision: str | None = None, base: str | None = None) -> ModelFiles:
    """The files of a model or an adapter, by its folder or hub id. UserError if they are missing or do not belong together.

    base  the folder or hub id of an adapter's base, in place of the one in its adapter_config.json
    """
    folder = locate(name, setting, revision)
    if not (folder / "adapter_config.json").exists():
        if base is not None:
            raise UserError(f"{setting}: {name} is not an adapter (it has no adapter_config.json), so it has no base to name")
        return ModelFiles(folder, None, _config(folder, name, setting))
    adapter = read_json(folder / "adapter_config.json", setting)
    base_name, own = base or adapter.get("base_model_name_or_path"), f"{setting.removesuffix('.model')}.base"
    as_now = f"as base_model_name_or_path into {name}/adapter_config.json"
    if not base_name or not isinstance(base_name, str):
        fix = f"set {own} to it" if setting.endswith(".model") else f"write it {as_now}"
        raise UserError(f"{setting}: {name}/adapter_config.json names no base model; {fix}")
    weight_files(folder, setting)
    try:
        same = base_name == adapter.get("base_model_name_or_path")
        base_folder = locate(base_name, setting, adapter.get("revision") if same else None)
    except UserError as error:
        reason = error.problems[0].removeprefix(f"{setting}: ")
        if base:
            fix = f"correct {own}"
        elif setting.endswith(".model"):
            fix = f"set {own} to the base that it was trained on"
        else:
            fix = f"write where it is now {as_now}"
        raise UserError(f"{setting}: the adapter {name} was trained on a base that is not here: {reason}; {fix}") from None
    if (base_folder / "adapter_config.json").exists():
        raise UserError(
            f"{setting}: the base of the adapter {name}, {base_name}, is itself an adapter; merge that first (llmkd export), and set {own}"
        )
    return ModelFiles(base_folder, folder, _config(base_folder, base_name, setting))


def locate(name: str, setting: str, revision: str | None = None, wanted: list[str] = _WANTED) -> Path:
    """The folder of a model: `name` itself, or that of a hub id, downloaded or in the hub's cache. A mistyped path never goes to the network."""
    if (path := Path(name).expanduser()).is_dir():
        refuse_what_is_no_file(path, setting)
        return path
    refuse_mistyped_folder(name, setting)
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        kind, reason = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
        hint = _HUB_HINTS.get(kind, "check the name and the connection")
        offline = kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled") and HF_HUB_OFFLINE
        why = f"{kind}: {textwrap.shorten(reason, 160, placeholder=' ...')}"
        if offline:
            why, hint = (
                "HF_HUB_OFFLINE is set, and it is not in the hub's cache",
                f"unset it, or fetch the model first (hf download {name})",
            )
        raise UserError(f"{setting}: {name} is no folder here and could not be downloaded from the hub ({why}); {hint}") from None
    with contextlib.suppress(Exception):  # the card, for the licence; separately, since a filled cache may lack it
        snapshot_download(name, revision=folder.name, allow_patterns=["README.md"])
    return folder


def student_folder(run: str | Path) -> Path:
    """The folder of a finished run's student: `adapter` or `model`. UserError if there is none."""
    for name in ("adapter", "model"):
        if (Path(run) / name).is_dir():
            return Path(run) / name
    for pattern in ("*", "*/*"):  # a pipeline's or sweep's folder
        inner = [path for path in sorted(Path(run).glob(pattern)) if (path / "adapter").is_dir() or (path / "model").is_dir()]
        if inner:
            found, fix = (f"{len(inner)} runs", "name one of them, such as") if len(inner) > 1 else ("1 run", "name it:")
            raise UserError(f"{run}: holds {found} and is none itself; {fix} {inner[0]}")
    if (Path(run) / "adapter_config.json").exists() or (Path(run) / "config.json").exists():  # a student, not the run that wrote it
        above = Path(run).absolute().parent
        named = f"; name the run: {above}" if (above / "recipe.yaml").exists() else "; name a run's output_dir"
        raise UserError(f"{run}: is a model itself, and no run{named}")
    raise UserError(f"{run}: holds neither adapter nor model; is the run finished?")


def refuse_mistyped_folder(name: str, setting: str) -> None:
    """UserError for a name that is neither a folder nor a possible hub id. Nothing is loaded or downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.is_file():
        raise UserError(f"{setting}: {name} is a file; name the folder that holds the model")
    looks_local = name.startswith((".", "/", "~", "runs/")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    if looks_local or not _HUB_ID.fullmatch(name):
        raise UserError(f"{setting}: there is no folder {name}; check the path")


def hub_origin(folder: Path) -> tuple[str, str] | None:
    """(repository id, commit) of a folder in the hub's cache; None for any other folder."""
    match = re.search(r"/models--([^/]+)/snapshots/([^/]+)$", folder.as_posix())
    return (match[1].replace("--", "/"), match[2]) if match else None


def licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the folder's model card gives them; those that it does not give are left out."""
    try:
        front_matter = re.match(r"\s*---\s*\n(.*?)\n---", read_file(folder / "README.md").decode("utf-8"), re.DOTALL)
        card = yaml.safe_load(front_matter[1]) if front_matter else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: card[name] for name in names if isinstance(card.get(name), str)} if isinstance(card, dict) else {}


def check_config(config: dict, where: str, setting: str) -> None:
    """UserError for a configuration that would run code from outside transformers: its own, or kernels fetched from the hub."""
    if "auto_map" in config:
        raise UserError(
            f"{setting}: {where} asks to run its own code (auto_map), which llmkd never does; use a model whose architecture is in transformers"
        )
    for key, value in _settings(config):
        if key.removesuffix("_internal").endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise UserError(
                f"{setting}: {where} asks for {key}: {value!r}, code from the hub that llmkd never runs; remove that line, "
                "and choose by the setting attention if need be"
            )


def attention_of(config: dict) -> list[str]:
    """The implementations of attention that a configuration asks for, at any depth."""
    return [value for key, value in _settings(config) if "attn_implementation" in key and isinstance(value, str)]


def _settings(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every name in a nested configuration with what it is set to; what is inside a list or an object also under the name of that."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _settings(one, name)
            if key.endswith("_implementation"):  # {"text_config": "sdpa", ...}
                yield key, one
    elif isinstance(value, list):
        for one in value:
            yield from _settings(one, key)
    else:
        yield key, value


def _config(folder: Path, name: str, setting: str) -> dict:
    if not (folder / "config.json").exists():
        inside = next(
            (f"; did you mean {name}/{n}?" for n in ("adapter", "model", "merged") if (folder / n).is_dir()), f"; it holds {some(folder)}"
        )
        raise UserError(f"{setting}: {name} has neither config.json nor adapter_config.json{inside}")
    config = read_json(folder / "config.json", setting)
    if (folder / "generation_config.json").is_file():  # transformers loads it with the model
        read_json(folder / "generation_config.json", setting)
    weight_files(folder, setting)
    for key in ("text_config", "quantization_config"):
        if key in config and not isinstance(config[key], dict) and (key, config[key]) != ("quantization_config", None):
            raise UserError(f"{setting}: {name}/config.json: {key} is {config[key]!r}, expected an object; copy it again")
    check_config(config, f"{name}/config.json", setting)
    return config


def classifier_class(config: dict) -> str | None:
    """The name of transformers' class that loads a classifier; None if the configuration is not that of a classifier."""
    kinds = ("SequenceClassification", "AudioClassification", "ImageClassification")
    named = " ".join(config.get("architectures") or [])
    return next((f"AutoModelFor{kind}" for kind in kinds if kind in named), None)


def encoder_decoder_class(config: dict) -> str | None:
    """The name of transformers' class that loads an encoder-decoder; None if the configuration is not that of one."""
    if not config.get("is_encoder_decoder"):
        return None
    sound = any(name in config for name in ("num_mel_bins", "input_feat_per_channel")) or config.get("model_type") == "moonshine"
    return f"AutoModelFor{'SpeechSeq2Seq' if sound else 'Seq2SeqLM'}"


def positions(config: dict) -> int | None:
    """The longest sequence that a model takes, in tokens; None if there is no bound. Families have different names for it."""
    config = config.get("text_config", config)
    return next((config[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx") if config.get(name)), None)


def layers_of(config: dict) -> int | None:
    """The number of a model's layers; None if its configuration does not say."""
    config = config.get("text_config", config)
    return next((config[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if config.get(name)), None)


def attention_heads(config: dict) -> int | None:
    """The number of a model's query heads; None if its configuration does not say, or gives a number for each layer."""
    config = config.get("text_config", config)
    found = (config.get(name) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads"))
    return next((number for number in found if isinstance(number, int)), None)


def rows_of(config: dict) -> int | None:
    """The number of rows of a model's embedding; None if its configuration does not say."""
    return config.get("text_config", config).get("vocab_size")


def width_of(config: dict) -> int | None:
    """The width of the hidden states between a model's layers; None if its configuration does not say."""
    config = config.get("text_config", config)
    return next((config[name] for name in ("hidden_size", "n_embd", "d_model") if config.get(name)), None)
