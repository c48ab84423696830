"""One row of the fault matrix."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One fault.

    fault   what happens
    answer  what llmkd does
    tests   the tests, relative to tests/, as pytest names them, separated by blanks
    """

    fault: str
    answer: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests.split()]
