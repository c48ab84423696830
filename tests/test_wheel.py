"""A wheel without the checkout: what is in it, the shipped recipes, and the quickstart by one process and by two."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from llmkd import cli
from llmkd.commands import recipes

REPO = Path(__file__).parents[1]


def test_every_recipe_is_listed_with_purpose_needs_and_command(capsys):
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    found = recipes.shipped()
    assert {entry.path for entries in found.values() for entry in entries} == {
        path.relative_to(REPO / "recipes") for path in (REPO / "recipes").rglob("*.yaml")
    }
    for name, entries in found.items():
        assert f"\n{name}\n" in f"\n{text}"
        for entry in entries:
            assert entry.does and entry.needs and str(entry.path) in entry.command
            assert all(line in text for line in (entry.does, f"needs: {entry.needs}", entry.command))


@pytest.mark.parametrize("name", recipes.shipped())
def test_init_copies_a_recipe_with_what_it_refers_to(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", name]) == 0
    out, err = capsys.readouterr()
    written = sorted(Path(line) for line in out.splitlines())
    assert written == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in written:
        assert path.read_bytes() == (REPO / path).read_bytes()
    command = err.removeprefix("next: ").split()
    starts = (["llmkd", "train", "--config"], ["accelerate", "launch", "--config_file"])
    assert command[:3] in starts and Path(command[3]) in written
    for path in written:
        if path.suffix == ".yaml":
            file = yaml.safe_load(path.read_text())
            stages = file.get("stages") or {}  # of a file of `llmkd make` a list, without recipes
            for part in (file, *(stages.values() if isinstance(stages, dict) else ())):
                assert all((path.parent / part[kind]).is_file() for kind in ("recipe", "make") if kind in part)


def test_init_overwrites_nothing(tmp_path, capsys):
    assert cli.main(["init", "quickstart", str(tmp_path / "new")]) == 0
    mine = tmp_path / "new/quickstart/2_distill.yaml"
    assert f"# Run: llmkd train --config {mine}\n" in mine.read_text()
    mine.write_text("mine")
    mine.with_name("1_teacher.yaml").unlink()
    capsys.readouterr()
    assert cli.main(["init", "quickstart", str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert not out and "exists; name another folder: llmkd init quickstart FOLDER" in err and len(err.splitlines()) == 1
    assert mine.read_text() == "mine" and not mine.with_name("1_teacher.yaml").exists()


def test_init_completes_what_a_kill_or_a_full_disk_has_left(tmp_path, capsys):
    words = ["init", "quickstart", str(tmp_path / "new")]
    assert cli.main(words) == 0
    lost = tmp_path / "new/quickstart/2_distill.yaml"
    content = lost.read_bytes()
    lost.unlink()
    assert cli.main(words) == 0 and lost.read_bytes() == content
    assert cli.main(words) == 2  # all of it is there


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds what a wheel of this tree installs."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("llmkd", "eval", "recipes"):
        shutil.copytree(REPO / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / file, source / file)
    if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        build = [sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"]
    else:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = out.glob("llmkd-*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def llmkd(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "llmkd", *words], cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_wheel_holds_the_packages_the_types_and_every_recipe(site):
    here = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    for folder, package in (("llmkd", "llmkd"), ("eval", "llmkd_eval"), ("recipes", "llmkd_recipes")):
        for path in (REPO / folder).rglob("*"):
            place = path.relative_to(REPO / folder).as_posix()
            if path.is_file() and "__pycache__" not in place and not (folder == "eval" and place.startswith(("speed/", "results/"))):
                assert f"{package}/{place}" in here, place
    assert "llmkd/py.typed" in here and not [
        path for path in here if "__pycache__" in path or path.startswith(("tests/", "eval/", "recipes/"))
    ]
    (metadata,) = site.glob("llmkd-*.dist-info/METADATA")
    text = metadata.read_text()
    assert all(
        f"Provides-Extra: {extra}" in text for extra in ("quantization", "eval", "tensorboard", "wandb", "trackio", "mlflow", "docs", "dev")
    )
    assert "Typing :: Typed" in text and "Keywords: " in text


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel(site, tmp_path):
    code = "import llmkd, llmkd_eval; print(llmkd.__file__, llmkd_eval.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    places = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert all(place.startswith(str(site)) for place in places.stdout.split())
    listed = llmkd(site, tmp_path, "recipes")
    assert listed.returncode == 0 and "quickstart/2_distill.yaml" in listed.stdout
    made = llmkd(site, tmp_path, "init", "quickstart")
    assert made.returncode == 0 and made.stderr == "next: llmkd train --config recipes/quickstart.yaml\n"
    few = (
        "--train.epochs",
        "null",
        "--train.max_steps",
        "2",
        "--data.train.limit",
        "200",
        "--data.validation.limit",
        "32",
        "--data.choices",
        "null",
    )
    one = llmkd(site, tmp_path, "train", "--config", "recipes/quickstart.yaml", *few)
    assert one.returncode == 0 and "kd_student" in one.stdout, one.stderr[-3000:]
    assert (tmp_path / "runs/quickstart/kd_student/adapter/adapter_model.safetensors").exists()
