"""Which model writes what in an on-policy run."""

from types import SimpleNamespace

import pytest

from llmkd.training.prepare import prepare
from llmkd.training.writing import on_policy_source

NO_GENERATION_CONFIG = SimpleNamespace(generation_config=None)
STUDENT, TEACHER = (SimpleNamespace(name=name, base_model=NO_GENERATION_CONFIG) for name in ("student", "teacher"))


@pytest.fixture
def opened(make_recipe, world):
    def go(**changes):
        recipe = make_recipe(data__validation__path=str(world / "held.jsonl"), **changes)
        prepared = prepare(recipe)
        source = prepared.source.for_rank(0, 1, "cpu")
        return on_policy_source(source, prepared, recipe.on_policy, STUDENT, [TEACHER])

    return go


def test_the_teacher_writes_its_part_and_the_student_the_rest(opened):
    source, own = opened(on_policy={"share": 0.5, "teacher_writes": 0.25, "max_new_tokens": 6})
    assert (source.writer.model, source.teacher.model, own.writer.model) == (STUDENT, TEACHER, STUDENT)
    assert source.writer.mix is own.writer.mix is source.teacher.mix is None


def test_the_teacher_is_mixed_in_for_training_alone(opened):
    mixed = {"share": 1.0, "long_horizon": {"teacher_mix": 0.2}, "max_new_tokens": 6}
    source, own = opened(on_policy=mixed, loss__divergence="reverse_kl")
    assert (source.writer.model, source.writer.mix.model, source.writer.mix.share) == (STUDENT, TEACHER, 0.2)
    assert source.teacher is None and own.writer.model is STUDENT and own.writer.mix is None


def test_without_held_out_prompts_nothing_is_written_for_validation(opened):
    assert opened(on_policy={"max_new_tokens": 6, "validation_prompts": 0})[1] is None
