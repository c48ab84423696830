"""The packages that read files, which come with an extra."""

import importlib

from ...errors import UserError, brief

#: By the kind of the files: what they are called, the extra, and its packages that read them.
_PACKAGES = {"audio": ("sounds", "audio", ("soundfile", "soxr")), "image": ("images", "image", ("PIL.Image",))}


def refuse_missing_packages(kind: str, setting: str) -> None:
    """UserError, before a file is read, where a package that reads files of a kind (audio, image) is not there."""
    what, extra, packages = _PACKAGES[kind]
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:  # OSError: a library that the package calls is not on this machine
            raise UserError(
                f'{setting}: {what} need {package}, which cannot be loaded ({brief(error)}); pip install "llmkd[{extra}]"'
            ) from None
