"""The fault matrix and the page of guarantees name tests that are there."""

import ast
import functools
import re
from pathlib import Path

import pytest

from .table import TABLE

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs/guarantees.md"


@functools.cache
def names_in(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing(nodes: list[str]) -> list[str]:
    """Those of `tests/FILE::TEST` and `tests/FILE` that are not there."""
    found = []
    for node in nodes:
        file, _, name = node.partition("::")
        if not (REPO / file).exists() or (name and name not in names_in(REPO / file)):
            found.append(node)
    return found


@pytest.mark.parametrize("title", TABLE)
def test_every_row_of_the_matrix_has_tests(title):
    for row in TABLE[title]:
        assert row.nodes and not missing(row.nodes), row.fault
    faults = [row.fault for group in TABLE.values() for row in group]
    assert len(set(faults)) == len(faults)


def test_every_row_of_the_page_of_guarantees_has_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith(("| What", "|--"))]
    assert len(rows) > 20
    for row in rows:
        nodes = [f"tests/{node}" for node in re.findall(r"`([\w/]+\.py(?:::test_\w+)?)`", row)]
        assert nodes and not missing(nodes), row
