"""Shared by the tests of settings: a recipe with what every one needs, and what problems are expected."""

BASE = """\
output_dir: runs/x
student: {model: base}
data:
  train: {path: t.jsonl}
"""


def found(problems: list[str], *expected: tuple[str, ...]) -> None:
    """Exactly these problems in this order: each the start of the line, then words it holds."""
    assert len(problems) == len(expected), problems
    for problem, (start, *words) in zip(problems, expected, strict=True):
        assert problem.startswith(start), problem
        assert all(word in problem for word in words), problem
