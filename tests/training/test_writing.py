"""Which model writes what in an on-policy run."""

from types import SimpleNamespace

import pytest

from llmkd.rollouts import draw
from llmkd.training.prepare import prepare
from llmkd.training.writing import on_policy_source

NO_GENERATION_CONFIG = SimpleNamespace(generation_config=None)
STUDENT, TEACHER, SECOND = (SimpleNamespace(name=name, base_model=NO_GENERATION_CONFIG) for name in ("student", "teacher", "second"))


@pytest.fixture
def opened(make_recipe, world):
    def go(teachers=(TEACHER,), **changes):
        recipe = make_recipe(data__validation__path=str(world / "held.jsonl"), **changes)
        prepared = prepare(recipe)
        source = prepared.source.for_rank(0, 1, "cpu")
        return on_policy_source(source, prepared, recipe.on_policy, recipe.mixture, STUDENT, teachers)

    return go


def test_the_teacher_writes_its_part_and_the_student_the_rest(opened):
    source, own = opened(on_policy={"share": 0.5, "teacher_writes": 0.25, "max_new_tokens": 6})
    assert (source.writer.model, own.writer.model) == (STUDENT, STUDENT) and source.writer.mix is own.writer.mix is None
    assert {index: (one.model, one.mix) for index, one in source.teachers.items()} == {0: (TEACHER, None), -1: (TEACHER, None)}
    assert source.teachers[0] is source.teachers[-1], "they write at once"


def test_each_of_several_teachers_writes_alone_and_all_write_together(opened, world):
    teachers = [{"name": "a", "model": str(world / "teacher")}, {"model": str(world / "adapter"), "weight": 3}]
    settings = {"on_policy": {"teacher_writes": 0.25, "max_new_tokens": 6}, "mixture__combine": "log_probabilities"}
    source, own = opened([TEACHER, SECOND], teacher=teachers, **settings)
    assert [(source.teachers[index].model, source.teachers[index].mix) for index in (0, 1)] == [(TEACHER, None), (SECOND, None)]
    mix = source.teachers[-1].mix
    assert source.teachers[-1].model is TEACHER and mix.models == (SECOND,) and mix.whole
    assert mix.combine.func is draw.together and mix.combine.keywords == {"weights": [0.25, 0.75], "geometric": True}
    assert own.writer.model is STUDENT and own.writer.mix is None


def test_the_teacher_is_mixed_in_for_training_alone(opened):
    mixed = {"share": 1.0, "long_horizon": {"teacher_mix": 0.2}, "max_new_tokens": 6}
    source, own = opened(on_policy=mixed, loss__divergence="reverse_kl")
    mix = source.writer.mix
    assert source.writer.model is STUDENT and mix.models == (TEACHER,) and not mix.whole
    assert mix.combine.func is draw.with_share and mix.combine.keywords == {"share": 0.2, "weights": [1.0], "geometric": False}
    assert not source.teachers and own.writer.model is STUDENT and own.writer.mix is None


def test_without_held_out_prompts_nothing_is_written_for_validation(opened):
    assert opened(on_policy={"max_new_tokens": 6, "validation_prompts": 0})[1] is None
