"""The list of settings, from the dataclasses: for --help, error messages and docs/settings.md."""

import dataclasses
import functools
import json
import typing

from .fields import metadata
from .recipe import Recipe


def join_or(options: list[str]) -> str:
    return ", ".join(options[:-1]) + (" or " if len(options) > 1 else "") + options[-1] if options else "nothing"


_hints = functools.cache(typing.get_type_hints)  # a run asks for them hundreds of times


def section_of(kind, key):
    """The section class of a key, or None. For a key that the user chose (the name of a stage) it is the class of all such entries."""
    if not dataclasses.is_dataclass(kind):
        return None
    hint = _hints(kind).get(key, kind)
    return next((c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)), None)


def describe(kind=Recipe, prefix: str = ""):
    """Yields every setting as (dotted path, type in words, default, description)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        path, hint = prefix + field.name, hints[field.name]
        section = section_of(kind, field.name)
        info = field.default
        if section:
            if getattr(info, "description", None):
                forms = typing.get_args(_hints(kind)[field.name])
                several = next((a for a in forms if typing.get_origin(a) is tuple), None)
                a_list = "them" if several and section in typing.get_args(several) else "numbers"
                plain = next((_words(a) for a in typing.get_args(next(iter(typing.get_args(hint)), None)) if _is_plain(a)), "")
                words = "a mapping of settings" + (f", or a list of {a_list}" if several else "")
                yield path, f"{plain}, or {words}" if plain else words, info.default if plain else None, info.description
            yield from describe(section, path + ".")
            continue
        factory = getattr(info, "default_factory", None)
        default = factory() if factory else getattr(info, "default", info)
        bounds = [m for m in getattr(info, "metadata", [])]
        yield path, _words(hint, bounds), default, getattr(info, "description", None) or ""


def _is_plain(form) -> bool:
    """Whether a setting, which may also be a section, can be a number or a word."""
    kinds = typing.get_args(form)[:1]
    return kinds == (float,) or typing.get_origin(*kinds or (None,)) is typing.Literal


def _words(hint, bounds=()) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        inner = list(bounds) + [m for a in hint.__metadata__ for m in (getattr(a, "metadata", None) or [a])]
        return _words(args[0], inner)
    if origin is typing.Literal:
        return join_or([str(a) for a in args])
    if origin is tuple:
        if args[-1] is not ...:
            return f"a list of {len(args)} numbers"
        item = _words(args[0])
        if item.startswith("a list of "):
            return f"a list of lists of {item.removeprefix('a list of ')}"
        if item == "a mapping":
            return "a list of mappings"
        return f"a list of {item}" + ("" if typing.get_origin(args[0]) is typing.Literal else "s")
    if origin is dict:
        return "a mapping"
    if args:
        return " or ".join("null" if a is type(None) else _words(a, bounds) for a in args)
    word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))
    limits = [
        f"{sign} {_plain(getattr(b, name))}"
        for b in bounds
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(b, name, None) is not None
    ]
    return word + (" " + ", ".join(limits) if limits else "")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def may_change_on_resume(dotted: str, kind: type | None = Recipe) -> bool:
    """Whether a resumed run may change a setting: if its field, or the field of a section around it, is `changeable`."""
    for key in dotted.split("."):
        if key.isdigit():  # an item of a list of sources or teachers
            continue
        if kind is None:
            return False
        if metadata(kind, key).changeable:
            return True
        kind = section_of(kind, key)
    return False


def help_text(kind=Recipe, section: str = "") -> str:
    """The settings (of one section, if it is named) with type, default and description, for --help."""
    lines = []
    for path, type_, default, text in describe(kind):
        if section and path != section and not path.startswith(section + "."):
            continue
        shown = "required" if default is ... or type(default).__name__ == "PydanticUndefinedType" else dump_value(default)
        lines.append(f"  --{path}  ({type_}; default {shown})\n      {text}")
    return "\n".join(lines)


def dump_value(value) -> str:
    return "null" if value is None else json.dumps(value) if not isinstance(value, str) else value or "none"
