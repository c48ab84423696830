"""A share of the targets: which ones, by loops in float64; what is computed for them, and what is not."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmkd.batch import Batch, Example, View
from llmkd.config.fields import part_of
from llmkd.config.target_weights import Keep as Settings
from llmkd.config.target_weights import TargetWeights as Weights
from llmkd.config.target_weights import chosen_by
from llmkd.head import Head
from llmkd.losses.keep import Keep
from llmkd.losses.long_horizon import LongHorizonTerm
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm, StudentOutputs
from llmkd.signals import Dense
from llmkd.teachers.sparse import TopK
from tests.losses.test_counts import H_T as TEACHER_WIDTH
from tests.losses.test_counts import Audit
from tests.losses.test_counts import H as WIDTH
from tests.losses.test_counts import V as WIDE
from tests.losses.test_target_weights import PLACES, batch, registered, rule, score  # noqa: F401  a fixture
from tests.losses.test_weights import CE, KD, N, V, by_loops, case

EXAMPLES = (4, 1, 6)  # targets of those in `batch`


def keep(share: float, by: str, invert: bool = False) -> Keep:
    return Keep.of(Settings(share=share, by=by, invert=invert), "loss.keep.by")


def best(scores: list[float], share: float, invert: bool = False) -> list[int]:
    """The indices of the targets that are kept, one example after another."""
    found, start = [], 0
    for n in EXAMPLES:
        most = math.ceil(round(share * n, 9))
        own = sorted(range(start, start + n), key=lambda i: (scores[i] if invert else -scores[i], i))
        found += own[:most]
        start += n
    return sorted(found)


def scored(by: str, hidden, project, signal, labels) -> list[float]:
    z, y = ((x @ head.weight.T).detach().tolist() for x, head in ((hidden, project), (signal.hidden_NH, signal.head.project)))
    return [score(by, z[i], y[i], int(labels[i]), PLACES[i], 64.0) for i in range(N)]


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("by", ["teacher_entropy", "student_entropy", "divergence", "confidence", "position"])
def test_the_loss_and_its_gradient_are_those_of_the_kept_targets(by, invert):
    """With the weights of sources, of which some are 0, and a rule for what is left."""
    for share in (0.5, 0.3):
        hidden, labels, project, signal = case()
        mine = best(scored(by, hidden, project, signal, labels), share, invert)
        assert 0 < len(mine) < N
        of_rule = scored("confidence", hidden, project, signal, labels)
        ce, kd = ([w if i in mine else 0.0 for i, w in enumerate(own)] for own in (CE, KD))
        kd = [w * s for w, s in zip(kd, of_rule, strict=True)]
        total, rows, grad = by_loops(
            hidden, project.weight, labels.tolist(), signal.hidden_NH, signal.head.project.weight, 0.3, 2.0, ce, kd, False
        )
        term = HeadTerm(Objective(0.3, 2.0), 4, rule=rule("confidence"), keep=keep(share, by, invert))
        student, given = StudentOutputs(hidden, Head(project, V)), batch(labels, ce=CE, kd=KD)
        selected = term.select(student, signal, given)
        assert selected.kept.tolist() == mine and term.share == share
        loss = term(student, signal, selected)
        assert loss.total.item() == pytest.approx(total, rel=1e-9)
        for name, values in rows.items():
            assert loss.rows[name].tolist() == pytest.approx(values, rel=1e-9, abs=1e-11), name
        assert loss.weights["kd"].tolist() == pytest.approx(kd, rel=1e-9, abs=1e-12)
        assert selected.counting("ce").tolist() == pytest.approx(ce)
        loss.total.backward()
        assert_close(hidden.grad, torch.tensor(grad), rtol=1e-8, atol=1e-9 * float(abs(grad).max()))


def test_a_kept_target_is_computed_as_without():
    """Its loss and gradient do not depend on what else is kept. In float32, and with no weights."""
    hidden, labels, project, signal = case()
    hidden, project = hidden.detach().float().requires_grad_(), project.float().requires_grad_(False)
    signal, found = Dense(signal.hidden_NH.float(), Head(signal.head.project.float(), V)), []
    for one in (None, keep(0.5, "position")):
        term, student = HeadTerm(Objective(0.3, 2.0), 100, keep=one), StudentOutputs(hidden, Head(project, V))
        loss = term(student, signal, term.select(student, signal, batch(labels)))
        found.append((loss.rows, torch.autograd.grad(loss.total, hidden)[0]))
    mine = best([-p for p in PLACES], 0.5)
    assert mine == [0, 1, 4, 5, 6, 7]
    for name in ("ce", "kd"):
        assert_close(found[1][0][name][mine], found[0][0][name][mine], rtol=1e-6, atol=0)
        assert found[1][0][name].count_nonzero() == len(mine)
    assert_close(found[1][1][mine], found[0][1][mine], rtol=1e-5, atol=1e-7)
    assert found[1][1].abs().sum(1).count_nonzero() == len(mine)


def test_equal_scores_are_kept_by_position_and_nan_is_not_hidden(registered):  # noqa: F811
    hidden, labels, project, signal = case()
    values = [1, 1, 0, 1] + [0] + [0, math.nan, 0, 1, 0, math.nan]
    registered("given", lambda labels_n, log_p_nV, log_q_nV, position_n: torch.tensor(values)[seen.pop()])
    for invert, expected in ((False, [0, 1, 4, 6, 8, 10]), (True, [0, 2, 4, 5, 6, 10])):
        seen = [slice(0, N)]
        chosen = keep(0.5, "given", invert)(hidden, Head(project, V), signal, batch(labels), 100)
        assert chosen.kept.tolist() == expected, invert
    registered("flat", lambda labels_n, log_p_nV, log_q_nV, position_n: torch.zeros(len(labels_n)))
    assert keep(0.5, "flat")(hidden, Head(project, V), signal, batch(labels), 3).kept.tolist() == [0, 1, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "n, share, kept", [(30, 0.1, 3), (100, 0.07, 7), (3, 0.5, 2), (1, 1e-9, 1), (0, 0.5, 0), (7, 1.0, 7), (10, 0.7, 7), (7, 1 / 3, 3)]
)
def test_how_many(n, share, kept):
    assert part_of(share, n) == kept


def product_counts(by: str, share=0.5):
    """Of 40 targets of two examples, of which 20 are kept: rows of the heads' products, by width."""
    teacher = Dense(torch.randn(40, TEACHER_WIDTH), Head(nn.Linear(TEACHER_WIDTH, WIDE, bias=False).requires_grad_(False), WIDE))
    student = StudentOutputs(torch.randn(40, WIDTH).requires_grad_(), Head(nn.Linear(WIDTH, WIDE, bias=False).requires_grad_(False), WIDE))
    view = View({}, torch.arange(40))
    given = Batch(torch.arange(40), torch.zeros(40), view, view, (Example("", 12, -1), Example("", 28, -1)))
    term = HeadTerm(Objective(0.5), 10, keep=keep(share, by))
    with Audit() as audit:
        loss = term(student, teacher, term.select(student, teacher, given))
    loss.total.backward()
    assert student.hidden_NH.grad.abs().sum(1).count_nonzero() == 20
    return dict(audit.products)


def test_what_is_not_kept_is_not_multiplied():
    """The student's head: forward and backward for the kept rows; a rule that reads it needs a forward product of all. The teacher's: once."""
    assert product_counts("position") == {WIDTH: 2 * 20, TEACHER_WIDTH: 20}
    assert product_counts("teacher_entropy") == {WIDTH: 2 * 20, TEACHER_WIDTH: 40 + 20}
    assert product_counts("student_entropy") == {WIDTH: 40 + 2 * 20, TEACHER_WIDTH: 20}
    assert product_counts("divergence") == {WIDTH: 40 + 2 * 20, TEACHER_WIDTH: 40 + 20}


def test_the_entropy_of_a_record_needs_no_head():
    hidden, labels, project, signal = case()
    log_p = signal.log_probs(slice(None)).detach()
    expected = best([-sum(math.exp(v) * v for v in row) for row in log_p.tolist()], 0.5)

    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("the student's head is asked")

    chosen = keep(0.5, "teacher_entropy")(hidden, Head(Never(), V), TopK.of(log_p, 2, labels), batch(labels), 4)
    assert chosen.kept.tolist() == expected


def test_where_all_are_kept_nothing_is_asked():
    hidden, labels, project, signal = case()
    view = View({}, torch.arange(N))
    for counts in ((), (1,) * N):
        few = Batch(labels[: len(counts)], labels[: len(counts)], view, view, tuple(Example("", n, -1) for n in counts))
        assert keep(0.5, "student_entropy")(hidden[: len(counts)], None, None, few) is few


def test_the_rule_of_a_number():
    weights = Weights(by="divergence", invert=True)
    assert chosen_by(0.5, None) == Settings(share=0.5, by="student_entropy", invert=False)
    assert chosen_by(0.5, weights) == chosen_by(Settings(share=0.5), weights) == Settings(share=0.5, by="divergence", invert=True)
    assert chosen_by(Settings(share=0.5, by="position"), weights) == Settings(share=0.5, by="position", invert=False)
    assert chosen_by(Settings(share=0.5, invert=False), weights) == Settings(share=0.5, by="divergence", invert=False)


def test_kept_targets_of_a_batch():
    """Those of a part of the loss are also those whose weight there is not 0; they are counted by example, and move with the batch."""
    _, labels, _, _ = case()
    kept = torch.tensor([0, 2, 4, 5, 9, 10])
    one = batch(labels, ce=CE).keeping(kept).to("cpu")
    assert one.carriers("ce").tolist() == [2, 4, 5, 9] and one.carriers("kd").tolist() == kept.tolist()
    assert one.counted(one.carriers("ce")) == [1, 1, 2] and one.counted(slice(0, N)) == list(EXAMPLES)
    np.testing.assert_array_equal(one.only_kept(torch.arange(1, N + 1)), [1, 0, 3, 0, 5, 6, 0, 0, 0, 10, 11])
    plain = batch(labels, ce=CE)
    assert plain.carriers("ce").tolist() == [i for i, w in enumerate(CE) if w] and plain.carriers("kd") == slice(0, N)


def test_what_a_token_leads_to_counts_where_the_token_does():
    """The later tokens of which on_policy.long_horizon sums up the rewards need not count themselves."""
    hidden, labels, project, signal = case()
    term, student, one = LongHorizonTerm(0.5, 0.9, False, 4), StudentOutputs(hidden, Head(project, V)), batch(labels)
    whole = term(student, signal, term.select(student, signal, one)).rows["long_horizon"]
    kept = torch.tensor([0, 2, 5, 8])
    loss = term(student, signal, term.select(student, signal, one.keeping(kept)))
    expected = torch.zeros_like(whole).index_copy(0, kept, whole[kept])
    assert_close(loss.rows["long_horizon"], expected, rtol=1e-12, atol=0)
    assert loss.total.item() == pytest.approx(0.5 * expected.sum().item(), rel=1e-12) and whole[kept].abs().min() > 0
    loss.total.backward()
    assert hidden.grad.abs().sum(1).nonzero().flatten().tolist() == kept.tolist()
