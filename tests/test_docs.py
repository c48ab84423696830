"""The documents agree with the code: links, commands, YAML, settings, environment variables."""

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from llmkd.cli import main
from llmkd.config import loader, schema
from llmkd.config.make import load_make
from llmkd.config.sweep import Sweep
from llmkd.losses import target_weights
from tests.kit.scripts import load_script

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
PAGES = [REPO / "README.md", REPO / "recipes/README.md", *sorted(DOCS.glob("*.md"))]

#: Files that the reader is told to write.
READERS_OWN = {"mine.yaml", "1_teacher.yaml", "2_distill.yaml", "recipe.yaml"}
#: What a YAML block that shows a part of a recipe is completed with.
MINIMAL = {"output_dir": "runs/x", "student": {"model": "a/b"}, "data": {"train": {"path": "train.jsonl", "format": "text"}}}


def named(page: Path) -> str:
    return str(page.relative_to(REPO))


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's fenced blocks in one of these languages ("" for none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{named(page)}: {target}"
        if page.parent == DOCS:
            assert other.is_relative_to(DOCS), f"{named(page)}: {target} leaves the site; name the path in `code` instead"
        if anchor:
            assert anchor in anchors(other), f"{named(page)}: {target}: no such heading"


def commands(page: Path) -> list[list[str]]:
    """Every `llmkd ...` of the page, in words; one that a launcher starts as if it were started without."""
    lines = [line for block in blocks(page, "bash", "sh", "") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`((?:llmkd|accelerate|torchrun) [^`]+)`", prose(page))
    found = []
    for line in lines:
        for part in re.split(r"&&|;|\|(?!\w)", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(part)
            if not words:
                continue
            for script, command in (("llmkd/train.py", ["train"]), ("eval/run.py", ["eval"]), ("llmkd", [])):
                starts = [i for i, word in enumerate(words) if word == script or (script == "llmkd" and word.endswith("/bin/llmkd"))]
                if starts and (words[0].rsplit("/", 1)[-1] in ("llmkd", "accelerate", "torchrun", "python")):
                    found.append(command + words[starts[0] + 1 :])
                    break
    return [words for words in found if words]


@pytest.fixture(scope="module")
def help_of():
    """`llmkd COMMAND --help`, run once."""
    import contextlib
    import io

    texts = {}

    def read(command: str) -> str:
        if command not in texts:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert main([command, "--help"]) == 0, command
            texts[command] = out.getvalue()
        return texts[command]

    return read


SETTINGS = {path for kind in (loader.Recipe, Sweep) for path, *_ in schema.describe(kind)}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_is_one_with_options_that_it_has(page, help_of, capsys):
    for words in commands(page):
        if words[0].startswith("--"):
            assert words == ["--version"] or words[0] == "--help", words
            continue
        text = help_of(words[0])
        for i, word in enumerate(words[1:], 1):
            option = word.split("=")[0]
            if not option.startswith("--") or option in ("--help", "--debug"):
                continue
            known = option[2:] in SETTINGS or re.search(rf"{option}(?![\w.-])", text)
            assert known, f"{named(page)}: llmkd {' '.join(words)}: no option {option}"
            if option == "--config":
                file = words[i + 1]
                assert file.isupper() or file in READERS_OWN or (REPO / file).is_file(), f"{named(page)}: no {file}"


def test_there_are_commands_of_every_kind():
    used = {words[0] for page in PAGES for words in commands(page)}
    assert used >= {"train", "data", "cache", "sweep", "eval", "tasks", "compare", "report", "export"}
    assert sum(len(blocks(page, "yaml")) for page in PAGES) >= 15


def merged(under, over):
    """`over` laid over `under`; a streaming or text part brings its own data."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {key: merged(under.get(key), over[key]) if key in over else under[key] for key in under.keys() | over.keys()}
    return over


YAML = [(page, i, block) for page in PAGES for i, block in enumerate(blocks(page, "yaml"))]


@pytest.mark.parametrize(("page", "i", "block"), YAML, ids=[f"{named(page)}-{i}" for page, i, _ in YAML])
def test_every_yaml_block_is_valid(page, i, block, tmp_path):
    """Whole files as they are, parts laid over a minimal recipe."""
    for folder in (REPO / "recipes").iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    part, file = yaml.safe_load(block), tmp_path / "recipe_of_this_test.yaml"
    whole = "stages" in part or "grid" in part or "arms" in part or {"output_dir", "student", "data"} <= part.keys()
    if whole:
        file.write_text(block, encoding="utf-8")
    else:
        file.write_text(yaml.safe_dump(merged(MINIMAL, part)), encoding="utf-8")
    kind = loader.file_kind(file)
    read = {"recipe": loader.load_recipe, "pipeline": loader.load_pipeline, "sweep": loader.load_sweep, "make": load_make}[kind]
    assert read(file)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_json_line_is_json(page):
    for block in blocks(page, "json"):
        for line in block.splitlines():
            assert isinstance(json.loads(line), dict)


def test_the_readme_is_short_and_opens_with_the_two_commands():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first, second = blocks(REPO / "README.md", "")[:2]
    assert "pip install" in first and "llmkd train --config recipes/quickstart.yaml" in first
    assert "pytest" in second and text.index(first) < text.index(second)
    assert re.findall(r"^```(\w*)", text, re.MULTILINE)[:3] == ["", "", ""], ".ci/run takes the second block"


def test_the_settings_page_is_the_code_s():
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == load_script(DOCS / "settings.py").page(), "run: python docs/settings.py"


def test_every_environment_variable_is_in_the_table():
    table = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (DOCS / "operations.md").read_text(encoding="utf-8")))
    files = [*(REPO / "llmkd").rglob("*.py"), *(path for path in (REPO / "eval").rglob("*.py") if "speed" not in path.parts)]
    texts = [text for path in files if "environ" in (text := path.read_text(encoding="utf-8"))]
    used = {name for text in texts for name in re.findall(r'"([A-Z]+_[A-Z0-9_]+)"', text)}
    used |= {name for text in texts for line in text.splitlines() if "environ" in line for name in re.findall(r'"([A-Z]+)"', line)}
    used -= {"UNSAFE_CODE"}  # a word of the harness's
    assert len(used) >= 10 and not used - table, used - table


def test_every_picture_is_what_the_script_draws_now(tmp_path):
    subprocess.run([sys.executable, DOCS / "pictures.py", tmp_path], check=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {Path(target).name for page in PAGES for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()} == shown
    if f"matplotlib=={version('matplotlib')}" in (REPO / "constraints.txt").read_text():  # another version may draw the same otherwise
        other = [name for name in drawn if (tmp_path / name).read_bytes() != (DOCS / "pictures" / name).read_bytes()]
        assert not other, f"{other} are not what their tables say now: python docs/pictures.py"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path], cwd=REPO, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr


def test_the_python_of_the_api_page_runs(monkeypatch):
    """All its blocks in order, as one program; what would train is left out."""
    monkeypatch.chdir(REPO)
    program = "\n".join(block for block in blocks(DOCS / "api.md", "python") if "llmkd.train(" not in block)
    for table in (target_weights.RULES, target_weights._FUNCTIONS):  # the page's own rule is gone again after the test
        monkeypatch.setitem(table, "doubtful", None)
        del table["doubtful"]
    exec(compile(program, "docs/api.md", "exec"), {"__name__": "page"})


def test_the_api_page_names_all_that_is_public():
    import llmkd

    listed = set(re.findall(r"`(\w+)[(`]", prose(DOCS / "api.md")))
    assert set(llmkd.__all__) - {"__version__"} <= listed
