"""The faults of tests/planted still apply. `python -m tests.planted` plants them; that is no part of the tests."""

import ast
import functools

import pytest

from tests.planted.fault import REPO, every_fault

FAULTS = every_fault()


@functools.cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((REPO / file).read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_applies_and_names_tests_that_exist(key):
    """Where the code has changed: give the fault its new text, or, if the line is gone, take it out and plant another of its kind."""
    fault = FAULTS[key]
    assert fault.new != fault.old
    ast.parse(fault.planted())
    assert fault.nodes
    for node in fault.nodes:
        file, _, test = node.partition("::")
        assert (REPO / file).is_file()
        assert not test or test.partition("[")[0] in functions(file), test


def test_there_are_as_many_as_promised():
    assert sum(fault.equivalent is None for fault in FAULTS.values()) >= 120
