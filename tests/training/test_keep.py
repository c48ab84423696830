"""Runs that train on a share of the targets: however a step is cut, resumed or spread, by caches, in the metrics, and refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmkd.batch import Batch, Example, View
from llmkd.commands.sweep import run_sweep
from llmkd.config import loader
from llmkd.data.batch_source import Step
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.training.loop import count_targets
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from llmkd.training.step_result import Accumulated, StepResult, TargetCounts
from tests.conftest import distance, plain_recipe, weights
from tests.training.one_and_two import assert_two_processes_are_one
from tests.training.test_resume import comparable, unfinish
from tests.training.test_target_weights import logged
from tests.training.test_weights import sources

SHORT = {"train__epochs": None, "train__max_steps": 3, "optim__warmup_steps": None, "validation__teacher_check": 0, "loss__kd_ratio": 0.3}
BOUND = 1e-12


@pytest.mark.parametrize("keep", [0.5, {"share": 0.3, "by": "divergence"}, {"share": 0.4, "by": "position", "invert": True}], ids=str)
def test_how_a_step_is_cut_does_not_matter(trained, world, tmp_path, keep):
    common = SHORT | {"data__train": sources(world, -0.5, 2.0), "loss__keep": keep, "loss__temperature": 2.0}
    whole = trained("whole", **common, train__micro_batch_size=8)
    cut = trained("cut", **common, train__micro_batch_size=3, data__packing=True, loss__chunk_size=5)
    assert distance(cut, whole) < BOUND
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "cut"), strict=True):
        assert a.keys() == b.keys() and [b[name] for name in a] == pytest.approx(list(a.values()), rel=1e-9)
    record, share = logged(tmp_path / "whole")[0], keep if isinstance(keep, float) else keep["share"]
    assert share < record["kept"] < share + 0.2 and record["ce_targets"] < record["kept"] * record["targets"]
    assert record["ce_weight"] > 0 and record["kd_weight"] > 1


def test_all_of_them_are_todays_bits(trained, tmp_path):
    found = [
        trained(name, **SHORT, **more) for name, more in (("a", {}), ("b", {"loss__keep": 1.0}), ("c", {"loss__keep": {"share": 1.0}}))
    ]
    assert distance(found[0], found[1]) == distance(found[0], found[2]) == 0
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b") == comparable(tmp_path / "c")


def test_it_is_the_mean_over_the_kept_targets(make_recipe, trained, world, tmp_path):
    """One step of all rows, in cross-entropy: of each row's answer the first half, as transformers' own model gives it."""
    one = SHORT | {"train__max_steps": 1, "train__batch_size": 37, "loss__kd_ratio": 0.0, "student__method": "full"}
    trained("kept", **one, loss__keep={"share": 0.5, "by": "position"})
    train, model, found, every = prepare(make_recipe()).train, AutoModelForCausalLM.from_pretrained(world / "student"), [], 0
    for i in range(len(train)):
        ids, mask = (torch.from_numpy(x) for x in train.example(i))
        log_q = model(ids[None].long()).logits[0].log_softmax(-1)
        places = [t for t in range(1, len(ids)) if mask[t]]
        every += len(places)
        found += [-log_q[t - 1, ids[t]] for t in places[: (len(places) + 1) // 2]]
    mean = torch.stack(found).mean()
    norm = torch.stack([one.norm() for one in torch.autograd.grad(mean, list(model.parameters()))]).norm()
    (record,) = logged(tmp_path / "kept")
    assert record["loss"] == record["ce"] == pytest.approx(mean.item(), rel=1e-6)  # norms round in float32
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert record["targets"] == every and record["kept"] == len(found) / every and {"ce_targets", "ce_weight"}.isdisjoint(record)


def test_it_goes_on_to_the_last_bit(make_recipe, tmp_path):
    settings = SHORT | {"student__lora__dropout": 0.3, "checkpoint__every": 1, "checkpoint__keep": 9, "loss__keep": 0.5}
    recipe = make_recipe(**settings)
    run(recipe)
    straight, records = weights(tmp_path / "out"), comparable(tmp_path / "out")
    assert "0.5 of each example's targets by student entropy" in (tmp_path / "out/adapter/README.md").read_text()
    unfinish(tmp_path / "out", 1)
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "out"), straight) == 0 and comparable(tmp_path / "out") == records
    with pytest.raises(UserError, match=r"loss\.keep"):
        run(make_recipe(**settings | {"loss__keep": 0.6}), resume=True)


@pytest.mark.slow
def test_side_by_side_as_alone(world, tmp_path):
    """A student that keeps half, one that keeps a third, and one that keeps all."""
    base = plain_recipe(world, tmp_path / "unused") | {"train": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 3}}
    base["data"]["validation"] = {"path": str(world / "held.jsonl")}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    arms = {"all": {"loss.keep": 1.0}, "half": {"loss.keep": 0.5}, "third": {"loss.keep": {"share": 0.34, "by": "divergence"}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "arms": arms}))
    run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    for name in arms:
        folder = tmp_path / "sweep/arms" / name
        run(loader.load_recipe(folder / "recipe.yaml", {"output_dir": str(tmp_path / name)}))
        assert distance(weights(folder), weights(tmp_path / name)) == 0
        assert logged(folder) == logged(tmp_path / name)
        assert ("kept" in logged(folder)[0]) == (name != "all")


@pytest.mark.slow
def test_two_processes_are_one(trained, world, tmp_path):
    changes = SHORT | {"loss__keep": 0.5, "train__batch_size": 3, "train__micro_batch_size": 1, "data__train": sources(world, -0.5, 2.0)}
    assert_two_processes_are_one(trained, world, tmp_path, changes)


def test_caches_that_hold_what_a_rule_reads(trained, make_recipe, caches):
    common = SHORT | {"train__max_steps": 1}
    for by, kind in (("teacher_entropy", "topk"), ("divergence", "hidden")):
        keep = {"loss__keep": {"share": 0.5, "by": by}}
        live, cached = (trained(f"{by} {name}", **common, **keep, **more) for name, more in cache_or_not(caches, kind))
        assert distance(live, cached) < 1e-2, by
    with pytest.raises(UserError, match=r"loss\.keep\.by: found divergence, which needs the teacher's whole distribution"):
        run(make_recipe("no", **common, loss__keep={"share": 0.5, "by": "divergence"}, teacher={"cache": {"path": str(caches / "narrow")}}))


def cache_or_not(caches, kind):
    return ("live", {}), ("cached", {"teacher": {"cache": {"path": str(caches / kind)}}})


def test_targets_of_a_step_that_nobody_counted_before():
    class Two:
        num_processes, device = 2, torch.device("cpu")

        def reduce(self, values, how):
            return 2 * values

    view, labels = View({}, torch.arange(8)), torch.arange(8)
    one = Batch(labels, labels, view, view, (Example("", 3, -1), Example("", 5, -1)), {"kd": torch.tensor([0.5] * 3 + [1.0] * 5)})
    counts = count_targets(Step(1, 0), [one], Two(), ["ce", "kd"], [0.25, 0.5])
    assert counts == TargetCounts(16, {"kd": (13.0, 16)}, {0.25: 2 * (1 + 2), 0.5: 2 * (2 + 3)})
    assert counts.of(0.5) == TargetCounts(10, whole=16) and counts.of(1.0) is counts


def test_means_of_a_step_by_hand():
    """Of six targets four are kept, and the labels of one of these have no weight."""
    rows = [{"ce": torch.tensor([1.0, 0.0, 3.0]), "kd": torch.tensor([2.0, 0.0, 4.0])}] * 2
    by_rule = [{"ce": torch.tensor([1.0, 0.0, 1.0]), "kd": torch.tensor([0.5, 0.0, 1.0])}] * 2
    by_rule[1] = by_rule[1] | {"ce": torch.tensor([0.0, 0.0, 1.0])}

    class One:
        num_processes = 1

    combine = {0: lambda values: values["ce"] + values["kd"]}
    done = Accumulated([], TargetCounts(6, {}, {0.6: 4}), 8.0, {0: rows}, combine, {0: by_rule}, {0: 0.6})
    assert done.unscale(0) == 6 / 4 / 8
    found, _, _ = StepResult(None, done, {0: torch.tensor(7.0)}, {}, False, One()).read({0})
    expected = {"ce": 8 / 3, "ce_targets": 3, "ce_weight": 0.75, "kd": 12 / 3, "kd_weight": 0.75, "kept": 4 / 6, "loss": 20 / 4}
    assert found[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss__keep": 0}, "loss.keep: found 0, expected a number > 0, <= 1, or a mapping of settings"),
        ({"loss__keep": 1.5}, "loss.keep: found 1.5"),
        ({"loss__keep": "half"}, 'loss.keep: found "half", expected a number > 0'),
        ({"loss__keep": None}, "loss.keep"),
        ({"loss__keep": [0.5]}, "loss.keep"),
        ({"loss__keep": {"by": "position"}}, "loss.keep.share"),
        ({"loss__keep": {"share": 0.0}}, "loss.keep.share"),
        ({"loss__keep": {"share": 0.5, "power": 2}}, "loss.keep.power"),
        ({"loss__keep": {"share": 0.5, "by": "entropy"}}, "loss.keep.by: found 'entropy', expected one of: teacher_entropy, student_"),
        (
            {"loss__keep": {"share": 0.5, "by": "divergence"}, "loss__kd_ratio": 0},
            "loss.keep.by: found divergence, which reads the teacher, with loss.kd_ratio 0",
        ),
        ({"loss__keep": {"share": 0.5, "by": "teacher_entropy"}, "teacher": None}, "loss.keep.by: found teacher_entropy, which reads"),
        (
            {"loss__keep": {"share": 0.5, "by": "teacher_entropy"}, "data__train": {"path": "x.jsonl", "loss": {"kd": 0}}},
            "loss.keep.by: found teacher_entropy, but data.train.loss.kd is 0",
        ),
        (
            {"loss__keep": {"share": 0.5, "by": "divergence"}, "teacher__cache": {"path": "c", "kind": "topk"}},
            "loss.keep.by: found divergence, which needs the teacher's whole distribution, and a cache of kind topk",
        ),
        (
            {
                "loss__keep": 0.5,
                "loss__target_weights": {"by": "divergence"},
                "data__train": {"path": "x.jsonl", "loss": {"kd": 0, "ce": 1}},
            },
            "loss.keep: found divergence, but data.train.loss.kd is 0",
        ),
    ],
    ids=str,
)
def test_what_is_refused(make_recipe, changes, words):
    with pytest.raises(UserError) as error:
        make_recipe(**changes)
    assert words in str(error.value)
    assert len(error.value.problems) == 1


def test_held_out_rows_all_count(trained, tmp_path, world):
    held = {"data__validation": {"path": str(world / "held.jsonl")}, "train__max_steps": 1}
    for name, keep in (("a", 1.0), ("b", 0.3)):
        trained(name, **SHORT | held, loss__keep=keep)
    before = [next(r for r in read_jsonl(tmp_path / out / "metrics.jsonl") if "validation" in r) for out in "ab"]
    assert before[0] == before[1]
