"""Checks names of modules against a model's weight files and its family's source in transformers, which is read but not run. No torch."""

import contextlib
import difflib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .weights import headers


def refuse_missing_modules(folder: Path, config: dict, targets: str | Sequence[str], copies: Sequence[str]) -> None:
    """UserError for modules of `student.lora` that the model cannot have: the name is neither in its weights nor in its family's source.

    config   the folder's config.json
    targets  student.lora.target_modules
    copies   student.lora.modules_to_save

    Where that does not decide (a regular expression, a family whose source is elsewhere), `models/lora.py` checks the loaded model.
    """
    stored = headers(folder, "student.model")
    whole = {key.rpartition(".")[0] for key in stored}
    known = {part for name in whole for part in name.split(".") if not part.isdigit()}
    matrices = sorted({key.split(".")[-2] for key, one in stored.items() if key.endswith(".weight") and len(one["shape"]) == 2})
    if isinstance(targets, str):
        targets = () if targets == "all-linear" else _names_in(targets, whole, known)
    source = _source(config)
    for setting, listed in (("target_modules", targets), ("modules_to_save", copies)):
        for name in listed:
            last = name.rpartition(".")[2]
            if last not in known and source and not re.search(rf"\b{re.escape(last)}\b", source):
                candidates = [*known, "all-linear"] if setting == "target_modules" else known
                near = difflib.get_close_matches(last, candidates, 1, 0.6)
                hint = f"did you mean {near[0]}? The" if near else "leave it out, or name another; the"
                raise UserError(
                    f"student.lora.{setting}: the model has no module {name!r}; {hint} model's modules with a matrix are {', '.join(matrices)}"
                )


def refuse_large_rank(folder: Path, rank: int) -> None:
    """UserError if student.lora.rank exceeds every dimension of the model's matrices."""
    largest = max((max(one["shape"]) for one in headers(folder, "student.model").values() if len(one["shape"]) == 2), default=rank)
    if rank > largest:
        raise UserError(
            f"student.lora.rank: found {rank}, and the model's largest matrix has {largest} rows or columns; lower it, or use method: full"
        )


def refuse_unknown_family(architecture: dict) -> None:
    """UserError if student.architecture.model_type is a misspelling of one of transformers' families."""
    family, models, text = architecture.get("model_type"), _models(), ""
    for name in ("auto_mappings.py", "configuration_auto.py") if models else ():
        with contextlib.suppress(OSError, ValueError):
            text += (models / "auto" / name).read_text(encoding="utf-8")
    listed = set(re.findall(r'"([\w.-]+)"', text))
    if isinstance(family, str) and family not in listed and (near := difflib.get_close_matches(family, listed, 1, 0.6)):
        raise UserError(f"student.architecture.model_type: found {family}, which transformers does not know; did you mean {near[0]}?")


def _names_in(text: str, whole: set[str], known: set[str]) -> list[str]:
    """The names in a text that is not a regular expression; none if it is one, or is a module's whole name.

    UserError for names of modules in place of a regular expression for whole names.
    """
    names = [name for name in re.split(r"[,\s]+", text) if name]
    if not all(re.fullmatch(r"[\w-]+", name) for name in names) or text in whole:
        return []
    if known & set(names):
        example = min(name for name in whole if set(name.split(".")) & set(names))
        raise UserError(
            f"student.lora.target_modules: found {text!r}, a regular expression that matches no whole name such as {example}; for modules by their "
            f"last names write [{', '.join(names)}]"
        )
    return names


def _models() -> Path | None:
    """The folder of the families in transformers, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    return Path(spec.submodule_search_locations[0]) / "models" if spec and spec.submodule_search_locations else None


def _source(config: dict) -> str:
    """The source in which transformers defines the families of a configuration; empty unless all of it is found."""
    if not (models := _models()):
        return ""
    families = [one.get("model_type") for one in (config, *config.values()) if isinstance(one, dict) and "model_type" in one]
    folders = [next((models / name for name in _folder_names(family) if (models / name).is_dir()), None) for family in families]
    texts = [_text_of(folder) if folder else "" for folder in folders]
    if not texts or not all(texts):
        return ""
    others = set(re.findall(r"^from \.\.(\w+)(?:\.modeling_\w+)? import", "\n".join(texts), re.MULTILINE)) - {"auto"}
    return "\n".join([*texts, *(_text_of(models / other) for other in sorted(others))])


def _folder_names(family: object) -> list[str]:
    name = re.sub(r"\W", "_", str(family))
    return [name, name.replace("_", ""), name.removesuffix("_text"), name.removesuffix("_vision"), name.removesuffix("_vision_model")]


def _text_of(folder: Path) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py")))
    except (OSError, ValueError):
        return ""
