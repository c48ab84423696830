"""Shared by the tests of settings: a recipe's text as it is loaded, or the problems that are found in it."""

import pytest

from llmkd.config import loader
from llmkd.errors import UserError


@pytest.fixture
def load(tmp_path):
    """Load a recipe's text (or bytes) with overrides."""

    def go(text, overrides=None, read=loader.load_recipe):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(path, overrides)

    return go


@pytest.fixture
def refused(load, tmp_path):
    """The problems found in a recipe, without the folder's name."""

    def go(text, overrides=None, read=loader.load_recipe) -> list[str]:
        with pytest.raises(UserError) as info:
            load(text, overrides, read)
        return [problem.replace(f"{tmp_path}/", "") for problem in info.value.problems]

    return go
