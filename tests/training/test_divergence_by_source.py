"""`data.train[].divergence`: runs whose sources have divergences of their own, and what is refused."""

import json

import pytest

from llmkd.config.recipe import Data, Loss, Source, divergences_of
from llmkd.errors import UserError
from llmkd.training.build_student import build_terms
from tests.conftest import distance

FEW = {"train__max_steps": 3, "optim__warmup_steps": 0, "validation__teacher_check": 0, "train__batch_size": 16}


@pytest.fixture
def sources(world, tmp_path):
    """The rows of the small world as two sources, each with a divergence, or with none."""
    lines = (world / "train.jsonl").read_text().splitlines()
    for name, part in (("a", lines[:20]), ("b", lines[20:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")

    def go(*divergences: str | None) -> list[dict]:
        each = zip("ab", divergences, strict=True)
        return [{"path": str(tmp_path / f"{name}.jsonl")} | ({"divergence": one} if one else {}) for name, one in each]

    return go


def test_sources_of_the_losss_own_divergence_are_bit_for_bit_those_without_one(trained, sources):
    plain = trained("plain", data__train=sources(None, None), loss__divergence="reverse_kl", **FEW)
    named = trained("named", data__train=sources("reverse_kl", None), loss__divergence="reverse_kl", **FEW)
    assert distance(plain, named) == 0


@pytest.mark.slow
def test_micro_batches_packing_and_prefixes_do_not_matter(trained, sources):
    mixed = sources("skewed_reverse_kl", "skewed_forward_kl")
    one = trained("one", data__train=mixed, train__micro_batch_size=16, student__dtype="float64", **FEW)
    for name, how in (("apart", {"train__micro_batch_size": 1}), ("packed", {"data__packing": True, "train__micro_batch_size": 5})):
        assert distance(one, trained(name, data__train=mixed, student__dtype="float64", **how, **FEW)) < 1e-9
    first = sources("skewed_reverse_kl", "skewed_reverse_kl")
    assert distance(one, trained("first", data__train=first, student__dtype="float64", **FEW)) > 1e-5, "the second source has its own"


def test_the_divergences_of_a_recipe_have_all_their_options():
    train = (Source(path="a"), Source(path="b", divergence="skewed_forward_kl"), Source(path="c", divergence="reverse_kl"))
    loss = Loss(kd_ratio=0.5, divergence="skewed_forward_kl", divergence_options={"alpha": 0.1})
    found = divergences_of(loss, Data(train=train))
    assert found == [("skewed_forward_kl", {"alpha": 0.1})] * 3 + [("reverse_kl", {})]
    (term,) = build_terms(loss, divergences=found)
    assert {i: one.func.__name__ for i, one in term.by_source.items()} == {2: "reverse_kl"}, "the default options are the loss's own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.train.divergence": "kl"}, "data.train.divergence: found 'kl', expected forward_kl"),
        ({"data.train.divergence": "skewed_reverse_kl", "data.train.divergence_options.alpha": 1}, "found 1, expected 0 to 0.99"),
        ({"data.train.divergence": "reverse_kl", "data.train.divergence_options.alpha": 0.1}, "reverse_kl has no such option"),
        ({"data.train.divergence_options.alpha": 0.1}, "given without divergence"),
        ({"data.train.divergence": "reverse_kl", "data.train.loss.kd": 0}, "found reverse_kl with loss.kd 0"),
        ({"data.validation": {"path": "v.jsonl", "divergence": "reverse_kl"}}, "only training rows are learnt from"),
        (
            {"data.train.divergence": "reverse_kl", "teacher.cache.path": "c", "teacher.cache.kind": "sampled"},
            "data.train.divergence: found reverse_kl with a sampled cache, which is unbiased for forward_kl only",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make_recipe, change, message):
    with pytest.raises(UserError, match=message):
        make_recipe(**{name.replace(".", "__"): value for name, value in change.items()})


def test_a_cache_of_samples_that_is_there_is_refused_before_a_model_is_loaded(make_recipe, caches):
    from llmkd.training.prepare import prepare

    recipe = make_recipe(
        teacher={"cache": {"path": str(caches / "sampled")}}, data__train__divergence="reverse_kl", data__validation_fraction=0.2
    )
    with pytest.raises(UserError, match=r"data.train.divergence: found reverse_kl, .* for forward_kl only"):
        prepare(recipe)
    assert json.dumps(recipe.data.train.divergence_options) == "{}"
