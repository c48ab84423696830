"""Columns of a row that its format does not read: counted, and refused where public data sets keep something in them that changes the meaning.

The names are those of LLaMA-Factory, axolotl, TRL, ShareGPT, OpenAI, verl and well-known data sets, without case and punctuation.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...config.data import FORMATS, Source
from ...console import count, warn
from .problems import ErrorCollector
from .recognise import ONE_ROW, ROLE_KEYS, is_role
from .turn_marks import plain

_ANSWERED = ("alpaca", "chat", "prompt_completion")
_EMPTY = (None, "", [], {})


@dataclass(frozen=True)
class Meaning:
    """Columns that mean something to the formats named, why their loss matters, and how they can be read."""

    names: frozenset[str]
    formats: tuple[str, ...]
    what: str
    fix: str = ""  # besides `ignore`; {} is the column's name
    column: str = ""  # the format's column that reads it under its own name
    holds: Callable[[Any], bool] = lambda value: True  # whether a value is such a thing


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SOURCES = "context contexts document passage passages article background knowledge evidence"  # what a prompt asks about

MEANINGS = (
    Meaning(
        _names(
            "system systemprompt systemmessage systemmsg sysprompt systeminstruction systeminstructions systemcontent"
            " sys developer developerprompt developermessage developerinstructions"
        ),
        _ANSWERED,
        "a system message",
        column="system",
    ),
    Meaning(
        _names(
            "tools functions tooldefinitions tooldefs toolspecs toolschemas toollist availabletools functiondefinitions functionschemas"
            " functionlist availablefunctions apis apilist availableapis toolset"
        ),
        _ANSWERED,
        "the functions that may be called",
        "write the row as format: chat with tools",
        column="tools",
    ),
    Meaning(
        _names(
            "history conversationhistory chathistory dialoguehistory dialoghistory messagehistory previousturns previousmessages pastmessages"
            " priorturns priormessages"
        ),
        _ANSWERED,
        "earlier turns",
        "write them as messages (format: chat)",
    ),
    Meaning(
        _names(
            "rejected chosen rejectedresponse chosenresponse rejectedresponses chosenresponses responserejected responsechosen rejectedoutput"
            " chosenoutput outputrejected outputchosen rejectedanswer chosenanswer rejectedmessages chosenmessages badoutput badresponse"
            " preferredoutput preferredresponse nonpreferredoutput nonpreferredresponse dispreferredoutput dispreferredresponse overallpreference"
            " betterresponse worseresponse betterresponseid responsea responseb response0 response1 response2 conversationa conversationb"
            " humanrefa humanrefb"
        ),
        tuple(FORMATS),
        "one half of a preference, and llmkd does not train on preferences",
    ),
    Meaning(
        _names("label kttag kototag ktotag isgood accepted"),
        _ANSWERED,
        "whether an answer is a good one, and llmkd would learn bad ones too",
        "set where: {{{0}: true}} to train on the good ones alone",
        holds=lambda value: isinstance(value, bool),
    ),
    Meaning(
        _names(
            "reasoning reasoningcontent reasoningtrace reasoningtext thinking thinkingcontent thinkingtrajectory thoughts thought cot"
            " complexcot chainofthought rationale think scratchpad"
        ),
        _ANSWERED,
        "an answer's reasoning",
        "write it as reasoning_content of an assistant message (format: chat), or into the answer",
    ),
    Meaning(
        _names(
            "image images imagepath imagepaths imageurl imageurls pixelvalues video videos videopath videourl audio audios audiopath audiourl"
        ),
        tuple(FORMATS),
        "something else than text, and llmkd reads text only",
    ),
    Meaning(
        _names(f"instruction input {_SOURCES}"),
        ("prompt_completion",),
        "a part of a prompt",
        "write it into the prompt, or use format: alpaca with fields: {{input: {0}}}",
    ),
    Meaning(_names(_SOURCES), ("alpaca",), "a part of a prompt", column="input"),
    Meaning(
        frozenset(ROLE_KEYS),
        ("text",),
        "who says it, so that a row is one turn",
        ONE_ROW.replace("{", "{{").replace("}", "}}"),
        holds=is_role,
    ),
    Meaning(_names("context contexts"), ("chat",), "what the answers rely on", "write it into a message"),
    Meaning(
        _names(
            "seqlens seqlen seqlength sequencelengths samplelengths examplelengths packedlengths cuseqlens cuseqlensq segmentids sequenceids"
        ),
        ("tokens",),
        "where the examples of a packed row begin",
        "write the tokens of each example as seq_lengths",
        holds=lambda value: isinstance(value, list),
    ),
    Meaning(
        frozenset({"teachercontext", "teacherinputids"}),
        ("tokens",),
        "what only the teacher reads, which rows of tokens cannot have",
        "use format: chat or prompt_completion",
    ),
    Meaning(
        _names("chattemplatekwargs templatekwargs enablethinking documents"),
        ("chat", "prompt_completion"),
        "an argument of the chat template",
        "remove it",
        holds=lambda value: not isinstance(value, str),
    ),
)


def count_unread(row: dict, read: set[str], source: Source, place: str, problems: ErrorCollector, unread: Counter) -> None:
    """Count the row's columns that are neither in `read` nor ignored; those with a meaning are added to `problems`."""
    for name, value in row.items():
        if name in read or name in source.ignore or name in FORMATS[source.format].notes or value is None:
            continue
        unread[name] += 1
        meaning = next((m for m in MEANINGS if source.format in m.formats and plain(name) in m.names and m.holds(value)), None)
        if meaning and value not in _EMPTY:
            problems.add(
                f"{place}: column {name!r} is not read: {_advice(meaning, name, row, source)}",
                alike=f"column {name!r} is not read",
            )


def _advice(meaning: Meaning, name: str, row: dict, source: Source) -> str:
    """What a column means, and the lines of the recipe that read it or leave it out."""
    ways = []
    columns = FORMATS[source.format].columns
    if meaning.column in columns and source.fields.get(meaning.column, meaning.column) not in row:
        fields = source.fields | {meaning.column: name}
        ways.append(f"set fields: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in fields.items())}}}")
    elif meaning.fix:
        ways.append(meaning.fix.format(name))
    ways.append(f"set ignore: [{', '.join([*source.ignore, name])}] to train without it")
    return f"it may hold {meaning.what}; {', or '.join(ways)}"


def note_unread(setting: str, source: Source, unread: Counter, rows: int, of: str = "of {}") -> None:
    """One line that lists what was not read, the most frequent first; none for the built-in corpus, which has columns for several formats.

    `rows`: the number of rows that were counted; `of`: what they are.
    """
    if unread and not source.path.startswith("builtin:"):
        listed = ", ".join(f"{name} ({number:,})" for name, number in unread.most_common())
        warn(
            f"note: {setting} ({source.path}): columns that are not read, with the rows that have them, {of.format(count(rows, 'row'))}: {listed}"
        )
