"""Notices changes of the model files of a run: between check and loading, and during the run. No torch."""

import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import ChangedFiles, UserError
from ..model_folder.files import ModelFiles
from ..model_folder.hashes import stamp
from ..model_folder.identity import CONFIGS
from ..model_folder.weights import INDEX, weight_files
from ..teachers.resolve import TeacherSource
from .prepare import Prepared, model_identity


class ModelWatch:
    """Watches the files from which a run's models were loaded. Make it after loading: ChangedFiles if they differ from those that were checked."""

    def __init__(self, prepared: Prepared):
        self._student, self._teachers = prepared.student, prepared.teachers
        self._stamps, self._looked = _stamps(prepared.student, prepared.teachers), time.monotonic()
        self._identity = model_identity(prepared.student, prepared.teachers)
        for what, value in self._identity.items():
            if prepared.identity.get(what) != value:
                raise ChangedFiles(f"{what} was changed while the run was starting; start again when it is whole")

    def changed(self, every: float = 1.0) -> str | None:
        """A sentence about a file that has changed, or None. The files are checked at most once in `every` seconds, and read only if touched."""
        if time.monotonic() < self._looked + every:
            return None
        self._looked = time.monotonic()
        try:
            now = {path: stamp(path) for path in self._stamps}
            if now == self._stamps:
                return None
            found = model_identity(self._student, self._teachers)
        except OSError as error:
            return f"{error.filename or 'a file of the models'} was removed while the run was using it ({error.strerror})"
        except UserError as error:
            return f"a model's files were changed while the run was using them ({error})"
        for what, value in self._identity.items():
            if found.get(what) != value:
                return f"{what} was changed while the run was using it"
        self._stamps = now
        return None


def _stamps(student: ModelFiles | None, teachers: Sequence[TeacherSource]) -> dict[Path, list[int]]:
    models = [student, *(teacher.files for teacher in teachers if teacher.cache is None)]
    folders = {folder for files in models if files for folder in (files.base, files.adapter) if folder}
    paths = [path for folder in folders for path in (*weight_files(folder, "output_dir"), *(folder / name for name in (*CONFIGS, INDEX)))]
    return {path: stamp(path) for path in paths if path.exists()}
