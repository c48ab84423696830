"""A setting that has been renamed is refused under its old name, in a file and on the command line, with the new name and no more."""

import pytest

from llmkd.config import loader
from llmkd.errors import UserError

RENAMED = [  # the old name, the new one, a value
    ("data.share_beginnings", "data.share_prefixes", True),
    ("data.validation_share", "data.validation_fraction", 0.1),
    ("loss.chunk_rows", "loss.chunk_size", 64),
    ("loss.divergence_options.forward_share", "loss.divergence_options.forward_weight", 0.5),
    ("optim.warmup_share", "optim.warmup_ratio", 0.1),
    ("optim.min_lr_share", "optim.min_lr_ratio", 0.1),
    ("teacher.cache.draws", "teacher.cache.num_samples", 8),
    ("train.length_group", "train.group_by_length", 4),
    ("validation.gate", "validation.teacher_check", 0),
]
BASE = {"output_dir": "runs/x", "student.model": "base", "data.train.path": "t.jsonl", "teacher.cache.path": "c"}
SWEEP = "output_dir: runs/s\nrecipe: r.yaml\ngrid: {optim.lr: [1, 2]}\n"


def written(path, settings: dict) -> None:
    """A file of nested sections, each setting on a line of its own."""
    rows, open_sections = [], ()
    for dotted, value in sorted(settings.items()):
        *sections, last = dotted.split(".")
        same = next(
            (n for n, (a, b) in enumerate(zip(sections, open_sections, strict=False)) if a != b), min(len(sections), len(open_sections))
        )
        rows += ["  " * n + f"{section}:" for n, section in enumerate(sections) if n >= same]
        rows.append("  " * len(sections) + f"{last}: {str(value).lower() if isinstance(value, bool) else value}")
        open_sections = tuple(sections)
    path.write_text("\n".join(rows) + "\n")


def problems(load, *arguments) -> list[str]:
    with pytest.raises(UserError) as info:
        load(*arguments)
    return list(info.value.problems)


@pytest.mark.parametrize("old, new, value", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(tmp_path, old, new, value):
    """Nothing is said of what only follows from it: `validation.every` wants held-out rows, which the old name gives."""
    path, base = tmp_path / "r.yaml", BASE | ({"validation.every": 5} if old == "data.validation_share" else {})
    written(path, base | {old: value})
    line = 1 + next(n for n, row in enumerate(path.read_text().splitlines()) if row.strip().startswith(old.rpartition(".")[2] + ":"))
    assert problems(loader.load_recipe, path) == [f"{path}:{line}: {old}: is now {new}"]
    written(path, base)
    assert problems(loader.load_recipe, path, {old: value}) == [f"--{old}: is now {new}"]
    written(path, BASE | {"data.packing": True, "loss.divergence": "symmetric_kl", new: value})
    loader.load_recipe(path)


def test_an_old_name_in_one_of_several_teachers(tmp_path):
    path = tmp_path / "r.yaml"
    written(path, {name: value for name, value in BASE.items() if not name.startswith("teacher")})
    path.write_text(path.read_text() + "teacher: [{model: a}, {model: b, cache: {path: c, draws: 3}}]\n")
    line = len(path.read_text().splitlines())
    assert problems(loader.load_recipe, path) == [f"{path}:{line}: teacher.1.cache.draws: is now teacher.1.cache.num_samples"]
    written(path, BASE)
    assert problems(loader.load_recipe, path, {"teacher": [{"model": "a", "cache": {"path": "c", "draws": 3}}]}) == [
        "--teacher.0.cache.draws: is now teacher.0.cache.num_samples"
    ]


def test_an_old_name_in_a_sweep(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SWEEP + "side_by_side: 2\n")
    assert problems(loader.load_sweep, path) == [f"{path}:4: side_by_side: is now students_per_teacher"]
    path.write_text(SWEEP)
    assert problems(loader.load_sweep, path, {"side_by_side": 2}) == ["--side_by_side: is now students_per_teacher"]
