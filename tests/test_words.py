"""One word for one thing: words that were retired stay out of code, messages and documents.

A word counts where letters neither precede nor follow it, so also in `from_store` and, capitalised, in `FromStore`.
"""

import fnmatch
import functools
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SUFFIXES = {".py", ".pyi", ".md", ".yaml", ".yml", ".sh", ".css", ".html", ".jinja", ".ipynb", ".toml"}

#: Settings of other names today.
SETTINGS = "share_beginnings|validation_share|length_group|warmup_share|min_lr_share|forward_share|side_by_side"

#: Retired words as patterns, and the words that replaced them.
RETIRED = {
    r"stores?": "teacher cache (cache)",
    r"figures?": "metric; chart or picture for what is drawn",
    r"hon(?:e|es|ed|ing)": "transform",
    r"gates?": "teacher check",
    r"mend(?:s|ed|ing)?": "fix, repair, correct",
    r"arms?": "run or configuration; arm is a sweep's word",
    r"twins?": "analytic-gradient version, copy, counterpart",
    r"spoken|speaks?": "returns, prints, model",
    r"taught": "teacher, learns from",
    r"hears?|heard": "read, receive",
    SETTINGS: "its new name",
}

#: Names of others in which a retired word stands.
OTHERS = r"store_true|tl\.store|store_init_configuration|gate_proj|<figure|</figure|<figcaption|plt\.figure"

#: (file, pattern of RETIRED): why the word is right there.
ALLOWED = {
    ("llmkd/teachers/cache/shards.py", "stores?"): "the file name of version 1",
    ("llmkd/signals.py", "stores?"): "the verb",
    ("llmkd/teachers/cache/records.py", "stores?"): "the verb",
    ("llmkd/data/encoding/token_cache.py", "stores?"): "the verb",
    ("llmkd/planning/ranks.py", "stores?"): "torch's own class",
    ("llmkd/models/float8.py", "gates?"): "what routers of experts are called in models",
    ("llmkd/teachers/fidelity.py", "gates?"): "a seed: another text would draw other examples",
    ("llmkd/config/validation.py", "gates?"): "the hint of a setting's new name",
    ("llmkd/config/validation.py", SETTINGS): "the hints of settings' new names",
    ("llmkd/output/plots.py", "figures?"): "matplotlib's figure",
    ("eval/speed/plots.py", "figures?"): "matplotlib's figure",
    ("eval/report/report.css", "figures?"): "the element of HTML",
    ("docs/pictures.py", "figures?"): "matplotlib's figure",
    ("docs/charts.py", "figures?"): "matplotlib's figure",
    ("examples/quickstart.ipynb", "figures?"): "matplotlib's figure",
    ("llmkd/config/sweep.py", "arms?"): "a sweep's arms",
    ("llmkd/config/loader.py", "arms?"): "a sweep's arms",
    ("llmkd/config/paths.py", "arms?"): "a sweep's arms",
    ("llmkd/commands/sweep*.py", "arms?"): "a sweep's arms",
    ("llmkd/commands/plan*.py", "arms?"): "a sweep's arms",
    ("llmkd/cli.py", "arms?"): "a sweep's arms",
    ("llmkd/commands/table.py", "arms?"): "a sweep's setting",
    ("eval/after_sweep.py", "arms?"): "a sweep's arms",
    ("eval/comparison/*", "arms?"): "a sweep's arms, compared",
    ("eval/report/*", "arms?"): "a sweep's arms, reported",
    ("recipes/digits/*", "spoken|speaks?"): "the name of a data set",
    ("docs/sound.md", "spoken|speaks?"): "the name of a data set",
    ("eval/speed/epoch.py", "arms?"): "a sweep's arms, measured",
    ("eval/speed/on_policy.py", "arms?"): "a sweep's arms, measured",
    ("eval/speed/step_setup.py", "arms?"): "adapters of a sweep's arms",
    ("recipes/*ablation*", "arms?"): "a sweep's arms",
    ("recipes/*study*", "arms?"): "a sweep's arms",
    ("recipes/studies/*", "arms?"): "a sweep's arms",
    ("docs/plan.md", "arms?"): "a sweep's arms",
    ("docs/making_data.md", "arms?"): "a sweep's setting",
    ("docs/rolling.md", "arms?"): "a sweep's setting",
    ("docs/evaluation.md", "arms?"): "a sweep's arms",
    ("docs/settings.md", "arms?"): "settings of a sweep",
    ("docs/glossary.md", "arms?"): "says what an arm is",
    ("docs/architecture.md", "arms?"): "a sweep's arms",
    ("docs/guarantees.md", "arms?"): "a sweep's arms",
}

FILES = sorted(
    path
    for path in [
        REPO / "README.md",
        *(path for room in ("llmkd", "eval", "recipes", "docs", "examples") for path in (REPO / room).rglob("*")),
    ]
    if path.suffix in SUFFIXES and "results" not in path.relative_to(REPO).parts
)
TEXTS = {path: path.read_text(encoding="utf-8") for path in FILES}


@functools.cache
def expression(pattern: str) -> re.Pattern:
    capitalised = r"|".join(one[0].upper() + one[1:] for one in pattern.split("|"))
    return re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])|(?<![A-Z])(?:{capitalised})(?![a-z])")


def found(pattern: str, line: str) -> bool:
    search = expression(pattern).search
    return bool(search(line) and search(re.sub(OTHERS, "", line)))


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_word_is_said_nowhere(pattern):
    hits = []
    for path in FILES:
        name = str(path.relative_to(REPO))
        if not any(word == pattern and fnmatch.fnmatch(name, files) for files, word in ALLOWED):
            lines = TEXTS[path].splitlines() if expression(pattern).search(TEXTS[path]) else []
            hits += [f"{name}:{number}: {line.strip()[:120]}" for number, line in enumerate(lines, 1) if found(pattern, line)]
    assert not hits, f"say {RETIRED[pattern]} instead:\n" + "\n".join(hits)


@pytest.mark.parametrize(("files", "pattern"), ALLOWED)
def test_an_exception_is_still_needed(files, pattern):
    named = [path for path in FILES if fnmatch.fnmatch(str(path.relative_to(REPO)), files)]
    assert any(found(pattern, line) for path in named for line in TEXTS[path].splitlines()), f"{files} has none: remove it"


def test_words_inside_identifiers_count():
    assert found(r"stores?", "from_store") and found(r"stores?", "class TeacherStore:") and found(r"stores?", "the store.")
    assert not found(r"stores?", "restored") and not found(r"arms?", "warm") and not found(r"gates?", "aggregates")
