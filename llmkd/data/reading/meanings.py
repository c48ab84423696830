"""Columns of public data sets that change the meaning of a row: what they mean, and how they can be read.

The names are those of LLaMA-Factory, axolotl, TRL, ShareGPT, OpenAI, Cohere, verl and well-known data sets. A column is known by its whole name, or by a word of it:
`bot_persona` is a persona, and `persona_id` and `num_tools` are about one.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...config.formats import FORMATS
from .names import ROLE_KEYS, SYSTEMS, TOOLS, is_role
from .values import parsed, plain, words_of

#: What to do with rows that are turns.
ONE_ROW = "write the turns of each conversation as one row, {messages: [{role, content}, ...]} (format: chat)"
PREFERENCE = "one half of a preference, and llmkd does not train on preferences"
NO_TEXT = "something else than text, and llmkd reads text only"
#: Columns with the better of two answers.
BETTER = set(
    "chosen chosenresponse responsechosen chosenoutput outputchosen chosenanswer chosenmessages preferredoutput preferredresponse".split()
)
WORSE = frozenset("rejected dispreferred nonpreferred unchosen worse losing loser".split())  # words for the other answer
_ANSWERED = ("alpaca", "chat", "prompt_completion")
_NOTHING = {"", "none", "null", "nan", "n/a", "na", "[]", "{}", "-"}
_MODES = set("on off true false yes no auto low medium high minimal default enabled disabled full short long".split())
#: Last words, and first words, of columns that are about a thing instead of holding it.
_ABOUT = set(
    "id ids uid uuid idx index num number count counts n size len length lengths tokens token type types kind category categories source sources"
    " origin lang language languages code score scores rating ratings rate hash sha md date time timestamp version model models license author"
    " title titles format status domain domains topic topics tag tags level difficulty effort budget mode style cutoff window embedding embeddings used"
    " usage enabled quality generator generated fingerprint name names label labels width height complete role".split()
)
_ASKING = {
    "has",
    "is",
    "num",
    "n",
    "no",
    "use",
    "uses",
    "used",
    "with",
    "total",
    "max",
    "min",
    "original",
    "seed",
    "raw",
    "operating",
    "file",
}


def _given(value: Any) -> bool:
    """Whether the value is a text, a list or an object: a number or a truth value only says something about the thing."""
    return isinstance(value, str | list | dict)


def _is_told(value: Any) -> bool:
    """Whether the value is or contains a text: `reasoning: on` is only a mode."""
    return isinstance(value, list | dict) or (isinstance(value, str) and plain(value) not in _MODES)


@dataclass(frozen=True)
class Meaning:
    """A kind of columns that matter to certain formats: why their loss matters, and how they can be read."""

    names: frozenset[str]
    formats: tuple[str, ...]
    what: str
    fix: str = ""  # other than `ignore`; {} is the column's name
    column: str = ""  # the format's column that reads it under its own name
    holds: Callable[[Any], bool] = _given  # whether a value is of this kind
    words: frozenset[str] = frozenset()  # names with one of these words are of this kind too, unless they are only about such a thing
    stems: tuple[str, ...] = ()  # names that contain one of these without punctuation are too
    unless: frozenset[str] = frozenset()  # last words of names that are only about such a thing, besides `_ABOUT`
    any_name: bool = False

    def is_named(self, name: str) -> bool:
        """Whether a column is of this kind by its name or a word of it."""
        within = not self.words.isdisjoint(words_of(name)) or any(stem in plain(name) for stem in self.stems)
        about = is_about(name) or not self.unless.isdisjoint(words_of(name)[-1:])
        return self.any_name or plain(name) in self.names or (within and not about)


def is_about(name: str) -> bool:
    """Whether a column is only about the thing in its name: persona_id, num_tools."""
    words = words_of(name)
    return bool(words) and (words[-1] in _ABOUT or words[0] in _ASKING)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _joined(first: str, last: str) -> frozenset[str]:
    """Each first word joined with each last word: system and prompt give systemprompt."""
    return frozenset(one + other for one in first.split() for other in last.split())


def _is_structured(value: Any) -> bool:
    """Whether the value is a list or an object, also as JSON text."""
    return isinstance(parsed(value) if isinstance(value, str) else value, list | dict)


def _is_talk(value: Any) -> bool:
    """Whether the value is a list of messages with roles."""
    turns = parsed(value) if isinstance(value, str) and value[:1] == "[" else value
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(one, dict) and any(is_role(one.get(key)) for key in ROLE_KEYS) for one in turns)
    )


_SOURCES = (  # what a prompt asks about
    "context contexts document passage passages article background knowledge evidence table tables schema premise hypothesis facts story sentence"
    " sentences sourcetext referencetext searchresults snippets"
)
_SOURCE_WORDS = _names("context contexts ctx ctxs documents docs passage passages paragraphs evidence")
_ANSWER_NAMES = "answer response output completion generation"
BAD_ANSWERS = _joined("bad negative incorrect wrong inferior", _ANSWER_NAMES)
_ASKED = (
    "instruction instructions input inputs query question prompt problem request message userprompt userquery userinput usermessage taskinput"
    " taskinstruction taskinstructions definition taskdefinition taskdescription guideline guidelines startercode hint hints"
)

MEANINGS = (
    Meaning(
        frozenset(SYSTEMS)
        | _names("scenario worldinfo")
        | _joined("system sys developer", "prompt message messages msg instruction instructions text content turn context")
        | _joined("bot agent assistant character role", "prompt instruction instructions description profile card setting"),
        _ANSWERED,
        "a system message",
        "write it as the system message of messages (format: chat)",
        column="system",
        words=_names("preamble persona personas personality personalities"),
        stems=("systemprompt", "systemmessage", "systeminstruction", "sysprompt"),
    ),
    Meaning(
        frozenset(TOOLS),
        _ANSWERED,
        "the functions that may be called",
        "write the row as format: chat with tools",
        column="tools",
        words=_names("tools functions apis"),
        stems=("toolschema", "toolspec", "tooldef", "functionschema", "functiondef", "functionspec", "toollist"),
    ),
    Meaning(
        _names("tool function plugin plugins"),
        _ANSWERED,
        "the functions that may be called",
        "write the row as format: chat with tools",
        column="tools",
        holds=_is_structured,
    ),
    Meaning(
        _names("functioncall functioncalls toolcall toolcalls tooluse tooluses toolresult toolresults toolresponse toolresponses"),
        _ANSWERED,
        "calls of functions, or what these gave",
        "write them as messages with tool_calls (format: chat)",
    ),
    Meaning(
        _names(
            "history conversationhistory chathistory dialoguehistory dialoghistory messagehistory pastuserinputs generatedresponses"
            " conversationsofar dialoguecontext dialogcontext conversationcontext chatcontext"
        ),
        _ANSWERED,
        "earlier turns",
        "write them as messages (format: chat)",
        words=_names("history past previous prev prior preceding"),
    ),
    Meaning(
        _names("shots demonstration demo exemplar example icl"),
        _ANSWERED,
        "examples that the prompt shows",
        "write them into the prompt",
        words=_names("demonstrations demos exemplars examples shots shot"),
        stems=("fewshot", "incontextexample"),
    ),
    Meaning(
        _names("choices options choice option a b c d opa opb opc opd ope"),
        _ANSWERED,
        "the choices of a question",
        "write them into the prompt",
        words=_names("choices options option distractor distractors"),
    ),
    Meaning(
        _names(
            "rejected chosen rejectedresponse chosenresponse rejectedresponses chosenresponses responserejected responsechosen rejectedoutput"
            " chosenoutput outputrejected outputchosen rejectedanswer chosenanswer rejectedmessages chosenmessages"
            " preferredoutput preferredresponse nonpreferredoutput nonpreferredresponse dispreferredoutput dispreferredresponse overallpreference"
            " betterresponse worseresponse betterresponseid saferresponseid humanrefa humanrefb winner"
        )
        | _joined(f"{_ANSWER_NAMES} conversation", "a b 0 1 2")
        | _joined("modela modelb model1 model2", _ANSWER_NAMES)
        | BAD_ANSWERS,
        tuple(FORMATS),
        PREFERENCE,
        words=WORSE,
    ),
    Meaning(
        _names(
            "reasoning reasoningcontent reasoningtrace reasoningtext thinking thinkingcontent thinkingtrajectory thoughts thought cot"
            " complexcot chainofthought rationale rationales think scratchpad explanation monologue innermonologue analysis"
        ),
        _ANSWERED,
        "an answer's reasoning",
        "write it as reasoning_content of an assistant message (format: chat), or into the answer",
        holds=_is_told,
        words=_names("reasoning thinking thoughts thought think cot rationale rationales scratchpad monologue"),
        stems=("chainofthought", "stepbystep"),
    ),
    Meaning(
        _names("media frames speech wav pixelvalues imagepath imagepaths imageurl imageurls videopath videourl audiopath audiourl"),
        tuple(FORMATS),
        NO_TEXT,
        words=_names("image images img imgs picture pictures photo photos video videos audio audios screenshot screenshots"),
        unless=_names("caption captions description descriptions alt text prompt"),
    ),
    Meaning(frozenset(), _ANSWERED, "a conversation", "write its turns into messages (format: chat)", holds=_is_talk, any_name=True),
    Meaning(
        _names(f"{_ASKED} {_SOURCES}"),
        ("prompt_completion",),
        "a part of a prompt",
        "write it into the prompt, or use format: alpaca with fields: {{input: {0}}}",
        words=_SOURCE_WORDS,
    ),
    Meaning(
        _names(f"{_ASKED} {_SOURCES}"), ("alpaca",), "a part of a prompt", "write it into the prompt", column="input", words=_SOURCE_WORDS
    ),
    Meaning(
        frozenset(ROLE_KEYS),
        ("text",),
        "who says it, so that a row is one turn",
        ONE_ROW.replace("{", "{{").replace("}", "}}"),
        holds=is_role,
    ),
    Meaning(
        _names("chattemplatekwargs templatekwargs enablethinking documents"),
        ("chat", "prompt_completion"),
        "an argument of the chat template",
        "remove it",
        holds=lambda value: not isinstance(value, str),
    ),
    Meaning(
        _names(f"{_ASKED} {_SOURCES}"),
        ("chat",),
        "what the answers rely on",
        "write it into a message",
        words=_SOURCE_WORDS,
    ),
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
)


def meaning_of(name: str, value: Any, format: str) -> Meaning | None:
    """The meaning of a column that a format does not read; None if it has none, or its value is empty."""
    return next((one for one in _named_so(name, format) if one.holds(value) and not is_empty(value)), None)


@functools.lru_cache(4096)  # every row of a file has the same names
def _named_so(name: str, format: str) -> list[Meaning]:
    return [one for one in MEANINGS if format in one.formats and one.is_named(name)]


def is_worse(name: str) -> bool:
    """Whether a column holds bad answers, or the worse of two."""
    return not WORSE.isdisjoint(words_of(name)) or plain(name) in BAD_ANSWERS


def is_empty(value: Any) -> bool:
    """Whether a value is empty: null, an empty text, or lists and objects of these, also as JSON text; or "None", as tables write it."""
    if isinstance(value, str):
        if value.strip().lower() in _NOTHING:
            return True
        value = parsed(value) if value[:1] in "[{" else value
    if isinstance(value, dict | list):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None


def is_copy(value: Any, read: Any) -> bool:
    """Whether the rest of the row has the content of a value: it is a text that is read, or all its texts occur in such texts, and one is long."""
    texts, known = [*_texts(value)], [*_texts(read)]
    inside = (text in known or (len(text) >= _LONG and any(text in one for one in known)) for text in texts)
    return bool(texts) and (isinstance(value, str) or len(max(texts, key=len)) >= _LONG) and all(inside)


_LONG = 20  # characters; a text of that length does not occur in another one by accident


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value except roles of messages, without case and with single spaces, as data sets often tidy one of two copies."""
    value = parsed(value) if isinstance(value, str) and value[:1] in "[{" else value
    if isinstance(value, str) and value.strip():
        yield " ".join(value.lower().split())
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not (plain(key) in ROLE_KEYS and is_role(inner)):
                yield from _texts(inner)
