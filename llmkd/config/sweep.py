"""Settings of several runs: pipelines (stages that build on one another) and sweeps (arms that are compared)."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from .dotted import flatten, replaced
from .fields import Count, Seed, config_dataclass, path_to

#: An arm's name needs no quotation marks in YAML or a shell.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


@config_dataclass
class Stage:
    recipe: str | None = path_to("file", None, description="Recipe of this stage, relative to the pipeline's file.")
    make: str | None = path_to(
        "file", None, description="Instead of a recipe: a file of llmkd make, whose data later stages and runs train on."
    )
    cache: str | None = path_to(
        "file",
        None,
        description="Instead of a recipe to train: a recipe whose teacher caches are written, for later stages and runs.",
    )
    roll: str | None = path_to(
        "file",
        None,
        description="Instead of a recipe to train: a recipe whose student, or teacher, answers its prompts once, as its on_policy says, into "
        "train.jsonl in the stage's folder.",
    )
    set: dict[str, Any] = Field(default_factory=dict, description="Changes to the settings of the recipe, or of make, by dotted path.")

    @property
    def writes_rows(self) -> bool:
        """Whether it leaves data, and no model or cache."""
        return bool(self.make or self.roll)


@config_dataclass
class Pipeline:
    """Several recipes run in order, then their students compared with one teacher on the same held-out rows."""

    output_dir: str = path_to(
        "output", min_length=1, description="Folder of the pipeline's output: each stage has a folder of its name in it."
    )
    stages: dict[str, Stage] = Field(min_length=1, description="The stages by name, in the order in which they run.")
    teacher: str = Field(description="Stage whose model is the teacher of the comparison.")
    students: tuple[str, ...] = Field(min_length=1, description="Stages whose students are compared with that teacher.")


@config_dataclass
class Evaluation:
    tasks: tuple[str, ...] = Field((), description="lm-evaluation-harness tasks on which every arm is evaluated; none by default.")
    tasks_dir: str | None = path_to("folder", None, description="Folder of task files for local data (llmkd tasks writes one).")
    fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of few-shot examples; null: the task's own number.")
    limit: Count | None = Field(None, description="Maximum number of questions of each task; null: all.")
    batch_size: Count | None = Field(None, description="Sequences per forward pass; null: the harness's own choice.")
    chat_template: bool = Field(False, description="Render the prompts in the student's chat template, with few-shot examples as turns.")
    allow_task_code: bool = Field(False, description="Run the Python that task files in tasks_dir name (!function and the like).")


@config_dataclass
class Sweep:
    """One recipe with a grid or a list of changes: every combination is an arm that is trained, evaluated and compared."""

    output_dir: str = path_to("output", min_length=1, description="Folder of the sweep's output: each arm is a run of its own in arms/.")
    stages: dict[str, Stage] = Field(
        default_factory=dict, description="Runs before the arms, in order, such as the training of a teacher; their folders are in stages/."
    )
    recipe: str = path_to("file", description="Recipe that the arms change, relative to the sweep's file.")
    set: dict[str, Any] = Field(default_factory=dict, description="Changes to the recipe's settings for every arm, by dotted path.")
    grid: dict[str, Any] = Field(default_factory=dict, description="Lists of values by dotted path; every combination is an arm.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Arms by name, each with its changes to the recipe's settings, by dotted path."
    )
    seeds: tuple[Seed, ...] = Field((), description="Every arm is trained once with each of these seeds. An empty list: the recipe's seed.")
    baseline: str | None = Field(None, description="Arm that the others are compared with; null: the first.")
    students_per_teacher: Count | None = Field(
        None, description="Maximum number of students that train side by side with one teacher. null: no maximum; 1: one after another."
    )
    eval: Evaluation = Field(default_factory=Evaluation)


@dataclass(frozen=True)
class ArmSpec:
    """An arm with one of its seeds. `arm` is its name without the seed: arms are compared over their seeds."""

    name: str
    arm: str
    seed: int | None
    changes: dict[str, Any]


def expand(sweep: Sweep) -> list[ArmSpec]:
    """Every arm with every seed, in the order of the file; `{seed}` in a text is the arm's. Expects a sweep without `sweep_contradictions`."""
    grid, seeds = flatten(sweep.grid), list(sweep.seeds)
    if "seed" in grid:
        seeds = grid.pop("seed")
    out = []
    for arm, changes in (*_combined(grid, alone=not sweep.arms), *sweep.arms.items()):
        for seed in seeds or [changes.get("seed")]:
            own = {} if seed is None else {"seed": seed}
            of_seed = changes if seed is None else replaced(changes, "{seed}", seed)
            out.append(ArmSpec(f"{arm}_seed-{seed}" if len(seeds) > 1 else arm, arm, seed, of_seed | own))
    return out


def _combined(grid: dict[str, Any], alone: bool) -> list[tuple[str, dict[str, Any]]]:
    """(name, changes) of the grid's arms. Without a grid: the unchanged recipe, if there are no other arms (`alone`)."""
    if not grid:
        return [("recipe", {})] if alone else []
    short = {path: path.rpartition(".")[2] for path in grid}
    names = {path: last if list(short.values()).count(last) == 1 else path for path, last in short.items()}
    texts = {path: _texts(values) for path, values in grid.items()}
    out = []
    for places in itertools.product(*(range(len(values)) for values in grid.values())):
        chosen = list(zip(grid, places, strict=True))
        out.append(("_".join(f"{names[path]}-{texts[path][i]}" for path, i in chosen), {path: grid[path][i] for path, i in chosen}))
    return out


def sweep_contradictions(sweep: Sweep) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of a sweep, in the form of `contradictions.contradictions`."""
    grid = flatten(sweep.grid)
    if not grid and not sweep.arms and not sweep.seeds:
        yield ("grid", "arms"), "not given; give values to combine, such as loss.kd_ratio: [0, 0.5], or arms by name"
    for path, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            yield (f"grid.{path}",), f"found {json.dumps(values)[:60]}, expected a list of values"
            return
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            yield (f"grid.{path}",), "has a value twice; keep one"
    if sweep.seeds and "seed" in grid:
        yield ("seeds", "grid"), "given together with seed in grid; keep one of them"
    own = [arm for arm, changes in sweep.arms.items() if "seed" in changes]
    if own and (sweep.seeds or "seed" in grid):
        yield (f"arms.{own[0]}", "seeds", "grid"), "has a seed of its own, but seeds are given for all arms; keep one of them"
    same = sweep.arms.keys() & dict(_combined({path: values for path, values in grid.items() if path != "seed"}, alone=False)).keys()
    if same:
        yield (f"arms.{min(same)}", "grid"), "is also the name of an arm of the grid; give it another name"
    if len(set(sweep.seeds)) < len(sweep.seeds):
        yield ("seeds",), "has a seed twice; keep one"
    for name in ("output_dir", "push_to_hub"):
        for path, changes in (("set", sweep.set), ("grid", grid), *((f"arms.{arm}", changes) for arm, changes in sweep.arms.items())):
            if any(key == name or key.startswith(f"{name}.") for key in changes):
                yield (
                    (path,),
                    f"changes {name}, which a sweep gives each arm itself"
                    if name == "output_dir"
                    else f"sets {name}; upload an arm by hand",
                )
    arms = expand(sweep)
    of_name: dict[str, ArmSpec] = {}
    for spec in arms:
        if of_name.setdefault(spec.name, spec).changes != spec.changes and not same:
            yield (f"arms.{spec.arm}", "arms", "grid"), f"two runs would be called {spec.name}; give the arms other names under arms:"
            break
    for spec in arms:
        if not NAME.fullmatch(spec.name) or len(spec.name) > 150:
            yield (
                (f"arms.{spec.arm}", "arms"),
                "a name has letters, digits and . _ + - only, and at most 150 of them; give the arm one under arms:",
            )
    known = list(dict.fromkeys(spec.arm for spec in arms))
    if sweep.baseline is not None and sweep.baseline not in known:
        new = sweep.baseline.replace("=", "-").replace(",", "_")  # the earlier spelling of names
        yield (
            ("baseline",),
            f"found {sweep.baseline}, " + (f"which is now {new}" if new in known else f"which is no arm; the arms are {', '.join(known)}"),
        )


def _texts(values: list[Any]) -> list[str]:
    """A setting's values as parts of arms' names: short (the last part of a path) if the short forms differ, else in full, else numbered."""
    for write in (_short, lambda value: value if isinstance(value, str) else json.dumps(value)):
        texts = [re.sub(r"[^A-Za-z0-9._+-]+", "-", write(value)).rstrip("-") or "none" for value in values]
        if len(set(texts)) == len(texts):
            return texts
    return [f"{text}-{i}" for i, text in enumerate(texts, 1)]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else json.dumps(value)
