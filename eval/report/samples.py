"""The answers of `llmkd sample` as an HTML page."""

from llmkd import __version__
from llmkd.commands.sample import Samples
from llmkd.commands.sample_text import columns

from .document import Heading, Para, Span, Table, Text, as_html
from .sweep_samples import kept


def samples_page(samples: Samples) -> str:
    """One HTML file: the models, then every prompt with the answers to it side by side."""
    sampling = samples.sampling
    how = (
        f"sampled at temperature {sampling['temperature']:g}, seed {sampling['seed']}"
        if sampling["temperature"]
        else "the most likely tokens"
    )
    summary = samples.summary()
    rows: list[list[Text]] = [
        [Span(one["model"]), *(f"{x:,.1f}" if isinstance(x, float) else str(x) for x in list(one.values())[1:])] for one in summary
    ]
    blocks = [
        Heading("Models", "models"),
        Table(list(summary[0]), rows, words=1),
        Para(
            f"Answers: {how}, at most {sampling['max_new_tokens']} tokens. An answer that is not marked as cut off ended by itself.",
            "small",
        ),
        Heading("Answers", "answers"),
    ]
    for i, one in enumerate(samples.asked, 1):
        texts = columns(one)
        blocks += [Heading(f"{i}. {one.place}"), Para(kept(one.prompt))]
        if one.teacher_prompt is not None:
            blocks += [Para("The teacher's prompt:", "small"), Para(kept(one.teacher_prompt))]
        blocks.append(Table(list(texts), [[kept(text) for text in texts.values()]], left=0, words=len(texts)))
    return as_html(f"Samples of {samples.run}", blocks, f"Written by llmkd {__version__} (llmkd sample).")
