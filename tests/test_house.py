"""Rules of the package's own shape: which layer may import which, and which names are free."""

import ast
import functools
import importlib.metadata
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmkd"
EVALUATION = PACKAGE.parent / "eval"  # installed as llmkd_eval
RECIPES = PACKAGE.parent / "recipes"  # installed as llmkd_recipes

#: Files at the top of llmkd/ and its folders. Each imports only from lines above its own: so losses, models and data never one another.
LAYERS = (
    "__init__ console files batch head process",
    "errors signals",
    "config model_folder",
    "losses models data servers",
    "teachers rollouts",
    "output tasks",
    "training",
    "doctor planning making",
    "api commands",
    "cli",
    "train __main__",
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units.split()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def import_statements(name: str) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Those of module `name`, and of these the ones that stand at its top level."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    every, top = ([node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)] for nodes in (ast.walk(tree), tree.body))
    return every, top


def imports(name: str, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that module `name` imports."""
    found = set()
    for node in import_statements(name)[top_level_only]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {base}
    return found


def unit(name: str) -> str:
    return (name.split(".") + ["__init__"])[1]


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "llmkd"}


def test_modules_import_only_from_lower_layers():
    without = [name for name in MODULES if unit(name) not in LAYER]
    assert not without, f"{', '.join(without)}: give a place in LAYERS"
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in sorted(ours(imports(name)))
        if unit(other) != unit(name) and LAYER[unit(other)] >= LAYER[unit(name)]
    ]
    assert not wrong, "\n".join(wrong)


def top_names(path: Path) -> set[str]:
    """What a module's own text names outside its functions and classes."""
    found, open_ = set(), [*ast.parse(path.read_text(encoding="utf-8")).body]
    while open_:
        node = open_.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        open_ += ast.iter_child_nodes(node)
    return found


def test_programs_outside_the_package_import_names_that_are_there():
    """Many of these imports stand in functions of programs that no test runs whole."""
    wrong, known = [], {}
    for path in sorted(one for folder in ("recipes", "eval", "docs", "examples") for one in (PACKAGE.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] != "llmkd":
                continue
            module = next((one for one in (node.module, f"{node.module}.__init__") if one in MODULES), None)
            if module and module not in known:
                stub = MODULES[module].with_suffix(".pyi")
                known[module] = top_names(MODULES[module]) | (top_names(stub) if stub.exists() else set())
            inner = {
                name
                for alias in node.names
                if (name := alias.name) and f"{node.module}.{name}" in {*MODULES, *(m.removesuffix(".__init__") for m in MODULES)}
            }
            wrong += [
                f"{path}:{node.lineno}: {node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in known.get(module, set()) | inner
            ]
    assert known and not wrong


def test_only_the_command_line_loads_the_evaluation_and_only_when_asked():
    users = {name for name in MODULES for other in imports(name) if other.split(".")[0] in ("eval", "llmkd_eval")}
    assert users <= {"llmkd.cli"}
    assert not {other for other in imports("llmkd.cli", top_level_only=True) if other.split(".")[0] == "llmkd_eval"}


def test_every_folder_of_the_packages_is_installed():
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(PACKAGE.parent) for root in (PACKAGE, EVALUATION, RECIPES) for path in root.rglob("__init__.py")}
    assert sorted(listed) == sorted(
        ".".join([{"eval": "llmkd_eval", "recipes": "llmkd_recipes"}.get(part, part) for part in folder.parts]) for folder in folders
    )


def test_imports_at_load_time_have_no_cycle():
    graph = {name.removesuffix(".__init__"): ours(imports(name, top_level_only=True)) for name in MODULES}
    TopologicalSorter(graph).prepare()


#: Who may take a whole recipe: what is started by the user, what hands out a recipe's sections, and what writes down all of them.
TAKE_RECIPES = ("config.", "commands.", "api", "training.run", "training.prepare", "training.build")
TAKE_RECIPES += (
    "planning.find",
    "planning.other_tasks",
    "planning.build",
    "planning.here",
    "planning.measure",
    "planning.ranks",
    "planning.caching",
    "planning.exchange",
    "planning.step",
    "planning.plan",
    "planning.fit",
    "planning.work",
    "doctor.setup",
    "doctor.examine",
    "training.student_run",
    "output.run_files",
    "output.run_folder",
    "output.trackers",
    "output.model_card",
)


def test_a_component_takes_its_own_settings_and_not_the_whole_recipe():
    for name in MODULES:
        nodes = [node for node in import_statements(name)[0] if isinstance(node, ast.ImportFrom)]
        if any(alias.name == "Recipe" for node in nodes for alias in node.names):
            assert name.removeprefix("llmkd.").startswith(TAKE_RECIPES), f"{name}: give it the sections that it needs"


@pytest.mark.parametrize("folder", [PACKAGE, EVALUATION])
def test_no_name_at_the_top_shadows_a_module_that_python_would_import(folder):
    """`python llmkd/train.py` puts llmkd/ first on sys.path, where every file in it becomes a top-level module."""
    installed = {top for top, owners in importlib.metadata.packages_distributions().items() if set(owners) != {"llmkd"}}
    here = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"}
    assert here or folder == EVALUATION, "no module found"
    assert not here & (sys.stdlib_module_names | installed)
