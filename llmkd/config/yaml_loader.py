"""A safe reader of YAML 1.2 that also gives the line of every value. Tags, duplicate keys and endless aliases are refused."""

import re
import typing

import yaml

from ..errors import UserError

MAX_NODES, MAX_DEPTH = 100_000, 40


#: {a part of the parser's message: what to do}.
_YAML_HINTS = {
    "expected <block end>": "indent the settings of one section alike",
    "mapping values are not allowed": "indent the settings of one section alike, and quote a text that holds a colon and a space",
    "character '\\t'": "indent by spaces, not by tabs",
    "but got '<stream end>'": "close the bracket or brace that is still open",
}


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-4 is a number; no, on, 010 and 12:30 are text."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # in C if PyYAML was built with libyaml, as its wheels are
    """Quotes texts that `Loader` would otherwise read back as another type."""


Loader.yaml_implicit_resolvers = Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first] + ([""] if _tag == "null" else [])
    )


def is_number(text: str) -> bool:
    """Whether a plain scalar is a number in YAML 1.2."""
    return Loader("").resolve(yaml.ScalarNode, text, (True, False)) in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str, name: str) -> tuple[typing.Any, dict[tuple, int], list[str]]:
    """The data in `text`, the line of every path in it, and the problems found (duplicate keys, tags)."""
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: not valid YAML: the character {error.character!r} is not allowed; remove it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", error))
        fix = next(
            (fix for words, fix in _YAML_HINTS.items() if words in problem),
            "write a setting as name: value, and quote a text with other signs",
        )
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}; {fix}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply; a recipe is flat") from None
    lines: dict[tuple, int] = {}
    problems: list[str] = []
    loader = Loader("")
    nodes = 0

    def build(node, path):
        nonlocal nodes
        nodes += 1
        if nodes > MAX_NODES:
            raise UserError(f"{name}: more than {MAX_NODES} values; a recipe is small")
        line = node.start_mark.line + 1
        lines.setdefault(path, line)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if len(path) > MAX_DEPTH:
            raise UserError(f"{name}:{line}: nested too deeply; a recipe is flat")
        if kind not in ("map", "seq", "null", "bool", "int", "float", "str"):
            problems.append(f"{name}:{line}: {'.'.join(map(str, path))}: found the tag {node.tag}; write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            out = {}
            for key_node, value in node.value:
                key_line = key_node.start_mark.line + 1
                merge = key_node.value == "<<" and key_node.style is None
                if merge or not isinstance(key_node, yaml.ScalarNode):
                    found = "a merge key (<<)" if merge else "a list or mapping as a name"
                    problems.append(
                        f"{name}:{key_line}: {'.'.join(map(str, path)) or 'settings'}: found {found}; write the settings out by name"
                    )
                    continue
                key = str(key_node.value)
                if key in out:
                    problems.append(
                        f"{name}:{key_line}: {'.'.join(map(str, (*path, key)))}: given twice (first on line {lines[*path, key]}); keep one"
                    )
                lines[*path, key] = key_line
                out[key] = build(value, (*path, key))
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(value, (*path, i)) for i, value in enumerate(node.value)]
        try:
            node.value.encode()
            if kind == "float":  # PyYAML converts floats as in YAML 1.1
                return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))
            return loader.construct_object(node)
        except (ValueError, KeyError):
            problems.append(f"{name}:{line}: {'.'.join(map(str, path))}: {node.value[:40]!r} is not a valid {kind}")
            return None

    data = build(root, ()) if root else None
    return ({} if data is None else data), lines, problems
