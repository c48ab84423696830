"""What the runs of a sweep wrote at their last validation, side by side."""

from llmkd.console import printable
from llmkd.output.samples import last_samples

from .document import Heading, Para, Span, Table, Text
from .sweep_files import SweepFolder

PROMPTS, RUNS = 4, 12  # the most that are shown


def sweep_samples(sweep: SweepFolder) -> list:
    """What the finished runs wrote to the same held-out prompts at their last validation; nothing where none recorded that."""
    found = {run.name: {one["prompt"]: one for one in last_samples(run.folder)} for run in sweep.runs if run.status == "done"}
    found = {name: answers for name, answers in found.items() if answers}
    if not found:
        return []
    shown = list(found)[:RUNS]
    out: list = [
        Heading("Samples", "samples"),
        Para("Answers to held-out prompts at the last validation, always the most likely token.", "small"),
    ]
    for prompt, one in list(found[shown[0]].items())[:PROMPTS]:
        rows: list[list[Text]] = [[Span("the data", "quiet"), "", kept(one["reference"])]]
        for name in (name for name in shown if prompt in found[name]):
            answer = found[name][prompt]
            rows.append([Span(name), f"{answer['tokens']}" + ("" if answer["finished"] else ", cut off"), kept(answer["text"])])
        out += [Heading(one["place"]), Para(kept(prompt)), Table(["run", "tokens", "answer"], rows, words=1)]
    if len(found) > RUNS:
        out.append(Para(f"{len(found) - RUNS} more runs have samples: samples.jsonl in their folders.", "small"))
    return out


def kept(text: str) -> Span:
    """A text with its lines, and with its control characters to be seen."""
    return Span(printable(text), "text")
