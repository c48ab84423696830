"""The model card of a trained adapter or model: what it is, how it was made and what was measured, with the hub's metadata.

Names and paths come from users. Whatever characters they contain, the metadata stays valid YAML and the text valid Markdown.
"""

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..config.fields import as_tuple
from ..config.loader import dump
from ..config.recipe import Data, Loss, Mixture, Recipe, Source, Student, distils
from ..config.schedule import in_words
from ..config.target_weights import chosen_by
from ..config.where import where_words
from ..model_folder.files import ModelFiles, hub_origin, licence
from ..model_folder.identity import record_of
from ..model_folder.layers import layer_words
from ..teachers.resolve import TeacherSource
from . import markdown
from .usage_snippets import GENERATION, full_model_snippet, usage_snippet

#: For each validation metric its type on the hub, if it has one there, and its description.
METRICS = {
    "ce": ("cross_entropy", "cross-entropy, nats per token"),
    "perplexity": ("perplexity", "perplexity"),
    "forward_kl": ("forward_kl", "KL(teacher, student), nats per token"),
    "reverse_kl": ("reverse_kl", "KL(student, teacher), nats per token"),
    "top1_agreement": ("top1_agreement", "same most likely token as the teacher"),
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("f1", "macro F1"),
    "wer": ("wer", "word error rate"),
    "cer": ("cer", "character error rate"),
}

#: Metrics that need a teacher.
TEACHER_METRICS = ("forward_kl", "reverse_kl", "top1_agreement", "teacher_ce", "teacher_entropy")


@dataclass(frozen=True)
class DataSource:
    """A data source, and what was found when it was read: path, name, split, resolved revision, rows."""

    source: Source
    found: dict

    @property
    def hub(self) -> bool:
        """Whether it came from the hub: its path has the form `owner/name` or `name`, and no local file has that name."""
        path = Path(self.source.path)
        a_file = path.exists() or path.suffix in (".json", ".jsonl", ".parquet", ".arrow", ".csv")
        return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.source.path)) and not a_file

    @property
    def revision(self) -> str | None:
        """The commit that was read, if known; else the recipe's revision."""
        return self.found.get("revision") or self.source.revision

    def __str__(self) -> str:
        """The source in one line of Markdown."""
        s, rows = self.source, self.found.get("rows")
        dropped = rows - self.found.get("used", rows) if rows else 0
        drawn = f", drawn by seed {s.seed}" if s.seed is not None else ", the first"
        parts = [
            markdown.code_span(s.path),
            f"configuration {markdown.code_span(s.name)}" if s.name else "",
            f"split {markdown.code_span(s.split)}" if self.hub or s.path.startswith("builtin:") else "",
            f"revision {markdown.code_span(self.revision)}" if self.revision else "the default branch's head" if self.hub else "",
            f"format {s.format}",
            f"{s.noise:g} of the answers replaced by wrong ones" if s.noise else "",
            f"rows whose {markdown.escape(where_words(s.where))}" if s.where else "",
            f"{rows:,} rows" if rows else "",
            f"{dropped:,} of them dropped (too long, or without an answer)" if dropped else "",
            f"at most {s.limit:,}{drawn}" if s.limit else "",
            f"{s.weight:g} passes an epoch" if s.weight != 1 else "",
            f"divergence {s.divergence}" if s.divergence else "",
        ]
        return ", ".join(part for part in parts if part)


def model_card(
    recipe: Recipe,
    summary: dict,
    student: ModelFiles | None,
    teachers: tuple[TeacherSource, ...],
    origins: dict[str, list[dict]],
    end_tokens: Sequence[str] | None = (),
    pipeline: str = GENERATION,
) -> str:
    """The card's Markdown. It takes the whole recipe because the card shows it.

    student            None for new weights
    teachers, origins  as in `Prepared`
    end_tokens         the tokens that end answers; None if the model writes no text
    pipeline           the name of transformers' pipeline for the model
    """
    data = sources_by_purpose(recipe.data, origins)
    if not distils(recipe):
        summary = drop_teacher_metrics(summary)
    packages = ["torch", "transformers", "peft", "accelerate", "datasets"]
    if recipe.student.quantization or any(one.settings.loaded_in for one in teachers) or recipe.optim.name != "adamw":
        packages.append("bitsandbytes")
    return "\n".join(
        [
            f"---\n{card_data(recipe, summary, student, teachers, data, pipeline).to_yaml()}\n---\n",
            f"# {markdown.escape(title(recipe))}\n",
            *introduction(recipe.student, recipe.loss, recipe.mixture, student, teachers),
            *(stopping(end_tokens) if end_tokens is not None else []),
            "\n## Use\n",
            markdown.code_block(usage_snippet(recipe.student, student, saved_in(recipe), pipeline), "python"),
            "\n## Data\n",
            *(f"- {what}: {one}" for what, group in data.items() for one in group),
            *([f"- {recipe.data.validation_fraction:.2%} of the training rows were held out."] if recipe.data.validation_fraction else []),
            "\n## Held-out metrics\n",
            *metrics_table(summary),
            "\n## Recipe\n",
            f"llmkd {__version__}, Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}.\n",
            markdown.code_block(dump(recipe), "yaml"),
            "",
        ]
    )


def drop_teacher_metrics(summary: dict) -> dict:
    """The summary without metrics that need a teacher, which a sweep measures also for students that do not distil."""
    return summary | {
        part: {k: v for k, v in summary.get(part, {}).items() if k not in TEACHER_METRICS} for part in ("before", "validation")
    }


def merged_card(text: str, folder: Path, drift: dict | None) -> str:
    """The card of a merged model, made from the adapter's card. `drift`: the result of `export.drift`.

    ValueError if `text` is not a card of llmkd.
    """
    card = ModelCard(text)
    card.data.library_name = "transformers"
    if card.data.base_model:
        card.data.base_model_relation = "finetune"
    if drift:  # the card's metrics belong to the adapter on its quantised base
        card.data.eval_results = None
    notes = ["The adapter described here, merged into its base.\n"]
    if drift:
        rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in drift["drift"].items())
        notes.append(
            f"The adapter was trained on a quantised base and merged into the {drift['merged_into']} one. The held-out metrics below are those of the model as "
            f"trained. The merged model differs from it by, on {drift['measured_on']} (forward_kl is KL(trained, merged)):\n\n| metric | value |\n|---|---|\n{rows}"
        )
    head, _, rest = card.text.partition("\n## Use\n")
    fence = re.search(r"^(`{3,})python\n.*?^\1$", rest, re.DOTALL | re.MULTILINE)
    if fence is None:
        raise ValueError("it has no Python under Use")
    rest = rest[: fence.start()] + markdown.code_block(full_model_snippet(repr(str(folder))), "python") + rest[fence.end() :]
    return f"---\n{card.data.to_yaml()}\n---\n{head}\n" + "\n".join(notes) + f"\n## Use\n{rest}"


def sources_by_purpose(settings: Data, origins: dict[str, list[dict]]) -> dict[str, list[DataSource]]:
    """The data sources by purpose."""
    out = {}
    for what, name in (("trained on", "train"), ("held out", "validation"), ("questions", "choices")):
        given = as_tuple(getattr(settings, name))
        found = origins.get(f"data.{name}") or [{}] * len(given)
        out[what] = [DataSource(source, origin) for source, origin in zip(given, found, strict=True)]
    return out


def card_data(
    recipe: Recipe,
    summary: dict,
    student: ModelFiles | None,
    teachers: tuple[TeacherSource, ...],
    data: dict[str, list[DataSource]],
    pipeline: str = GENERATION,
) -> ModelCardData:
    """The metadata for the hub. Names of local folders and files are left out, since they mean nothing there."""
    base = student and hub_origin(student.base)
    lora, train = recipe.student.method == "lora", [one.source.path for one in data["trained on"] if one.hub]
    held_out = data["held out"] or data["trained on"]
    asked = ("accuracy",) if data["questions"] else ()  # of multiple-choice questions
    results = [
        eval_result(name, summary["validation"][name], *((data["questions"], "multiple-choice") if name in asked else (held_out, pipeline)))
        for name in METRICS
        if math.isfinite(summary["validation"].get(name, math.nan))
    ]
    relation = {"base_model_relation": "adapter" if lora else "finetune"} if base else {}
    return ModelCardData(
        base_model=base[0] if base else None,
        **relation,
        **(licence(student.base) if student else {}),
        library_name="peft" if lora else "transformers",
        pipeline_tag=pipeline,
        tags=["llmkd", *(["lora"] if lora else []), *(["distillation"] if teachers else [])],
        datasets=list(dict.fromkeys(train)) or None,
        model_name=title(recipe),
        eval_results=results or None,
    )


def eval_result(name: str, value: float, rows: list[DataSource], task: str) -> EvalResult:
    """A metric with the rows on which it was measured. A data set's type is an id on the hub, or "custom".

    Questions have their own task: the hub gives results of the same task, type, configuration, split and revision the data name of the first.
    """
    hub = rows[0] if len(rows) == 1 and rows[0].hub else None
    names = ", ".join(one_line(one.source.path if one.hub else Path(one.source.path).name) for one in rows)
    kind, described = METRICS[name]
    return EvalResult(
        task_type=task,
        dataset_type=hub.source.path if hub else "custom",
        dataset_name=f"{names} (held out)",
        dataset_config=hub.source.name if hub else None,
        dataset_split=hub.source.split if hub else None,
        dataset_revision=hub.revision if hub else None,
        metric_type=kind,
        metric_value=round(value, 6),
        metric_name=described,
    )


def introduction(
    settings: Student, loss: Loss, mixture: Mixture, student: ModelFiles | None, teachers: tuple[TeacherSource, ...]
) -> list[str]:
    """Sentences on the student, its base and licence, and the teachers."""
    quantization, kind = settings.quantization, "A LoRA adapter" if settings.method == "lora" else "A model"
    terms = f", hidden states {in_words(loss.features.weight)}" if loss.features else ""
    terms += f", attention {loss.attention.what} {in_words(loss.attention.weight)}" if loss.attention else ""
    if rule := loss.target_weights:
        terms += f", targets of {' and '.join(rule.terms)} weighed by {rule.by.replace('_', ' ')}{' (inverted)' * rule.invert}"
    if (kept := chosen_by(loss.keep, loss.target_weights)).share < 1:
        terms += f", {kept.share:g} of each example's targets by {kept.by.replace('_', ' ')}{' (lowest first)' * kept.invert}"
    how = f"{loss.divergence}, kd_ratio {in_words(loss.kd_ratio)}, temperature {in_words(loss.temperature)}{terms}"
    made = f"distilled ({how})" if teachers else "fine-tuned"
    lines = [f"{kind} {made} with llmkd.\n"]
    if student is None:
        return [*lines, "It was trained from new random weights.\n"]
    terms = licence(student.base)
    name = terms.get("license_name", terms.get("license"))
    lines.append(
        f"- Base: {model_name(student.base)}"
        + (f", quantised to {quantization.type} by bitsandbytes during training" if quantization else "")
    )
    if student.adapter:
        lines.append(f"- Continued from the adapter {model_name(student.adapter)}")
    lines.append(
        f"- Licence of the base, as its card says: {markdown.code_span(name)}"
        + (f" ({markdown.code_span(terms['license_link'])})" if "license_link" in terms else "")
        + ". The data have terms of their own."
        if name
        else "- The licence of the base is not known: the base has no model card."
    )
    lines += [f"- Teacher: {describe_teacher(teacher)}" for teacher in teachers]
    if len(teachers) > 1:
        how = " times the probability that each gives the target" if mixture.weights == "confidence" else ""
        lines.append(f"- The teachers are combined by their {mixture.combine.replace('_', '-')}, with their weights{how}")
    return lines


def stopping(end_tokens: Sequence[str]) -> list[str]:
    """A sentence on the tokens at which generation stops."""
    if not end_tokens:
        return ["- No answer of the training data ends with an end token: generation may not stop by itself."]
    listed = " or ".join(map(markdown.code_span, end_tokens))
    return [f"- Answers end with {listed}, where generation stops: `eos_token_id` in generation_config.json names it."]


def describe_teacher(teacher: TeacherSource) -> str:
    """A teacher in one line of Markdown: its model, how it was loaded or cached, and its weight."""
    one, files, parts = teacher.settings, teacher.files, []
    if files:
        parts.append((f"the adapter {model_name(files.adapter)} on " if files.adapter else "") + model_name(files.base))
    if one.ema is not None:
        parts.append(f"as the moving average of the student itself ({one.ema:g})")
    if one.merge_adapter:
        parts.append("merged")
    if one.quantization:
        parts.append(f"quantised to {one.quantization.type}")
    if one.server:
        parts.append(
            f"{markdown.code_span(one.model or 'a model')} on a {one.of_server('api')} server, its {one.of_server('top_k')} most likely tokens"
        )
    if teacher.cache:
        parts.append(f"its outputs read from {markdown.code_span(one.cache.path)} ({teacher.cache.header['kind']['name']})")
    return ", ".join(parts + ([f"weight {one.weight:g}"] if one.weight != 1 else []))


def model_name(folder: Path) -> str:
    """A model's name on the hub with its commit, or its folder; for some layers of another model also which ones."""
    record = record_of(folder)
    if "headed_from" in record:
        return f"{markdown.code_span(record['headed_from'])} with a new head"
    if "cut_from" in record:
        return f"{layer_words(record['layers'])} of {markdown.code_span(record['cut_from'])}"
    origin = hub_origin(folder)
    return f"{markdown.code_span(origin[0])} (revision {markdown.code_span(origin[1])})" if origin else markdown.code_span(str(folder))


def metrics_table(summary: dict) -> list[str]:
    """A table of all held-out metrics, before and after training."""
    before, after = summary.get("before", {}), summary["validation"]
    if not after:
        return ["None were measured."]
    cell = lambda value: "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)  # noqa: E731
    rows = [
        f"| {name}{f' ({METRICS[name][1]})' if name in METRICS else ''} | {cell(before.get(name))} | {cell(value)} |"
        for name, value in after.items()
    ]
    return ["| metric | before | after |", "|---|---|---|", *rows]


def saved_in(recipe: Recipe) -> str:
    """The student's id on the hub if it is pushed to an owner's repository, else its folder in the run's folder."""
    if recipe.push_to_hub and "/" in recipe.push_to_hub.repo:
        return recipe.push_to_hub.repo
    return str(Path(recipe.output_dir, "adapter" if recipe.student.method == "lora" else "model"))


def title(recipe: Recipe) -> str:
    """The repository's name, or that of the run's folder."""
    return one_line(
        recipe.push_to_hub.repo.rpartition("/")[2] if recipe.push_to_hub else Path(recipe.output_dir).expanduser().resolve().name
    )


def one_line(text: str) -> str:
    return " ".join(text.split())
