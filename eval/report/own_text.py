"""What the students of a sweep, or that of a run, have written themselves: its length, end and entropy over the steps, what it cost, and some of it to be read."""

from llmkd.output.metrics import seconds_of
from llmkd.output.samples import in_training, read_samples

from .document import Chart, Gallery, Heading, Para, Span, Table, Text
from .stacked import stacked
from .sweep_charts import curves, legend, smooth
from .sweep_files import Arm, Run, SweepFolder
from .sweep_samples import kept

RUNS, FIRST, LAST = 12, 1, 2  # runs of which texts are shown, and how many of the first and of the last step
#: By the name in metrics.jsonl: title and unit.
TRAINING = {
    "written_length": ("Written in training: length", "tokens"),
    "written_finished": ("Written in training: share that ended by itself", "share of answers"),
    "written_entropy": ("Written in training: entropy of the student", "nats per token"),
    "written_share": ("Share of the examples that are written", "share of examples"),
}
ENGINE = {
    "written_staleness": ("Age of the student that writes", "optimizer steps"),
    "written_apart": ("Distance of the student that writes", "nats per token"),
}
HELD_OUT = {
    "own_reverse_kl": ("Own text, held out: KL(student || teacher)", "nats per token"),
    "own_forward_kl": ("Own text, held out: KL(teacher || student)", "nats per token"),
    "own_length": ("Own text, held out: length", "tokens"),
    "own_finished": ("Own text, held out: share that ended by itself", "share of answers"),
}


def own_text(sweep: SweepFolder, colours: dict[str, int]) -> list:
    """The section on what on-policy students write; nothing where no run has recorded any. `colours`: see `sweep_charts.highlighted`."""
    arms = [arm for arm in sweep.arms.values() if any(seconds_of(run.records) for run in arm.runs)]
    if not arms:
        return []
    mine = {name: number for name, number in colours.items() if name in {arm.name for arm in arms}}
    of_steps = (
        (TRAINING, lambda run, name: smooth(run.curve(name)), "line"),
        (HELD_OUT, Run.held_out, "dots"),
        (ENGINE, Run.curve, "line"),  # it rises from push to push
    )
    charts = [
        curves(f"own-{name.replace('_', '-')}", title, unit, arms, mine, lambda run, name=name, curve=curve: curve(run, name), kind)
        for names, curve, kind in of_steps
        for name, (title, unit) in names.items()
    ]
    out: list = [
        Heading("What the students write" if len(sweep.runs) > 1 else "What the student writes", "own-text"),
        Para(
            "On-policy runs. In training: the answers that were trained on, as they came. Held out: answers to the same held-out prompts at every validation.",
            "small",
        ),
    ]
    if found := [chart for chart in charts if chart]:
        out.append(Gallery(found, [one for one in legend(sweep, mine) if one[1] is not None]))
    return [*out, *_time(arms), *_texts(sweep)]


def _time(arms: list[Arm]) -> list:
    """How the time of a step divides, by arm; the mean of its runs."""
    per_step, rows = {}, []
    for arm in arms:
        spent = [(seconds_of(run.records), run) for run in arm.runs]
        each = [
            (one["writing"], one["teacher"], one["training"] - one["teacher"], max(1, run.records[-1]["step"])) for one, run in spent if one
        ]
        writing, teacher, student = (sum(one[i] for one in each) / len(each) for i in range(3))
        per_step[arm.name] = [sum(one[i] / one[3] for one in each) / len(each) for i in range(3)]
        tokens = sum(r["written"] * r["written_length"] for run in arm.runs for r in run.records if "written_length" in r)
        speed = tokens / max(1e-9, sum(one[0] for one in each))
        share = writing / max(1e-9, writing + teacher + student)
        rows.append([Span(arm.name), f"{writing:,.1f}", f"{teacher:,.1f}", f"{student:,.1f}", f"{share:.0%}", f"{speed:,.0f}"])
    title, parts = "seconds per step; after each bar the share of writing", ["writing", "teacher", "student's training"]
    picture = stacked("own-time", "Time of a step", title, parts, per_step)
    head = ["arm", "seconds of writing", "of the teacher", "of the student's training", "share of writing", "tokens written per second"]
    note = "The teacher's seconds are those of its body; its head is computed with the loss, and counts as the student's training."
    return [Heading("Time"), Gallery([Chart("own-time", "Time of a step", picture)]), Table(head, rows), Para(note, "small")]


def _texts(sweep: SweepFolder) -> list:
    """A few of the answers that were trained on, of the first and of the last step that has some."""
    found = {run.name: [one for one in read_samples(run.folder) if in_training(one)] for run in sweep.runs}
    found = {name: texts for name, texts in found.items() if texts}
    if not found:
        return []
    rows: list[list[Text]] = []
    for name, texts in list(found.items())[:RUNS]:
        first, last = ([one for one in texts if one["step"] == step] for step in (texts[0]["step"], texts[-1]["step"]))
        for one in [*first[:FIRST], *(last[:LAST] if last[0]["step"] > first[0]["step"] else [])]:
            length = f"{one['tokens']}" + ("" if one["finished"] else ", cut off")
            rows.append([Span(name), f"{one['step']}", length, kept(one["prompt"]), kept(one["text"]), kept(one["reference"])])
    out: list = [
        Heading("Texts that were trained on"),
        Table(["run", "step", "tokens", "prompt", "what the student wrote", "the data's answer"], rows, words=3),
    ]
    if len(found) > RUNS:
        out.append(Para(f"{len(found) - RUNS} more runs have such texts: samples.jsonl in their folders.", "small"))
    return out
