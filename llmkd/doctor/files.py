"""Checks of the files that a run writes and reads: the saved and the exported student, its end tokens, the teacher cache, free disk space."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.recipe import Teacher
from ..config.teacher import Cache
from ..console import count
from ..data.encoding.tokenizer import save_tokenizer
from ..model_folder.files import ModelFiles, find
from ..model_folder.generation import generation_settings, stops_at
from ..models import merge as merging
from ..models import saved_student
from ..models.load import LoadContext, load_models, load_teacher
from ..teachers.cache.records import make_record_format
from ..teachers.cached import CachedTeacher
from ..teachers.live import LiveTeacher
from ..teachers.resolve import TeacherSource, examples_of
from ..teachers.sparse import Sampled, TopK
from . import plain
from .check import BUG, Check, Result, failed, not_asked, passed, short, warned
from .data import last_tokens
from .losses import logits
from .setup import Setup
from .weights import moved, round_at_random_, widened

MOST_BYTES = 8 << 30  # size of a model that is written for a check


def saved(setup: Setup) -> Result:
    """The student with changed weights, written as at the end of a run and loaded again as for an evaluation, must have the same logits."""
    if why := _too_large(setup, whole=setup.small.student.method == "full"):
        return not_asked(why)
    student, settings = setup.student, setup.small.student
    with moved(setup):
        folder = _write(setup)
        before = _logits(setup)
    again = saved_student.as_trained(folder) if settings.method == "lora" else Teacher(model=str(folder), dtype=settings.dtype)
    model = load_teacher(again, LoadContext(setup.prepared.vocab, setup.device), "the saved student")
    gap = _gap(before, _logits(setup, model))
    found = f"the saved student's logits differ from the trained one's by {short(gap)} of the largest"
    return passed(found) if gap <= setup.rounding(student) else failed(found, "what a run leaves is not what it trained: " + setup.cause)


def exported(setup: Setup) -> Result:
    """The same for the student merged into its base, as by `llmkd export`, and loaded by transformers alone."""
    student, settings = setup.student, setup.small.student
    if settings.method == "full":
        return not_asked("the student trains in full and is a plain model already")
    if settings.quantization or "quantization_config" in setup.prepared.student.config:
        return not_asked("the base is quantised, and a merge differs by its rounding; llmkd export measures that")
    if why := _too_large(setup, whole=True):
        return not_asked(why)
    folder, before, share = _moved_far(setup)
    files, to = find(str(folder), "export"), setup.folder / "merged"
    merged = merging.merge(files, setup.prepared.vocab, trained_in=settings.dtype).to(setup.device).eval()
    unrounded = _plain_logits(setup, merged)
    dtype = merged.get_input_embeddings().weight.dtype
    del merged
    model = _exported(setup, files, to)
    narrow = max((student.dtype, model.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    with widened(model):
        after = _plain_logits(setup, model)
        round_at_random_(model, narrow)
        rounding = _size(_plain_logits(setup, model) - after) / _size(after)
    off, gap = _size(before - unrounded) / _size(before), _size(unrounded - after) / _size(before)
    near = 1e-9 if dtype == torch.float64 else 1e-4
    found = f"moved until its logits differ by {share:.0%}, the student merged in {_name(dtype)} differs from the trained one by {short(off)} of the"
    found += f" logits' size, and the exported model from that by {short(gap)}; rounding its weights to {_name(narrow)} does about {short(rounding)}"
    if off <= near and gap <= max(near, 3 * rounding):
        return passed(found)
    if off <= near:
        return failed(
            found, "share the adapter instead: the merge is right, but not what is exported of it, by more than rounding usually does"
        )
    return failed(found, "share the adapter instead of the export; " + BUG)


def _exported(setup: Setup, files: ModelFiles, to: Path) -> nn.Module:
    """The model that `llmkd export` would write, loaded by transformers alone."""
    from transformers import AutoModelForCausalLM

    merged = merging.merge(files, setup.prepared.vocab)
    saved_student.save_whole(merged, to, generation_settings(files.config, (files.adapter, files.base), "export"))
    merging.verify_saved(merged, to)
    del merged
    try:
        return AutoModelForCausalLM.from_pretrained(to, dtype="auto", trust_remote_code=False).to(setup.device).eval()
    finally:
        shutil.rmtree(to)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _moved_far(setup: Setup) -> tuple[Path, Tensor, float]:
    """(folder, logits, change): the student saved with its weights moved until the logits change by a third, as those of a trained adapter may.

    In a new adapter a merge that is wrong by 1 % would not show. The logits [n, V] are computed in at least float32; the change is relative.
    """
    with widened(setup.student.model):
        old = _logits(setup).double().cpu()
    change, share = 0.0, 0.01
    while change < 0.3 and share < 100:
        share *= 10
        with moved(setup, share):
            with widened(setup.student.model):
                new = _logits(setup).double().cpu()
            change = _size(new - old) / _size(old)
            folder = _write(setup)
    return folder, new, change


def _plain_logits(setup: Setup, model) -> Tensor:
    """Logits at the sampled targets by transformers' own forward pass, [n, V], float64 on the CPU."""
    batch = setup.batch()
    with torch.no_grad():
        logits_BTV = model(input_ids=batch.student.inputs["input_ids"], use_cache=False).logits
    return logits_BTV.flatten(0, 1)[batch.student.rows_N[setup.sample(batch)], : setup.prepared.vocab].double().cpu()


def _size(x: Tensor) -> float:
    return max(x.pow(2).mean().sqrt().item(), 1e-30)


def end_tokens(setup: Setup) -> Result:
    """The token that ends the answers must be one at which the saved student's generation stops."""
    tokenizer, found = setup.prepared.tokenizer, last_tokens(setup)
    if not found:
        return not_asked("every example is cut at data.max_length, so no answer ends")
    total = sum(found.values())
    usual = [token for token, times in found.most_common() if times >= 0.05 * total]
    if usual[0] is None:
        fix = "let the chat template end the assistant's turn with a control token, or use a format without a template, which adds the end token"
        return warned(f"{found[None]} of {total} examples end without a control token, so the student does not learn to stop", fix)
    stops = generation_ends(setup)
    ends = [token for token in usual if token is not None]
    words = ", ".join(f"{found[token]} of {total} examples end with {tokenizer.convert_ids_to_tokens(token)!r}" for token in ends)
    at = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in stops) or "nothing"
    if lacking := [token for token in ends if token not in stops]:
        fix = f"add {', '.join(map(str, lacking))} to eos_token_id in the generation_config.json of student.model"
        return failed(f"{words}, and the saved student stops at {at}: it would write on after its answer", fix)
    return passed(f"{words}; the saved student stops at {at}")


def generation_ends(setup: Setup) -> list[int]:
    """The end tokens in the generation config that is saved with the student."""
    if _too_large(setup, whole=setup.small.student.method == "full"):
        return stops_at(_generation(setup))
    return stops_at(json.loads((_write(setup) / "generation_config.json").read_text()))


def cache(setup: Setup) -> Result:
    """The cache's content for the rows against the model that wrote it; for a cache not written yet, the content that it would get."""
    asked, why, wrong = [], [], False
    for number, source in enumerate(setup.prepared.teachers):
        planned = setup.unwritten.get(source.setting)
        if not source.cache and not planned:
            continue
        if not source.settings.model_path:
            why.append(f"{source.setting} names a cache and no model that could be loaded")
        elif not len(mine := examples_of(setup.few, number)):
            why.append(f"none of the examples is {source.setting}'s")
        else:
            found, bad = _against_live(setup, source, mine.tolist(), planned)
            asked.append(f"{source.setting}: {found}")
            wrong = wrong or bad
    if wrong:
        fix = "write the cache again by llmkd cache with this recipe, into another folder; with kind: topk, more value_bits are closer"
        return failed("; ".join(asked), fix)
    return passed("; ".join(asked)) if asked else not_asked("; ".join(why) or "no teacher has a cache")


def _against_live(setup: Setup, source: TeacherSource, mine: list[int], planned: Cache | None) -> tuple[str, bool]:
    """(what was compared, whether it is wrong). `planned`: the settings of a cache not written yet, whose records are made in memory."""
    batch, every = setup.batch(mine), slice(None)
    model = setup.live.get(source.setting)
    if model is None:
        alone = (source.setting, dataclasses.replace(source.settings, cache=None))
        (model,) = load_models([], [alone], LoadContext(setup.prepared.vocab, setup.device, setup.small.seed))[1]
    live = LiveTeacher(model)(batch)
    if planned:
        form = make_record_format(planned, setup.prepared.vocab, model)
        kept = form.signal(torch.from_numpy(form.record(live, batch.labels_N, batch.examples)), setup.device)
    else:
        kept = CachedTeacher(source.cache, setup.device)(batch)
    log_p_NV = live.log_probs(every).double()
    own_N = log_p_NV[torch.arange(batch.num_targets, device=setup.device), batch.labels_N]
    most = (kept.label_log_probs(every, batch.labels_N).double() - own_N).abs().max().item()
    found, wrong = f"the labels' log-probability by at most {short(most)} nats", not most <= 0.05 + 2 * setup.rounding(model)
    if not isinstance(kept, Sampled):
        distance = plain.kl(*_on_one_set(log_p_NV, kept)).mean().item()
        found += f", KL(live || cache) {short(distance)} nats per token"
        wrong = wrong or not distance <= 0.02
    where = "not written yet; its records made in memory" if planned else source.settings.cache.path
    return f"{where}, against the live teacher at {batch.num_targets} targets: {found}", wrong


def _on_one_set(log_p_NV: Tensor, kept) -> tuple[Tensor, Tensor]:
    """The live and the cached log-probabilities [N, E] over the cache's events: all tokens, or its top k and the rest together."""
    if not isinstance(kept, TopK):
        return log_p_NV, torch.log_softmax(kept.log_probs(slice(None)).double(), -1)
    named_NV = torch.zeros_like(log_p_NV).scatter(1, kept.ids_NK, (kept.log_p_NK > -torch.inf).double())
    rest_N1 = (log_p_NV.exp() * (1 - named_NV)).sum(1, keepdim=True).clamp_min(1e-30).log()
    live_NK = torch.where(kept.log_p_NK > -torch.inf, log_p_NV.gather(1, kept.ids_NK), -torch.inf)
    tail_N1 = kept.tail_NS[:, [kept.tail_exponents.index(1.0)]].double().clamp_min(-69.0)
    return torch.cat([live_NK, rest_N1], 1), torch.cat([kept.log_p_NK.double(), tail_N1], 1).log_softmax(1)


def disk(setup: Setup) -> Result:
    """Free space for checkpoints and the finished student on the disk of output_dir."""
    recipe, state = setup.small, setup.state
    trained = sum(p.numel() * p.element_size() for p in state.parameters.values())
    size = sum(p.numel() * p.element_size() for p in setup.student.parameters()) if recipe.student.method == "full" else trained
    keeps = recipe.checkpoint.keep + 1 + bool(recipe.checkpoint.best_by)  # the next one is written before the oldest is removed
    needed = keeps * 3 * trained + size  # each checkpoint has the weights and two moments
    folder = Path(recipe.output_dir).expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        return failed(f"output_dir: {nearest} cannot be written to", "choose another output_dir")
    free = shutil.disk_usage(nearest).free
    found = f"{count(keeps, 'checkpoint')} and the student take about {needed / 1e9:.2g} GB, and {nearest} has {free / 1e9:,.1f} GB free"
    if needed > free:
        return failed(found, "free some, choose another output_dir, or lower checkpoint.keep")
    return (
        warned(found, "it may fill up while the run lasts: free some, or choose another output_dir") if 2 * needed > free else passed(found)
    )


def _write(setup: Setup) -> Path:
    folder = setup.folder / "student"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_tokenizer(setup.prepared.tokenizer, folder)
    saved_student.save(setup.student, folder, setup.small.student, _generation(setup))
    return folder


def _generation(setup: Setup) -> dict:
    prepared = setup.prepared
    return prepared.task.generation(setup.small.student, prepared.student, prepared.end_tokens)


def _logits(setup: Setup, model=None) -> Tensor:
    model = model or setup.student.replaced(autocast=None)
    return logits(setup, "student", model.eval(), setup.batch())


def _gap(before_NV: Tensor, after_NV: Tensor) -> float:
    before_NV, after_NV = before_NV.double().cpu(), after_NV.double().cpu()
    return (before_NV - after_NV).abs().max().item() / max(before_NV.abs().max().item(), 1e-3)


def _too_large(setup: Setup, whole: bool) -> str:
    """The reason not to write the student; empty if it can be written."""
    tensors = setup.student.model.parameters() if whole else setup.state.parameters.values()
    size, free = sum(p.numel() * p.element_size() for p in tensors), shutil.disk_usage(setup.folder).free
    if size > MOST_BYTES:
        return f"it takes {size / 1e9:.0f} GB, more than this check writes ({MOST_BYTES / 1e9:.0f} GB)"
    if size > 0.4 * free:
        return f"it takes {size / 1e9:.1f} GB, and {setup.folder.parent} has {free / 1e9:.1f} GB free (TMPDIR names another folder)"
    return ""


CHECKS = (
    Check("the saved student has the trained one's logits", "Files", "models", BUG, saved),
    Check("the exported student has them too", "Files", "models", BUG, exported),
    Check("the student learns to end, and stops there", "Files", "models", BUG, end_tokens),
    Check("the teacher cache holds what the live teacher says", "Files", "models", "write the cache again by llmkd cache", cache),
    Check("there is room on the disk", "Files", "models", "choose another output_dir", disk),
)
