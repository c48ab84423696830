"""Answers that were rolled: a teacher that is not the one from which their writer learnt is named, where it scores them and where it teaches."""

import dataclasses
import json

import pytest

from llmkd.config.loader import dump
from llmkd.config.recipe import Data, Source, Teacher
from llmkd.config.teacher import Cache
from llmkd.files import write_sealed
from llmkd.rollouts.answer_file import about_path
from llmkd.teachers.resolve import resolve_teachers
from llmkd.training.rolled_data import learnt_from, report_writers

KEY = "0123456789abcdef"


@pytest.fixture
def said(world, tmp_path, capsys):
    """What a run with these teachers says of a file of answers by `part`, whose writer is `writer` and learnt from `stage`."""

    def go(
        part: str, writer: str, stage: list[str], *models: str, complete: bool = True, folder: bool = False, keys: tuple = (KEY,)
    ) -> str:
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps({"answer": f'"key": "{"1" * 16}"', "key": key}) + "\n" for key in keys))

        def known(name: str) -> dict:
            (one,) = resolve_teachers([("teacher", Teacher(model=str(world / name)))])
            return {"model": name, "weights": one.weights}

        about = {"writer": {"part": part} | known(writer), "learnt_from": [known(name) for name in stage]}
        write_sealed(about_path(path), about | {"settings": {}, "complete": complete, "rows": [1, KEY]})
        teachers = resolve_teachers([(f"teacher.{i}", Teacher(model=str(world / name), name=name)) for i, name in enumerate(models)])
        capsys.readouterr()
        report_writers(Data(train=Source(path=str(tmp_path if folder else path), format="tokens")), teachers)
        return capsys.readouterr().err

    return go


def test_nothing_is_said_where_the_two_are_one(said):
    assert said("student", "student", ["teacher"], "teacher") == ""
    assert said("teacher", "teacher", [], "teacher") == ""
    assert said("student", "student", ["stranger", "teacher"], "teacher") == ""
    assert said("student", "student", ["teacher"], "stranger", "teacher") == ""
    assert said("student", "student", ["teacher"]) == "", "no teacher here"
    assert said("model", "student", [], "teacher") == "", "not known"


@pytest.mark.parametrize("folder", [False, True])
def test_another_teacher_is_named(said, folder):
    found = said("student", "student", ["stranger"], "teacher", folder=folder)
    assert "note: data.train" in found and "was written by a student of stranger, but the teacher of this run is" in found
    assert "was written by stranger, but the teacher of this run is" in said("teacher", "stranger", [], "teacher", folder=folder)
    assert "another model" in said("student", "student", ["teacher"], "adapter", folder=folder), "an adapter on it is another model"


def test_a_file_that_is_not_complete_is_named(said):
    assert "has not written all of its answers" in said("student", "student", ["teacher"], "teacher", complete=False)


@pytest.mark.parametrize("keys", [(), (KEY, KEY), ("0" * 16,)], ids=["removed", "added", "another file"])
def test_a_file_with_other_rows_than_were_written_is_named(said, keys):
    found = said("student", "student", ["teacher"], "teacher", keys=keys)
    assert f"r.jsonl) is not the file that llmkd roll wrote: it has {len(keys)} row" in found and "instead of 1;" in found


def test_the_teacher_of_the_writers_run_is_found_and_who_wrote_its_data(world, tmp_path, make_recipe, capsys):
    recipe = make_recipe()
    rolled = tmp_path / "seqkd.jsonl"
    rolled.write_text("{}\n")
    about = {
        "writer": {"part": "teacher", "model": "t", "weights": {"base": "b", "adapter": None}},
        "learnt_from": [],
        "settings": {},
        "complete": True,
    }
    write_sealed(about_path(rolled), about)
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, train=(recipe.data.train, Source(path=str(rolled), format="tokens")))
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(recipe))
    (teacher,) = resolve_teachers([("teacher", recipe.teacher)])
    assert [one["weights"] for one in learnt_from(tmp_path / "run")] == [teacher.weights, {"base": "b", "adapter": None}]
    gone = dataclasses.replace(recipe, teacher=Teacher(model=str(tmp_path / "gone")))
    (tmp_path / "run" / "recipe.yaml").write_text(dump(gone))
    assert [one["model"] for one in learnt_from(tmp_path / "run")] == ["t"]
    assert "the files of its teacher are gone" in capsys.readouterr().err
    assert learnt_from(None) == []


def test_of_a_cache_alone_the_model_that_made_it_is_compared(world, caches):
    (live,) = resolve_teachers([("teacher", Teacher(model=str(world / "adapter")))])
    (cache,) = resolve_teachers([("teacher", Teacher(cache=Cache(path=str(caches / "topk"))))])
    assert cache.files is None and cache.weights == live.weights and live.weights["adapter"]
