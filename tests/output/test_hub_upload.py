"""Downloads from the hub and uploads to it, against a small hub of the tests' own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmkd.cli import main
from llmkd.errors import UserError
from tests.conftest import plain_recipe
from tests.kit.hub import FakeHub
from tests.kit.processes import Server, launch

REPO = Path(__file__).parents[2]
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A fake hub, a home folder for what comes from it, and a server of processes that know only that hub."""
    hub, home = FakeHub(), tmp_path_factory.mktemp("home")
    server = Server(**hub.environment(home))
    yield hub, home, server
    server.close()
    hub.server.shutdown()


@pytest.fixture
def hub(started):
    """The hub, empty again, as are the files from it."""
    hub, home, _ = started
    hub.clear()
    shutil.rmtree(home)
    home.mkdir()
    return hub


@pytest.fixture
def llmkd(world, tmp_path, hub, started):
    """`llmkd train` in a process of its own, which knows only the fake hub: exit code and what it said."""

    def go(*arguments: str, change=None, **environment: str | None) -> tuple[int, str]:
        recipe = plain_recipe(world, tmp_path / "out") | {"teacher": None, "train": {"batch_size": 8, "max_steps": 2}}
        if change:
            change(recipe)
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        settings = {**hub.environment(started[1]), "LLMKD_CACHE": str(tmp_path / "cache"), **environment}
        start = launch if "HF_HUB_OFFLINE" in environment else started[2].launch  # it is read when huggingface_hub is imported
        done = start(1, main, ["train", "--config", str(tmp_path / "r.yaml"), *arguments], **settings)
        return done.returncode, done.stderr

    return go


def problems(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("llmkd: ")]


@pytest.mark.slow
def test_a_model_and_a_data_set_by_revision(llmkd, hub, started, world, tmp_path):
    old = {p.name: p.read_bytes() for p in (world / "student").iterdir()} | {"README.md": CARD, "pytorch_model.bin": b"pickled"}
    commit = hub.add("models", "someone/tiny", old, ref="v1")
    hub.add("models", "someone/tiny", {"config.json": b"{}"})  # main is another model by now
    rows = (world / "train.jsonl").read_bytes()
    read = hub.add("datasets", "someone/rows", {"data/train.jsonl": rows, "data/test.jsonl": rows.splitlines(True)[0]}, ref="v2")
    hub.add("datasets", "someone/rows", {"data/train.jsonl": b'{"other": 1}\n'})

    def change(recipe):
        recipe["student"] |= {"model": "someone/tiny", "revision": "v1"}
        recipe["data"] = {"train": {"path": "someone/rows", "revision": "v2"}, "max_length": 256}

    code, said = llmkd(change=change)
    assert code == 0, said
    assert "train: 37 examples" in said
    card = ModelCard.load(tmp_path / "out/adapter/README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("someone/tiny", "apache-2.0", ["someone/rows"])
    assert f"`someone/tiny` (revision `{commit}`)" in card.text and f"'someone/tiny', revision='{commit}'" in card.text
    assert f"revision `{read}`" in card.text
    adapter = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("someone/tiny", "v1")
    assert not [a for a in hub.asked if "pytorch_model.bin" in a]
    # the snippet, in a process that has only the cache
    snippet = card.text.split("```python\n")[1].split("\n```")[0]
    offline = {**os.environ, **hub.environment(started[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", snippet], env=offline, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed(llmkd, hub, world):
    rows = (world / "train.jsonl").read_bytes()
    hub.add("datasets", "someone/rows", {"data/train.jsonl": rows}, ref="v2")

    def change(recipe):
        recipe["data"] = {"train": {"path": "someone/rows", "revision": "v2"}, "max_length": 256, "streaming": True}
        recipe["train"] |= {"max_steps": 2}

    code, said = llmkd(change=change)
    assert code == 0, said
    assert "train: streaming someone/rows" in said and "16 rows streamed, 16 examples" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "train", "words"),
    [
        ({"model": "someone/none"}, {}, ["student.model: someone/none", "RepositoryNotFound", "check the name"]),
        ({"model": "someone/tiny", "revision": "v9"}, {}, ["student.model: someone/tiny", "RevisionNotFound", "check the revision"]),
        ({"model": "someone/gated"}, {}, ["student.model: someone/gated", "GatedRepo", "ask for access"]),
        ({}, {"path": "someone/none"}, ["data.train.path: someone/none", "hub"]),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(llmkd, hub, world, tmp_path, student, train, words):
    hub.add_folder("someone/tiny", world / "student")
    hub.add_folder("someone/gated", world / "student")
    hub.gated.add("someone/gated")

    def change(recipe):
        recipe["student"] |= student
        recipe["data"]["train"] |= train

    code, said = llmkd(change=change)
    assert code == 2 and len(problems(said)) == 1, said
    assert all(word in problems(said)[0] for word in words), said
    assert not (tmp_path / "out").exists()


def push(recipe):
    recipe["push_to_hub"] = {"repo": "someone/mine"}


@pytest.mark.slow
def test_the_finished_student_is_uploaded(llmkd, hub, tmp_path):
    code, said = llmkd(change=push)
    assert code == 0 and f"uploaded to {hub.url}/someone/mine" in said, said
    stored = hub.repos["models", "someone/mine"][hub.commit("models", "someone/mine", "main")]
    here = {p.name: p.read_bytes() for p in (tmp_path / "out/adapter").iterdir()}
    assert stored == here and hub.private["someone/mine"]
    assert json.loads((tmp_path / "out/summary.json").read_text())["pushed"] == "someone/mine"
    asked = len(hub.asked)
    code, said = llmkd("--resume", change=push)
    assert code == 0 and len(hub.asked) == asked, said


@pytest.mark.slow
def test_a_failed_upload_loses_nothing_and_resume_tries_again(llmkd, hub, started, tmp_path):
    hub.refuses = "/commit/"
    code, said = llmkd(change=push)
    assert code == 2 and len(problems(said)) == 1, said
    student = tmp_path / "out/adapter"
    command = f"hf upload --private someone/mine {student} ."
    assert said.rstrip().endswith(command) and "500" in said and (student / "adapter_model.safetensors").exists()
    assert "pushed" not in json.loads((tmp_path / "out/summary.json").read_text())
    hub.refuses = ""
    code, said = llmkd("--resume", change=push)
    assert code == 0 and "uploaded" in said, said
    assert len(hub.repos["models", "someone/mine"]) == 2
    environment = {**os.environ, **hub.environment(started[1]), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    del hub.repos["models", "someone/mine"]
    subprocess.run(command, shell=True, env=environment, check=True, timeout=60)  # what the message says works too
    assert "README.md" in hub.repos["models", "someone/mine"][hub.commit("models", "someone/mine", "main")]
    assert hub.private["someone/mine"]


@pytest.mark.slow
def test_a_public_repository_does_not_get_what_shall_be_private(llmkd, hub, tmp_path):
    hub.add("models", "someone/mine", {})
    code, said = llmkd(change=push)
    assert code == 2 and "push_to_hub.private" in problems(said)[0], said
    assert len(hub.repos["models", "someone/mine"]) == 1
    code, said = llmkd("--resume", "--push_to_hub.private", "false", change=push)
    assert code == 0 and len(hub.repos["models", "someone/mine"]) == 2, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo", "environment", "words"),
    [
        ("someone/mine", {"HF_TOKEN": None}, ["push_to_hub: there is no token", "hf auth login"]),
        ("someone/mine", {"HF_HUB_OFFLINE": "1"}, ["push_to_hub: HF_HUB_OFFLINE is set"]),
        ("a/b/c", {}, ["push_to_hub.repo: found 'a/b/c'", "owner/name"]),
        ("so..me", {}, ["push_to_hub.repo: found 'so..me'"]),
    ],
)
def test_what_cannot_be_uploaded_is_said_before_anything_is_loaded(llmkd, hub, tmp_path, repo, environment, words):
    code, said = llmkd("--push_to_hub.repo", repo, "--student.model", str(tmp_path), **environment)
    assert code == 2 and len(problems(said)) == 1 and all(word in said for word in words), said
    assert not hub.asked and not (tmp_path / "out").exists()


def test_two_stages_of_a_pipeline_do_not_share_a_repository():
    from llmkd.commands.pipeline import stage_recipes
    from llmkd.config.loader import load_pipeline

    config = REPO / "recipes/quickstart.yaml"
    with pytest.raises(UserError, match="several stages would upload to someone/mine"):
        stage_recipes(load_pipeline(config), config, {"push_to_hub.repo": "someone/mine"})
