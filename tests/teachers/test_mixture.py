"""Several teachers: what they say together, by hand and in float64; who answers which rows."""

import json

import pytest
import torch

from llmkd.batch import Batch
from llmkd.data.collate import collate, select_examples
from llmkd.data.examples import TokenExamples
from llmkd.head import Head
from llmkd.losses.divergences import forward_kl, generalized_jsd, reverse_kl
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.signals import TEACHER_METRICS, Dense
from llmkd.teachers.live import LiveTeacher
from llmkd.teachers.mixture import Mixture, Routed
from llmkd.training.prepare import prepare
from tests.conftest import distance

N, V, H = 11, 13, 5
WEIGHTS = [3.0, 1.0, 2.0]


def linear(seed: int) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(H, V, bias=False, dtype=torch.float64).requires_grad_(False)


class Says:
    """A teacher whose hidden states follow from the batch's input ids, whatever else is in the batch."""

    metrics = TEACHER_METRICS

    def __init__(self, seed: int):
        self.head, self.seen = Head(linear(seed), V), []

    def __call__(self, batch: Batch) -> Dense:
        view = batch.teacher
        self.seen.append(view.inputs["input_ids"].tolist())
        ids_N = view.inputs["input_ids"].flatten()[view.rows_N]
        angles_NH = (ids_N[:, None].double() + 1) * torch.arange(1, H + 1)
        return Dense(torch.sin(angles_NH), self.head)


def data(teacher_index=None) -> TokenExamples:
    lengths = [4, 7, 3, 6, 5]
    offsets = torch.tensor([0, *lengths]).cumsum(0).numpy()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (sum(lengths),), generator=generator, dtype=torch.int32).numpy()
    marks = torch.ones(sum(lengths), dtype=torch.bool).numpy()
    marks[offsets[:-1]] = False
    marks[[5, 12, 19]] = False
    encoded = TokenExamples(ids, marks, offsets, torch.arange(5).numpy())
    if teacher_index is not None:
        encoded.teacher_index[:] = teacher_index
    return encoded


@pytest.fixture
def batch() -> Batch:
    return collate(data(), [3, 1, 0], 0)


def spoken(teachers: list, batch: Batch, T: float = 1.0) -> torch.Tensor:
    """[teachers, N, V] probabilities at temperature T."""
    return torch.stack([(t.head.logits(t(batch).hidden_NH) / T).softmax(-1) for t in teachers])


def by_hand(p_PNV: torch.Tensor, w_PN: torch.Tensor, combine: str) -> torch.Tensor:
    if combine == "probabilities":
        return (w_PN[..., None] * p_PNV).sum(0)
    product_NV = (p_PNV ** w_PN[..., None]).prod(0)
    return product_NV / product_NV.sum(-1, keepdim=True)


def shares(teachers: list, batch: Batch, confidence: bool) -> torch.Tensor:
    w_PN = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None].expand(-1, batch.num_targets)
    if confidence:
        w_PN = w_PN * spoken(teachers, batch).gather(-1, batch.labels_N.expand(len(teachers), -1)[..., None])[..., 0]
    return w_PN / w_PN.sum(0)


def student_log_probs(batch: Batch, T: float) -> torch.Tensor:
    torch.manual_seed(9)
    return (torch.randn(batch.num_targets, V, dtype=torch.float64) / T).log_softmax(-1)


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("combine", ["probabilities", "log_probabilities", "divergences"])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, generalized_jsd])
def test_what_they_say_together_is_what_the_formula_says(batch, T, confidence, combine, divergence):
    teachers = [Says(seed) for seed in (1, 2, 3)]
    signal = Mixture(teachers, WEIGHTS, combine, confidence)(batch)
    log_q = student_log_probs(batch, T)
    w_PN, p_PNV = shares(teachers, batch, confidence), spoken(teachers, batch, T)
    if combine == "divergences":
        expected = sum(w * divergence(log_q, p.log()) for w, p in zip(w_PN, p_PNV, strict=True))
    else:
        expected = divergence(log_q, by_hand(p_PNV, w_PN, combine).log())
    for rows in (slice(None), slice(3, 8), torch.tensor([5, 0, 7])):
        torch.testing.assert_close(signal.divergence(divergence, rows, log_q[rows], T), expected[rows], rtol=1e-10, atol=1e-12)
    if combine != "divergences":
        torch.testing.assert_close(signal.log_probs(slice(2, 6), log_q[2:6], T).exp(), by_hand(p_PNV, w_PN, combine)[2:6])
        own = by_hand(spoken(teachers, batch), w_PN, combine).gather(-1, batch.labels_N[:, None])[:, 0]
        torch.testing.assert_close(signal.label_log_probs(slice(None), batch.labels_N), own.log(), rtol=1e-10, atol=1e-12)


def test_several_times_the_same_teacher_are_that_teacher(batch):
    one = Says(1)
    log_q = student_log_probs(batch, 1)
    alone = one(batch).divergence(forward_kl, slice(None), log_q)
    for combine in ("probabilities", "log_probabilities", "divergences"):
        together = Mixture([one, one], [1.0, 5.0], combine)(batch).divergence(forward_kl, slice(None), log_q)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("combine", ["probabilities", "divergences"])
def test_the_gradient_and_the_chunks_of_the_fused_head_are_those_of_the_formula(batch, combine):
    teachers = [Says(seed) for seed in (1, 2)]
    signal = Mixture(teachers, WEIGHTS[:2], combine)(batch)
    head = Head(linear(7), V)
    hidden = torch.randn(batch.num_targets, H, dtype=torch.float64, requires_grad=True)
    objective = Objective(0.7, 2.0, reverse_kl)
    got = []
    for chunk in (1, 4, 100):
        total, _ = fused_loss(hidden, head, batch.labels_N, objective, signal, chunk)
        got.append(torch.autograd.grad(total, hidden)[0])
    log_q, w, p = (head.logits(hidden) / 2).log_softmax(-1), torch.tensor([0.75, 0.25], dtype=torch.float64), spoken(teachers, batch, 2.0)
    kd = (
        reverse_kl(log_q, (w[:, None, None] * p).sum(0).log())
        if combine == "probabilities"
        else w @ torch.stack([reverse_kl(log_q, x.log()) for x in p])
    )
    ce = torch.nn.functional.cross_entropy(head.logits(hidden), batch.labels_N, reduction="sum")
    (expected,) = torch.autograd.grad(0.3 * ce + 0.7 * 4 * kd.sum(), hidden)
    for gradient in got:
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# ---- who answers what


@pytest.mark.parametrize("packing", [False, True])
def test_each_teacher_is_asked_only_its_own_rows(packing):
    encoded = data([0, 1, -1, 0, 1])
    batch = collate(encoded, [3, 1, 0, 2, 4], 0, packing)
    first, second = Says(1), Says(2)
    together = Mixture([first, second], [1.0, 1.0])
    signal = Routed(together, [first, second])(batch)
    asked = {name: {i for ids in says.seen for row in ids for i in row} for name, says in (("first", first), ("second", second))}
    assert asked["first"] and asked["second"]
    tokens = [sum(len(row) for ids in says.seen for row in ids) for says in (first, second)]
    if packing:  # without padding the count is exact: one's own rows and those of all
        lengths = [int(encoded.example(i)[1].nonzero()[0][-1]) for i in range(5)]
        assert tokens == [lengths[0] + lengths[3] + lengths[2], lengths[1] + lengths[4] + lengths[2]]
    log_q = student_log_probs(batch, 1)
    whose = torch.from_numpy(encoded.teacher_index)[batch.example_N]
    each = {k: t(batch).divergence(forward_kl, slice(None), log_q) for k, t in ((0, first), (1, second), (-1, together))}
    expected = torch.stack([each[int(k)][n] for n, k in enumerate(whose)])
    for rows in (slice(None), slice(2, 9), slice(6, 7)):
        torch.testing.assert_close(signal.divergence(forward_kl, rows, log_q[rows]), expected[rows])
        torch.testing.assert_close(
            signal.label_log_probs(rows, batch.labels_N[rows]), signal.log_probs(rows).gather(-1, batch.labels_N[rows, None])[:, 0]
        )


@pytest.mark.parametrize("packing", [False, True])
def test_a_part_of_a_batch_is_the_batch_of_that_part(packing):
    encoded = data()
    whole = collate(encoded, [3, 1, 0, 2], 0, packing)
    part, alone = select_examples(whole, [True, False, False, True]), collate(encoded, [3, 2], 0, packing)
    assert torch.equal(part.labels_N, alone.labels_N)
    assert torch.equal(part.example_N, alone.example_N)
    assert part.examples == alone.examples
    assert torch.equal(
        part.teacher.inputs["input_ids"].flatten()[part.teacher.rows_N], alone.teacher.inputs["input_ids"].flatten()[alone.teacher.rows_N]
    )
    if packing:
        assert {k: v.tolist() for k, v in part.teacher.inputs.items()} == {k: v.tolist() for k, v in alone.teacher.inputs.items()}


# ---- whole runs


@pytest.fixture
def two(world, make_recipe, tmp_path):
    """A recipe with two sources and two teachers, of which the changes say more."""

    def make(out="out", **changes):
        rows = (world / "train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "a.jsonl").write_text("".join(rows[:20]))
        (tmp_path / "b.jsonl").write_text("".join(rows[20:]))
        sources = [{"path": str(tmp_path / name), "teacher": name[0]} for name in ("a.jsonl", "b.jsonl")]
        teachers = [{"name": "a", "model": str(world / "adapter")}, {"name": "b", "model": str(world / "stranger")}]
        return make_recipe(out, **({"data__train": sources, "teacher": teachers, "validation__teacher_check": 0} | changes))

    return make


def weights_after(recipe) -> dict:
    from llmkd.training.run import run
    from tests.conftest import weights

    run(recipe)
    from pathlib import Path

    return weights(Path(recipe.output_dir))


@pytest.mark.slow
def test_a_run_of_two_teachers_each_on_its_rows_differs_from_either_alone_and_does_not_depend_on_packing(two, world):
    routed = weights_after(two("routed"))
    packed = weights_after(two("packed", data__packing=True, train__micro_batch_size=3))
    assert distance(routed, packed) < 1e-9
    alone = [{"model": str(world / "adapter")}, {"model": str(world / "stranger")}]
    plain = [{"path": s.path} for s in two().data.train]
    for k in range(2):
        assert distance(routed, weights_after(two(f"alone{k}", teacher=alone[k], data__train=plain))) > 1e-4


def test_rows_that_name_no_teacher_are_for_all_of_them_though_some_have_no_name(two, world):
    bare = [{"model": str(world / "adapter")}, {"model": str(world / "stranger")}]
    plain = [{"path": s.path} for s in two().data.train]
    for teachers in (bare, [bare[0] | {"name": "a"}, bare[1]]):
        assert prepare(two(teacher=teachers, data__train=plain)).train.teacher_index.tolist() == [-1] * 37
    named = prepare(two(teacher=[bare[0], bare[1] | {"name": "b"}], data__train=[plain[0], plain[1] | {"teacher": "b"}])).train
    assert named.teacher_index.tolist() == [-1] * 20 + [1] * 17


def test_a_teacher_known_by_samples_beside_one_with_rows_of_its_own(two, world, tmp_path):
    """The gate and the held-out rows ask each micro-batch of whoever it is for: the CE is told of all of them."""
    from llmkd.commands.cache import cache
    from llmkd.training.run import run

    kept = {"model": str(world / "stranger"), "cache": {"path": str(tmp_path / "cache"), "kind": "sampled", "num_samples": 5}}
    plain = [{"path": s.path} for s in two().data.train]
    changes = {"data__train": [plain[0] | {"teacher": "a"}, plain[1]], "data__validation": plain[0] | {"limit": 9, "teacher": "a"}}
    recipe = two(teacher=[{"name": "a", "model": str(world / "adapter")}, kept], validation__teacher_check=37, **changes)
    cache(recipe)
    found = run(recipe)["validation"]
    alone = run(
        two(
            "alone",
            teacher={"model": str(world / "adapter")},
            **changes | {"data__train": plain[0], "data__validation": plain[0] | {"limit": 9}},
        )
    )
    assert found["teacher_ce"] == pytest.approx(alone["validation"]["teacher_ce"], abs=1e-9)


def test_two_of_the_same_teacher_train_as_one_does(two, world, make_recipe):
    same = [{"model": str(world / "adapter"), "weight": w} for w in (1.0, 3.0)]
    plain = [{"path": s.path} for s in two().data.train]
    together = weights_after(two("together", teacher=same, data__train=plain, mixture__combine="divergences"))
    assert distance(together, weights_after(two("one", teacher=same[0] | {"weight": 1.0}, data__train=plain))) < 1e-9


def test_the_held_out_figures_are_those_of_the_ensemble(two, world):
    from llmkd.training.run import run

    teachers = [{"model": str(world / "adapter")}, {"model": str(world / "stranger")}]
    recipe = two(
        teacher=teachers,
        data__train={"path": str(world / "train.jsonl")},
        data__validation={"path": str(world / "held.jsonl")},
        train__max_steps=2,
    )
    found = run(recipe)["before"]
    from llmkd.models.load import LoadContext, load_teacher

    prepared = prepare(recipe)
    live = [LiveTeacher(load_teacher(one, LoadContext(prepared.vocab, "cpu"))) for one in recipe.teacher]
    batch = collate(prepared.validation, list(range(len(prepared.validation))), 0)
    p = torch.stack([t(batch).log_probs(slice(None)).exp() for t in live]).mean(0)
    assert found["teacher_ce"] == pytest.approx(float(-p.gather(-1, batch.labels_N[:, None]).log().mean()), abs=1e-9)
    assert found["teacher_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-9)


def test_held_out_rows_say_which_part_of_their_own_teachers_distribution_was_known(tmp_path):
    """A row of one teacher says it of that one, a row of all says it where it is so of any."""
    from types import SimpleNamespace

    import numpy as np

    from llmkd.training.student_run import StudentRun
    from llmkd.training.validate import HeldOut

    examples = SimpleNamespace(teacher_index=[0, 1, -1], student_hash=str)
    teachers = [SimpleNamespace(part="top 8 tokens"), SimpleNamespace(part=None)]
    prepared = SimpleNamespace(validation=examples, validation_places="abc", teachers=teachers)
    student = SimpleNamespace(prepared=prepared, folder=SimpleNamespace(path=tmp_path))
    for metric, parts in (("forward_kl", ["top 8 tokens", None, "top 8 tokens"]), ("ce", [None] * 3)):
        StudentRun.write_held_out(student, HeldOut(np.ones(3, int), {metric: np.zeros(3)}))
        assert [json.loads(line).get("teacher_part") for line in (tmp_path / "held_out.jsonl").read_text().splitlines()] == parts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": []}, ["teacher: found an empty list"]),
        ({"teacher": [{"name": "a", "model": "x"}, {"name": "a", "model": "y"}]}, ["teacher.1.name: found 'a' twice"]),
        ({"teacher": [{"name": "a", "model": "x"}, {"model": "y"}]}, ["data.train.1.teacher: found 'b'", "the names are: a"]),
        (
            {"mixture": {"combine": "divergences"}, "teacher": {"name": "a", "model": "x"}, "data__train": {"path": "x"}},
            ["mixture: set, but there are not several"],
        ),
        ({"teacher": [{"name": "a", "model": "x"}, {"name": "b", "weight": 0, "model": "y"}]}, ["teacher.1.weight: found 0", ">= 1e-06"]),
        ({"teacher": [{"name": "a", "model": "x"}, {"name": "b"}]}, ["teacher.1.model: not given"]),
    ],
)
def test_mistakes_with_several_teachers_are_named(two, changes, words):
    from llmkd.errors import UserError

    with pytest.raises(UserError) as info:
        two(**changes)
    assert all(word in str(info.value) for word in words), json.dumps(info.value.problems)
