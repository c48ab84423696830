"""Marks that say whether a turn of a conversation, or a whole row, is trained on: `weight: 0`, `train: false`, `masked: true`, ...

Of a good or a bad answer see `verdicts.py`. A mark is honoured exactly or refused: a value between 0 and 1, and a key that may mean either, cannot be. Null is no mark, since parquet
gives every message all the keys that any has.
"""

import functools
import re
from collections.abc import Container, Iterator
from typing import Any

from ...config.data import Source
from .problems import ErrorCollector
from .values import as_yaml, kind, plain, words_of
from .verdicts import bad_marks, has_sense

#: True or 1: trained on; false or 0: context only. Spellings of OpenAI, Mistral, axolotl, ms-swift, tinker and others.
TRAINED = set(
    "train training trainable istrainable shouldtrain dotrain totrain trainon trainonturn trainonthis usefortraining istrain"
    " weight lossweight sampleweight trainingweight loss lossscale hasloss useloss inloss computeloss calculateloss includeinloss"
    " countsforloss learn learnable supervise supervised issupervised trained importanceweight exampleweight instanceweight rowweight".split()
)
#: The reverse: true or 1 is context only.
UNTRAINED = set(
    "masked ismasked maskloss lossmasked ignoreloss ignoreinloss noloss skiploss lossignored excludefromloss excludedfromloss"
    " notrain donttrain donottrain skiptraining excludefromtraining untrained untrainable nottrained unsupervised contextonly".split()
)
#: Keys of a message that may be such a mark, but do not say in which direction.
UNCLEAR = {"mask", "lossmask", "skip", "skipped", "ignore", "ignored", "exclude", "excluded"}
#: Columns that say for each token or turn whether it is trained on.
MASKS = set(
    "mask masks lossmask lossmasks completionmask assistantmask assistantmasks assistanttokensmask labelmask labelsmask trainmask trainingmask"
    " targetmask maskhistory traindetail trainingdetail trainoninput trainoninputs weights lossweights tokenweights rolestotrain"
    " lastturnonly lastonly onlylast onlylastturn lastroundonly targetturn targetturns contextturns numcontextturns".split()
)
#: Values of such a column that name turns, as in loss_on: last.
_WHICH = set("last lastturn lastonly onlylast lastround final finalturn first assistant completion response answer output all".split())
_ABOUT_TRAINING = re.compile(r"(train|loss|mask|weight|supervis)")
#: Words of a message's key that may be a mark if its value is true, false, 0 or 1.
_MAY_MARK = re.compile(
    "(predict|backprop|grad|gradient|finetune|tune|sft|optimi[sz]e|imitate|teach|contribute|label|target|context|prompt|input|output|completion|"
    "history|include|exclude|use|active|enable|delete|hidden|omit|drop|keep|kept|coef|coefficient|"
    "multiplier|importance|generate|generation|gen|frozen|only)(s|d|ed)?"
)
#: Words in the name of a number that counts or identifies something and is not a mark.
_COUNTS = set("id ids idx index count num number size len length tokens token time epoch step version order rank position pos".split())
#: Columns that mark rows as not to be used: by true or 1, and by false or 0.
_LEFT_OUT = UNCLEAR - {"mask", "lossmask"} | set("drop dropped deleted isdeleted holdout heldout isholdout".split())
_KEPT = set("include included keep kept use used active enabled".split())
#: The end of error messages: how to mark the parts of a row that are trained on.
HOW_MARKED = "write train: true or false into messages (format: chat)"
_ELSEWHERE = ("tool_calls", "function_call", "tools", "functions")  # objects whose keys are a function's


def mark_of(message: dict, source: Source, where: str, problems: ErrorCollector, answer: bool) -> tuple[bool | None, set[str]]:
    """Whether a message says that it is trained on (None: it does not say), and the keys that say so.

    The source's own name for the key is `fields.train`; its truth is "trained on". `answer`: it is an assistant's, which is refused where it
    says of itself that it is a bad one. What cannot be honoured is added to `problems`.
    """
    said, keys, own = {}, set(), source.fields.get("train")
    for key, value in message.items():
        name = plain(key)
        if key == own or name in TRAINED or name in UNTRAINED:
            keys.add(key)
            if value is not None and (truth := _truth(value, f"{where}.{key}", problems)) is not None:
                said[key] = truth != (key != own and name in UNTRAINED)
        elif value is not None and (inner := _unclear(key, value)):
            keys.add(key)
            problems.add(
                f"{where}.{inner}: it may mark what is trained on, and llmkd does not read it; write train: true or false for a whole turn, "
                f"or set ignore: {as_yaml([*source.ignore, key])}",
                alike=f"{key} in messages",
            )
        elif answer and (bad := next(bad_marks({key: value}, _ELSEWHERE), None)):
            keys.add(key)
            mark = f"set fields: {as_yaml(source.fields | {'train': key})}" if not own and _is_flag(value) and not value else ""
            problems.add(
                f"{where}.{bad[0]} is {bad[1]!r}: it may say that the answer is a bad one, which llmkd would learn; "
                f"{mark or 'write train: false'} to read such turns as context, or set ignore: {as_yaml([*source.ignore, key])}",
                alike=f"{bad[0]} is {bad[1]!r} in messages",
            )
    if len(set(said.values())) > 1:
        problems.add(f"{where}: {' and '.join(said)} contradict each other; keep one")
    return next(iter(said.values()), None), keys


def row_mark(
    row: dict, read: set[str], source: Source, place: str, problems: ErrorCollector, how: str = HOW_MARKED
) -> tuple[bool | None, set[str]]:
    """The same for a whole row, whose columns named in `read` are the format's. Nothing of a row marked false is trained on.

    Columns by which rows are chosen are no mark of a row that is not to be used. `how`: in words, how rows
    of the format say which of their parts are trained on; {} is the column's name.
    """
    said, keys, read = {}, set(), {*read, *source.ignore}
    for key, value in _columns(row, read, TRAINED | UNTRAINED):
        keys.add(key)
        fix = f"; set {ignoring(source, key)} if it is something else"
        if (truth := _truth(value, f"{place}: {key}", problems, fix)) is not None:
            said[key] = truth != (plain(key) in UNTRAINED)
    for key, value in row.items():
        if key in read or key in keys or value in (None, "", [], {}):
            continue
        if inner := _mask(key, value):
            keys.add(key)
            problems.add(
                f"{place}: {inner} may say which parts of the row are trained on, and llmkd does not read it; {how.format(key)}, "
                f"or set {ignoring(source, key)}",
                alike=f"{inner}, which llmkd does not read",
            )
        elif key not in source.where and (found := _not_used(key, value, source.where)):
            inner, bad, why = found
            keys.add(key)
            problems.add(
                f"{place}: {inner} is {bad!r}: it may {why}; set where: {as_yaml(source.where | {inner: _other(bad)})} to train on the others "
                f"alone, or set {ignoring(source, key)}",
                alike=f"{inner} is {bad!r}",
            )
    if len(set(said.values())) > 1:
        problems.add(f"{place}: {' and '.join(said)} contradict each other; keep one")
    return next(iter(said.values()), None), keys


def rows_to_use(row: dict, read: set[str]) -> dict[str, Any]:
    """The `where` that leaves out rows marked like this one: as not to be used, or as having a bad answer."""
    found = (_not_used(key, value, read) for key, value in row.items() if key not in read and value is not None)
    return {mark[0]: _other(mark[1]) for mark in found if mark}


def _not_used(key: str, value: Any, chosen_by: Container[str]) -> tuple[str, Any, str] | None:
    """(path, value, its meaning) of a mark in a column that the row is not to be used; None if there is none."""
    truth = _truth_of(value)
    if truth is not None and plain(key) in (_LEFT_OUT if truth else _KEPT):
        return key, value, "mark a row that is not to be used, and llmkd does not read it"
    bad = next((mark for mark in bad_marks({key: value}, _ELSEWHERE) if mark[0] not in chosen_by), None)
    return bad and (*bad, "say that the answer is a bad one, which llmkd would learn")


def _truth_of(value: Any) -> bool | None:
    """The truth value of a flag, also if a table has it as text; None for anything else."""
    return (
        bool(value)
        if _is_flag(value)
        else {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
        if isinstance(value, str)
        else None
    )


def ignoring(source: Source, *names: str) -> str:
    """The setting that ignores these columns too."""
    return f"ignore: {as_yaml([*source.ignore, *names])}"


def _unclear(key: str, value: Any) -> str | None:
    """The key, or a key inside its value, that may mark a turn in a way that cannot be honoured; None if there is none."""
    if plain(key) in UNCLEAR or _about_training(key):
        return key
    if has_sense(key, value):
        return None  # see `verdicts.bad_marks`
    if _is_flag(value) and _is_mark(value, words_of(key)) and any(map(_MAY_MARK.fullmatch, words_of(key))):
        return key
    return _inside(key, value)


@functools.lru_cache(4096)
def _about_training(key: str) -> bool:
    return any(map(_ABOUT_TRAINING.match, words_of(key)))


def _mask(key: str, value: Any) -> str | None:
    """The column, or a key inside its value, that may say which parts of a row are trained on; None if there is none."""
    name, several = plain(key), isinstance(value, list | dict) or (isinstance(value, str) and plain(value) in _WHICH)
    if name in MASKS or (_about_training(key) and (several or _is_mark(value, words_of(key)))):
        return key
    if name in ("labels", "tokenlabels") and isinstance(value, list) and all(type(one) is int for one in value):
        return key
    return _inside(key, value)


def _inside(key: str, value: Any, depth: int = 3) -> str | None:
    """The path, such as `meta.train`, of a mark in an object, or in one of a list, that excludes something from training or names a part."""
    if not depth or not isinstance(value, dict | list) or key in _ELSEWHERE:
        return None
    for one in [value] if isinstance(value, dict) else value:
        for name, inner in one.items() if isinstance(one, dict) else ():
            known, flag = plain(name), _is_flag(inner)
            if (flag and (known in UNCLEAR or (known in TRAINED and not inner) or (known in UNTRAINED and inner))) or (
                isinstance(inner, list) and inner and known in MASKS
            ):
                return f"{key}.{name}"
            if found := _inside(f"{key}.{name}", inner, depth - 1):
                return found
    return None


def _is_mark(value: Any, words: list[str]) -> bool:
    """Whether a value may be a mark: true or false, or 0 or 1 under a key that does not count or identify something."""
    return isinstance(value, bool) or (_is_flag(value) and not _COUNTS.intersection(words))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def _other(value: Any) -> Any:
    """The condition of `where` for the rows without a value."""
    return {"not": value} if isinstance(value, str) else not value if isinstance(value, bool) else int(not value)


def _columns(row: dict, read: set[str], names: set[str]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in row.items() if key not in read and plain(key) in names and value not in (None, "", [], {}))


def _truth(value: Any, where: str, problems: ErrorCollector, fix: str = "") -> bool | None:
    if _is_flag(value):
        return bool(value)
    shown = f"{value:g}" if isinstance(value, float) else repr(value) if isinstance(value, int | str) else kind(value)
    problems.add(f"{where} is {shown[:40]}, expected true, false, 1 or 0: a turn is trained on or it is not{fix}")
    return None
