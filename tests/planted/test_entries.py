"""The faults of tests/planted still apply. `python -m tests.planted` plants them; that is no part of the tests."""

import ast
import functools
from itertools import groupby

import pytest

from tests.planted.fault import REPO, Fault, every_fault

FAULTS = every_fault()
ROOMS = {room: list(keys) for room, keys in groupby(FAULTS, key=lambda key: key.partition("/")[0])}


@functools.cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((REPO / file).read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def problems(fault: Fault) -> list[str]:
    """What keeps a fault from being planted, but for the new text being no Python."""
    found = ["changes nothing"] * (fault.new == fault.old) + ["names no test"] * (not fault.nodes)
    try:
        fault.planted()
    except (OSError, ValueError) as error:
        found.append(str(error))
    for node in fault.nodes:
        file, _, test = node.partition("::")
        if not (REPO / file).is_file() or (test and test.partition("[")[0] not in functions(file)):
            found.append(f"{node} is no test")
    return found


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def no_python(faults: dict[str, Fault]) -> list[str]:
    """Which faults of one file make it a file that is no Python. All that can stand in it together are parsed at once."""
    text, alone = next(iter(faults.values())).text(), []
    for key, fault in faults.items():
        if text.count(fault.old) == 1:
            text = text.replace(fault.old, fault.new)
        else:
            alone.append(key)
    return [key for key in (alone if is_python(text) else faults) if not is_python(faults[key].planted())]


@pytest.mark.parametrize("room", ROOMS)
def test_faults_apply_and_name_tests_that_exist(room):
    """Where the code has changed: give the fault its new text, or, if the line is gone, take it out and plant another of its kind."""
    wrong = {key: found for key in ROOMS[room] if (found := problems(FAULTS[key]))}
    for file in {FAULTS[key].file for key in ROOMS[room]}:
        of_file = {key: FAULTS[key] for key in ROOMS[room] if FAULTS[key].file == file and key not in wrong}
        wrong |= {key: ["its new text is no Python"] for key in (no_python(of_file) if of_file else [])}
    assert not wrong, "\n".join(f"{key}: {'; '.join(found)}" for key, found in wrong.items())


def test_there_are_as_many_as_promised():
    assert sum(fault.equivalent is None for fault in FAULTS.values()) >= 120
