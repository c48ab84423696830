"""One examined run of the small world: a LoRA student, packed rows, a teacher with an adapter, a temperature of 2."""

import json

import pytest

from llmkd.config import loader
from llmkd.doctor import setup as setup_module
from llmkd.doctor.check import Check, Result
from llmkd.doctor.examine import CHECKS, ask
from llmkd.doctor.setup import Setup
from tests.conftest import plain_recipe

CACHED = ("alone", "largest_logit", "rows", "formats")  # what a setup remembers of its own computations


@pytest.fixture(scope="session", autouse=True)
def _fewer_examples():
    """Checks compute with half as many examples as on the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup_module, "MOST_EXAMPLES", 4)
        yield


@pytest.fixture(scope="session")
def make_setup(world, tmp_path_factory):
    """A setup of the small world with settings by dotted path; read and loaded, or only made."""

    def go(loaded: bool = True, **changes) -> Setup:
        folder = tmp_path_factory.mktemp("doctor")
        (folder / "recipe.yaml").write_text(json.dumps(plain_recipe(world, folder / "out")))
        (folder / "work").mkdir()
        recipe = loader.load_recipe(folder / "recipe.yaml", {name.replace("__", "."): value for name, value in changes.items()})
        setup = Setup(recipe, 16, folder / "work")
        if loaded:
            setup.read()
            setup.load()
        return setup

    return go


@pytest.fixture(scope="session")
def whole_setup(make_setup, tmp_path_factory) -> Setup:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_setup(data__packing=True, loss__temperature=2.0)


@pytest.fixture
def setup(whole_setup) -> Setup:
    """The session's setup, which has forgotten what it computed in other tests."""
    for name in CACHED:
        vars(whole_setup).pop(name, None)
    return whole_setup


def named(words: str) -> Check:
    (check,) = [one for one in CHECKS if words in one.name]
    return check


@pytest.fixture
def asked():
    """The result of the one check with these words in its name."""

    def go(setup: Setup, words: str) -> Result:
        return ask(setup, named(words))

    return go


@pytest.fixture
def caught(asked):
    """What a check that fails found; it must say how to put it right."""

    def go(setup: Setup, words: str) -> str:
        result = asked(setup, words)
        assert result.status == "failed", result
        assert result.fix
        return result.found

    return go
