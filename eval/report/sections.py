"""Sections of a sweep's report without statistics: what was run, the teacher next to the students, the cost."""

import json
import math
import re
from collections import Counter
from pathlib import Path

from llmkd.files import read_file

from . import published
from .document import Fold, Heading, Items, Para, Span, Table, Text
from .sweep_files import Arm, Run, SweepFolder, read_json


def what_was_run(sweep: SweepFolder) -> list:
    data, counts = sweep.data, Counter(run.status for run in sweep.runs)
    versions = ", ".join(f"{name} {version}" for name, version in (data.get("versions") or {}).items())
    told = [
        ("date", data.get("date")),
        ("machine", data.get("machine")),
        ("versions", f"llmkd {data.get('llmkd')}" + (f", {versions}" if versions else "")),
        ("arms", f"{len(sweep.arms)}, {len(sweep.runs)} runs: " + ", ".join(f"{n} {status}" for status, n in counts.items())),
        ("baseline", Span(sweep.baseline)),
    ]
    shown, every = settings_of(sweep.base)
    out: list = [Heading("What was run", "run"), Table(["", ""], [[name, value or "not recorded"] for name, value in told] + shown, left=2)]
    if sweep.base:
        out.append(every)
    else:
        out.append(Para("The base recipe is not recorded yet: the sweep stopped before its first arm.", "small"))
    stages = data.get("stages") or {}
    if stages:
        out += [
            Heading("Stages before the arms"),
            Table(["stage", "seconds", "held-out CE before", "after"], [_stage(sweep, n, s) for n, s in stages.items()]),
        ]
    out += [Heading("Arms, as differences to the base recipe")]
    out.append(Table(["arm", "differs in", "seeds", "status"], [_arm(sweep, arm) for arm in sweep.arms.values()], left=4))
    return out + _unfinished(sweep) + _worsened(sweep)


def settings_of(base: dict) -> tuple[list[list[Text]], Fold]:
    """The settings of a recipe that say most, as rows of a table, and all of them, folded."""
    shown = ("student.model", "student.method", "student.lora.rank", "teacher.model", "data.train.path", "data.validation.path",
             "loss.divergence", "loss.kd_ratio", "optim.lr", "train.batch_size", "train.epochs", "train.max_steps", "seed")  # fmt: skip
    told: list[list[Text]] = [[key, Span(value_text(base[key]))] for key in shown if base.get(key) is not None]
    rows: list[list[Text]] = [[Span(key), Span(value_text(value))] for key, value in base.items()]
    return told, Fold("Every setting of the recipe", [Table(["setting", "value"], rows, left=2)])


def _stage(sweep: SweepFolder, name: str, stage: dict) -> list[Text]:
    summary = read_json(sweep.path / stage["folder"] / "summary.json")
    ce = [(summary.get(part) or {}).get("ce") for part in ("before", "validation")]
    return [Span(name), f"{stage.get('seconds') or 0:.1f}", *("not measured" if x is None else f"{x:.4f}" for x in ce)]


def _arm(sweep: SweepFolder, arm: Arm) -> list[Text]:
    differs: list[str | Span] = []
    for key, value in arm.changes.items():
        was = f" (base: {value_text(sweep.base[key])})" if key in sweep.base else ""
        if key in sweep.base and sweep.base[key] == value:
            was = ""
        differs += [*(["; "] if differs else []), Span(f"{key}: {value_text(value)}"), was]
    seeds = [str(run.seed) for run in arm.runs if run.seed is not None]
    return [Span(arm.name), tuple(differs) or "nothing", ", ".join(seeds) or "the recipe's", _status(arm)]


def _status(arm: Arm) -> Text:
    """ "done", or how many runs are what."""
    counts = Counter(run.status for run in arm.runs)
    if len(counts) == 1:
        (status,) = counts
        return Span(status, "worse") if status == "failed" else status if status == "done" else Span(status, "quiet")
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _unfinished(sweep: SweepFolder) -> list:
    """Each failed run with its reason, and those that wait, by name."""
    failed = [run for run in sweep.runs if run.status == "failed"]
    waiting = [run for run in sweep.runs if run.status not in ("failed", "done")]
    out: list = []
    if failed:
        items: list[Text] = [(Span(run.name), ": ", _cut(run.reason or "no reason recorded")) for run in failed]
        out += [Heading("Runs that failed"), Items(items)]
    if waiting:
        names = [part for run in waiting for part in (", ", Span(run.name))][1:]
        out += [Heading("Runs that wait"), Para((*names, ". llmkd sweep with --resume trains them."))]
    return out


def _worsened(sweep: SweepFolder) -> list:
    items: list[Text] = [(Span(run.name), ": ", _cut(str(text))) for run in sweep.runs for text in run.summary.get("warnings") or ()]
    return [Heading("Runs that ended worse than they began"), Items(items)] if items else []


def _cut(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def teacher_checks(sweep: SweepFolder) -> list:
    """Each teacher's CE against the students' before training, and how far the KD loss went."""
    out: list = [Heading("Teacher", "teacher")]
    groups: dict[str, list[Run]] = {}
    for run in sweep.runs:
        if run.distils:
            how = {key: value for key, value in run.recipe.items() if key.startswith(("teacher", "mixture."))}
            groups.setdefault(json.dumps(how if len(run.teachers) > 1 else run.teachers, sort_keys=True), []).append(run)
    if not groups:
        return [*out, Para("No arm learns from a teacher.")]
    rows, warned = [], []
    for runs in groups.values():
        teachers, combined = runs[0].teachers, runs[0].recipe.get("mixture.combine", "probabilities")
        name = " and ".join(short(sweep, one) for one in teachers) + (f" ({combined})" if len(teachers) > 1 else "")
        before = [r.summary.get("before") or next((x["validation"] for x in r.records if "validation" in x), {}) for r in runs]
        pairs = [(b["teacher_ce"], b["ce"]) for b in before if "teacher_ce" in b and "ce" in b]
        kinds = dict.fromkeys(teacher_kind(sweep, one) for one in teachers)
        moved = [m for r in runs if (m := _moved(r.curve("kd")))]
        kd = "not recorded" if not moved else f"{_mean([a for a, _ in moved]):.4f} to {_mean([b for _, b in moved]):.4f}"
        theirs, ours = (_mean([pair[i] for pair in pairs]) for i in (0, 1))
        verdict: Text = "not measured"
        if pairs:
            verdict = Span("better than the students", "better") if theirs < ours else Span("worse than the students", "worse")
        names = list(dict.fromkeys(run.arm for run in runs))
        cells = [f"{x:.4f}" if pairs else "–" for x in (theirs, ours)]
        rows.append(
            [
                Span(name),
                "; ".join(kinds),
                *cells,
                kd,
                verdict,
                ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else ""),
            ]
        )
        if pairs and theirs >= ours:
            warned.append(
                (name, f"'s CE on the held-out rows ({theirs:.4f}) is no better than the students' before training ({ours:.4f}). ")
            )
        elif not all(kind.startswith("tuned") for kind in kinds):
            warned.append((name, " is not known to be tuned on this data. "))
    head: list[Text] = [
        "teacher",
        "what it is",
        "its held-out CE",
        "students' before",
        "KD loss, first to last tenth",
        "on the held-out rows",
        "arms",
    ]
    table = Table(head, rows, left=2, words=2)
    out += [
        Para(
            "Measured on the held-out rows before training. A student learns little from a teacher with a higher CE than its own.", "small"
        ),
        table,
    ]
    if all(row[2] == "–" for row in rows):
        out.append(
            Para(
                "No held-out rows were measured with a teacher (data.validation or data.validation_fraction), so it is not known whether the teacher was the better model.",
                "warn",
            )
        )
    out += [Para(("The teacher ", Span(name), text + published.ADVICE + f" Source: {published.SOURCE}."), "warn") for name, text in warned]
    return out


def teacher_kind(sweep: SweepFolder, model: str) -> str:
    stage = re.search(r"/stages/([^/]+)/(adapter|model|merged)/?$", model)
    if stage and (stage[1] in (sweep.data.get("stages") or {}) or (sweep.path / "stages" / stage[1]).exists()):
        made = stage[2] == "model" and "architecture:\n" in _text(sweep.path / "stages" / stage[1] / "recipe.yaml")
        return f"{'new weights, made' if made else 'tuned'} by this sweep's stage {stage[1]}"
    if (Path(model) / "cache.json").exists():
        return "a teacher cache"
    if published.adapter_base(model) or re.search(r"/adapter/?$", model):
        return "tuned: an adapter"
    return "a model as it is"


def _text(path: Path) -> str:
    return read_file(path).decode("utf-8") if path.exists() else ""


def short(sweep: SweepFolder, model: str) -> str:
    """A path inside the sweep's folder from there on; of another long one the last three parts."""
    inside = re.search(r"/(stages/[^/]+/.*)$", model)
    parts = model.rstrip("/").split("/")
    return inside[1] if inside else model if len(parts) <= 3 else "…/" + "/".join(parts[-3:])


def _moved(curve: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Means of the first and the last tenth of a curve."""
    values, tenth = [y for _, y in curve], math.ceil(len(curve) / 10)
    return (_mean(values[:tenth]), _mean(values[-tenth:])) if len(values) > 1 else None


def cost(sweep: SweepFolder) -> list:
    out: list = [Heading("Cost", "cost")]
    groups = sweep.data.get("groups") or []
    runs = {run.name: run for run in sweep.runs}
    if not groups:
        return [*out, Para("No group of arms has been planned yet.")]
    rows: list[list[Text]] = []
    last = {name: i for i, group in enumerate(groups, 1) for name in group["arms"]}  # a sweep that went on may have planned arms anew
    passes = alone = 0
    seconds, earlier, lost = 0.0, 0.0, False
    for i, group in enumerate(groups, 1):
        own = [runs[name] for name in group["arms"] if last[name] == i and name in runs]
        if i not in last.values():
            earlier += group.get("seconds") or 0.0
            continue
        names = ", ".join(group["arms"][:8]) + (f" and {len(group['arms']) - 8} more" if len(group["arms"]) > 8 else "")
        how = "side by side" if group.get("shared") else f"alone: {group.get('why') or 'no reason recorded'}"
        guess, took = (group.get("estimate") or {}), group.get("seconds") or 0.0
        planned = f"{guess['seconds']:.1f}" if "seconds" in guess else "none"
        memory = f"{guess['bytes'] / 1e9:.1f} GB" if "bytes" in guess else "none"
        unknown = not took and any(run.status == "done" for run in own)
        actual = ["not recorded"] * 2 if unknown else [f"{took:.1f}", f"{took / len(group['arms']):.1f}"]
        rows.append([str(i), names, how, str(len(group["arms"])), planned, *actual, memory])
        if took or unknown:
            distilling = sum(run.distils for run in own)
            passes, alone = passes + (distilling > 0), alone + distilling
        seconds, lost = seconds + took, lost or unknown
    head: list[Text] = ["group", "arms", "how", "arms", "seconds, estimated", "actual", "an arm's share", "memory, estimated"]
    before = sum(stage.get("seconds") or 0.0 for stage in (sweep.data.get("stages") or {}).values())
    items: list[Text] = [
        f"All arms took {'at least ' * lost}{seconds:.1f} seconds"
        + (f", earlier attempts at them {earlier:.1f}" if earlier else "")
        + (f", the stages before them {before:.1f}" if before else "")
        + ". Validation and saving are in it."
        + " Of some arms that are done the seconds were not recorded." * lost,
        f"Teacher passes over the training data: {'at least ' * lost}{passes}; one for each arm that distils would have been {alone}, "
        f"so {'at most ' * lost}{alone - passes} were saved.",
    ]
    out += [Items(items), Table(head, rows, left=3)]
    each: list[list[Text]] = [[Span(run.name), f"{run.seconds:.1f}", run.status] for run in sweep.runs]
    out.append(
        Fold(
            "Seconds of every run (of arms side by side, the group's time in equal shares)",
            [Table(["run", "seconds", "status"], each, words=1)],
        )
    )
    return out


def published_results(sweep: SweepFolder, rows: list, versions: str) -> list:
    """torchtune's results next to ours; nothing where the recipe isn't that of the study."""
    if not published.applies(sweep.base, sweep.path):
        return []
    out: list = [Heading("Published results next to ours", "published")]
    out.append(Para(f"Published: {published.TITLE}, {published.SOURCE}. Ours: measured here, ± one standard error over questions."))
    ours = {(row.task, row.metric, row.arm): row for row in rows}
    body: list[list[Text]] = []
    for row in published.ROWS:
        alike = [arm for arm in sweep.arms.values() if arm.done and published.like(row, *_likeness(sweep, arm))]
        for arm in alike or [None]:
            cells: list[Text] = []
            for (task, metric), value in zip(published.COLUMNS, row.values, strict=True):
                own = ours.get((task, metric, arm.name)) if arm else None
                error = f" ±{own.stderr:.4f}" if own and own.stderr is not None else ""
                cells += [Span(f"{value:.4f}", "quiet"), f"{own.value:.4f}{error}" if own else "–"]
            body.append([row.name, Span(arm.name) if arm else Span("none", "quiet"), *cells])
    heads = [text for task, metric in published.COLUMNS for text in (f"{task} {metric}, published", "ours")]
    out.append(Table(["published model", "our arm of its kind", *heads], body, left=2))
    errors = ", ".join(f"{task} {metric} {error}" for (task, metric), error in published.COLUMNS.items())
    out.append(Para(f"One standard error of a published result, by the number of questions: about {errors}.", "small"))
    differs = published.differing(sweep.base)
    told = [
        *published.ALWAYS,
        *([f"Ours were measured with {versions}."] if versions else []),
        *(f"The base recipe differs in {text}." for text in differs),
    ]
    return [*out, Heading("Conditions that differ"), Items(list(told))]


def _likeness(sweep: SweepFolder, arm: Arm) -> tuple[dict, str | None, bool]:
    run = arm.done[0]
    teacher = None
    if len(run.teachers) == 1:  # the study has no mixtures
        teacher = "tuned" if teacher_kind(sweep, run.teachers[0]).startswith("tuned") else "untuned"
    return run.recipe, teacher, teacher_kind(sweep, str(run.recipe.get("student.model"))).startswith("tuned")


def value_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
