"""The error of a row, and a collector that raises the errors of many rows as one."""

from ...errors import UserError

SHOWN = 20


class BadRow(ValueError):
    """A row that cannot be read; the text is the reason. `alike`: a text that the errors of many rows of a file have in common."""

    def __init__(self, reason: str, alike: str = ""):
        super().__init__(reason)
        self.alike = alike


class ErrorCollector:
    """Collects errors, one line each, and raises them as one UserError that shows the first twenty.

    hints   whether they are to say which settings would read a row; not where such settings are tried
    """

    def __init__(self, hints: bool = True):
        self.hints = hints
        self.found: list[str] = []
        self._alike: dict[str, int] = {}

    def has(self, alike: str) -> bool:
        """Whether there already is an error of this kind: further ones are only counted, so their texts are not needed."""
        return alike in self._alike

    def add(self, problem: str, alike: str = "") -> None:
        """Add an error as one line: characters that do not print are escaped, and the rest after 600 characters is cut off.

        Of the errors with the same `alike`, which every row of a file may have, the first is shown and the others are counted.
        """
        if alike:
            self._alike[alike] = self._alike.get(alike, 0) + 1
            if self._alike[alike] > 1:
                return
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in problem)
        self.found.append(line if len(line) <= 600 else f"{line[:600]} ...")

    def raise_if_any(self) -> None:
        if self.found:
            more = [f"... and {len(self.found) - SHOWN} more problems like these"] if len(self.found) > SHOWN else []
            more += [f"... and {count - 1} more rows: {alike}" for alike, count in self._alike.items() if count > 1]
            raise UserError(*self.found[:SHOWN], *more)
