"""The rows that lm-evaluation-harness evaluates, from its task files, which are read without the harness and without running the code that they name. No
torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...config.data import Source
from ...errors import UserError
from ...files import read_file

_SPLITS = ("test_split", "validation_split")  # training rows may be trained on


class _Loader(yaml.SafeLoader):
    """Tags, such as !function, are null."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def evaluated(tasks: Sequence[str], folder: str, setting: str) -> Iterator[Source]:
    """The test and validation data of each task, from the task files in a folder. UserError if these do not name it."""
    files = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        fields = _fields(path, setting)
        for name in (fields.get("task"), path.stem) if isinstance(fields.get("task"), str) else ():
            files.setdefault(name, (path, fields))
    if not files:
        raise UserError(f"{setting}.tasks_dir: {folder} holds no task files (*.yaml); llmkd tasks writes them for local data")
    for name in tasks:
        if name not in files:
            known = ", ".join(sorted({fields["task"] for _, fields in files.values()}))
            raise UserError(f"{setting}.tasks: found {name}, and {folder} has no such task; it has {known}")
        yield from _sources(*files[name], f"{setting}.tasks")


def _sources(path: Path, fields: dict[str, Any], setting: str) -> Iterator[Source]:
    given = fields.get("dataset_kwargs")
    files = given.get("data_files") if isinstance(given, dict) else None
    splits = [fields[name] for name in _SPLITS if isinstance(fields.get(name), str)]
    if not splits or not isinstance(fields.get("dataset_path"), str):
        raise UserError(f"{setting}: {path} names no data of test or validation; name the data themselves: {{path: FILE}}")
    if files is None:
        name = fields.get("dataset_name")
        yield from (Source(path=fields["dataset_path"], name=name if isinstance(name, str) else None, split=split) for split in splits)
        return
    if not isinstance(files, dict):
        files = dict.fromkeys(splits, files)
    for split in splits:
        if not files.get(split):
            raise UserError(f"{setting}: {path} names no file of {split} in its data_files; name the data themselves: {{path: FILE}}")
        for one in [files[split]] if isinstance(files[split], str) else files[split]:
            yield Source(path=str(path.parent / one))


def _fields(path: Path, setting: str, depth: int = 0) -> dict[str, Any]:
    """The fields of a task file, on top of those of the file that it includes."""
    try:
        found = yaml.load(read_file(path), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{setting}.tasks_dir: {path}: cannot be read ({str(error).splitlines()[0][:160]})") from error
    found = found if isinstance(found, dict) else {}
    include = found.get("include")
    return (_fields(path.parent / include, setting, depth + 1) if isinstance(include, str) and depth < 9 else {}) | found
