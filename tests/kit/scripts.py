"""Scripts outside the package, loaded as modules: those of docs/, examples/ and recipes/."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_script(path: Path) -> ModuleType:
    """Run a script's top level under its own name, so that `if __name__ == "__main__"` does not hold."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
