"""The start of `loss.features`: its term for two loaded models, and its maps and scales, computed from hidden states before the first step."""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..config.features import Features
from ..config.schedule import middle
from ..config.terms import layer_pairs
from ..console import info, warn
from ..data.batching import make_micro_batches
from ..data.examples import Examples
from ..errors import UserError
from ..head import widen
from ..losses.features import FeatureTerm, Spread
from ..losses.least_squares import LeastSquares
from ..models.model import Model
from ..models.parts import sharded_like
from ..signals import Teacher
from .layer_pairs import LEAST_PER_DIMENSION, is_computed, refuse_features

#: Maps are computed on at least _TARGETS targets, and on _PER_DIMENSION for each dimension of the student's states; half as many more measure the fit.
_TARGETS, _PER_DIMENSION = 1024, 8
#: If the share that maps leave unexplained is below this, there is next to nothing to teach.
_LITTLE = 0.1


def feature_terms(features: Features | None, setting: str, student: Model, teachers: dict[str, Model], seed: int) -> list[FeatureTerm]:
    """The term of `loss.features` for loaded models; [] without it. UserError if they lack the layers or widths that it needs.

    setting    the teacher's setting: teacher, or teacher.0, ...
    teachers   by setting
    seed       for maps that start at random
    """
    if not features:
        return []
    names, models = ("student.model", f"{setting}.model"), (student, teachers[setting])
    depths = [model.depth(name) for model, name in zip(models, names, strict=True)]
    refuse_features(features, *((depth, None) for depth in depths))
    pairs = layer_pairs(features.layers, *depths)
    sides = [sorted({pair[side] for pair in pairs}) for side in range(2)]
    of_student, of_teacher = (model.widths(numbers, name) for model, numbers, name in zip(models, sides, names, strict=True))
    widths = [(of_student[s], of_teacher[t]) for s, t in pairs]
    for width, other in widths:
        refuse_features(features, (depths[0], width), (depths[1], other))
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    init = "identity" if features.init == "identity" else "xavier"
    rest = middle(features.weight), features.distance, features.projection, init, features.lr, dtype, seed
    return [FeatureTerm(pairs, widths, *rest)]


def refuse_small_samples(features: Features, width: int, samples: tuple[Sequence[Batch], Sequence[Batch]]) -> None:
    """UserError if the samples of `sample_batches` have too few targets: the teacher has too few examples, or one of them is too long."""
    needed, (taken, kept) = LEAST_PER_DIMENSION * (width + 1), (sum(batch.num_targets for batch in batches) for batches in samples)
    if not kept:
        raise UserError("loss.features: the teacher has one training example, but its hidden states are measured on two or more; give more")
    if is_computed(features) and taken < needed:
        raise UserError(
            f"loss.features.init: found least_squares, but a map of states {width} wide needs {needed:,} targets, and the training examples on "
            f"which it would be computed have {taken:,} (the other examples measure the fit); use xavier, or give more examples"
        )


def start_features(
    features: Features, term: FeatureTerm, student: Model, teacher: Teacher, samples: tuple[Sequence[Batch], Sequence[Batch]]
) -> dict[str, float]:
    """Set the term's maps and scales from the untouched models.

    Returns, by pair ("student 2, teacher 3"), the share of the teacher's states that a linear map leaves unexplained; {} if there are too
    few targets for maps.

    samples   batches of training examples on which maps and scales are computed, and others on which that share is measured
    """
    scales, maps = _agreed(*_fitted(term, student, teacher, samples[0]), term.scales.device)
    for n, ((s, t), size) in enumerate(zip(term.pairs, scales, strict=True)):
        if not 0 < size < math.inf:
            what = "are the same at every target" if size == 0 else "are not finite"
            raise UserError(f"loss.features.layers: found [{s}, {t}], but the hidden states there {what}; name other layers")
        if features.scale == "teacher_variance":
            term.scales[n] = size
        if maps and is_computed(features):
            with torch.no_grad():
                for held, value in zip((term.maps[n].weight, term.maps[n].bias), maps[n], strict=True):
                    held.copy_(sharded_like(value, held))
    return _left(term, student, teacher, samples[1], maps) if maps or not term.maps else {}


def report_shares(features: Features, shares: dict[str, float], targets: int) -> None:
    """Print the unexplained shares, measured on `targets` targets, and a note if they leave next to nothing to teach."""
    if not shares:
        return
    means = "a linear map of the untouched student's hidden states" if features.projection == "linear" else "the untouched student"
    of = "variance" if features.distance == "mse" else f"hidden states (by {features.distance})"
    each = "; ".join(f"{pair}: {share:.1%}" for pair, share in shares.items())
    info(f"features: {means} leaves this share of the teacher's {of} unexplained, on {targets:,} targets: {each}")
    if max(shares.values()) < _LITTLE:
        best = f"{1 - max(shares.values()):.0%}"
        warn(
            f"note: loss.features: {means} explains {best} or more of the teacher's before the first step, so there is next to nothing to teach; "
            "other layers, or a student that differs more from its teacher, may leave more"
        )


def sample_batches(train: Examples, mine: Sequence[int], width: int, size: int, device) -> tuple[list[Batch], list[Batch]]:
    """Two lists of batches of at most `size` of the training examples `mine`, the same for every run and rank.

    The first has enough targets to compute maps of states `width` wide, the second half as many to measure the fit.
    """
    chosen = random.Random("features").sample(list(mine), len(mine))
    ends = np.cumsum(train.num_targets[np.array(chosen, np.int64)])
    fit = min(max(_TARGETS, _PER_DIMENSION * width), 2 * int(ends[-1]) // 3)
    first = max(1, min(int(np.searchsorted(ends, fit)) + 1, len(chosen) - 1))
    last = int(np.searchsorted(ends, ends[first - 1] + fit // 2)) + 1
    return tuple(_batches(train, some, size, device) for some in (chosen[:first], chosen[first:last]))


def _batches(train: Examples, chosen: list[int], size: int, device) -> list[Batch]:
    few = train.take(np.sort(np.array(chosen, np.int64)))
    return [few.batch(examples).to(device) for examples in make_micro_batches(list(range(len(few))), few.lengths, size)]


def _fitted(
    term: FeatureTerm, student: Model, teacher: Teacher, batches: Sequence[Batch]
) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """For each pair the teacher's spread, NaN if a state is not finite, and the least-squares map; no maps if the term has none or there are
    too few targets. Hidden states are held for one batch at a time."""
    spreads = [Spread(term.distance) for _ in term.pairs]
    enough = sum(batch.num_targets for batch in batches) >= LEAST_PER_DIMENSION * (term.width + 1)
    fits = [LeastSquares(one.in_features, one.out_features, term.scales.device) for one in term.maps or () if enough]
    finite = [True for _ in term.pairs]
    for batch in batches:
        for n, (x_ND, y_NE) in enumerate(_states(term, student, teacher, batch)):
            spreads[n].add(y_NE)
            finite[n] &= bool(x_ND.isfinite().all())
            if fits:
                fits[n].add(x_ND, y_NE)
    scales = [one.value if ok else math.nan for one, ok in zip(spreads, finite, strict=True)]
    if not fits or not all(map(math.isfinite, scales)):
        return scales, []
    return scales, [fits.pop(0).map() for _ in term.pairs]  # dropped one by one, to save memory


def _agreed(scales: list[float], maps: list[tuple[Tensor, Tensor]], device) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """The first process's values on every process, so that all have the same bits whatever hardware they run on."""
    if not torch.distributed.is_initialized():
        return scales, maps
    found = [torch.tensor(scales, dtype=torch.float64, device=device), *(one.contiguous() for pair in maps for one in pair)]
    for tensor in found:
        torch.distributed.broadcast(tensor, 0)
    return found[0].tolist(), list(zip(found[1::2], found[2::2], strict=True))


def _left(
    term: FeatureTerm, student: Model, teacher: Teacher, batches: Sequence[Batch], maps: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """By pair: the mean distance of the student's mapped states from the teacher's, over the teacher's spread; with `mse` that is 1 - R^2 over
    all dimensions. A pair whose teacher states do not differ is left out."""
    spreads, sums = [Spread(term.distance) for _ in term.pairs], [0.0 for _ in term.pairs]
    for batch in batches:
        for n, (x_ND, y_NE) in enumerate(_states(term, student, teacher, batch)):
            mapped_NE = x_ND.double() @ maps[n][0].T + maps[n][1] if maps else x_ND.double()
            spreads[n].add(y_NE)
            sums[n] += term.distance(mapped_NE, y_NE.double()).sum().item()
    found = zip(term.pairs, sums, spreads, strict=True)
    return {f"student {s}, teacher {t}": total / one.states.n / one.value for (s, t), total, one in found if one.value}


@torch.no_grad()
def _states(term: FeatureTerm, student: Model, teacher: Teacher, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """For each pair the hidden states of student [N, D] and teacher [N, E] at a batch's targets, at least float32, on the term's device."""
    training, device = student.training, term.scales.device
    student.eval()
    try:
        ours, theirs = student.outputs(batch.student, term.student_taps).layers, teacher(batch).layers
    finally:
        student.train(training)
    return [(widen(ours[s]).to(device), widen(theirs[t]).to(device)) for s, t in term.pairs]
