"""Checks of the models: vocabularies, logits and adapters; and that the teacher is deterministic and knows the rows better than the student."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.encoding.tokenizer import load_tokenizer, vocab_size
from ..models.language_model import LanguageModel
from ..training.teacher_check import ADVICE
from ..training.validate import Evaluator
from .check import BUG, Check, Result, failed, not_asked, passed, short, warned
from .losses import logits
from .setup import Setup


def vocabularies(setup: Setup) -> Result:
    """The tokenizers must have the same entries and split the rows alike, and every model must have a row for every token."""
    prepared, ours = setup.prepared, setup.prepared.tokenizer
    texts, problems = [ours.decode(setup.few.example(i)[0].tolist()) for i in range(len(setup.few))], []
    compared = 0
    for source in prepared.teachers:
        if not source.files:
            continue
        theirs = load_tokenizer(str(source.files.with_tokenizer), f"{source.setting}.model")
        other = [token for token, i in ours.get_vocab().items() if theirs.get_vocab().get(token, i) != i]
        if other:
            problems.append(f"{source.setting}: {len(other)} tokens, such as {other[0]!r}, have another id than the student's")
        split = next((text for text in texts if ours.encode(text) != theirs.encode(text)), None)
        if split:
            problems.append(f"{source.setting}: its tokenizer splits {split[:60]!r} otherwise")
        compared += 1
    for setting, model in setup.models.items():
        rows = model.base_model.get_input_embeddings().weight.shape[0]
        columns = logits(setup, setting, model, setup.batch([0])).shape[1]
        if rows < prepared.vocab or columns != prepared.vocab:
            problems.append(f"{setting}: {rows} rows of the embedding and {columns} logits for {prepared.vocab} tokens")
    highest = max(int(view.ids.max()) for view in (prepared.train, prepared.train.teacher_view) if view is not None)
    if highest >= prepared.vocab:
        problems.append(f"the rows have token {highest}, and the models know {prepared.vocab}")
    if problems:
        return failed("; ".join(problems), "use a teacher and a student of one tokenizer family, each with its own model's tokenizer")
    alike = "; the teacher's tokenizer is the same" if compared == 1 else f"; {compared} teachers' are the same" if compared else ""
    return passed(f"{vocab_size(ours):,} entries, of which all models know {prepared.vocab:,}{alike}")


def own_logits(setup: Setup) -> Result:
    """llmkd's logits against those of transformers' forward pass, example by example."""
    gaps, problems = {}, []
    batch = setup.batch()
    for setting, model in setup.models.items():
        ours_NV = logits(setup, setting, model, batch)
        if not torch.isfinite(ours_NV).all():
            problems.append(f"{setting}: its logits are not finite")
            continue
        theirs_NV = torch.cat([_transformers_logits(setup, setting, model, i) for i in range(len(setup.few))])
        size = theirs_NV.abs().max().item()
        gaps[setting] = (ours_NV.double().cpu() - theirs_NV.double().cpu()).abs().max().item() / max(size, 1e-3)
        if gaps[setting] > setup.rounding(model):
            problems.append(f"{setting}: llmkd's logits and the model's own differ by {short(gaps[setting])} of the largest")
    if problems:
        return failed(
            "; ".join(problems), "its weights may hold NaN, or transformers computes it in a way that llmkd does not: " + setup.cause
        )
    return passed("differences relative to the largest logit: " + ", ".join(f"{name} {short(gap)}" for name, gap in gaps.items()))


@torch.no_grad()
def _transformers_logits(setup: Setup, setting: str, model: LanguageModel, i: int) -> Tensor:
    batch = setup.batch([i])
    view = (batch.student if setting == "student" else batch.teacher).each(lambda x: x.to(model.device))
    model.set_active_adapter()
    with torch.autocast(model.device.type, model.autocast, enabled=model.autocast is not None):
        logits_BTV = model.base_model(input_ids=view.inputs["input_ids"], use_cache=False).logits
    return logits_BTV[0, view.rows_N[setup.sample(batch).to(view.rows_N.device)].to(logits_BTV.device), : model.head.vocab]


def adapters(setup: Setup) -> Result:
    """A teacher with an adapter must differ from its base."""
    changed, problems, why = {}, [], []
    batch = setup.batch()
    for source in setup.prepared.teachers:
        if not source.files or not source.files.adapter:
            continue
        model = setup.live.get(source.setting)
        if model is None:
            why.append(f"{source.setting} is read from its cache")
        elif not hasattr(model.model, "disable_adapter"):
            why.append(f"{source.setting}'s adapter is merged")
        else:
            within = torch.log_softmax(logits(setup, source.setting, model, batch).double(), -1)
            with _base_alone(model):
                without = torch.log_softmax(logits(setup, source.setting, model, batch).double(), -1)
            changed[source.setting] = (within.exp() * (within - without)).sum(-1).mean().item()
            if not changed[source.setting] > 1e-6:
                problems.append(f"{source.setting}: its adapter {source.settings.model} changes nothing")
    if problems:
        fix = "it may be untrained (its B matrices are 0), or its tensors were not read: train it, or check teacher.model"
        return failed("; ".join(problems), fix)
    if not changed:
        return not_asked("; ".join(why) or "no teacher is an adapter")
    return passed(", ".join(f"{name}: KL {value:.3g} nats per token from its base" for name, value in changed.items()))


@contextlib.contextmanager
def _base_alone(model: LanguageModel) -> Iterator[None]:
    """The model without its adapter while the block lasts. PEFT makes an adapter trainable when it enables it again, which is undone."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        with model.model.disable_adapter():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def deterministic(setup: Setup) -> Result:
    """Two passes of the teacher over the same rows must agree."""
    if setup.teacher is None:
        return not_asked("the recipe loads no teacher")
    if not setup.live:
        return not_asked("the teacher is a cache or on a server, and its answers are read as they were kept")
    batch, problems, most = setup.batch(), [], 0.0
    for setting, model in setup.live.items():
        a, b = (logits(setup, setting, model, batch).double() for _ in range(2))
        gap = (a - b).abs().max().item() / max(a.abs().max().item(), 1e-3)
        most = max(most, gap)
        if model.training or any(p.requires_grad for p in model.parameters()):
            problems.append(f"{setting}: it is in training mode, or some of its weights train")
        elif gap > 0.1 * setup.rounding(model):
            problems.append(f"{setting}: two passes over the same rows differ by {short(gap)} of the largest logit")
    if problems:
        fix = (
            "something in it is drawn anew (dropout, a sampling layer), or its kernels are not deterministic: set teacher.attention: eager"
        )
        return failed("; ".join(problems), fix)
    return passed("two passes agree bit for bit" if most == 0 else f"two passes agree to {short(most)} of the largest logit")


def better(setup: Setup) -> Result:
    """The teacher's cross-entropy against the student's, paired by example."""
    if setup.teacher is None:
        return not_asked("the recipe loads no teacher")
    if missing := [source.setting for source in setup.prepared.teachers if source.setting in setup.stand_ins]:
        return not_asked(f"{missing[0]} is trained by an earlier stage, and an untrained model stands in for it")
    if "teacher_ce" not in setup.teacher.metrics:
        return not_asked("this teacher does not give the labels' probabilities")
    evaluator = Evaluator(setup.accelerator, setup.small.validation.micro_batch_size)
    found = evaluator.validate([setup.student], setup.teacher, setup.prepared.train)[0]
    (ours, targets), (theirs, _) = found.counting("ce"), found.counting("teacher_ce")
    if not len(targets):
        return not_asked("no training rows have a weight above 0 in the cross-entropy (data.train.loss.ce)")
    values = found.metrics()
    gain = (ours - theirs).sum() / targets.sum()
    residual = (ours - theirs) - gain * targets
    n = len(targets)
    error = math.sqrt(n / max(1, n - 1) * float((residual**2).sum())) / targets.sum() if n > 1 else math.inf
    words = f"on {n} examples the teacher's cross-entropy is {values['teacher_ce']:.4f} and the student's {values['ce']:.4f}"
    words += f" (difference {gain:.4f}, standard error {error:.4f})"
    if gain > 2 * error:
        return passed(words)
    fix = (
        ADVICE + " If it is the student's own base, what it is given beyond the student (data.teacher_context, say) does not help it here."
    )
    return failed(words, fix) if gain < -2 * error else warned(words + ": no clear difference", fix)


CHECKS = (
    Check("tokenizers and vocabularies belong together", "Models", "models", "use models of one tokenizer family", vocabularies),
    Check("logits are those of the model's own forward pass", "Models", "models", BUG, own_logits),
    Check("the teacher's adapter changes it", "Teacher", "models", "check teacher.model and teacher.base", adapters),
    Check("the teacher gives the same logits twice", "Teacher", "models", BUG, deterministic),
    Check("the teacher knows the rows better than the student", "Teacher", "models", BUG, better),
)
