"""`llmkd export`: write a finished run's student as one plain transformers model, which needs neither PEFT nor llmkd."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import yaml

from ..console import info, warn
from ..data.encoding.tokenizer import load_tokenizer, save_tokenizer, shared_vocab
from ..errors import UserError
from ..files import read_file, remove_leftovers, write_folder
from ..model_folder.files import ModelFiles, classifier_class, encoder_decoder_class, find, rows_of, student_folder
from ..model_folder.generation import generation_settings
from ..model_folder.identity import record_of, verify, write_record
from ..output.run_files import read_summary, run_of
from ..output.run_folder import refuse_unwritable
from ..training.prepare import prepare

_OF_THE_MODEL = ("adapter_config.json", "config.json", "generation_config.json", "llmkd.json", "model.safetensors.index.json")
SAMPLE = 64  # examples for the comparison of the merged model with the trained one


def export(run: Path, to: Path | None = None, checkpoint: str | None = None) -> Path:
    """Write the student as a plain model and return its folder.

    run          a run's folder, or an adapter's
    to           the folder to write, which must not exist; by default RUN/merged
    checkpoint   the number of a step, or best; by default the finished student
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run's output_dir or an adapter")
    run = run.resolve()
    student = run if (run / "adapter_config.json").exists() else student_folder(run)
    is_adapter = (student / "adapter_config.json").exists()
    if student.name == "adapter" and not is_adapter:
        raise UserError(f"export: {student} has no adapter_config.json, which was written with it; copy it again")
    if not is_adapter and not checkpoint:
        raise UserError(f"{run}: was trained in full, so {student} is already a plain model; nothing to merge")
    if to is None:
        name = f"merged-{checkpoint}" if checkpoint else "merged"
        to = run.with_name(f"{run.name}-{name}") if student == run else run / name
    if os.path.lexists(to):
        whole = ", and all of its files are as an export wrote them: use it," if _is_whole(to) else ";"
        raise UserError(f"--to: {to} exists{whole} choose another folder, or remove it")
    refuse_unwritable(to, "--to")
    saved = checkpoint_folder(run, checkpoint) if checkpoint else None
    from ..models.merge import from_checkpoint, merge, merge_classifier, verify_saved
    from ..models.saved_student import save_whole

    files = find(str(student), "export")
    verify(files.base, files.adapter, "export")
    if auto := classifier_class(files.config) or encoder_decoder_class(files.config):
        model = merge_classifier(files, auto, saved) if is_adapter else from_checkpoint(student, saved, auto)
        return _written_classifier(model, student, to, auto)
    tokenizer = load_tokenizer(str(student if (student / "tokenizer.json").exists() else files.base), "export")
    vocab = shared_vocab(tokenizer, {"export": rows_of(files.config)})
    model = merge(files, vocab, saved) if is_adapter else from_checkpoint(student, saved)
    record = drift(model, files, tokenizer, vocab, run, saved) if is_adapter else None
    to.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(to.parent, to.name)
    with write_folder(to) as part:
        save_whole(model, part, generation_settings(files.config, (files.adapter, files.base), "export"))
        verify_saved(model, part)
        save_tokenizer(tokenizer, part)
        if is_adapter and (card := _card(student / "README.md", to, record)):
            (part / "README.md").write_text(card, encoding="utf-8")
        write_record(part, "export", student="merged" if is_adapter else "full", **(record or {}))
    return to


def _written_classifier(model, student: Path, to: Path, auto: str) -> Path:
    """Write a classifier or an encoder-decoder model as a plain model, with the student's tokenizer, feature extractor or image processor."""
    from ..models.merge import verify_saved
    from ..models.saved_student import save_whole

    to.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(to.parent, to.name)
    with write_folder(to) as part:
        save_whole(model, part, None)
        verify_saved(model, part, auto)
        for file in sorted(student.iterdir()):
            if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in _OF_THE_MODEL and not (part / file.name).exists():
                shutil.copy(file, part)
        write_record(part, "export", student="full")
    return to


def _is_whole(folder: Path) -> bool:
    """Whether a folder is a finished export, as after a kill at the very end of the command."""
    try:
        verify(folder, None, "--to")
        return record_of(folder, "--to").get("student") in ("merged", "full")
    except (UserError, OSError):
        return False


def _card(path: Path, to: Path, record: dict | None) -> str | None:
    """The merged model's card, made from the adapter's. None if there is no card, or it is damaged, or not llmkd's."""
    from ..output.model_card import merged_card

    if not path.exists():
        return None
    try:
        card = read_file(path).decode("utf-8")
        return merged_card(card, to, record) if "llmkd" in card else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        warn(f"note: {to} gets no model card: {path} is damaged ({str(error).splitlines()[0]})")
        return None


def drift(merged, files: ModelFiles, tokenizer, vocab: int, run: Path, saved: Path | None) -> dict | None:
    """How far the merged model is from the trained one, for an adapter that was trained on a quantised base; None for other adapters.

    {"trained_on": the quantisation, "merged_into": "unquantised", or "dequantised" where the folder holds no unquantised base,
    "measured_on": the examples, "drift": {ce, trained_ce, forward_kl (trained || merged), top1_agreement}}.
    """
    from ..models.saved_student import as_trained

    settings = as_trained(files.adapter, files.base)
    trained_on = dataclasses.asdict(settings.quantization) if settings.quantization else files.config.get("quantization_config")
    if not trained_on:
        return None
    from ..models.language_model import LanguageModel
    from ..models.load import LoadContext, load_teacher
    from ..models.merge import load_trained_weights
    from ..teachers.live import LiveTeacher
    from ..training.launch import start
    from ..training.validate import Evaluator

    sample, where = _sample(run, vocab)
    accelerator = start()
    trained = load_teacher(settings, LoadContext(vocab, accelerator.device))
    if saved:
        load_trained_weights(trained.model, saved)
    plain = LanguageModel(merged.to(accelerator.device), vocab).eval()
    found = Evaluator(accelerator, 4).validate([plain], LiveTeacher(trained), sample)[0].metrics()
    metrics = {
        "ce": found["ce"],
        "trained_ce": found["teacher_ce"],
        "forward_kl": found["forward_kl"],
        "top1_agreement": found["top1_agreement"],
    }
    into = "unquantised" if settings.quantization else "dequantised"
    info(
        f"merged into the {into} base; compared with the trained model on {where}: KL {metrics['forward_kl']:.4f} nats, "
        f"agreement {metrics['top1_agreement']:.3f}, CE {metrics['ce']:.4f} (trained: {metrics['trained_ce']:.4f})"
    )
    merged.to("cpu")
    return {"trained_on": trained_on, "merged_into": into, "measured_on": where, "drift": metrics}


def _sample(run: Path, vocab: int):
    """Examples of the run's held-out rows, or else of its training rows; random tokens if the data cannot be read; and a description of them."""
    from ..config.loader import load_recipe
    from ..data.examples import TokenExamples

    try:
        recipe = load_recipe(run / "recipe.yaml")
        student, loss = dataclasses.replace(recipe.student, layers=None), dataclasses.replace(recipe.loss, kd_ratio=0.0)
        prepared = prepare(dataclasses.replace(recipe, student=student, teacher=None, loss=loss))  # only its data is needed
        encoded = prepared.validation or prepared.train
        first = np.arange(len(encoded)) < SAMPLE
        return encoded.subset(first).unweighted(), f"{first.sum()} {'held-out' if prepared.validation else 'training'} examples"
    except UserError as error:
        warn(f"note: the run's data cannot be read ({error.problems[0]}); comparing on random tokens")
    ids = np.random.default_rng(0).integers(0, vocab, (8, 64), np.int32)
    marks = np.ones_like(ids, bool)
    marks[:, 0] = False
    return TokenExamples(ids.ravel(), marks.ravel(), np.arange(0, 513, 64), np.arange(8)), "8 rows of random tokens"


def checkpoint_folder(run: Path, which: str) -> Path:
    """The folder of a checkpoint, by its step or `best` (by checkpoint.best_by). UserError if it is missing or damaged."""
    if which == "best":
        path = run / "summary.json"
        if not path.exists():
            raise UserError(f"--checkpoint: {run} has no summary.json, which names the best step; finish the run, or name a step")
        best = read_summary(run, "name a step instead of best").get("best")
        if not (isinstance(best, dict) and "step" in best):
            raise UserError(f"--checkpoint: {run} kept no best checkpoint; it needs checkpoint.best_by in its recipe")
        which = str(best["step"])
    folder = run / "checkpoints" / f"step-{which}"
    there = ", ".join(sorted((p.name.removeprefix("step-") for p in folder.parent.glob("step-*")), key=lambda n: (len(n), n))) or "none"
    if not folder.is_dir():
        raise UserError(f"--checkpoint: {run} has no checkpoint {which}; it has {there}")
    from ..training.checkpoint import Unusable, verified

    try:
        verified(folder, run_of(run))
    except Unusable as error:
        raise UserError(f"--checkpoint: {folder} cannot be used ({error}); the run has {there}") from error
    return folder
