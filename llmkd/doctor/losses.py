"""Checks of the loss: it is 0 for equal models, its value and gradient are those of the textbook, and each target has a term of its own."""

import dataclasses

import torch
from torch import Tensor

from ..batch import Batch, View
from ..config.target_weights import TargetWeights
from ..head import Head
from ..losses.keep import Keep
from ..losses.terms import StudentOutputs
from ..models.language_model import LanguageModel
from ..signals import Signal
from ..teachers.live import LiveTeacher
from . import plain
from .check import BUG, Check, Result, failed, not_asked, passed, short
from .setup import MOST_TARGETS, Setup


def itself(setup: Setup) -> Result:
    """The run's own loss must be 0, with gradient 0, if the student is its own teacher."""
    if not setup.distils:
        return not_asked("the recipe's loss has no teacher (loss.kd_ratio is 0)")
    batch = setup.batch()
    batch = Batch(batch.labels_N, batch.example_N, batch.student, batch.student, batch.examples)
    hidden = setup.student.hidden(batch.student).detach().requires_grad_()
    loss = setup.term(kd_ratio=1.0)(StudentOutputs(hidden, setup.student.head), LiveTeacher(setup.student)(batch), batch)
    (grad,) = torch.autograd.grad(loss.total, hidden)
    (of_ce,) = torch.autograd.grad(setup.term(kd_ratio=0.0)(StudentOutputs(hidden, setup.student.head), None, batch).total, hidden)
    most, share = loss.rows["kd"].abs().max().item(), (grad.norm() / of_ce.norm().clamp_min(1e-30)).item()
    limit = setup.rounding(setup.student)
    name = setup.small.loss.divergence
    found = f"{name} of the student from itself is at most {short(most)} nats at {batch.num_targets} targets, its gradient {short(share)} of the cross-entropy's"
    if most <= limit and (share <= 10 * limit or name == "total_variation"):  # its slope jumps at 0
        return passed(found)
    return failed(found, setup.cause)


def as_the_textbook(setup: Setup) -> Result:
    """The terms at each target, the gradient of the hidden states, and the targets that count, against the textbook in float64."""
    loss, head, gaps, slopes, targets, dtypes, kept = setup.small.loss, setup.student.head, {}, [], 0, set(), 0
    for i in range(len(setup.few)):
        batch = setup.batch([i])
        rows_n = torch.arange(batch.num_targets, device=setup.device)[:MOST_TARGETS]
        with torch.no_grad():
            hidden_NH = setup.student.hidden(batch.student)[rows_n]
        signal = setup.signal(batch) if loss.kd_ratio else None
        try:
            signal = None if signal is None else plain.take(signal, rows_n)
        except TypeError:
            return not_asked(f"a {type(signal).__name__.lower()} signal has no textbook form")
        examples = tuple(dataclasses.replace(one, num_targets=len(rows_n)) for one in batch.examples)
        few = Batch(batch.labels_N[rows_n], batch.example_N[rows_n], batch.student, batch.teacher, examples)
        ours, theirs = (hidden_NH.clone().requires_grad_() for _ in range(2))
        computed = setup.term(chunk=7)(StudentOutputs(ours, head), signal, few)
        logits_NV = plain.logits(head, theirs)
        expected = {"ce": plain.cross_entropy(logits_NV, few.labels_N)}
        if signal is not None:
            try:
                expected["kd"] = plain.distance(logits_NV, signal, *setup.divergence_at(few), loss.temperature)
            except TypeError as error:
                return not_asked(f"a {str(error).lower()} signal at temperature {loss.temperature:g} has no textbook form")
        if loss.target_weights:
            try:
                w_n = plain.target_weights(loss.target_weights, logits_NV, signal, few.labels_N, few.position_N)
            except TypeError as error:
                return not_asked(f"weights by a {str(error).lower()} have no textbook form")
            expected |= {name: w_n * expected[name] for name in loss.target_weights.terms if name in expected}
        if setup.keep:
            try:
                mine, problem = _kept(setup.keep, hidden_NH, head, logits_NV, signal, few)
            except TypeError as error:
                return not_asked(f"targets that count by a {str(error).lower()} have no textbook form")
            if problem:
                return failed(problem, BUG)
            kept += mine
        ratio = loss.kd_ratio if "kd" in expected else 0.0
        weights = {"ce": 1 - ratio, "kd": ratio}
        total = sum(weights[name] * value.sum() for name, value in expected.items())
        if computed.rows.keys() != expected.keys():
            return failed(f"the loss has the terms {', '.join(computed.rows)}, and the recipe asks for {', '.join(expected)}", BUG)
        for name, value in expected.items():
            gap = (computed.rows[name].double() - value).abs() / value.abs().clamp_min(1.0)
            gaps[name] = max(gaps.get(name, 0.0), gap.max().item())
        gaps["loss"] = max(gaps.get("loss", 0.0), ((computed.total.double() - total).abs() / total.abs().clamp_min(1.0)).item())
        (own,), (want,) = (torch.autograd.grad(x, y) for x, y in ((computed.total, ours), (total, theirs)))
        dtypes |= {head.logits(hidden_NH).dtype} | (set() if signal is None else plain.precisions(signal, few.labels_N))
        slopes.append(((own.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item())
        targets += len(rows_n)
    found = f"at {targets} targets " + ", ".join(f"{name} differs by {short(gap)}" for name, gap in gaps.items())
    found += f", the gradient by {short(max(slopes))} of its size"
    found += f"; {kept} count, those with the {'lowest' if setup.keep.invert else 'highest'} scores" if setup.keep else ""
    exact = dtypes == {torch.float64}  # student and teacher: a float32 teacher, or its cache, is rounded as float32
    near = {torch.float64: 1e-8 if exact else 1e-3, torch.float32: 1e-3}.get(setup.student.dtype, 3e-2)
    if max(gaps.values()) <= (1e-9 if exact else 1e-4) and max(slopes) <= near:
        return passed(found)
    return failed(found, setup.cause)


def _kept(keep: Keep, hidden_NH: Tensor, head: Head, logits_NV: Tensor, signal: Signal | None, few: Batch) -> tuple[int, str]:
    """(the number of targets of an example that count, a description of what is wrong with them beyond rounding, or "")."""
    kept = keep(hidden_NH, head, signal, few, 7).carriers("ce")
    score_n = plain.target_weights(TargetWeights(by=keep.rule.name), logits_NV, signal, few.labels_N, few.position_N)
    mask_n = torch.zeros(few.num_targets, dtype=torch.bool, device=score_n.device)
    mask_n[kept] = True
    count, most = int(mask_n.sum()), -(-few.num_targets * round(keep.share * 10**9) // 10**9)
    if count != most:
        return count, f"{count} of {few.num_targets} targets count, and loss.keep asks for {most}"
    score_n = -score_n if keep.invert else score_n
    if count < few.num_targets and score_n[~mask_n].max() > score_n[mask_n].min() + 1e-4:
        return (
            count,
            f"a target counts whose {keep.rule.name} is {score_n[mask_n].min():.4g}, and one of {score_n[~mask_n].max():.4g} does not",
        )
    return count, ""


def one_position(setup: Setup) -> Result:
    """Other logits at one target must change that target's terms only, and the loss by exactly that."""
    batch = setup.batch()
    signal, head = setup.signal(batch), setup.student.head
    with torch.no_grad():
        hidden_NH = setup.student.hidden(batch.student)
        before = setup.term()(StudentOutputs(hidden_NH, head), signal, batch)
        for i in sorted({0, batch.num_targets // 2, batch.num_targets - 1}):
            other_NH = hidden_NH.clone()
            other_NH[i] = -other_NH[i]
            after = setup.term()(StudentOutputs(other_NH, head), signal, batch)
            for name in before.rows:
                moved = (after.rows[name] - before.rows[name]).abs()
                own, moved[i] = moved[i].item(), 0.0
                if moved.max().item() > 1e-5 * max(1.0, before.rows[name].abs().max().item()):
                    return failed(
                        f"other logits at target {i} move {name} at target {int(moved.argmax())} by {moved.max().item():.2g}", BUG
                    )
                if own == 0 and name == "ce":
                    return failed(f"other logits at target {i} do not move its {name}", BUG)
            step = setup.term().combine({name: (after.rows[name][i] - before.rows[name][i]).item() for name in before.rows})
            whole = (after.total - before.total).item()
            if abs(whole - step) > 1e-4 * max(1.0, abs(before.total.item())):
                return failed(f"other logits at target {i} move its terms by {step:.4g} and the whole loss by {whole:.4g}", BUG)
    return passed(f"other logits at one of {batch.num_targets} targets move the terms of that target alone, and the loss by just as much")


def later_tokens(setup: Setup) -> Result:
    """Another token in an example must change the logits after it, none before it, and none of other examples."""
    batch, problems, asked = setup.batch(), [], 0
    for setting, model in setup.models.items():
        view = batch.student if setting == "student" else batch.teacher
        view = view.each(lambda x, model=model: x.to(model.device))
        ids_BT = view.inputs["input_ids"]
        T = ids_BT.shape[1]
        for e in range(min(2, len(setup.few))):
            mine_N = (view.rows_N // T) == e
            own = view.rows_N[mine_N] % T
            at = int(own[len(own) // 2])  # the token after this position, which predicts it, is changed
            if at + 1 >= T or at + 1 > int(own.max()):
                continue
            asked += 1
            changed_BT = ids_BT.clone()
            changed_BT[e, at + 1] = (changed_BT[e, at + 1] + 1) % model.head.vocab
            gap_N = _logits_gap(model, view, View(view.inputs | {"input_ids": changed_BT}, view.rows_N))
            limit = setup.rounding(model) * max(1.0, setup.largest_logit)
            earlier = _most(gap_N[~(mine_N & (view.rows_N % T > at))])
            if earlier > limit:
                problems.append(f"{setting}: token {at + 1} of an example moves logits by {earlier:.2g} that must not depend on it")
            if _most(gap_N[mine_N & (view.rows_N % T > at)]) == 0:
                problems.append(f"{setting}: token {at + 1} of an example does not move the logits after it")
    if problems:
        return failed(
            "; ".join(problems),
            "the labels are in the input, or the model is not causal (is_decoder in its config.json); or " + setup.cause,
        )
    if not asked:
        return not_asked("no example has two targets in a row")
    return passed("another token moves the logits behind it in its own example alone, in " + " and ".join(setup.models))


def _logits_gap(model: LanguageModel, view: View, other: View) -> Tensor:
    """The largest difference of the logits at each target, [N]."""
    with torch.no_grad():
        pair = [model.hidden(one) for one in (view, other)]
        gaps = []
        for at in range(0, len(pair[0]), 128):
            a, b = (head_logits(model, hidden_NH[at : at + 128]).double() for hidden_NH in pair)
            gaps.append((a - b).abs().amax(-1))
        return torch.cat(gaps)


def logits(setup: Setup, setting: str, model: LanguageModel, batch: Batch) -> Tensor:
    """A model's logits at the sampled targets of a batch, [n, V]. Teachers read the teacher's view."""
    view = batch.student if setting == "student" else batch.teacher
    with torch.no_grad():
        hidden_NH = model.hidden(view.each(lambda x: x.to(model.device)))
        return head_logits(model, hidden_NH[setup.sample(batch).to(hidden_NH.device)])


def head_logits(model: LanguageModel, hidden_NH: Tensor) -> Tensor:
    weight = getattr(model.head.project, "weight", hidden_NH)  # a teacher on another device has its head on the student's
    return model.head.logits(hidden_NH.to(weight.device))


def _most(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def wide_logits(setup: Setup) -> Result:
    """The run's own logits must turn the gradient by much less than bfloat16 logits would."""
    head = setup.student.head
    if type(head.project) is not torch.nn.Linear:
        return not_asked("the head has an adapter or is quantised, so there are no exact logits to compare with")
    batch = setup.batch()
    rows_n = torch.arange(batch.num_targets, device=setup.device)[: 4 * MOST_TARGETS]
    signal, loss = setup.signal(batch), setup.small.loss
    with torch.no_grad():
        hidden_NH = setup.student.hidden(batch.student)[rows_n]
        exact_NV, own_NV = plain.logits(head, hidden_NH), head.logits(hidden_NH)
    labels_N, ratio = batch.labels_N[rows_n], loss.kd_ratio if signal is not None else 0.0

    def slope(logits_NV: Tensor) -> Tensor:
        logits_NV = logits_NV.double().requires_grad_()
        total = (1 - ratio) * plain.cross_entropy(logits_NV, labels_N).sum()
        if ratio:
            kd = plain.distance(logits_NV, plain.take(signal, rows_n), loss.divergence, loss.divergence_options, loss.temperature)
            total = total + ratio * kd.sum()
        return torch.autograd.grad(total, logits_NV)[0]

    try:
        want = slope(exact_NV.clone())
        own, narrow = ((slope(x.clone()) - want).norm().item() / want.norm().item() for x in (own_NV, exact_NV.bfloat16()))
    except TypeError:
        return not_asked("this teacher's signal has no textbook form")
    found = f"logits in bfloat16 would turn the loss's gradient by {narrow:.2%} at {len(labels_N)} targets; the run's own ({str(own_NV.dtype).removeprefix('torch.')}) turn it by {short(own)}"
    if own <= max(0.1 * narrow, 1e-6):
        return passed(found)
    return failed(found, BUG)


CHECKS = (
    Check("a model distilled from itself has a divergence of 0", "Loss", "models", BUG, itself),
    Check("the fused loss and its gradient are those of the textbook", "Loss", "models", BUG, as_the_textbook),
    Check("logits at one position move only its own loss", "Loss", "models", BUG, one_position),
    Check("a token moves only what comes after it", "Loss", "models", BUG, later_tokens),
    Check("logits are wider than bfloat16", "Loss", "models", BUG, wide_logits),
)
