"""The functions of the Python API, which check their arguments as strictly as a recipe's settings are checked; see `llmkd.__all__`.

All problems of a call are reported at once, one line each: the argument, what was found, what was expected, what to do. The training
loop does not come this way: it calls `losses.fused`, since its arguments follow from a checked recipe.
"""

import difflib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config.recipe import DIVERGENCES, Recipe
from .errors import ArgumentError
from .head import Head
from .losses import divergences, fused
from .losses.objective import Objective
from .signals import Dense, Divergence, Signal
from .teachers.mixture import Mixed, RoutedSignal
from .teachers.sparse import Sampled, TopK


def train(recipe: Recipe, resume: bool = False) -> dict:
    """Train the student of a recipe, as `llmkd train` does, and return the contents of its `summary.json`.

    recipe   from `llmkd.load_recipe(path, overrides)`
    resume   continue from the newest checkpoint in the recipe's output folder

    Raises UserError (a mistake in the recipe or its data), NonFinite (a loss or gradient became inf or NaN) or Stopped (SIGTERM or
    SIGINT arrived; a checkpoint is saved). Signals are handled only if this is called in the main thread: Python allows no signal
    handlers in others.
    """
    if not isinstance(recipe, Recipe):
        raise ArgumentError(f"recipe: found a {type(recipe).__name__}, expected a Recipe; llmkd.load_recipe(path) gives one")
    from .training.run import run
    from .training.shutdown import ShutdownRequest

    in_main_thread = threading.current_thread() is threading.main_thread()
    return run(recipe, resume, None if in_main_thread else ShutdownRequest())


def make_divergence(name: str, **options: float) -> Divergence:
    """One of the divergences of `loss.divergence`, with its options fixed: a function (log_q [N, E], log_p [N, E]) -> [N], in nats.

    log_q and log_p are the student's and the teacher's log-probabilities over E events. `llmkd.divergences` has the formulas, their
    sources and the meaning of the options. ArgumentError for an unknown name or option, or a value outside an option's range.
    """
    if not isinstance(name, str) or name not in DIVERGENCES:
        close = difflib.get_close_matches(str(name), [*DIVERGENCES, *_OTHER_NAMES], 1)
        hint = f"; did you mean {_OTHER_NAMES.get(close[0], close[0])}?" if close else ""
        raise ArgumentError(f"name: found {name!r}, expected one of {', '.join(DIVERGENCES)}{hint}")
    known, problems = DIVERGENCES[name], []
    for option, value in options.items():
        if option not in known:
            problems.append(f"{option}: {name} has no such option; it has: {', '.join(known) or 'none'}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not known[option][0] <= value <= known[option][1]:
            problems.append(f"{option}: found {value!r}, expected {known[option][0]:g} to {known[option][1]:g}")
    if name == "alpha_beta" and not problems and not any(({o: d for o, (_, _, d) in known.items()} | options).values()):
        problems.append("alpha, beta: both are 0; at least one of them must be positive")
    if problems:
        raise ArgumentError(*problems)
    return divergences.make_divergence(name, **options)


_OTHER_NAMES = {"kl": "forward_kl", "fkl": "forward_kl", "rkl": "reverse_kl", "jsd": "generalized_jsd", "js": "generalized_jsd"}
_OTHER_NAMES |= {"tvd": "total_variation", "akl": "adaptive_kl", "jeffreys": "symmetric_kl", "ab": "alpha_beta"}


def fused_loss(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    objective: Objective,
    signal: Signal | None = None,
    chunk_size: int | None = None,
    check_labels: bool = True,
    weights: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (1 - kd_ratio) CE + kd_ratio T^2 D over N targets, without ever holding an [N, V] tensor of logits.

    hidden_NH      the student's last hidden states at the positions that predict the targets, of any floating-point type
    head           the student's head; its trainable parameters get their gradients
    labels_N       the target tokens, int64, each from 0 to vocab - 1
    objective      `llmkd.Objective(kd_ratio, temperature, divergence)`
    signal         the teacher's output for the same N targets, in the same order; needed if kd_ratio is above 0
    chunk_size     targets per chunk; it changes memory and speed, not the result. The default depends on the device
    check_labels   check that every label is in the vocabulary. On a GPU this waits for the device once per call
    weights        {"ce": [N], "kd": [N]}: a finite weight of each target in each term; 1 if a term is missing. Targets whose weights are all 0
                   are not computed. On a GPU this waits for the device once per call

    Returns the *sum* of the loss over the N targets (a scalar: divide it by the number of targets of the whole optimizer step, then call
    backward), and the terms of each target in nats, detached and multiplied by their weights: {"ce": [N]}, and with a signal "kd": [N],
    which is T^2 D.

    There is no ignore_index: pass only the supervised positions. With labels that are -100 elsewhere:

        keep = labels_BT.flatten() != -100
        fused_loss(hidden_BTH.flatten(0, 1)[keep], head, labels_BT.flatten()[keep], objective, llmkd.Dense(teacher_NH, teacher_head))

    ArgumentError if the arguments do not fit one another. All checks except `check_labels` read shapes and types only.
    """
    problems = list(_problems(hidden_NH, head, labels_N, objective, signal, chunk_size))
    problems += _weight_problems(weights, labels_N) if not problems else []
    if not problems and check_labels:
        problems = list(_label_problems(labels_N, head.vocab))
    if problems:
        raise ArgumentError(*problems)
    return fused.fused_loss(hidden_NH, head, labels_N, objective, signal, chunk_size, weights)


def _weight_problems(weights, labels_N: Tensor) -> Iterator[str]:
    if weights is not None and not isinstance(weights, dict):
        yield f'weights: found {_shown(weights)}, expected a dict such as {{"ce": a float tensor [N]}}'
        return
    for name, w_N in (weights or {}).items():
        if name not in ("ce", "kd"):
            yield f"weights: found one for {name!r}; the terms are ce and kd"
        elif not isinstance(w_N, Tensor) or w_N.shape != labels_N.shape or not w_N.is_floating_point():
            yield f"weights[{name!r}]: found {_shown(w_N)}, expected a float tensor [{len(labels_N)}]"
        elif w_N.device != labels_N.device:
            yield f"weights[{name!r}]: is on {w_N.device}, and labels_N on {labels_N.device}; move one of them"


def _problems(hidden_NH, head, labels_N, objective, signal, chunk_size) -> Iterator[str]:
    if not isinstance(hidden_NH, Tensor) or hidden_NH.dim() != 2 or not hidden_NH.is_floating_point():
        yield f"hidden_NH: found {_shown(hidden_NH)}, expected a float tensor [N, H]; select the supervised positions first"
        return
    if not isinstance(labels_N, Tensor) or labels_N.dim() != 1 or labels_N.dtype != torch.int64:
        yield f"labels_N: found {_shown(labels_N)}, expected an int64 tensor [N]"
        return
    if not isinstance(head, Head):
        yield f"head: found a {type(head).__name__}, expected a Head; write llmkd.Head(model.lm_head, vocab)"
        return
    if not isinstance(objective, Objective):
        yield f"objective: found a {type(objective).__name__}, expected an Objective; write llmkd.Objective(kd_ratio=0.5)"
        return
    N, device = len(hidden_NH), hidden_NH.device
    if len(labels_N) != N:
        yield f"labels_N: found {len(labels_N)} labels for {N} rows of hidden_NH; give one label for each row"
    if labels_N.device != device:
        yield f"labels_N: is on {labels_N.device}, and hidden_NH on {device}; move one of them"
    yield from _head_problems("head", head, hidden_NH)
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        yield f"chunk_size: found {chunk_size!r}, expected a whole number >= 1"
    if signal is None and objective.kd_ratio:
        yield (
            f"signal: not given, and objective.kd_ratio is {objective.kd_ratio:g}; give the teacher's output, such as "
            "llmkd.Dense(hidden_NH, head), or set kd_ratio=0"
        )
    if signal is not None and not all(callable(getattr(signal, name, None)) for name in ("divergence", "log_probs")):
        yield f"signal: found a {type(signal).__name__}, expected a Signal; of logits or hidden states make one with llmkd.Dense"
        return
    if isinstance(signal, Dense) and signal.hidden_NH.dim() == 2:
        yield from _head_problems("signal.head", signal.head, signal.hidden_NH, "signal.hidden_NH")
    for extent in _extents(signal):
        if extent.targets != N:
            yield f"signal: has {extent.targets} targets, and hidden_NH {N} rows; give the teacher's output for the same targets"
        if extent.vocab not in (None, head.vocab):
            yield (
                f"signal: is over {extent.vocab} tokens, and the student's head over {head.vocab}; both need one tokenizer, and the "
                "vocab of both heads is the tokenizer's size"
            )
        if extent.device not in (None, device):
            yield f"signal: is on {extent.device}, and hidden_NH on {device}; move one of them"


def _head_problems(name: str, head: Head, hidden_NH: Tensor, hidden_name: str = "hidden_NH") -> Iterator[str]:
    weights = list(head.project.parameters())
    if weights and weights[0].device != hidden_NH.device:
        yield f"{name}: is on {weights[0].device}, and {hidden_name} on {hidden_NH.device}; move one of them"
    width, rows = (getattr(head.project, field, None) for field in ("in_features", "out_features"))
    if width not in (None, hidden_NH.shape[1]):
        yield f"{name}: takes hidden states of width {width}, and {hidden_name} has {hidden_NH.shape[1]}"
    if rows is not None and rows < head.vocab:
        yield f"{name}: has {rows} rows, and vocab is {head.vocab}; vocab is the tokenizer's size, at most the rows of the head"


def _label_problems(labels_N: Tensor, vocab: int) -> Iterator[str]:
    if not len(labels_N):
        return
    outside_N = (labels_N < 0) | (labels_N >= vocab)
    if not outside_N.any():
        return
    first = int(outside_N.nonzero()[0])
    found = int(labels_N[first])
    what = f"labels_N: found {found} at row {first} ({int(outside_N.sum())} of {len(labels_N)} rows), expected 0 to {vocab - 1}"
    if found < 0:
        yield f"{what}; select the supervised rows first: keep = labels != {found}, then hidden[keep], labels[keep] and the teacher's rows [keep]"
    else:
        yield f"{what}; the labels are of another tokenizer than the head, or vocab is too small"


@dataclass(frozen=True)
class _Extent:
    targets: int
    vocab: int | None
    device: torch.device | None


def _extents(signal: Signal | None) -> Iterator[_Extent]:
    """The number of targets, the vocabulary and the device of a signal and its parts. Nothing is known of a user's own class."""
    match signal:
        case Dense():
            yield _Extent(len(signal.hidden_NH), signal.head.vocab, signal.hidden_NH.device)
        case TopK():
            yield _Extent(len(signal.ids_NK), signal.vocab, signal.ids_NK.device)
        case Sampled():
            yield _Extent(len(signal.ids_ND), signal.vocab, signal.ids_ND.device)
        case Mixed():
            for part in signal.parts:
                yield from _extents(part)
        case RoutedSignal():
            yield _Extent(len(signal.owner_N), None, None)
            for part in signal.parts:
                yield from (_Extent(len(signal.owner_N), extent.vocab, extent.device) for extent in _extents(part))


def _shown(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
