"""Puts settings of the command line into a file's data before it is checked."""

import json
from typing import Any

from .schema import describe, join_or


def override(data: dict, overrides: dict[str, Any], problems: list[str]) -> set[tuple]:
    """Set {dotted path: value} in `data` and return the keys of each. A path that cannot be set there is added to `problems`."""
    changed = set()
    for dotted, value in overrides.items():
        place: Any = data
        *parents, last = dotted.split(".")
        keys: list = []
        for key in parents:
            key = _index(place, key)
            if isinstance(place, dict) and key.isdigit() and place:
                here = ".".join(map(str, keys))
                problems.append(f"--{dotted}: {here} is one, and no list; write --{dotted.replace(f'{here}.{key}', here, 1)}")
                break
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            keys.append(key)
            if isinstance(place, list) and not isinstance(key, int):
                problems.append(
                    f"--{dotted}: {'.'.join(map(str, keys[:-1]))} is a list of {len(place)}; it has no {key}, but {_items(place)}"
                )
                break
            place = place[key]
            if not isinstance(place, dict | list):
                problems.append(f"--{dotted}: {_no_section('.'.join(map(str, keys)), place, dotted, value)}")
                break
        else:
            last = _index(place, last)
            if isinstance(place, list) and not isinstance(last, int):
                which = f"it has no {last}, but {_items(place)}" if last.isdigit() else f"name one, such as --{'.'.join(parents)}.0.{last}"
                problems.append(f"--{dotted}: {'.'.join(parents)} is a list of {len(place)}; {which}")
                continue
            place[last] = value
            changed.add((*keys, last))
    return changed


def _no_section(here: str, found: Any, dotted: str, value: Any) -> str:
    """The problem with a setting below another that has a single value."""
    below, type_ = dotted[len(here) + 1 :], next((type_ for path, type_, *_ in describe() if path == here), "")
    if "mapping" in type_:
        return f"{here} is {json.dumps(found)} here, which has no {below}; give it whole: --{here} '{{{below}: {value}, ...}}'"
    return f"{here} is {json.dumps(found)[:80]}, and has no settings of its own" + (f" ({type_}); write --{here} VALUE" if type_ else "")


def _items(place: list) -> str:
    return join_or([str(n) for n in range(len(place))]).replace(" or ", " and ")


def _index(place: Any, key: str) -> str | int:
    """A key of a mapping, or an index of a list."""
    return int(key) if isinstance(place, list) and key.isdigit() and int(key) < len(place) else key
