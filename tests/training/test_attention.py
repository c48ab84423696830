"""Attention distillation in a run: what it trains, what it logs, what changes nothing, and what is refused."""

import functools
import json
import shutil

import pytest
import torch

from llmkd.batch import Batch, Example, View
from llmkd.config.terms import layer_pairs
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.losses import attention
from llmkd.losses.attention import AttentionTerm, map_divergence, relation_divergence
from llmkd.losses.terms import StudentOutputs
from llmkd.signals import AttentionInputs, Dense
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import distance, weights
from tests.training.test_resume import LONG, comparable, unfinish

MAPS = {"loss__attention": {"weight": 0.3, "layers": "last"}}
RELATIONS = {"loss__attention": {"weight": 0.3, "layers": [[1, 2], [2, 1]], "what": "relations", "relation_heads": 4}}
EITHER = pytest.mark.parametrize("term", [MAPS, RELATIONS], ids=["maps", "relations"])
SHORT = {"train__max_steps": 3}


def steps(folder) -> list[dict]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if "lr" in record]


@EITHER
def test_it_is_a_term_of_the_loss_and_nothing_of_it_is_exported(term, trained, tmp_path):
    found, plain = trained("with", **SHORT, **term), trained("without", **SHORT)
    assert found.keys() == plain.keys() and distance(found, plain) > 1e-6
    for record in steps(tmp_path / "with"):
        assert record["attention"] > 0
        assert record["loss"] == pytest.approx(0.5 * record["ce"] + 0.5 * record["kd"] + 0.3 * record["attention"], rel=1e-12)
    assert "attention" in json.loads((tmp_path / "with/summary.json").read_text())["train"]
    assert f", attention {term['loss__attention'].get('what', 'maps')} 0.3)" in (tmp_path / "with/adapter/README.md").read_text()


def test_without_the_divergence_it_still_asks_the_teacher(trained, tmp_path):
    alone = {"loss__kd_ratio": 0.0, "optim__lr": 0.02, "train__max_steps": 12, "student__method": "full"}
    trained("out", **alone, loss__attention={"weight": 5.0})
    records = steps(tmp_path / "out")
    assert "kd" not in records[0] and records[-1]["attention"] < 0.7 * records[0]["attention"]


@EITHER
def test_micro_batches_packing_and_recomputed_layers_change_nothing(term, trained):
    how = {"train__max_steps": 2, "student__method": "full", **term}
    whole = trained("whole", **how)
    assert distance(whole, trained("cut", **how, train__micro_batch_size=1, student__gradient_checkpointing=True)) < 1e-12
    packed = {"train__micro_batch_size": 8, "data__packing": True, "data__share_prefixes": True}
    assert distance(whole, trained("packed", **how, **packed)) < 2e-6  # rotations and norms round in float32


@EITHER
def test_under_autocast_it_is_nearly_the_same(term, trained, tmp_path):
    how = {"train__max_steps": 1, "optim__warmup_steps": 0, "student__dtype": "float32", "teacher__dtype": "float32", **term}
    for name in ("no", "bf16"):
        trained(name, **how, student__mixed_precision=name)
    exact, rounded = (steps(tmp_path / name)[0]["attention"] for name in ("no", "bf16"))
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact


def test_it_resumes_bit_for_bit(trained, make_recipe, tmp_path):
    term = MAPS
    whole = trained("whole", **LONG, **term)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    unfinish(tmp_path / "again", 4)
    run(make_recipe("again", **LONG, **term), resume=True)
    assert distance(weights(tmp_path / "again"), whole) == 0 and comparable(tmp_path / "again") == comparable(tmp_path / "whole")
    with pytest.raises(UserError, match="loss.attention.weight"):
        run(make_recipe("again", **LONG, **{"loss__attention": term["loss__attention"] | {"weight": 0.4}}), resume=True)


@EITHER
def test_a_student_that_is_its_teacher_has_none(term, world, trained, tmp_path):
    same = {"student__model": str(world / "teacher"), "teacher__model": str(world / "teacher"), "loss__kd_ratio": 1.0}
    settings = term["loss__attention"] | {"layers": "last"}
    trained("out", **same, loss__attention=settings, student__method="full", train__max_steps=1, optim__warmup_steps=0)
    (record,) = steps(tmp_path / "out")
    assert record["attention"] == 0 and record["grad_norm"] < 1e-10


@pytest.mark.parametrize(
    "attention, changes, words",
    [
        ({"weight": 0}, {}, r"loss.attention.weight: found 0, expected a number > 0"),
        ({"layers": [[0, 1]]}, {}, r"loss.attention.layers: found layer 0, the embeddings"),
        ({"heads": "mean", "what": "relations"}, {}, r"loss.attention.heads: belongs to what: maps, but what is relations"),
        ({"relation_heads": 4}, {}, r"loss.attention.relation_heads: belongs to what: relations, but what is maps"),
        ({}, {"teacher": None}, r"loss.attention: set with no teacher"),
        ({}, {"teacher": [{"model": "a"}, {"model": "b"}]}, r"loss.attention: set with 2 teachers"),
        ({}, {"teacher.cache.path": "cache"}, r"loss.attention: set with teacher.cache, and a cache holds nothing"),
        ({}, {"student.attention": "eager"}, r"loss.attention: set with student.attention"),
        ({}, {"teacher.attention": "sdpa"}, r"loss.attention: set with teacher.attention"),
        ({}, {"data.teacher_context": "Think."}, r"loss.attention: set with data.teacher_context"),
    ],
    ids=str,
)
def test_settings_that_contradict_are_refused(make_recipe, attention, changes, words):
    with pytest.raises(UserError, match=words):
        make_recipe(**changes, **{"loss.attention": attention})


@pytest.mark.parametrize(
    "attention, words",
    [
        ({"layers": [[1, 1], [2, 3]]}, "loss.attention.layers: found layer 3 of the teacher, which has 2 layers"),
        ({"layers": [[3, 1]]}, "loss.attention.layers: found layer 3 of the student, which has 2 layers"),
        ({"layers": [[1, 1], [1, 1]]}, r"loss.attention.layers: found the pair \[1, 1\] twice"),
        ({}, "found maps, but the student has 2 heads and the teacher 3; set loss.attention.heads: mean, or what: relations"),
    ],
    ids=str,
)
def test_what_two_models_do_not_have_is_refused_before_one_is_loaded(make_recipe, world, tmp_path, attention, words):
    changes = {}
    if not attention:
        shutil.copytree(world / "teacher", tmp_path / "three")
        config = json.loads((tmp_path / "three/config.json").read_text()) | {"num_attention_heads": 3, "num_key_value_heads": 3}
        (tmp_path / "three/config.json").write_text(json.dumps(config))
        changes = {"teacher": [{"model": str(tmp_path / "three")}]}
    with pytest.raises(UserError, match=words):
        prepare(make_recipe(**changes, **{"loss.attention": attention}))


def test_rows_with_a_context_for_the_teacher_are_refused(make_recipe, tmp_path):
    rows = [{"instruction": "Say 1", "output": "Yes.", "teacher_context": "Be sure."}, {"instruction": "Say 2", "output": "No."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train.path": str(tmp_path / "rows.jsonl"), "loss.attention": {}}
    with pytest.raises(UserError, match="loss.attention: rows have a teacher_context"):
        prepare(make_recipe(**changes))


def test_relation_heads_that_do_not_divide_the_widths_are_refused_before_a_model_is_loaded(make_recipe, world):
    for teacher in ({}, {"teacher": [{"model": str(world / "adapter")}]}):
        recipe = make_recipe(**teacher, **{"loss.attention": {"what": "relations"}})
        with pytest.raises(UserError, match=r"found 32, .*\(16, 16, 16 and 24, 24, 24 in student and teacher\); these do: 1, 2, 4, 8$"):
            prepare(recipe)


@pytest.mark.parametrize(
    "layers, student, teacher, pairs",
    [
        ("last", 3, 4, ((3, 4),)),
        ("middle", 3, 4, ((2, 2),)),
        ("middle", 4, 12, ((2, 6),)),
        ("uniform", 4, 12, ((1, 3), (2, 6), (3, 9))),
        ("uniform", 3, 4, ((1, 1), (2, 3))),
        ("uniform", 6, 4, ((1, 1), (2, 1), (3, 2), (4, 3), (5, 3))),
        (((2, 1), (1, 4)), 3, 4, ((2, 1), (1, 4))),
    ],
    ids=str,
)
def test_pairs_of_layers(layers, student, teacher, pairs):
    assert layer_pairs(layers, student, teacher) == pairs


def test_uniform_needs_a_layer_before_the_last():
    with pytest.raises(ValueError, match="found uniform, and the student has one layer; use last"):
        layer_pairs("uniform", 1, 4)


def test_pairs_are_averaged():
    view, generator = View({"input_ids": torch.zeros(2, 5, dtype=torch.long)}, torch.tensor([1, 4, 7])), torch.Generator().manual_seed(0)
    made = [AttentionInputs(*(torch.randn(2, 2, 5, 4, generator=generator) for _ in range(3)), 0.5, None) for _ in range(4)]
    batch = Batch(torch.zeros(3), torch.zeros(3), view, view, (Example("", 2, 0), Example("", 1, 0)))
    outputs = StudentOutputs(torch.zeros(3, 4), None, attention={1: made[0], 2: made[1]})
    signal = Dense(torch.zeros(3, 4), None, attention={3: made[2], 1: made[3]})
    for heads, pair in ((None, map_divergence), (2, functools.partial(relation_divergence, heads=2))):
        term = AttentionTerm(0.5, ((1, 3), (2, 1)), relation_heads=heads)
        expected = (pair(made[0], made[2], view, [2, 1])[1] + pair(made[1], made[3], view, [2, 1])[1]) / 2
        loss = term(outputs, signal, batch)
        torch.testing.assert_close(loss.rows["attention"], expected)
        torch.testing.assert_close(loss.total, 0.5 * expected.sum())
        assert (term.student_taps.attention, term.teacher_taps.attention, term.teacher_taps.queries) == ({1, 2}, {3, 1}, heads is not None)


def test_a_micro_batch_without_targets_and_one_with_another_view():
    view = View({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, torch.zeros(0, dtype=torch.long))
    outputs, term = StudentOutputs(torch.zeros(0, 4), None), AttentionTerm(1.0, ((1, 1),))
    assert term(outputs, Dense(torch.zeros(0, 4), None), Batch(torch.zeros(0), torch.zeros(0), view, view)).total == 0
    with pytest.raises(UserError, match="teacher_context"):
        term(outputs, Dense(torch.zeros(0, 4), None), Batch(torch.zeros(0), torch.zeros(0), view, View(view.inputs, view.rows_N)))


def test_memory_that_runs_out_halves_the_chunks(monkeypatch):
    term, asked = AttentionTerm(1.0, ((1, 1),)), []
    view = View({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, torch.tensor([1]))
    batch, one = (
        Batch(torch.zeros(1), torch.zeros(1), view, view, (Example("", 1, 0),)),
        AttentionInputs(*torch.ones(3, 1, 2, 3, 4), 1.0, None),
    )
    monkeypatch.setattr(attention, "grouped", lambda view, counts, most, long: asked.append((most, long)) or [])
    said = []
    while True:
        term(StudentOutputs(torch.zeros(1, 4), None, attention={1: one}), Dense(torch.zeros(1, 4), None, attention={1: one}), batch)
        if not (now := term.halve_chunks(100, "cpu", 128)):
            break
        said.append(now)
    assert said == [f"attention in chunks of {kib} KiB" for kib in ("1,024", "512", "256")]
    assert asked == [(2**n, 2 ** (n + 4)) for n in (18, 17, 16, 15)]  # pairs of a target and a position, of 2 heads in 4 bytes


def test_beside_hidden_states(trained, tmp_path):
    """Both are read in one pass, and both are terms."""
    trained("out", **MAPS, train__max_steps=2, loss__features={"weight": 0.2, "init": "xavier", "layers": "last"})
    (first, _) = steps(tmp_path / "out")
    expected = 0.5 * first["ce"] + 0.5 * first["kd"] + 0.2 * first["features"] + 0.3 * first["attention"]
    assert first["loss"] == pytest.approx(expected, rel=1e-9) and min(first["features"], first["attention"]) > 0
