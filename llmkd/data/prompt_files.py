"""Reads files of prompts, and renders and encodes them like the run's training rows."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import formats as config
from ..config.recipe import Data, Source
from ..console import warn
from ..errors import UserError
from .encoding.control_tokens import Text, controls, refuse_unmarked
from .encoding.encode import edges, tokens_of
from .encoding.formats import FORMATS
from .encoding.rendered_text import turn_token
from .encoding.teacher_context import teacher_texts
from .encoding.token_rows import refuse_foreign, split
from .notes import example_notes
from .prompts import Prompt, parted
from .reading.files import KINDS, Records, kind_of, records
from .reading.problems import BadRow, ErrorCollector
from .reading.row_checks import check_row
from .reading.sources import open_source
from .reading.unread import note_unread
from .reading.values import kind, opened

#: A row that does not have the columns of the run's data must have one of these.
GENERAL = ("prompt", "messages", "instruction")
#: Placeholder for the answer while a prompt is rendered.
_ANSWER = "Yes"


def read_prompts(path: Path, sources: Sequence[Source], data: Data, tokenizer, setting: str = "--prompts") -> list[Prompt]:
    """The prompts of a file, rendered like a row of `sources`, the run's training data, up to its answer. UserError names every bad row.

    A row has the columns of one of the sources, with or without the answer, or else a `prompt` (text or messages), `messages` or an
    `instruction`; in a .txt file each line is a prompt. A row of `input_ids` is a prompt up to its first target, or all of it without one.
    """
    problems, unread, counts, out = ErrorCollector(), Counter(), Counter(), []
    has_turns = functools.cache(lambda: _has_turns(next(one for one in sources if config.FORMATS[one.format].is_text), setting))
    for place, get in _records(path, setting):
        try:
            source, row, answered = _row_of(get(), sources, has_turns)
            found = len(problems.found)
            row = check_row(row, place, source, problems, unread=unread)
            if len(problems.found) == found:
                prompt, unshown = prompt_of(row, answered, place, source, data, tokenizer)
                out.append(prompt)
                counts.update([*(f"unshown {key}" for key in unshown), f"rendered {turn_token(row, controls(tokenizer).any)}"])
        except (BadRow, ValueError) as error:
            problems.add(f"{place}: {error}")
        except RecursionError:
            problems.add(f"{place}: nested too deeply; give it fewer levels")
    problems.raise_if_any()
    if not out:
        raise UserError(f"{setting}: {path} has no prompts; write one a line")
    note_unread(setting, dataclasses.replace(sources[0], path=str(path)), unread, len(out))
    counts.pop("rendered None", None)
    for note in example_notes(counts | {"rows": len(out)}):
        warn(note.replace(": ", f": {setting} ({path}): ", 1))
    return out


# ---- reading


def _records(path: Path, setting: str) -> Records:
    if not path.is_file():
        raise UserError(f"{setting}: {path}: {'is a folder' if path.is_dir() else 'no such file'}; name a file of prompts")
    if path.suffix.lower() != ".txt" and kind_of(path) is None:
        raise UserError(f"{setting}: {path} is not a file of a known kind (.txt, {', '.join(KINDS)}); convert it to one")
    with open(path, "rb") as file:
        if path.suffix.lower() != ".txt":
            yield from records(file, path.name, path)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", functools.partial(_line, line)


def _line(line: bytes) -> dict[str, str]:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise BadRow("not UTF-8; save the file as UTF-8") from None
    if text.startswith("\ufeff"):
        raise BadRow("starts with a byte order mark; save the file as plain UTF-8")
    return {"prompt": text}


def _row_of(row: Any, sources: Sequence[Source], has_turns: Callable[[], bool]) -> tuple[Source, dict, bool]:
    """The source like whose rows a row is read, the row with that source's columns, and whether its answer is the file's own. ValueError if no
    source fits."""
    if not isinstance(row, dict):
        raise ValueError(f"found {kind(row)}, expected an object")
    for source in sources:
        if asks(row, source):
            return (source, *with_some_answer(row, source))
    name = next((name for name in GENERAL if name in row), None)
    if name is None:
        raise ValueError(
            f"found the columns {', '.join(row) or 'none'}, expected those of the run's data ({', '.join(_asked(sources[0]))}) or one of {', '.join(GENERAL)}"
        )
    texts = [source for source in sources if config.FORMATS[source.format].is_text]
    if not texts:
        raise ValueError(f"the run's data are tokens, and how a {name} becomes them is not known; write rows of {_asked(sources[0])[0]}")
    plain = dataclasses.replace(texts[0], fields={}, roles={}, ignore=())
    return (plain, *with_some_answer(_with_columns_of(plain, row, name, has_turns), plain))


def asks(row: Any, source: Source) -> bool:
    """Whether a row has all columns that a prompt of the source needs."""
    names = _asked(source)
    return isinstance(row, dict) and opened(row, names).keys() >= {*names}


def _asked(source: Source) -> list[str]:
    """The file's names for the columns that a prompt of the source needs: all but the answer and optional ones."""
    row_format = config.FORMATS[source.format]
    return [source.fields.get(name, name) for name, column in row_format.row.items() if not column.optional and name != row_format.answer]


def with_some_answer(row: dict, source: Source) -> tuple[dict, bool]:
    """The row with a placeholder for a missing answer, and whether it had one."""
    answer, row = config.FORMATS[source.format].answer, opened(row, source.fields.values())
    theirs = source.fields.get(answer, answer)
    if answer is None or row.get(theirs) is not None:
        return row, True
    role, content = (source.fields.get(name, name) for name in ("role", "content"))
    turns = source.format == "prompt_completion" and isinstance(row[source.fields.get("prompt", "prompt")], list)
    return {**row, theirs: [{role: source.roles.get("assistant", "assistant"), content: _ANSWER}] if turns else _ANSWER}, False


def _with_columns_of(source: Source, row: dict, name: str, has_turns: Callable[[], bool]) -> dict:
    """A row whose prompt is in the column `name`, one of GENERAL, with the columns of the source's format instead."""
    asked, rest = row[name], {column: value for column, value in row.items() if column != name}
    if source.format != "alpaca" and rest.get("input"):
        raise ValueError(f"input is not read where the run's data are of format {source.format}; write it into the {name}")
    if name == "messages" and not isinstance(asked, list) or not isinstance(asked, str | list):
        raise ValueError(f"{name} is {kind(asked)}, expected {'' if name == 'messages' else 'text or '}a list of messages")
    if source.format in ("alpaca", "text") and isinstance(asked, list):
        only = asked[0] if len(asked) == 1 and isinstance(asked[0], dict) and asked[0].get("role") == "user" else {}
        if not isinstance(only.get("content"), str):
            raise ValueError(f"{name} is a conversation, and the run's data are of format {source.format}; give a text")
        asked = only["content"]
    if isinstance(asked, str) and (source.format == "chat" or source.format == "prompt_completion" and has_turns()):
        asked = [{"role": "user", "content": asked}]
    column = {"alpaca": "instruction", "chat": "messages", "prompt_completion": "prompt", "text": "text"}[source.format]
    answer = {}
    if source.format == "prompt_completion" and isinstance(asked, list) and len(asked) > 1 and _is_assistant(asked[-1]):
        asked, answer = asked[:-1], {"completion": asked[-1:]}
    return {**rest, column: asked, **answer}


def _is_assistant(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _has_turns(source: Source, setting: str) -> bool:
    """Whether the prompts of the run's own rows are lists of messages; the first row tells."""
    try:
        row = next(get() for _, get in open_source(source, "data.train").records)
        name = source.fields.get("prompt", "prompt")
        return isinstance(opened(row, [name])[name], list)
    except (UserError, BadRow, StopIteration, KeyError, TypeError) as error:
        raise UserError(
            f"{setting}: whether the run's prompts are texts or conversations is not known, since its training data cannot be read ({error}); "
            "write each prompt as a row of its format"
        ) from None


# ---- rendering


def prompt_of(row: dict, answered: bool, place: str, source: Source, data: Data, tokenizer) -> tuple[Prompt, tuple[str, ...]]:
    """A checked row as a prompt, and its keys that the chat template does not show. ValueError if it cannot be rendered."""
    row = {column: value for column, value in row.items() if column != "train"}
    if not config.FORMATS[source.format].is_text:
        return _token_prompt(row, place, tokenizer), ()
    if not tokenizer.chat_template and any(isinstance(row.get(column), list) for column in ("prompt", "messages")):
        raise ValueError("it is a conversation, and the run's tokenizer has no chat template; give a text")
    answer, reference = config.FORMATS[source.format].answer, None
    if source.format == "chat":
        messages = [{key: value for key, value in message.items() if key != "train"} for message in row["messages"]]
        if _is_assistant(messages[-1]):
            *messages, last = messages
            reference = last["content"]
        if not messages or _is_assistant(messages[-1]) or messages[-1]["role"] in ("system", "developer"):
            raise ValueError("nothing is asked: the last turn before the answer is not the user's, nor a tool's")
        row = row | {"messages": messages}
    elif answer and answered:
        reference = row[answer] if isinstance(row[answer], str) else row[answer][0]["content"]
    with_answer = FORMATS[source.format].with_answer
    question, row_format = with_answer(row, reference or _ANSWER) if with_answer else (row, source.format)
    question |= {"teacher_context": row.get("teacher_context")}
    source = dataclasses.replace(source, format=row_format)
    (text,) = FORMATS[row_format].render(question, source, tokenizer)
    (theirs,) = teacher_texts(question, [text], source, data, tokenizer) or [text]
    if text.raw:
        refuse_unmarked([text.text], controls(tokenizer))
        cut = functools.partial(_raw_prompt, reference, bool(answer), data, tokenizer)
        prompt = Prompt(place, cut(text), cut(theirs), reference, frozenset(edges(tokenizer)[1]))
    else:
        prompt = dataclasses.replace(parted(place, *tokens_of([text, theirs], data, tokenizer), tokenizer), reference=reference)
    if not len(prompt.ids):
        raise ValueError("the prompt is empty")
    return prompt, text.unshown


def _token_prompt(row: dict, place: str, tokenizer) -> Prompt:
    """A row of tokens as a prompt: everything before its first target, or all of it without one."""
    refuse_foreign(row, tokenizer)
    (own,) = split(row, whole=False) or [(row["input_ids"], None)] if len(row["lengths"]) == 1 else [None]
    if own is None:
        raise ValueError(f"it is a packed row of {len(row['lengths'])} examples; write each as a row of its own")
    if not len(own[0]):
        raise ValueError("the prompt is empty")
    return Prompt(place, own[0], own[0]) if own[1] is None or not own[1].any() else parted(place, own, own, tokenizer)


def _raw_prompt(reference: str | None, has_answer: bool, data: Data, tokenizer, text: Text) -> np.ndarray:
    """The tokens of a text without a chat template up to its answer.

    With a placeholder as answer, the prompt's last word might become another token, so the prompt is then encoded by itself, without a
    space at its end, which would be a part of the answer's first token.
    """
    if reference:
        ids, loss_mask = tokens_of([text], data, tokenizer)[0]
        return ids[: int(loss_mask.argmax())]
    asked = text.text[: text.spans[0][0]].rstrip(" ") if has_answer else text.text
    ids, _ = tokens_of([Text(asked, [])], data, tokenizer)[0]
    return ids[: len(ids) - len(edges(tokenizer)[1])]
