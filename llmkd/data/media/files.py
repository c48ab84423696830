"""Bytes of sound and image files."""

from pathlib import Path

from ...errors import UserError, fix_of

AGAIN = "fetch or write the file again"


def read_bytes(path: str | Path, place: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{place}: {path}: {reason}; {fix_of(error, 'name a file that is there')}") from error
