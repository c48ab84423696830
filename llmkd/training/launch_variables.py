"""The environment variables by which a launcher describes the launch to its processes; impossible values are refused. No torch."""

from collections.abc import Mapping

from ..errors import UserError

_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_FIX = "unset it, or start with accelerate launch or torchrun"


def refuse_broken_launch(variables: Mapping[str, str]) -> None:
    """UserError for values that are not numbers, a rank beyond the number of processes, and several processes without an address to meet at."""
    given = {name: variables[name].strip() for name in _NUMBERS if variables.get(name, "").strip()}
    for name, value in given.items():
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{name}: found {value} in the environment, expected a whole number; {_FIX}")
    count = int(given.get("WORLD_SIZE", "1"))
    if count < 1:
        raise UserError(f"WORLD_SIZE: found {count} in the environment, expected at least 1; {_FIX}")
    if int(given.get("RANK", "0")) >= count:
        raise UserError(f"RANK: found {given['RANK']} in the environment, expected a number below WORLD_SIZE, {count}; {_FIX}")
    if lacking := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if count > 1 and not variables.get(name, "").strip()]:
        raise UserError(f"WORLD_SIZE: found {count} in the environment, without {', '.join(lacking)}; {_FIX}")
