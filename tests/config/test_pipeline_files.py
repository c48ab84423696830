"""The file of a pipeline, whose stages name recipes."""

import pytest

from llmkd.config import loader
from tests.kit.settings import found

PIPELINE = "output_dir: r\nstages:\n  a: {recipe: a.yaml}\n  b: {recipe: b.yaml, set: {teacher.model: x}}\nteacher: a\nstudents: [b]\n"


def test_a_pipeline_loads(load, tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).touch()
    pipeline = load(PIPELINE, None, loader.load_pipeline)
    assert list(pipeline.stages) == ["a", "b"] and pipeline.stages["b"].set == {"teacher.model": "x"} and pipeline.students == ("b",)
    assert load(PIPELINE, "elsewhere", loader.load_pipeline).output_dir == "elsewhere"


@pytest.mark.parametrize(
    ("old", "new", "start", "words"),
    [
        ("[b]", "[c]", "r.yaml:", ["students: found c, which is no stage; the stages are a, b"]),
        ("teacher: a", "teacher: c", "r.yaml:", ["teacher: found c, which is no stage"]),
        ("students: [b]", "students: [b]\nseed: 1", "r.yaml:7: seed: ", ["unknown", "output_dir, stages"]),
        ("  a: ", "  ../c: {recipe: a.yaml}\n  a: ", "r.yaml:3: stages.../c: ", ["letters, digits"]),
        ("output_dir: r", "output_dir: ''", "r.yaml:1: output_dir: ", []),
        ("set: {teacher.model: x}", "set: 3", "r.yaml:4: stages.b.set: ", ["found 3", "a mapping"]),
        (
            "{recipe: a.yaml}",
            "{}",
            "r.yaml:3: stages.a: ",
            [
                "has a recipe, or in its place a file of llmkd make (make:), or a recipe whose caches (cache:) or answers (roll:) are written"
            ],
        ),
        ("{recipe: a.yaml}", "{recipe: a.yaml, st: {}}", "r.yaml:3: stages.a.st", ["did you mean stages.a.set"]),
        ("[b]", "[]", "r.yaml:6: students: ", []),
    ],
)
def test_a_bad_pipeline_is_refused(refused, old, new, start, words):
    found(refused(PIPELINE.replace(old, new), None, loader.load_pipeline), (start, *words))


@pytest.mark.parametrize(
    ("text", "read", "place"),
    [
        (PIPELINE, loader.load_pipeline, "r.yaml:4: stages.b.recipe: there is no file "),
        ("output_dir: r\nrecipe: b.yaml\nseeds: [1]\n", loader.load_sweep, "r.yaml:2: recipe: there is no file "),
    ],
)
def test_a_missing_recipe_is_named_where_it_is_written(refused, tmp_path, text, read, place):
    (tmp_path / "a.yaml").touch()
    found(refused(text, None, read), (place, "b.yaml; did you mean "))
    (tmp_path / "b.yaml").mkdir()
    found(refused(text, None, read), (place.replace("there is no file ", ""), "b.yaml is a folder; name a file in it"))
