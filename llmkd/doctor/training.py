"""Checks of a step: which weights train, and that micro-batches, padding, packing and ranks do not change the loss or its gradient."""

import re

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config.recipe import Lora
from ..data.batch_source import Step
from ..data.batching import make_micro_batches
from ..models.families import non_text_parameters
from ..training.loop import StudentState, accumulate_gradients, optimizer_step, unscale_and_norm_
from ..training.step_result import TargetCounts
from . import plain, two_processes
from .check import BUG, Check, Result, failed, not_asked, passed, short, warned
from .setup import Setup


def gradients(setup: Setup, micro_batches: list[Batch], accelerator=None, state: StudentState | None = None) -> dict[str, Tensor]:
    """The gradient of a step over all few examples, as the training loop computes it: {parameter: gradient on the CPU}."""
    accelerator, state, counts = accelerator or setup.accelerator, state or setup.state, TargetCounts(int(setup.few.num_targets.sum()))
    with setup.as_trained():
        teacher = setup.teacher if setup.distils else None
        found = accumulate_gradients(0, Step(1, 0, counts.targets), counts, {0: state}, teacher, accelerator, micro_batches)
        unscale_and_norm_(state, found.unscale(0))
    return _taken(setup)


def _taken(setup: Setup) -> dict[str, Tensor]:
    """The gradients of the parameters, which are then cleared."""
    taken = {name: p.grad.detach().to("cpu", copy=True) for name, p in setup.state.parameters.items() if p.grad is not None}
    setup.state.optimizer.zero_grad(set_to_none=True)
    return taken


def gap(these: dict[str, Tensor], those: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients, relative to that of the first; infinite if their parameters differ."""
    if these.keys() != those.keys():
        return float("inf")
    pairs = [(these[name].double(), those[name].double()) for name in these]
    size = sum(float((a**2).sum()) for a, _ in pairs) ** 0.5
    return sum(float(((a - b) ** 2).sum()) for a, b in pairs) ** 0.5 / max(size, 1e-30)


def _limit(setup: Setup) -> float:
    """The relative change that rounding may cause in a gradient; bfloat16 rounds each of many sums."""
    rounding = max(setup.rounding(model) for model in setup.models.values())
    return {1e-9: 1e-7, 1e-4: 1e-3}.get(rounding, 5 * rounding)


def splits(setup: Setup) -> Result:
    """The gradients of one micro-batch, of one for each example, and of the mean of a plain loss by autograd must agree."""
    n = len(setup.few)
    if n < 2:
        return not_asked("there is one example only, which cannot be split")
    whole = gradients(setup, [setup.batch(weighted=True)])
    apart = gap(whole, gradients(setup, [setup.batch([i], weighted=True) for i in range(n)]))
    expected = _plain_gradients(setup)
    found = f"one micro-batch of {n} examples and {n} of one: gradients differ by {short(apart)} of their size"
    against = None if expected is None else gap(expected, whole)
    if against is not None:
        found += f"; from autograd's of the mean over targets of a plain loss by {short(against)}"
    if max(apart, against or 0.0) <= _limit(setup):
        return passed(found)
    return failed(found, "an optimizer step would depend on train.micro_batch_size: " + setup.cause)


def _plain_gradients(setup: Setup) -> dict[str, Tensor] | None:
    """The gradients of the textbook loss, averaged over all targets. None for a signal or a term without a textbook form, and for float64 logits
    above 1 GB."""
    loss, targets = setup.small.loss, int(setup.few.num_targets.sum())
    if loss.features or loss.attention or int(setup.few.num_targets.max()) * setup.prepared.vocab > 1 << 27:
        return None
    try:
        with setup.as_trained():
            for i in range(len(setup.few)):
                batch = setup.batch([i], weighted=True)
                signal = setup.signal(batch)
                logits_NV = setup.student.head.logits(setup.student.hidden(batch.student)).double()
                ratio = loss.kd_ratio if signal is not None else 0.0
                own = dict(batch.weights)
                if rule := loss.target_weights:
                    w_N = plain.target_weights(rule, logits_NV, signal, batch.labels_N, batch.position_N)
                    own |= {name: w_N * own[name] if name in own else w_N for name in rule.terms}
                total = (1 - ratio) * _weighted_sum(plain.cross_entropy(logits_NV, batch.labels_N), own.get("ce"))
                if ratio:
                    kd = plain.distance(logits_NV, signal, *setup.divergence_at(batch), loss.temperature)
                    total = total + ratio * _weighted_sum(kd, own.get("kd"))
                (total / targets).backward()
    except TypeError:
        _taken(setup)
        return None
    return _taken(setup)


def _weighted_sum(term_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return term_N.sum() if weight_N is None else (term_N * weight_N)[weight_N != 0].sum()


def ranks(setup: Setup) -> Result:
    """Two ranks must share out the examples, and the mean of their gradients, without a GPU also the one that two processes exchange, must be that
    of one process."""
    n = len(setup.few)
    if n < 2:
        return not_asked("there is one example only, and two ranks would have to share it")
    size = max(1, n // 4)
    dealt = [make_micro_batches(list(range(n)), setup.few.max_lengths, size, rank, 2) for rank in range(2)]
    if sorted(i for one in dealt for micro in one for i in micro) != list(range(n)):
        return failed(f"of {n} examples two ranks get {dealt}", "some would be trained on twice, or never: " + BUG)
    one = gradients(setup, [setup.batch(weighted=True)])
    each = [
        gradients(setup, [setup.batch(i, weighted=True) for i in dealt[rank]], two_processes.Rank(setup.device, rank, 2))
        for rank in range(2)
    ]
    mean = {name: sum(part.get(name, torch.zeros_like(one[name])) for part in each) / 2 for name in one}
    apart = gap(one, mean)
    found = f"the mean of two ranks' gradients differs from one process's by {short(apart)} of its size"
    if not two_processes.can_fork():
        found += " (computed one after the other in this process: no second one was started, since there is a GPU)"
    else:
        try:
            exchanged = gap(one, two_processes.exchanged_gradients(setup, dealt, gradients))
        except TimeoutError as error:
            return warned(f"{found}; {error}", "the machine may be busy: ask again, or try a run of a few steps with accelerate launch")
        found += f"; what two processes exchanged over gloo by {short(exchanged)}"
        apart = max(apart, exchanged)
    return passed(found) if apart <= _limit(setup) else failed(found, "more processes would train another model: " + setup.cause)


def padding(setup: Setup) -> Result:
    """The loss of each example alone and in one padded micro-batch of all must agree."""
    if len(set(setup.few.max_lengths.tolist())) < 2:
        return not_asked("the examples have one length, so there is no padding")
    return _unmoved(setup, setup.batch(), "padding", "train.micro_batch_size: 1 avoids it, and ")


def packing(setup: Setup) -> Result:
    """The loss of each example alone and in one packed row of all must agree."""
    if not setup.small.data.packing:
        return not_asked("data.packing is false")
    words = "packing with shared prefixes" if setup.small.data.share_prefixes else "packing"
    return _unmoved(setup, setup.batch(packing=True), words, "set data.packing: false; ")


def _unmoved(setup: Setup, batch: Batch, what: str, fix: str) -> Result:
    together, alone = setup.loss_rows(batch), setup.alone
    moved = {name: (values - torch.cat([one[name] for one in alone])).abs() for name, values in together.items()}
    found = f"{what} of {len(alone)} examples moves " + " and ".join(
        f"{name} by at most {short(gap.max().item())}" for name, gap in moved.items()
    )
    if all(gap.max().item() <= setup.allowed and gap.mean().item() <= 0.1 * setup.allowed for gap in moved.values()):
        return passed(found)
    return failed(found, fix + setup.cause)


def parameters(setup: Setup) -> Result:
    """Exactly the parameters that the recipe means train: the optimizer has them, each gets a gradient, and a step changes nothing else."""
    student, state = setup.student, setup.state
    wanted, trained = intended(setup), set(state.parameters)
    if wanted != trained:
        more, less = sorted(trained - wanted), sorted(wanted - trained)
        sides = [f"{len(x)} {words}, such as {x[0]}" for x, words in ((more, "train unasked"), (less, "do not train")) if x]
        return failed(f"of {len(wanted)} tensors that are to train, " + "; ".join(sides), "check student.method and student.lora; " + BUG)
    if problem := _other_adapter(setup):
        return failed(problem, "it is not what student.lora asks for: " + BUG)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in state.parameters.values()}:
        return failed(f"the optimizer has {len(held)} tensors, and {len(trained)} train", BUG)
    frozen = _sums([student, *setup.live.values()], trained)
    with setup.weights_kept():
        before = {name: p.detach().to("cpu", copy=True) for name, p in state.parameters.items()}
        found = gradients(setup, [setup.batch()])
        for name, p in state.parameters.items():
            p.grad = found[name].to(p.device, copy=True) if name in found else None
        optimizer_step(state, 1, torch.tensor(1.0, device=setup.device), torch.zeros((), device=setup.device))
        still = [name for name, p in state.parameters.items() if torch.equal(before[name], p.detach().cpu())]
    _forget(state.optimizer)
    if (others := _sums([student, *setup.live.values()], trained)) != frozen:
        moved = [name for name in frozen if others[name] != frozen[name]]
        return failed(f"a step changes {len(moved)} tensors that do not train, such as {moved[0]}", BUG)
    lacking, bad = sorted(trained - found.keys()), [name for name, g in found.items() if not torch.isfinite(g).all()]
    if bad:
        return failed(f"the gradient of {len(bad)} tensors, such as {bad[0]}, is not finite", "check the weights, and student.dtype")
    zero = {name for name, g in found.items() if not g.any()}
    pairs = {name for name in zero if _partner_is_zero(state.parameters, name)}
    known = {name for name in lacking if ".experts." in name} | set(student.capabilities.parameters_without_gradient)
    size = sum(p.numel() for p in state.parameters.values())
    words = f"{size:,} parameters in {len(trained)} tensors train, of {sum(p.numel() for p in student.parameters()):,}"
    if idle := sorted([*lacking, *(zero - pairs)]):
        fix = "they may belong to parts that text does not use, or experts that no token chose: then name other modules in student.lora.target_modules"
        lost = set(lacking) - known
        return (failed if lost else warned)(f"{words}; {len(idle)} get no gradient, such as {min(lost or idle)}", fix)
    fixed = [name for name in still if name not in zero]
    if fixed:
        return failed(f"{words}; a step does not change {len(fixed)} that have a gradient, such as {fixed[0]}", f"raise optim.lr, or {BUG}")
    new = f"; the first gradient of {len(pairs)} matrices is 0, since the other one of their pair is" if pairs else ""
    return passed(f"{words}; each has a gradient, and a step changes these and nothing else{new}")


def _other_adapter(setup: Setup) -> str:
    """A description of how a new adapter differs from `student.lora`; empty if it does not differ, or the student has no new adapter."""
    settings, lora = setup.small.student, setup.small.student.lora or Lora()
    if settings.method != "lora" or setup.prepared.student.adapter:
        return ""
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    for where, module in setup.student.model.named_modules():
        for name, factor in module.scaling.items() if hasattr(module, "lora_A") else ():
            dropout = getattr(module.lora_dropout[name], "p", 0.0) if name in getattr(module, "lora_dropout", {}) else lora.dropout
            found = (module.r[name], factor, dropout, bool(getattr(module, "use_dora", {}).get(name)))
            if found != (lora.rank, scale, lora.dropout, lora.dora):
                wanted = f"rank {lora.rank}, a scale of {scale:g}, dropout {lora.dropout:g} and dora {str(lora.dora).lower()}"
                return f"{where} has rank {found[0]}, a scale of {found[1]:g}, dropout {found[2]:g} and dora {str(found[3]).lower()}, and the recipe {wanted}"
    return ""


def intended(setup: Setup) -> set[str]:
    """The names of the parameters that should train by the recipe: the student's, and the maps of its hidden states."""
    return _of_student(setup) | {f"terms.features.maps.{n}.{name}" for n in range(_maps(setup)) for name in ("weight", "bias")}


def _maps(setup: Setup) -> int:
    features = setup.small.loss.features
    return len(setup.distiller.terms["features"].pairs) if features and features.projection == "linear" else 0


def _of_student(setup: Setup) -> set[str]:
    student, settings = setup.student, setup.small.student
    named = dict(student.model.named_parameters())
    if settings.method == "full":
        unused = {id(p) for p in non_text_parameters(student.base_model)}
        return {name for name, p in named.items() if id(p) not in unused}
    copies = settings.lora.modules_to_save if settings.lora else ()
    if setup.prepared.student.adapter:
        copies = next(iter(student.model.peft_config.values())).modules_to_save or ()
    own = re.compile(r"\.lora_[A-Za-z_]+(\.|$)" + (r"|\.modules_to_save\." if copies else ""))
    return {name for name in named if own.search(name)}


def _sums(models: list, trained: set[str]) -> dict[str, int]:
    """A sum over the bytes of each tensor that does not train."""
    out = {}
    for number, model in enumerate(models):
        for name, x in [*model.model.named_parameters(), *model.model.named_buffers()]:
            if number or name not in trained:
                x = x.detach().contiguous().reshape(-1)
                whole = x.view(torch.uint8) if x.element_size() % 4 or not x.numel() else x.view(torch.int32)
                out[f"{number} {name}"] = int(whole.sum(dtype=torch.int64))
    return out


def _partner_is_zero(parameters: dict[str, nn.Parameter], name: str) -> bool:
    """Whether a tensor belongs to a pair of a new adapter whose other matrix is 0: A of a linear layer, B of an embedding."""
    other = name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_B.", ".lora_embedding_A.")
    return other != name and other in parameters and not parameters[other].any()


def _forget(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


CHECKS = (
    Check(
        "exactly what is meant trains, and all of it gets a gradient", "Step", "models", "check student.method and student.lora", parameters
    ),
    Check("gradients are equal under two splits of a batch", "Step", "models", BUG, splits),
    Check("padding leaves the loss alone", "Step", "models", BUG, padding),
    Check("packing leaves the loss alone", "Step", "models", "set data.packing: false", packing),
    Check("ranks agree with one process", "Step", "models", BUG, ranks),
)
