"""Finds Python code that task files would run, before the harness reads them, and refuses it unless it is allowed."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from llmkd.errors import UserError
from llmkd.files import read_file

_PLAIN = "tag:yaml.org,2002:"


def refuse_task_code(folder: Path, harness: Path) -> None:
    """UserError if a task file in the folder, or one that it includes, would run Python that is not the harness's own.

    harness  the folder of the installed harness, whose own files may be included whatever they hold
    """
    problems = [f"--tasks_dir: {where} {what}" for path in sorted(folder.rglob("*.yaml")) for where, what in _code_in(path, harness, set())]
    if problems:
        fix = "read it, and give --allow_task_code (eval.allow_task_code in a sweep) if it may run; or leave it out"
        raise UserError(*(f"{problem}; {fix}" for problem in dict.fromkeys(problems)))


def _code_in(path: Path, harness: Path, seen: set[Path]) -> Iterator[tuple[str, str]]:
    """(file:line, the code) of everything that runs Python in a file and in those that it includes."""
    path = path.resolve()
    if path in seen or path.is_relative_to(harness):
        return
    seen.add(path)
    try:
        root = yaml.compose(read_file(path), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError):  # the harness reports the error if the task is asked for
        return
    for node in _nodes(root, set()):
        where = f"{path}:{node.start_mark.line + 1}"
        if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python/"):
            yield (
                where,
                f"runs Python ({node.tag.removeprefix(_PLAIN)} {node.value if isinstance(node.value, str) else ''})".replace(" )", ")"),
            )
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                text = one.value if isinstance(one, yaml.ScalarNode) else ""
                if key.value == "include" and text:
                    yield from _code_in(path.parent / text, harness, seen)
                elif key.value == "hf_evaluate" and text.lower() in ("true", "yes", "on"):
                    yield where, "has a metric's code fetched and run (hf_evaluate)"
                elif key.value == "metric" and "/" in text:
                    yield where, f"has a metric's code run ({text})"
                elif key.value == "dataset_path" and (text == "pandas" or text.endswith(".py")):
                    yield where, f"reads its data by code (dataset_path: {text})"


def _nodes(node: yaml.Node | None, seen: set[int]) -> Iterator[yaml.Node]:
    """A node and all nodes below it, each once, since an anchor may occur in several places."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    yield node
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for inner in pair:
                yield from _nodes(inner, seen)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _nodes(inner, seen)


def sandbox_templates() -> None:
    """Make the harness render the templates of task files in Jinja's sandbox, which gives them no access to Python."""
    import jinja2.sandbox
    from lm_eval import utils

    if not isinstance(utils.env, jinja2.sandbox.SandboxedEnvironment):
        # Oddity: the harness has one environment for all templates, a name of its module
        boxed = jinja2.sandbox.SandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline
        )
        boxed.filters |= utils.env.filters
        utils.env = boxed
