"""Of students side by side, a refusal of what is one student's own is marked with that student, and one of what all share is not."""

import importlib.util
from types import SimpleNamespace

import pytest

from llmkd.config.recipe import Student
from llmkd.errors import UserError
from llmkd.models.load import LoadContext, load_models
from llmkd.training import build, prepare

#: Changes of one student, and the refusal.
OWN = {
    "targets": ({"loss.features.weight": 0.5}, "loss.features.init: found least_squares, but a map"),
    "layers": ({"loss.features.layers": [[1, 3]]}, "loss.features.layers: found layer 3 of the teacher"),
    "attention": ({"loss.attention.layers": [[1, 3]]}, "loss.attention.layers: found layer 3 of the teacher"),
    "widths": ({"loss.attention.what": "relations"}, "loss.attention.relation_heads: found 32"),
    "package": ({"optim.name": "adamw_8bit"}, "optim.name: needs bitsandbytes"),
}
FEW = {"data.train.limit": 2, "train.batch_size": 2, "optim.warmup_steps": None}


def refused(*many) -> UserError:
    with pytest.raises(UserError) as found:
        prepare.prepare(many[0], others=many[1:])
    return found.value


@pytest.mark.parametrize("name", OWN)
def test_what_a_students_own_settings_ask_for(make_recipe, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else real(name, *more))
    changes, words = OWN[name]
    good, bad = make_recipe(**FEW), make_recipe(**FEW, **changes)
    for k, many in enumerate([(bad, good, good), (good, bad, good), (good, good, bad)]):
        error = refused(*many)
        assert str(error).startswith(words) and error.student == k


def test_the_files_of_the_first_student_and_of_its_teacher(make_recipe, world, monkeypatch):
    good = make_recipe()
    assert refused(make_recipe(**{"student.model": str(world / "nothing")}), good).student == 0
    assert not hasattr(refused(make_recipe(**{"teacher.model": str(world / "nothing")}), good), "student")

    def verify(*_):
        raise UserError("damaged")

    monkeypatch.setattr(prepare, "verify", verify)
    assert refused(good, good).student == 0


def test_the_files_of_another_student():
    def find(student: Student):
        if student.model == "b":
            raise UserError("none")

    with pytest.raises(UserError) as found:
        load_models([Student(model="a"), Student(model="b")], [], LoadContext(640, "cpu", find=find))
    assert found.value.student == 1


@pytest.mark.parametrize("part", ["weights", "source"])
def test_a_checkpoint_that_does_not_fit(monkeypatch, tmp_path, part):
    def fits(saved):
        if saved.state == "bad":
            raise UserError("other weights") if part == "weights" else ValueError("other data")

    saved = [SimpleNamespace(step=1, path=tmp_path, state=state) for state in ("good", "bad")]
    monkeypatch.setattr(build.checkpoint, "newest", lambda *_: saved)
    folder = SimpleNamespace(checkpoints=tmp_path, run={}, path=tmp_path)
    students = [SimpleNamespace(folder=folder, restore=fits if part == "weights" else lambda saved: None)] * 2
    source = SimpleNamespace(total_steps=3, restore=lambda state: fits(SimpleNamespace(state=state)))
    with pytest.raises(UserError, match="other") as found:
        build.restore(students, source, True)
    assert found.value.student == 1
