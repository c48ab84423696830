"""Writes the report of a sweep from the files of its folder, as one HTML file and as Markdown."""

from dataclasses import dataclass
from pathlib import Path

from llmkd import __version__
from llmkd.console import count, info
from llmkd.files import remove_leftovers, write_atomic

from ..comparison.compare import Row
from ..comparison.compare_text import EXPLANATION, LEGEND, as_numbers, blocks, cells, digits, reach, title
from ..comparison.item_results import HELD_OUT
from . import sections, sweep_charts
from .best import best_sentence, find_best, find_cross_fit, headline
from .document import Heading, Items, Para, Span, Table, Text, as_html, as_markdown, as_plain
from .findings import NOT_COMPARED, compared, label, mark, measure, statements
from .own_text import own_text
from .sweep_files import SweepFolder, read_json, read_sweep
from .sweep_samples import sweep_samples

NOTES = 6  # the most that are printed


@dataclass(frozen=True)
class Report:
    """What is known of a sweep. `notes`: what was left out of the comparisons."""

    sweep: SweepFolder
    rows: list[Row]
    notes: list[str]

    def numbers(self) -> dict:
        """Every run with its results and every comparison, unrounded."""
        runs = [
            {name: getattr(run, name) for name in ("name", "arm", "seed", "status", "reason", "seconds", "changes", "folder")}
            | {name: run.summary.get(name) for name in ("before", "validation", "train", "best")}
            for run in self.sweep.runs
        ]
        best = [
            {name: getattr(one, name) for name in ("best", "distilled", "plain", "pair")}
            | {"cross_fit": find_cross_fit(self.sweep, self.rows, one)}
            for one in find_best(self.sweep, self.rows)
        ]
        return {"baseline": self.sweep.baseline, "runs": runs, "best": best, "notes": self.notes, **as_numbers(self.rows)}


def read_report(folder: Path) -> Report:
    """Read a sweep's folder, whatever state it is in, and compare its arms. UserError where there is no sweep."""
    sweep = read_sweep(Path(folder))
    notes: list[str] = []
    finished = {arm.name: [run.folder for run in arm.done if run.folder.is_dir()] for arm in sweep.arms.values()}
    rows = measure({name: runs for name, runs in finished.items() if runs}, sweep.baseline, notes.append)
    return Report(sweep, rows, list(dict.fromkeys(notes)))


def write(report: Report) -> tuple[Path, Path]:
    """Write report.html and report.md into the sweep's folder, and print the best arms."""
    sweep, rows = report.sweep, report.rows
    written = write_pages(sweep.path, f"Report of the sweep {sweep.path.resolve().name}", document(sweep, rows, report.notes))
    for note in report.notes[:NOTES]:
        info(f"note: {note}")
    if len(report.notes) > NOTES:
        info(f"{count(len(report.notes) - NOTES, 'more note')} at the end of the report")
    for one in find_best(sweep, rows):
        info(as_plain(best_sentence(sweep, one)))
    return written


def write_pages(folder: Path, heading: str, document: list) -> tuple[Path, Path]:
    """report.html and report.md of a folder."""
    foot = f"Written by llmkd {__version__} from the files of this folder; llmkd report writes it again."
    page, text = folder / "report.html", folder / "report.md"
    remove_leftovers(folder, "report.*")
    write_atomic(page, as_html(heading, document, foot))
    write_atomic(text, as_markdown(heading, document, foot, page.name))
    return page, text


def document(sweep: SweepFolder, rows: list[Row], notes: list[str]) -> list:
    held, tasks = ([row for row in rows if (row.task == HELD_OUT) == here] for here in (True, False))
    out = headline(sweep, rows)
    out += summary(sweep, rows, notes)
    out += sections.what_was_run(sweep)
    out += sections.teacher_checks(sweep)
    colours = sweep_charts.highlighted(sweep, rows)
    out += learning(sweep, colours)
    out += own_text(sweep, colours)
    out += [Heading("Held-out rows", "held-out"), *results(sweep, held, "held")]
    out += sweep_samples(sweep)
    out += [Heading("Benchmarks", "benchmarks"), *results(sweep, tasks, "task")]
    out += [Para(f"Measured with {measured}.", "small")] if (measured := harness(sweep, tasks)) else []
    out += settings_map(sweep, rows)
    out += sections.published_results(sweep, rows, harness(sweep, tasks))
    out += sections.cost(sweep)
    if compared(rows):
        out += [Heading("How to read the comparisons", "reading"), Para(" ".join(EXPLANATION), "small")]
    if notes:
        out += [Heading("What was left out of the comparisons", "notes"), Items([note.replace(f"{sweep.path}/", "") for note in notes])]
    return out


def summary(sweep: SweepFolder, rows: list[Row], notes: list[str]) -> list:
    """What the statistics support, made from the rows alone; then what is missing."""
    items = statements(rows, sweep.baseline)
    if not items:
        items.append(why_nothing(sweep, rows, notes))
    open_ = [run for run in sweep.runs if run.status != "done"]
    for status, words in (("failed", "failed and are not counted"), ("waiting", "not trained yet")):
        names = [run.name for run in open_ if run.status == status]
        if names:
            listed = [part for name in names[:6] for part in (", ", Span(name))][1:]
            items.append(
                (f"{len(names)} of {len(sweep.runs)} runs {words}: ", *listed, f" and {len(names) - 6} more." if names[6:] else ".")
            )
    return [Heading("Against the baseline", "summary"), Items(items, "summary")]


def why_nothing(sweep: SweepFolder, rows: list[Row], notes: list[str]) -> Text:
    done = [arm for arm in sweep.arms.values() if arm.done]
    if not done:
        return "No arm is finished, so there is nothing to compare."
    if len(sweep.arms) == 1:
        return "The sweep has one arm, so there is nothing to compare it with; its metrics are below."
    if sweep.baseline not in [arm.name for arm in done]:
        return (
            "No statement about differences: the baseline ",
            Span(sweep.baseline),
            " has no finished run. The arms' own metrics are below.",
        )
    if len(done) == 1:
        return ("No statement about differences: of the arms only the baseline ", Span(sweep.baseline), " is finished.")
    if not rows and not notes:
        return "No statement about differences: the finished arms have neither held-out rows (data.validation or data.validation_fraction) nor benchmarks."
    return "No statement about differences: no other arm could be compared with the baseline; the end of this report says why."


def learning(sweep: SweepFolder, colours: dict[str, int]) -> list:
    out: list = [Heading("Learning curves", "curves")]
    training, held = sweep_charts.training_curves(sweep, colours), sweep_charts.held_out_curves(sweep, colours)
    if training:
        out += [
            training,
            Para(
                "Lines: a moving average over a twentieth of the logged steps; with several seeds their mean, in a band from the lowest to the highest."
                + (f" In colour: the baseline and the best arms, {len(colours)} in all." if len(colours) < len(sweep.arms) else ""),
                "small",
            ),
        ]
    else:
        out.append(Para("No run has logged two steps yet."))
    if held:
        out += [held]
    else:
        out.append(
            Para(
                "No held-out metrics over steps: the recipes have no held-out rows (data.validation or data.validation_fraction), or measured them once."
            )
        )
    return out


def results(sweep: SweepFolder, rows: list[Row], prefix: str) -> list:
    """An overview of all arms, then each metric with its statistics."""
    if not rows:
        if prefix == "held":
            return [Para("No finished arm has held-out rows: data.validation or data.validation_fraction was not set.")]
        return [
            Para("No finished arm has been measured on a benchmark: eval.tasks of the sweep names none, or the evaluation has not run yet.")
        ]
    columns = list(dict.fromkeys((row.task, row.metric) for row in rows))
    found = {(row.task, row.metric, row.arm): row for row in rows}
    body: list[list[Text]] = []
    for arm in dict.fromkeys(row.arm for row in rows):
        body.append([Span(arm), *(overview(found.get((*column, arm))) for column in columns)])
    base = found.get((*columns[0], sweep.baseline))
    caption = f"Baseline: {sweep.baseline}." if base and compared(rows) else ""
    out: list = [
        Table(
            ["arm", *(label(*column) for column in columns)],
            body,
            caption=caption,
        )
    ]
    if compared(rows):
        out.append(Para(" ".join(LEGEND).replace('"Not over seeds"', '"Not over seeds" (†)'), "small"))
    for i, block in enumerate(blocks(rows)):
        out.append(Heading(title(block).replace(f"{block[0].task} {block[0].metric}", label(block[0].task, block[0].metric), 1)))
        chart = sweep_charts.intervals(block, f"{prefix}-{i}")
        out += [chart] if chart else []
        out.append(statistics(block))
        out += [Para(text, "small") for text in reach(block)]
    return out


def statistics(block: list[Row]) -> Table:
    """The table of `llmkd compare`, and the interval over seeds where there is one as a column of it."""
    head, *lines = cells(block)
    head[0] = "arm"
    if not compared(block):
        return Table(head[:2], [[Span(line[0]), line[1]] for line in lines])
    table: list[list[Text]] = [[Span(line[0]), *line[1:-1], judged(row, line[-1])] for row, line in zip(block, lines, strict=True)]
    if any(row.seed_interval for row in block):
        place, d = head.index("p"), digits(block)
        head.insert(place, "95 % over seeds")
        for row, line in zip(block, table, strict=True):
            low, high = row.seed_interval or (None, None)
            line.insert(place, "" if low is None else f"{low:+.{d}f} to {high:+.{d}f}" + ("" if row.seeds_matched else " (Welch)"))
    return Table(head, table, words=1)


def judged(row: Row, words: str) -> Text:
    return Span(words, {True: "better", False: "worse", None: "quiet"}[row.better])


def overview(row: Row | None) -> Text:
    if row is None:
        return Span("not measured", "quiet")
    value = f"{row.value:.4f}"
    kind = {True: "better", False: "worse", None: ""}[row.better]
    return (
        (value, " ", Span(mark(row), kind))
        if kind
        else (value, Span(f" {NOT_COMPARED}", "quiet"))
        if row.verdict == NOT_COMPARED
        else value
    )


def settings_map(sweep: SweepFolder, rows: list[Row]) -> list:
    out: list = [Heading("By setting", "settings")]
    drawn, chosen, arms = sweep_charts.maps(sweep, rows)
    if not chosen:
        return [*out, Para("No map: the arms don't differ in just one or two settings.")]
    names: list[str | Span] = [part for key in chosen for part in (" and ", Span(key))][1:]
    if not drawn:
        why = (
            "there is no value to draw yet" if len(chosen) == 2 or not rows else "its values are no numbers, so the tables above show them"
        )
        return [*out, Para(("The arms differ in ", *names, f"; {why}."))]
    others = [name for name in sweep.arms if name not in {arm.name for arm in arms}]
    told: list[str | Span] = ["Means over seeds. "]
    if len(chosen) == 2:
        told = ["The stronger the colour, the better the value. Colours run from the worst to the best value of the map, a distance that may be chance. ",
                "The words in the cells are the comparison with the baseline; a cell without a word shows no difference. The best value is framed. ", *told]  # fmt: skip
    if others:
        told += ["Not in it, since they differ in more: ", *[part for name in others for part in (", ", Span(name))][1:], "."]
    return [*out, Para(("Arms that differ in ", *names, " alone. ", *told)), sweep_charts.Gallery(drawn)]


def harness(sweep: SweepFolder, rows: list[Row]) -> str:
    """Versions of harness and tasks that the finished runs were measured with."""
    found = set()
    for run in sweep.runs:
        for task in dict.fromkeys(row.task for row in rows):
            record = read_json(run.folder / "eval" / f"{task}.json")
            if record:
                rendered = ", in the model's chat template" if record.get("chat_template") else ""
                found.add(f"lm-evaluation-harness {record.get('harness')}, {task} version {record.get('version')}{rendered}")
    return "; ".join(sorted(found))
