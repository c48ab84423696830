"""Settings of `llmkd make` that cannot be combined with seeds that are sounds, or need them. A part of `make.py`. No torch."""

from collections.abc import Iterator, Sequence
from typing import Any

from .fields import as_tuple, with_setting_names

#: The stages that read sounds and their transcripts.
_STAGES = ("transcribe", "keep")
#: Settings of keep about the text of a question, or about several answers to one. With near_duplicate_of: answer `near_duplicate` is about
#: transcripts.
_OF_QUESTIONS = ("echo", "agreement", "near_duplicate")


def reads_sounds(make: Any) -> bool:
    """Whether the rows are sounds. `make`: the file's settings, without those of its stages."""
    return any(source.format == "speech" for source in as_tuple(make.seeds))


def sound_contradictions(make: Any, stages: Sequence[Any]) -> Iterator[tuple[tuple, str]]:
    """Contradictions, in the form of `make._contradictions`."""
    if not reads_sounds(make):
        for one in stages:
            if one.do == "transcribe":
                yield ("stages", one.number - 1), "is transcribe, and no seeds are sounds; give seeds of format speech, or use answer"
            elif one.do == "keep" and one.settings.wer_below is not None:
                yield ("stages", one.number - 1, "wer_below"), "set, and no seeds are sounds; leave it out"
        if make.writer is not None and make.writer.target_prefix is not None:
            yield ("writer", "target_prefix"), "set, and no seeds are sounds; leave it out"
        return
    for setting, source in with_setting_names(make.seeds, "seeds"):
        if source.format != "speech":
            yield (
                (*setting.split("."), "format"),
                f"found {source.format} with others of format speech; make the data of each in a file of its own",
            )
    if make.writer is not None and make.writer.kind == "api":
        yield (
            ("writer", "server"),
            "set with seeds of format speech, which no chat completions read; name a model, a command or recorded answers",
        )
    if make.writer is not None and make.writer.temperature:
        yield ("writer", "temperature"), f"found {make.writer.temperature:g}, and transcripts are the most likely tokens; leave it out"
    transcribed = False
    for one in stages:
        place = ("stages", one.number - 1)
        if one.do not in _STAGES:
            yield place, f"is {one.do}, which reads no sounds; after seeds of format speech the stages are {' and '.join(_STAGES)}"
        if one.do == "transcribe" and transcribed:
            yield place, "is a second transcribe; leave one out"
        transcribed |= one.do == "transcribe"
        if one.do != "keep":
            continue
        if one.settings.wer_below is not None and not transcribed:
            yield (*place, "wer_below"), "set before the stage transcribe, whose transcripts it compares; move it behind that"
        for name in _OF_QUESTIONS:
            of_answers = name == "near_duplicate" and one.settings.near_duplicate_of == "answer"
            if getattr(one.settings, name) is not None and not of_answers:
                fix = "set near_duplicate_of: answer" if name == "near_duplicate" else "leave it out"
                yield (*place, name), f"set for sounds, whose question is no text; {fix}"
        if one.settings.balance is not None and not one.settings.balance.column:
            yield (*place, "balance"), "set without a column for sounds, whose question is no text; name a column"
