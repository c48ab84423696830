"""The packages that read files, which come with an extra."""

import importlib

from ...errors import UserError, brief

#: {kind of files: (their name, the extra, the packages of the extra that read them)}.
_PACKAGES = {"audio": ("sounds", "audio", ("soundfile", "soxr")), "image": ("images", "image", ("PIL.Image",))}


def refuse_missing_packages(kind: str, setting: str) -> None:
    """UserError if a package that reads files of a kind (audio, image) is missing. To be called before any file is read."""
    what, extra, packages = _PACKAGES[kind]
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, OSError) as error:  # OSError: a library that the package calls is not on this machine
            raise UserError(
                f'{setting}: {what} need {package}, which cannot be loaded ({brief(error)}); pip install "llmkd[{extra}]"'
            ) from None
