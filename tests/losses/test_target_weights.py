"""Rules that weigh targets: scores, weights and gradients written out as loops in float64; and what a rule is asked, when, and how often."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import llmkd
from llmkd.batch import Batch, Example, View
from llmkd.config.target_weights import RULES
from llmkd.config.target_weights import Keep as KeepSettings
from llmkd.config.target_weights import TargetWeights as Settings
from llmkd.errors import ArgumentError
from llmkd.head import Head
from llmkd.losses import fused
from llmkd.losses.divergences import make_divergence
from llmkd.losses.keep import Keep
from llmkd.losses.objective import Objective
from llmkd.losses.target_weights import TargetWeights
from llmkd.losses.terms import HeadTerm, StudentOutputs
from llmkd.signals import Dense
from llmkd.teachers.mixture import Mixed, RoutedSignal
from llmkd.teachers.sparse import Sampled, TopK
from tests.losses.test_counts import H_T as WIDTH_T
from tests.losses.test_counts import Audit
from tests.losses.test_counts import H as WIDTH
from tests.losses.test_counts import V as WIDE
from tests.losses.test_weights import CE, H_T, KD, N, V, by_loops, case, linear, randn, softmax, weights

PLACES = [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]  # of eleven targets of three examples


def batch(labels, **given) -> Batch:
    view = View({}, torch.arange(N))
    return Batch(labels, labels, view, view, tuple(Example("", n, -1) for n in (4, 1, 6)), weights(**given))


def rule(by: str, **options) -> TargetWeights:
    return TargetWeights.of(Settings(by, **options))


@pytest.fixture
def registered():
    """Registers a rule under a name for one test."""

    def go(name: str, function, **more) -> TargetWeights:
        llmkd.register_target_weights(name, function, **more)
        return rule(name, terms=("ce", "kd"))

    before = dict(RULES)
    yield go
    for name in RULES.keys() - before.keys():
        del RULES[name]
        del llmkd.losses.target_weights._FUNCTIONS[name]


def log_softmax(x):
    top = max(x)
    return [v - top - math.log(sum(math.exp(u - top) for u in x)) for v in x]


def score(by: str, z: list[float], y: list[float], label: int, place: int, half_life: float) -> float:
    """Of one target, from the logits of student and teacher."""
    q, p = softmax(z), softmax(y)
    if by in ("teacher_entropy", "student_entropy"):
        return -sum(v * math.log(v) for v in (p if by == "teacher_entropy" else q)) / math.log(len(z))
    if by == "divergence":
        return math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)) / 2)
    return 1 - q[label] if by == "confidence" else 0.5 ** (place / half_life)


def expected(by, hidden, head, labels, teacher_hidden, teacher_head, power=1.0, invert=False, half_life=64.0) -> list[float]:
    z, y = (a.detach() @ b.detach().T for a, b in ((hidden, head), (teacher_hidden, teacher_head)))
    found = [score(by, z[i].tolist(), y[i].tolist(), int(labels[i]), PLACES[i], half_life) for i in range(N)]
    return [(1 - s if invert else s) ** power for s in found]


@pytest.mark.parametrize("T, chunk", [(1.0, 100), (2.0, 3)])
@pytest.mark.parametrize(
    "by, options",
    [
        ("teacher_entropy", {}),
        ("teacher_entropy", {"invert": True, "power": 2.0}),
        ("student_entropy", {"terms": ("ce", "kd")}),
        ("divergence", {"power": 0.5}),
        ("confidence", {"power": 2.0, "terms": ("ce",)}),
        ("position", {"half_life": 2.5, "terms": ("kd", "ce")}),
        ("position", {"invert": True}),
    ],
    ids=str,
)
def test_weights_and_gradients_are_those_of_loops(by, options, T, chunk):
    """Times the weights of the sources, of which some are 0: those rows are not asked for."""
    hidden, labels, project, signal = case()
    terms, given = options.get("terms", ("kd",)), {name: value for name, value in options.items() if name != "terms"}
    w = expected(by, hidden, project.weight, labels, signal.hidden_NH, signal.head.project.weight, **given)
    own = {"ce": CE, "kd": KD}
    own |= {name: [a * b for a, b in zip(own[name], w, strict=True)] for name in terms}
    total, rows, grad = by_loops(
        hidden, project.weight, labels.tolist(), signal.hidden_NH, signal.head.project.weight, 0.3, T, own["ce"], own["kd"], False
    )
    term = HeadTerm(Objective(0.3, T), chunk, rule=rule(by, **options))
    loss = term(StudentOutputs(hidden, Head(project, V)), signal, batch(labels, ce=CE, kd=KD))
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    for name, values in rows.items():
        assert loss.rows[name].tolist() == pytest.approx(values, rel=1e-9, abs=1e-11), name
    assert loss.weights.keys() == set(terms)
    for name in terms:
        assert loss.weights[name].tolist() == pytest.approx(own[name], rel=1e-9, abs=1e-12), name
    loss.total.backward()
    assert_close(hidden.grad, torch.tensor(grad), rtol=1e-8, atol=1e-9 * float(abs(grad).max()))


def test_several_teachers_are_weighed_by_their_mixture():
    hidden, labels, project, signal = case()
    other = Dense(randn(N, H_T, seed=8), Head(linear(H_T, 9), V))
    mixed = Mixed([signal, other], [math.log(0.25), math.log(0.75)], labels)
    y = [(one.hidden_NH @ one.head.project.weight.T).detach().tolist() for one in (signal, other)]
    p = [[math.log(0.25 * a + 0.75 * b) for a, b in zip(softmax(y[0][i]), softmax(y[1][i]), strict=True)] for i in range(N)]
    z = (hidden @ project.weight.T).detach().tolist()
    parts = [Dense(one.hidden_NH[at], one.head) for one, at in ((signal, [0, 2, 3, 6, 7, 8, 10]), (other, [5, 1, 9, 4]))]
    owner = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0])
    places = torch.tensor([0, 1, 1, 2, 3, 0, 3, 4, 5, 2, 6])
    routed = RoutedSignal(parts, owner, places)
    of_owner = [[math.log(v) for v in softmax(y[owner[i]][i])] for i in range(N)]
    for by in ("teacher_entropy", "divergence"):
        for one, log_p in ((mixed, p), (routed, of_owner)):
            loss = HeadTerm(Objective(0.3, 2.0), 4, rule=rule(by))(StudentOutputs(hidden, Head(project, V)), one, batch(labels))
            assert loss.weights["kd"].tolist() == pytest.approx([score(by, z[i], log_p[i], 0, 0, 1) for i in range(N)], rel=1e-9)


def test_targets_without_a_weight_are_not_multiplied():
    """Of 40 targets of two examples the first ones have no weight by an inverted position, all others none where it falls steeply; eight have
    none for the divergence, and with `keep` the last half of each example counts."""
    project, head_T = (nn.Linear(width, WIDE, bias=False).requires_grad_(False) for width in (WIDTH, WIDTH_T))
    teacher, view, labels, kd = (
        Dense(torch.randn(40, WIDTH_T), Head(head_T, WIDE)),
        View({}, torch.arange(40)),
        torch.arange(40),
        torch.ones(40),
    )
    kd[10:18] = 0
    given = Batch(labels, labels, view, view, (Example("", 12, -1), Example("", 28, -1)), {"kd": kd})
    late = Keep.of(KeepSettings(share=0.5, by="position", invert=True), "loss.keep.by")
    both, steep = {"invert": True, "terms": ("ce", "kd")}, {"half_life": 0.01, "power": 100.0, "terms": ("ce", "kd")}
    for options, keep, of_student, of_teacher in (
        ({"invert": True}, None, 40, 31),  # the first target of the second example is one of the eight
        (both, None, 38, 31),
        (steep, None, 2, 1),
        (both, late, 20, 18),
        (steep, late, 0, 0),
    ):
        student = StudentOutputs(torch.randn(40, WIDTH).requires_grad_(), Head(project, WIDE))
        term = HeadTerm(Objective(0.5), 10, rule=rule("position", **options), keep=keep)
        with Audit() as audit:
            loss = term(student, teacher, term.select(student, teacher, given))
        assert audit.products == Counter({WIDTH: 2 * of_student, WIDTH_T: of_teacher}), options
        loss.total.backward()
        assert student.hidden_NH.grad.abs().sum(1).count_nonzero() == of_student


@pytest.mark.parametrize("confidence", [False, True])
def test_the_heads_of_several_teachers_are_multiplied_once(confidence):
    """By the rule and by the divergence, at another temperature, and for the weight of each teacher; 40 targets, of which 8 have no weight."""
    teachers = [Dense(torch.randn(40, WIDTH_T), Head(nn.Linear(WIDTH_T, WIDE, bias=False).requires_grad_(False), WIDE)) for _ in range(2)]
    student = StudentOutputs(torch.randn(40, WIDTH).requires_grad_(), Head(nn.Linear(WIDTH, WIDE, bias=False).requires_grad_(False), WIDE))
    view, labels, kd = View({}, torch.arange(40)), torch.arange(40), torch.ones(40)
    kd[10:18] = 0
    given = Batch(labels, labels, view, view, (Example("", 40, -1),), {"kd": kd})
    mixed, half = Mixed(teachers, [math.log(0.5)] * 2, labels, confidence=confidence), torch.arange(20)
    routed = RoutedSignal([Dense(one.hidden_NH[:20], one.head) for one in teachers], torch.arange(2).repeat(20), half.repeat_interleave(2))
    for signal, each in ((mixed, 2), (routed, 1)):
        with Audit() as audit:
            loss = HeadTerm(Objective(0.5, 2.0), 10, rule=rule("divergence"))(student, signal, given)
        assert audit.products == {WIDTH: 2 * 40, WIDTH_T: each * 32}
    assert loss.total.isfinite()


def test_what_a_record_holds_is_used_as_it_is():
    """The entropy of a top-k record and of samples is that of the whole distribution, at temperature 1, whatever they keep of it."""
    hidden, labels, project, signal = case()
    log_p = signal.log_probs(slice(None)).detach()
    entropies = [-sum(math.exp(v) * v for v in row) for row in log_p.tolist()]
    narrow = TopK.of(log_p, 2, labels)
    drawn = torch.multinomial(log_p.exp(), 5, True, generator=torch.Generator().manual_seed(1))
    sampled = Sampled(drawn, V, 1.0, narrow.entropy_N, narrow.label_log_p_N, narrow.entropy_N)
    for one in (narrow, sampled):
        loss = HeadTerm(Objective(0.3), 4, rule=rule("teacher_entropy"))(StudentOutputs(hidden, Head(project, V)), one, batch(labels))
        assert loss.weights["kd"].tolist() == pytest.approx([h / math.log(V) for h in entropies], rel=1e-9)


@pytest.mark.parametrize("T, divergence", [(1.0, "forward_kl"), (3.0, "forward_kl"), (3.0, "generalized_jsd"), (3.0, "total_variation")])
def test_a_rule_of_ones_changes_no_bit(registered, T, divergence):
    """In float32, as models are trained, and with numbers that are no powers of two."""
    ones = registered("ones", lambda labels_n, log_p_nV, log_q_nV, position_n: torch.ones(len(labels_n)))
    hidden, labels, project, signal = case()
    hidden, project = hidden.detach().float().requires_grad_(), project.float().requires_grad_()
    signal = Dense(signal.hidden_NH.float(), Head(signal.head.project.float(), V))
    found = []
    for one in (None, ones):
        term = HeadTerm(Objective(0.3, T, make_divergence(divergence)), 4, rule=one)
        loss = term(StudentOutputs(hidden, Head(project, V)), signal, batch(labels))
        found.append([loss.total, *loss.rows.values(), *torch.autograd.grad(loss.total, [hidden, project.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_rule_of_ones_own_sees_chunks_and_no_gradient(registered):
    """What it is given, at most a chunk at a time; its scores are clamped; what it returns wrongly is said."""
    seen = []

    def mine(labels_n, log_p_nV, log_q_nV, position_n):
        seen.append((labels_n.tolist(), log_p_nV, log_q_nV, position_n.tolist()))
        return 3 * log_q_nV.exp()[:, 0] - 1

    hidden, labels, project, signal = case()
    own = registered("mine", mine)
    loss = HeadTerm(Objective(0.5, 2.0), 4, rule=own)(StudentOutputs(hidden, Head(project, V)), signal, batch(labels))
    log_q = (hidden @ project.weight.T).log_softmax(-1)
    assert [len(one[0]) for one in seen] == [4, 4, 3] and sum((one[3] for one in seen), []) == PLACES
    assert all(one[1] is None and not one[2].requires_grad for one in seen)
    assert_close(torch.cat([one[2] for one in seen]), log_q.detach())
    assert_close(loss.weights["ce"], (3 * log_q.exp()[:, 0] - 1).clamp(0, 1).detach())
    assert not loss.weights["kd"].requires_grad
    wide = registered("wide", lambda labels_n, log_p_nV, log_q_nV, position_n: log_p_nV, needs_teacher=True)
    with pytest.raises(ArgumentError, match=r"loss\.target_weights\.by: wide returned \(4, 13\), expected one score for each of 4 targets"):
        HeadTerm(Objective(0.5), 4, rule=wide)(StudentOutputs(hidden, Head(project, V)), signal, batch(labels))
    first = registered("first", lambda labels_n, log_p_nV, log_q_nV, position_n: log_p_nV[:, 0].exp(), needs_teacher=True)
    with pytest.raises(ArgumentError, match="first reads the teacher, which some targets do not have"):
        HeadTerm(Objective(0.5), 4, rule=first)(StudentOutputs(hidden, Head(project, V)), signal, batch(labels, kd=[0.0] + [1.0] * 10))
    with pytest.raises(ArgumentError, match="a rule already"):
        llmkd.register_target_weights("position", mine)


def test_a_score_that_is_not_a_number_is_not_hidden(registered):
    nan = registered("nan", lambda labels_n, log_p_nV, log_q_nV, position_n: torch.full((len(labels_n),), math.nan))
    hidden, labels, project, signal = case()
    loss = HeadTerm(Objective(0.5), 4, rule=nan)(StudentOutputs(hidden, Head(project, V)), signal, batch(labels))
    assert loss.total.isnan() and loss.rows["kd"].isnan().all()


def test_no_weight_where_the_divergence_is_infinite(registered):
    """The teacher rules out tokens in row 1, where the rule gives no weight."""
    hidden, labels, project, _ = case()
    log_p = randn(N, V, seed=4).log_softmax(-1)
    log_p[1, 3] = -math.inf

    class Known:
        full_distribution = True

        def log_probs(self, rows, log_q_nV=None, temperature=1.0):
            return log_p[rows]

    skip = registered("skip", lambda labels_n, log_p_nV, log_q_nV, position_n: (position_n != 1).float())
    for name in ("reverse_kl", "skewed_reverse_kl"):
        term = HeadTerm(Objective(0.5, 1.0, make_divergence(name)), 4, rule=skip)
        loss = term(StudentOutputs(hidden, Head(project, V)), Known(), batch(labels))
        assert loss.total.isfinite() and torch.autograd.grad(loss.total, hidden)[0].isfinite().all(), name


def test_the_kernel_is_used_only_where_weights_are_known_before(monkeypatch):
    asked = []
    monkeypatch.setattr(fused, "kernels_run", lambda device: asked.append(device) or False)
    hidden, labels, project, signal = case()
    hidden, project = hidden.detach().float(), project.float().requires_grad_(False)
    signal = Dense(signal.hidden_NH.float(), Head(signal.head.project.float(), V))
    for by, times in (("divergence", 0), ("position", 3)):
        asked.clear()
        HeadTerm(Objective(0.5), 4, rule=rule(by))(StudentOutputs(hidden, Head(project, V)), signal, batch(labels))
        assert len(asked) == times, by
    student = fused._Product(Head(project, V), hidden[:4], fused.Tiles(V, hidden.device))
    assert fused._choose_backend(Objective(0.5), student, signal, rule("divergence"))[1] == (
        "forward_kl weighed by divergence, by PyTorch, with its gradient in closed form"
    )
