"""Runs whose targets a rule weighs: however a step is cut, resumed or spread, by caches, in the metrics, and refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from llmkd.data.batch_source import Step
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.losses.terms import Loss
from llmkd.training.loop import measured_scales
from llmkd.training.run import run
from llmkd.training.step_result import Accumulated, StepResult, TargetCounts
from tests.conftest import distance, weights
from tests.training.one_and_two import assert_two_processes_are_one
from tests.training.test_resume import comparable, unfinish
from tests.training.test_weights import sources

SHORT = {"train__epochs": None, "train__max_steps": 3, "validation__teacher_check": 0, "loss__kd_ratio": 0.3}
BOUND = 1e-12


def logged(out) -> list[dict]:
    return [
        {name: v for name, v in record.items() if name not in ("peak_memory", "targets_per_s")}
        for record in comparable(out)
        if "loss" in record
    ]


@pytest.mark.parametrize("rule", [{"by": "divergence", "terms": ["ce", "kd"]}, {"by": "teacher_entropy"}, {"by": "position"}], ids=str)
def test_how_a_step_is_cut_does_not_matter(trained, world, tmp_path, rule):
    of_second = (-0.5, 2.0) if "ce" not in rule.get("terms", ()) else (-0.5, 1.0)
    common = SHORT | {"data__train": sources(world, *of_second), "loss__target_weights": rule, "loss__temperature": 2.0}
    common |= {"loss__normalize": "weights"} if "ce" in rule.get("terms", ()) else {}
    common["data__validation"] = {"path": str(world / "held.jsonl"), "limit": 3}
    whole = trained("whole", **common, train__micro_batch_size=8)
    cut = trained("cut", **common, train__micro_batch_size=3, data__packing=True, loss__chunk_size=5)
    assert distance(cut, whole) < BOUND
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "cut"), strict=True):
        assert a.keys() == b.keys() and [b[name] for name in a] == pytest.approx(list(a.values()), rel=1e-9)
    plain = trained("plain", **common | {"loss__target_weights": None}, train__micro_batch_size=8)
    assert distance(plain, whole) > 1e-6
    before = [next(r for r in read_jsonl(tmp_path / out / "metrics.jsonl") if "validation" in r) for out in ("whole", "plain")]
    assert before[0] == before[1]  # held-out rows all count alike


def test_it_goes_on_to_the_last_bit(make_recipe, world, tmp_path):
    """With LoRA's dropout, and one of the model itself."""
    shutil.copytree(world / "student", tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    rule = {"by": "confidence", "power": 2.0, "terms": ["ce", "kd"]}
    settings = SHORT | {"student__lora__dropout": 0.3, "checkpoint__every": 1, "checkpoint__keep": 9, "loss__normalize": "weights"}
    settings |= {"student__model": str(tmp_path / "student")}
    recipe = make_recipe(**settings, loss__target_weights=rule)
    run(recipe)
    straight, records = weights(tmp_path / "out"), comparable(tmp_path / "out")
    step = next(record for record in records if "loss" in record)
    assert 0 < step["ce_weight"] < 1 and step["ce_weight"] == step["kd_weight"] and "kd_targets" not in step
    assert step["loss"] == pytest.approx(0.7 * step["ce"] + 0.3 * step["kd"], rel=1e-9), "the pass before has the same dropout"
    assert "targets of ce and kd weighed by confidence" in (tmp_path / "out/adapter/README.md").read_text()
    unfinish(tmp_path / "out", 1)
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "out"), straight) == 0 and comparable(tmp_path / "out") == records
    with pytest.raises(UserError, match=r"loss\.target_weights"):
        run(make_recipe(**settings, loss__target_weights=rule | {"power": 1.0}), resume=True)


def test_means_of_a_step_by_hand():
    """Two micro-batches; a weight is 0 in the first, and one is below 0, as a source's may be."""
    terms = [{"ce": torch.tensor([1.0, 2.0]), "kd": torch.tensor([0.0, 3.0])}, {"ce": torch.tensor([4.0]), "kd": torch.tensor([-0.5])}]
    by_rule = [{"kd": torch.tensor([0.0, 0.5])}, {"kd": torch.tensor([-0.25])}]

    class One:
        num_processes = 1

    combine = {0: lambda values: values["ce"] + values["kd"]}
    done = Accumulated([], TargetCounts(3, {"kd": (99.0, 3)}), 1.0, {0: terms}, combine, {0: by_rule})
    result = StepResult(None, done, {0: torch.tensor(7.0)}, {}, True, One())
    found, norms, stop = result.read({0})
    assert found[0] == pytest.approx(
        {"ce": 7 / 3, "kd": 2.5 / 0.75, "kd_targets": 2, "kd_weight": 0.25, "loss": 7 / 3 + 2.5 / 3}, rel=1e-12
    )
    assert norms == {0: 7.0} and stop and result.nonfinite[0] == 0


def test_the_sums_of_weights_are_those_of_all_processes():
    """Two micro-batches here and others there; a weight below 0, targets of which half are kept, and a part that no target carries."""

    class Two:
        num_processes, process_index, device = 2, 0, torch.device("cpu")

        def reduce(self, values, how):
            return values + torch.tensor([1.5, 3.0, 0.0], dtype=torch.float64)

    class Weighed:
        measures_weights, share = True, 0.5

        def __call__(self, batch, signal):
            return Loss(torch.zeros(()), {}, {name: torch.tensor(w) for name, w in batch.by_rule.items()})

    def micro(**by_rule):
        one = SimpleNamespace(by_rule=by_rule)
        one.to = lambda device: one
        return one

    step, counts = Step(3, 0), TargetCounts(20, {"features": (4.0, 4)}, {0.5: 10})
    batches = [micro(ce=[1.0, 0.0], kd=[0.25, 0.0], none=[0.0, 0.0]), micro(ce=[1.0], kd=[-0.75], none=[0.0])]
    plain = SimpleNamespace(measures_weights=False)
    active = {0: SimpleNamespace(distiller=plain), 1: SimpleNamespace(distiller=Weighed())}
    found = measured_scales(0, step, counts, active, None, Two(), batches)
    assert found == {1: {"features": 5.0, "ce": 10 / 3.5, "kd": 10 / 4.0, "none": 1.0}}
    assert measured_scales(0, step, counts, {0: SimpleNamespace(distiller=plain)}, None, Two(), batches) == {}


@pytest.mark.slow
def test_two_processes_are_one(trained, world, tmp_path):
    changes = SHORT | {"loss__target_weights": {"by": "divergence"}, "train__batch_size": 3, "train__micro_batch_size": 1}
    changes |= {"loss__normalize": "weights", "loss__keep": 0.5}
    assert_two_processes_are_one(trained, world, tmp_path, changes)


def test_caches_that_hold_what_a_rule_reads(trained, make_recipe, caches):
    """The kind is known from the cache alone; the entropy is in every cache of llmkd's own, the distribution in one of hidden states."""
    common = SHORT | {"train__max_steps": 1, "optim__warmup_steps": None}
    live = trained("live", **common, loss__target_weights={"by": "teacher_entropy"})
    cached = trained("cached", **common, loss__target_weights={"by": "teacher_entropy"}, teacher={"cache": {"path": str(caches / "topk")}})
    assert distance(live, cached) < 1e-3  # records keep 16 bits
    hidden = {"cache": {"path": str(caches / "hidden")}}
    by = {"loss__target_weights": {"by": "divergence"}}
    assert distance(trained("a", **common, **by), trained("b", **common, **by, teacher=hidden)) < 1e-4
    for kind in ("narrow", "sampled"):
        with pytest.raises(UserError, match=r"loss\.target_weights\.by: found divergence, which needs the teacher's whole distribution"):
            run(make_recipe(f"no {kind}", **common, **by, teacher={"cache": {"path": str(caches / kind)}}))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"loss__target_weights": {"by": "entropy"}},
            "loss.target_weights.by: found 'entropy', expected one of: teacher_entropy, student_",
        ),
        ({"loss__target_weights": {}}, "loss.target_weights.by"),
        ({"loss__target_weights": {"by": "position", "power": 0}}, "loss.target_weights.power"),
        ({"loss__target_weights": {"by": "position", "terms": []}}, "loss.target_weights.terms"),
        ({"loss__target_weights": {"by": "position", "terms": ["kl"]}}, "loss.target_weights.terms"),
        ({"loss__target_weights": {"by": "position", "terms": ["kd", "kd"]}}, "loss.target_weights.terms: found ['kd', 'kd']"),
        ({"loss__target_weights": {"by": "divergence", "half_life": 3}}, "loss.target_weights.half_life: belongs to by: position"),
        (
            {"loss__target_weights": {"by": "position"}, "loss__kd_ratio": 0},
            "loss.target_weights.terms: found kd, and with loss.kd_ratio 0",
        ),
        ({"loss__target_weights": {"by": "position", "terms": ["ce", "kd"]}, "teacher": None}, "found kd, and with loss.kd_ratio 0"),
        (
            {"loss__target_weights": {"by": "confidence", "terms": ["ce"]}, "loss__kd_ratio": 1},
            "loss.target_weights.terms: found ce, and with loss.kd_ratio 1",
        ),
        (
            {"loss__target_weights": {"by": "divergence", "terms": ["ce"]}, "loss__kd_ratio": 0},
            "loss.target_weights.by: found divergence, which reads the teacher, with loss.kd_ratio 0",
        ),
        (
            {"loss__target_weights": {"by": "teacher_entropy", "terms": ["ce"]}, "teacher": None},
            "loss.target_weights.by: found teacher_entropy, which reads the teacher, with no teacher",
        ),
        (
            {"loss__target_weights": {"by": "divergence"}, "teacher__cache": {"path": "c", "kind": "topk"}},
            "loss.target_weights.by: found divergence, which needs the teacher's whole distribution, and a cache of kind topk",
        ),
        (
            {"loss__target_weights": {"by": "divergence", "terms": ["ce"]}, "data__train": {"path": "x.jsonl", "loss": {"kd": 0}}},
            "loss.target_weights.by: found divergence for ce, but data.train.loss.kd is 0",
        ),
        (
            {"loss__target_weights": {"by": "position"}, "data__train": {"path": "x.jsonl", "loss": {"ce": 0, "kd": 0}}},
            "data.train.loss: found ce: 0 and kd: 0",
        ),
    ],
    ids=str,
)
def test_what_is_refused(make_recipe, changes, words):
    with pytest.raises(UserError) as error:
        make_recipe(**changes)
    assert words in str(error.value)


def test_several_teachers_with_a_cache(make_recipe, caches):
    two = [{"model": "a"}, {"cache": {"path": str(caches / "topk")}}]
    with pytest.raises(UserError, match=r"found teacher_entropy, .* with teacher\.1\.cache; set teacher\.1\.cache\.kind: hidden"):
        make_recipe(teacher=two, loss__target_weights={"by": "teacher_entropy"})
    make_recipe(teacher=two, loss__target_weights={"by": "student_entropy"})
