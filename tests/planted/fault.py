"""Faults to be planted: small changes of the code that are wrong, each with the tests that should notice it."""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """One fault: in `file`, the text `old`, which stands there once, becomes `new`.

    name         unique in its room
    says         what is wrong then, in a few words
    file         relative to the repository
    tests        the tests that should notice, relative to tests/, as pytest names them (FILE or FILE::TEST), separated by blanks
    equivalent   why the changed program computes the same, so that no test can notice; None for a fault proper
    """

    name: str
    says: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str | None = None

    def text(self, root: Path = REPO) -> str:
        """The file as it is."""
        return (root / self.file).read_text(encoding="utf-8")

    def planted(self, root: Path = REPO) -> str:
        """The file's text with the fault in it. ValueError where `old` is not found exactly once."""
        text = self.text(root)
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: expected once, found {found} times: {self.old!r}")
        return text.replace(self.old, self.new)

    @property
    def nodes(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests.split()]


def in_file(file: str, *entries: tuple[str, ...]) -> list[Fault]:
    """Faults of one file: (name, says, old, new, tests), and with a sixth part `equivalent`."""
    return [Fault(name, says, file, old, new, tests, *equivalent) for name, says, old, new, tests, *equivalent in entries]


def every_fault() -> dict[str, Fault]:
    """All faults by ROOM/NAME, in the order of the files in rooms/. ValueError where two have one name."""
    from . import rooms

    found = {}
    for module in sorted(one.name for one in pkgutil.iter_modules(rooms.__path__)):
        for fault in importlib.import_module(f"{rooms.__name__}.{module}").FAULTS:
            if (key := f"{module}/{fault.name}") in found:
                raise ValueError(f"{key}: two faults have this name")
            found[key] = fault
    return found
