"""loss.features as settings: which layers a word means, and what is refused when a recipe is read."""

import pytest

from llmkd.config.features import Features, feature_problems
from llmkd.config.terms import layer_pairs
from llmkd.errors import UserError


@pytest.mark.parametrize(
    "layers, student, teacher, pairs",
    [
        ("middle", 12, 24, [(6, 12)]),
        ("middle", 3, 5, [(2, 3)]),
        ("last", 6, 30, [(6, 30)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5)]),  # 1.5 and 4.5 are rounded up
        ("uniform", 3, 4, [(1, 1), (2, 3)]),
        (((0, 0), (2, 5)), 2, 9, [(0, 0), (2, 5)]),
    ],
)
def test_the_pairs_that_a_word_means(layers, student, teacher, pairs):
    assert list(layer_pairs(layers, student, teacher)) == pairs


def test_what_models_do_not_have():
    """Only what is known of them is compared."""
    assert not list(feature_problems(Features(layers=((7, 7),), projection="none"), (None, 8), (7, None)))
    found = dict(feature_problems(Features(layers=((0, 7), (7, 0))), (6, 8), (7, 8)))
    assert found == {"loss.features.layers": "found layer 7 of the student, which has 6 layers; name one up to 6"}
    assert "twice" in dict(feature_problems(Features(layers=((0, 7), (0, 7))), (6, None), (7, None)))["loss.features.layers"]
    assert "uniform" in dict(feature_problems(Features(layers="uniform"), (1, 8), (7, 8)))["loss.features.layers"]
    assert dict(feature_problems(Features(init="identity"), (2, 8), (2, 9))).keys() == {"loss.features.init"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss__features": {"weight": 0}}, "loss.features.weight: found 0; leave loss.features out"),
        ({"loss__features": {}, "teacher": None}, "loss.features: set without a teacher; give teacher.model, or leave it out"),
        (
            {"loss__features": {"projection": "none", "init": "xavier"}},
            "loss.features.init: set with projection: none, where there is no map",
        ),
        ({"loss__features": {"projection": "none", "lr": 0.1}}, "loss.features.lr: set with projection: none"),
        (
            {
                "loss__features": {},
                "student__model": None,
                "student__architecture": {"model_type": "llama"},
                "student__tokenizer": "t",
                "student__method": "full",
            },
            "loss.features.init: found least_squares with new weights, .* use xavier",
        ),
        ({"loss__features": {"teacher": "a"}}, "loss.features.teacher: found 'a', and there is one teacher only; leave it out"),
        (
            {"loss__features": {}, "teacher__cache__path": "c"},
            "teacher.cache.* a teacher cache holds no hidden states of inner layers; leave the cache",
        ),
        (
            {"loss__features": {}, "teacher": [{"model": "a"}, {"model": "b"}]},
            "loss.features.teacher: not given, and there are several .* set teacher.name",
        ),
        (
            {"loss__features": {"teacher": "c"}, "teacher": [{"model": "a", "name": "x"}, {"model": "b", "name": "y"}]},
            "loss.features.teacher: found 'c'; name the one whose hidden states the student learns; the names are: x, y",
        ),
        (
            {
                "loss__features": {"teacher": "y"},
                "teacher": [{"model": "a", "name": "x"}, {"model": "b", "name": "y", "cache": {"path": "c"}}],
            },
            "teacher.1.cache.* a teacher cache holds no hidden states",
        ),
        ({"loss__features": {"layers": "mid"}}, "loss.features.layers: found .*middle, uniform or last"),
        ({"loss__features": {"layers": [1, 2]}}, "loss.features.layers"),
        ({"loss__features": {"layers": []}}, "loss.features.layers: found"),
        ({"loss__features": {"layers": [[1, -1]]}}, "loss.features.layers"),
        ({"loss__features": {"distance": "mae"}}, "loss.features.distance: found 'mae', expected mse, normalized_mse or cosine"),
    ],
)
def test_what_is_refused_when_a_recipe_is_read(make_recipe, changes, words):
    with pytest.raises(UserError, match=words) as info:
        make_recipe(**changes)
    assert len(info.value.problems) == 1, info.value.problems
