"""Sources with weights of their own in the loss: however a step is cut, resumed or spread, in validation, in the metrics, and refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from llmkd_eval.comparison.compare import compare

from llmkd.cli import main
from llmkd.commands.sweep import run_sweep
from llmkd.config import loader
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.training.one_and_two import assert_two_processes_are_one
from tests.training.test_resume import comparable, unfinish

LAST = {"train__epochs": None, "train__max_steps": 3, "validation__teacher_check": 0, "loss__kd_ratio": 0.3}
BOUND = 1e-12


def sources(world, *of_second, limit=20) -> list[dict]:
    """The 37 rows, with or without a weight of the labels, and the nine held-out ones, with others."""
    second = dict(zip(("ce", "kd"), of_second or (-0.5, 2.0), strict=True))
    return [
        {"path": str(world / "train.jsonl"), "limit": limit, "loss": {"ce": 0, "kd": 1}},
        {"path": str(world / "held.jsonl"), "loss": second},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["targets", "weights"])
def test_how_a_step_is_cut_does_not_matter(trained, world, normalize):
    common = LAST | {"data__train": sources(world), "loss__normalize": normalize}
    whole = trained("whole", **common, train__micro_batch_size=8)
    packed = {"train__micro_batch_size": 3, "data__packing": True, "loss__chunk_size": 5}
    cuts = {"ones": ({"train__micro_batch_size": 1}, BOUND), "packed": (packed, BOUND)}
    if normalize == "targets":
        cuts["shared"] = packed | {"data__share_prefixes": True}, 1e-6  # norms round in float32
    for name, (cut, bound) in cuts.items():
        assert distance(trained(name, **common, **cut), whole) < bound, name
    assert distance(trained("unweighted", **LAST, data__train=[one | {"loss": {}} for one in sources(world)]), whole) > 1e-6


def test_ones_are_no_weights_to_the_last_bit(trained, world, tmp_path):
    plain = [{key: value for key, value in one.items() if key != "loss"} for one in sources(world)]
    found = [
        trained(name, **LAST, data__train=data) for name, data in (("a", plain), ("b", [one | {"loss": {"ce": 1.0}} for one in plain]))
    ]
    assert distance(*found) == 0 and comparable(tmp_path / "a") == comparable(tmp_path / "b")


def test_it_goes_on_to_the_last_bit(make_recipe, world, tmp_path):
    recipe = make_recipe(
        **LAST, data__train=sources(world), loss__normalize="weights", student__lora__dropout=0.3, checkpoint__every=1, checkpoint__keep=9
    )
    run(recipe)
    straight, records = weights(tmp_path / "out"), comparable(tmp_path / "out")
    unfinish(tmp_path / "out", 1)
    run(recipe, resume=True)
    assert distance(weights(tmp_path / "out"), straight) == 0 and comparable(tmp_path / "out") == records
    with pytest.raises(UserError, match=r"data.train.1.loss.kd"):
        run(make_recipe(**LAST, data__train=sources(world, -0.5, 1.0), loss__normalize="weights", student__lora__dropout=0.3), resume=True)


@pytest.mark.slow
def test_two_processes_are_one_where_one_of_them_has_no_weights(trained, world, tmp_path):
    """Micro-batches of one: some ranks see rows of the second source alone, whose weights are all 1 but one, and some of the first alone, where no
    hidden states are compared. Maps train on both."""
    first, second = sources(world, 1.0, 1.0)
    changes = LAST | {
        "data__train": [first | {"loss": first["loss"] | {"features": 0}}, second | {"loss": {"attention": -2}}],
        "loss__features": {"layers": "last", "lr": 0.1},
        "loss__attention": {"heads": "mean"},
        "loss__normalize": "weights",
        "train__batch_size": 3,
        "train__micro_batch_size": 1,
    }
    assert_two_processes_are_one(trained, world, tmp_path, changes)


@pytest.mark.slow
def test_side_by_side_each_ends_as_it_would_alone(world, tmp_path):
    """Students with and without a teacher, and with each way to divide, on the same weighted batches."""
    base = plain_recipe(world, tmp_path / "unused")
    base |= {
        "data": {"train": sources(world, 1.0, 0.0), "max_length": 256},
        "train": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 4},
    }
    base["data"]["train"][0]["loss"] = {"ce": 0.25, "kd": 1}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    arms = {"sft": {"loss.kd_ratio": 0}, "kd": {"loss.kd_ratio": 0.5}, "by_weights": {"loss.kd_ratio": 0.5, "loss.normalize": "weights"}}
    arms["by_rule"] = arms["by_weights"] | {
        "loss.target_weights": {"by": "divergence"},
        "loss.keep": {"share": 0.5, "by": "student_entropy"},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "arms": arms}))
    run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    for name in arms:
        folder = tmp_path / "sweep/arms" / name
        run(loader.load_recipe(folder / "recipe.yaml", {"output_dir": str(tmp_path / name), "validation.compare_to_teacher": False}))
        assert distance(weights(folder), weights(tmp_path / name)) == 0, name


def test_held_out_rows_count_where_they_have_a_weight(make_recipe, world, tmp_path):
    """By hand: from the sums of each example, of which the first source has no labels, and the second counts half in the divergences."""
    held = [
        {"path": str(world / "train.jsonl"), "limit": 6, "loss": {"ce": 0, "kd": 1}},
        {"path": str(world / "held.jsonl"), "limit": 4, "loss": {"ce": 3, "kd": 0.5}},
        {"path": str(world / "held.jsonl"), "limit": 2, "loss": {"ce": -2, "kd": 1}},
    ]
    for name, lr in (("out", 1e-2), ("other", 3e-2)):
        run(make_recipe(name, **LAST, data__validation=held, optim__lr=lr))
    lines = read_jsonl(tmp_path / "out/held_out.jsonl")
    assert [line["weights"] for line in lines] == 6 * [{"ce": 0.0, "kd": 1.0}] + 4 * [{"ce": 3.0, "kd": 0.5}] + 2 * [{"ce": 0.0, "kd": 1.0}]
    found = read_jsonl(tmp_path / "out/metrics.jsonl")[-1]["validation"]
    for metric in ("ce", "teacher_ce", "forward_kl", "top1_agreement", "entropy"):
        of = {"ce": "ce", "teacher_ce": "ce", "entropy": None}.get(metric, "kd")
        w = [line["weights"][of] if of else 1.0 for line in lines]
        top = sum(a * line["sums"][metric] for a, line in zip(w, lines, strict=True))
        assert found[metric] == pytest.approx(top / sum(a * line["targets"] for a, line in zip(w, lines, strict=True)), rel=1e-12), metric
    assert found["ce_targets"] == sum(line["targets"] for line in lines[6:10]) < found["targets"] and "kd_targets" not in found
    rows = compare({name: [tmp_path / name] for name in ("out", "other")}, info=lambda line: None)
    for row in rows:
        values = read_jsonl(tmp_path / row.arm / "metrics.jsonl")[-1]["validation"]
        assert row.value == pytest.approx(values[row.metric], rel=1e-9) and row.n == (
            4 if row.metric == "ce" else 10
        )  # a row that is there twice is one draw


def test_training_rows_that_are_held_out_need_labels(make_recipe, world, tmp_path):
    lone = [{"path": str(world / "train.jsonl"), "loss": {"ce": 0}}]
    few = [lone[0], {"path": str(world / "held.jsonl"), "limit": 1}]
    for data, words in ((lone, "data.train.0.loss.ce: found 0"), (few, "data.validation_fraction: none of the rows")):
        with pytest.raises(UserError, match=words):
            prepare(make_recipe(data__train=data, data__validation_fraction=0.1))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"data__train": {"path": "x.jsonl", "loss": {"kd": -1e-300}}, "loss__features": {}},
            "data.train.loss.kd: found -1e-300, expected at least 1e-30, or 0 where it may be 0",
        ),
        ({"data__train": {"path": "x.jsonl", "loss": {"ce": 0, "kd": 0}}}, "data.train.loss: found ce: 0 and kd: 0"),
        ({"data__train": {"path": "x.jsonl", "loss": {"ce": 0}}, "loss__kd_ratio": 0}, "data.train.loss.ce: found 0 with loss.kd_ratio 0"),
        ({"data__train": {"path": "x.jsonl", "loss": {"ce": 0}}, "teacher": None}, "data.train.loss.ce: found 0 with loss.kd_ratio 0"),
        ({"data__train": {"path": "x.jsonl", "loss": {"kd": 0}}, "loss__kd_ratio": 1}, "data.train.loss.kd: found 0 with loss.kd_ratio 1"),
        ({"data__train__loss__labels": 1}, "data.train.loss.labels"),
        ({"data__train__loss__ce": "none"}, "data.train.loss.ce"),
        ({"data__train__loss__ce": float("nan")}, "data.train.loss.ce"),
        ({"data__train__loss__ce": 1001}, "data.train.loss.ce"),
        ({"data__choices": {"path": "q.jsonl", "loss": {"ce": 0}}}, "data.choices.loss: given"),
        ({"data__validation": {"path": "x.jsonl", "loss": {"ce": -1}}}, "data.validation.loss.ce: found -1"),
        (
            {"data__validation": {"path": "x.jsonl", "loss": {"kd": 0}}, "checkpoint__best_by": "forward_kl"},
            "data.validation.loss.kd: found 0, and no held-out rows",
        ),
        ({"loss__normalize": "sum"}, "loss.normalize"),
    ],
    ids=str,
)
def test_what_is_refused(make_recipe, changes, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        make_recipe(**changes)


def test_it_is_said_which_source_carries_what(make_recipe, world, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(plain_recipe(world, tmp_path / "out") | {"data": {"train": sources(world, 1.0, 1.0), "max_length": 256}}))
    assert main(["data", "--config", str(path), "--show", "0"]) == 0
    said = capsys.readouterr().out
    assert f"data.train.0 ({world / 'train.jsonl'}): loss.ce 0 (0 targets carry it)" in said and "loss.kd" not in said
    assert "data.train.1" not in [line.partition(" (")[0] for line in said.splitlines() if "carry" in line]


def test_the_teacher_is_checked_on_rows_with_labels(make_recipe, world, tmp_path, capsys):
    common = {"train__epochs": None, "train__max_steps": 1, "optim__warmup_steps": None, "validation__teacher_check": 64}
    run(make_recipe("some", **common, data__train=sources(world, 1.0, 1.0)))
    assert "on 9 training examples" in capsys.readouterr().err
    run(make_recipe("none", **common, data__train=sources(world)[0]))
    said = capsys.readouterr().err
    assert "teacher check: skipped" in said
    record = next(r for r in read_jsonl(tmp_path / "none/metrics.jsonl") if "loss" in r)
    assert "ce" not in record and record["ce_targets"] == 0 and record["loss"] == pytest.approx(record["kd"] / 2)


@pytest.mark.parametrize("normalize", ["targets", "weights"])
def test_hidden_states_and_attention_of_a_source(trained, world, tmp_path, normalize):
    """One source has neither, the other counts negatively or twice. Then how a step is cut does not matter; what the first step says of the second
    source is what it says in a run on that source alone; and maps are computed on the sources that they compare."""
    inner = {"loss__features": {"layers": "middle"}, "loss__attention": {"layers": "last"}, "loss__normalize": normalize}
    common = LAST | inner | {"train__batch_size": 40, "train__max_steps": 2, "optim__warmup_steps": None}
    both = [
        {"path": str(world / "train.jsonl"), "limit": 20, "loss": {"features": 0, "attention": 0}},
        {"path": str(world / "held.jsonl"), "loss": {"features": -2, "attention": 3}},
    ]
    whole = trained("whole", **common, data__train=both, train__micro_batch_size=40)
    cut = trained("cut", **common, data__train=both, train__micro_batch_size=3, data__packing=True)
    assert distance(whole, cut) < 1e-9  # the teacher's spread is in float32
    alone = [both[1] | {"loss": {}}]
    trained("alone", **common, data__train=alone, train__micro_batch_size=40)
    one, other = (next(r for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r) for name in ("whole", "alone"))
    counted = other["targets"]
    assert one["features_targets"] == one["attention_targets"] == counted < one["targets"]
    assert one["features"] == pytest.approx(-other["features"], rel=1e-6) and one["attention"] == pytest.approx(
        other["attention"], rel=1e-9
    )
    share = (1, 1) if normalize == "weights" else (2 * counted / one["targets"], 3 * counted / one["targets"])
    inner = share[0] * one["features"] + share[1] * one["attention"]
    assert one["loss"] == pytest.approx(0.7 * one["ce"] + 0.3 * one["kd"] + inner, rel=1e-9)


@pytest.mark.parametrize(
    "loss, changes, words",
    [
        ({"features": 0}, {}, "data.train.loss.features: found 0, and there is no loss.features; leave it out"),
        ({"attention": 2}, {"loss__features": {}}, "data.train.loss.attention: found 2, and there is no loss.attention; leave it out"),
        ({"ce": 0, "kd": 0, "features": 0}, {"loss__features": {}}, "data.train.loss: found ce: 0, kd: 0 and features: 0, so these rows"),
        ({"ce": 0, "features": 0}, {"loss__features": {}, "loss__kd_ratio": 0}, "data.train.loss.ce: found 0 with loss.kd_ratio 0"),
        ({"features": 1e-9}, {"loss__features": {}}, "data.train.loss.features: found 1e-09, expected 0, or a number of 1e-06"),
    ],
    ids=str,
)
def test_weights_of_hidden_states_that_are_refused(make_recipe, world, loss, changes, words):
    with pytest.raises(UserError) as error:
        make_recipe(data__train={"path": str(world / "train.jsonl"), "loss": loss}, **changes)
    assert words in str(error.value) and len(error.value.problems) == 1
    make_recipe(data__train={"path": str(world / "train.jsonl"), "loss": {"ce": 0, "kd": 0}}, loss__features={})


def test_held_out_rows_have_no_weights_of_hidden_states(make_recipe, world):
    with pytest.raises(
        UserError, match="data.validation.loss.features: found 0, but features are measured in training alone; leave it out"
    ):
        make_recipe(data__validation={"path": str(world / "held.jsonl"), "loss": {"features": 0}}, loss__features={})


def test_examples_keep_their_weights(make_recipe, world):
    data = prepare(make_recipe(data__train=sources(world))).train
    counts = data.num_targets
    assert data.weights["ce"].tolist() == 20 * [0.0] + 9 * [-0.5] and data.weights["kd"].tolist() == 20 * [1.0] + 9 * [2.0]
    assert data.take(np.array([25, 3])).weights["ce"].tolist() == [-0.5, 0.0]
    expected = {"ce": (0.5 * counts[20:].sum(), counts[20:].sum()), "kd": (counts[:20].sum() + 2 * counts[20:].sum(), counts.sum())}
    assert data.weighted(range(29)) == expected
    assert data.weighted([0, 1]) == {"ce": (0.0, 0)} and data.unweighted().weights == {}
    assert SimpleNamespace(**vars(data)).ids is data.unweighted().ids
