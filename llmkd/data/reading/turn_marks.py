"""Marks that say whether a turn of a conversation, or a whole row, is trained on: `weight: 0`, `train: false`, `masked: true`, ...

A mark is honoured exactly or refused: a value between 0 and 1, and a key that may mean either, cannot be. Null is no mark, since parquet
gives every message all the keys that any has.
"""

import re
from collections.abc import Iterator
from typing import Any

from .problems import ErrorCollector
from .values import kind

#: True or 1: trained on; false or 0: context only. Spellings of OpenAI, Mistral, axolotl, ms-swift, tinker and others.
TRAINED = set(
    "train training trainable istrainable shouldtrain dotrain totrain trainon trainonturn trainonthis usefortraining istrain"
    " weight lossweight sampleweight trainingweight loss lossscale hasloss useloss inloss computeloss calculateloss includeinloss"
    " countsforloss learn learnable supervise supervised issupervised".split()
)
#: The reverse: true or 1 is context only.
UNTRAINED = set(
    "masked ismasked maskloss lossmasked ignoreloss ignoreinloss noloss skiploss lossignored excludefromloss excludedfromloss"
    " notrain donttrain donottrain skiptraining excludefromtraining untrained untrainable nottrained unsupervised contextonly".split()
)
#: Keys of a message that may be such a mark, and do not say in which direction.
UNCLEAR = {"mask", "lossmask", "skip", "skipped", "ignore", "ignored", "exclude", "excluded"}
#: Columns that say of each token or turn whether it is trained on.
MASKS = set(
    "mask masks lossmask lossmasks completionmask assistantmask assistantmasks assistanttokensmask labelmask labelsmask trainmask trainingmask"
    " targetmask maskhistory traindetail trainingdetail trainoninput trainoninputs weights lossweights tokenweights rolestotrain".split()
)
_ABOUT_TRAINING = re.compile(r"(train|loss|mask|weight|supervis)")


def plain(name: str) -> str:
    """A name without case, spaces, dashes and underscores: isTrainable and is_trainable are one."""
    return re.sub(r"[\W_]+", "", name).lower()


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def mark_of(message: dict, own: str | None, where: str, problems: ErrorCollector) -> tuple[bool | None, set[str]]:
    """Whether a message says that it is trained on (None: it does not say), and the keys that say so.

    `own` is the file's own name for the key, whose truth is "trained on". What cannot be honoured is added to `problems`.
    """
    said, keys = {}, set()
    for key, value in message.items():
        name = plain(key)
        if key == own or name in TRAINED or name in UNTRAINED:
            keys.add(key)
            if value is not None and (truth := _truth(value, f"{where}.{key}", problems)) is not None:
                said[key] = truth != (key != own and name in UNTRAINED)
        elif value is not None and (name in UNCLEAR or any(map(_ABOUT_TRAINING.match, _words(key)))):
            keys.add(key)
            problems.add(
                f"{where}.{key}: it may mark what is trained on, and llmkd does not read it; write train: true or false for a whole turn, "
                f"or set ignore: [{key}]",
                alike=f"{key} in messages",
            )
    if len(set(said.values())) > 1:
        problems.add(f"{where}: {' and '.join(said)} contradict each other; keep one")
    return next(iter(said.values()), None), keys


def row_mark(row: dict, read: set[str], place: str, problems: ErrorCollector) -> tuple[bool | None, set[str]]:
    """The same of a whole row, whose columns named in `read` are the format's. Of a row marked false nothing is trained on."""
    said, keys = {}, set()
    for key, value in _columns(row, read, TRAINED | UNTRAINED):
        keys.add(key)
        if (truth := _truth(value, f"{place}: {key}", problems, f"; set ignore: [{key}] if it is something else")) is not None:
            said[key] = truth != (plain(key) in UNTRAINED)
    for key, _ in _columns(row, read, MASKS):
        keys.add(key)
        problems.add(
            f"{place}: {key} may say which parts of the row are trained on, and llmkd does not read it; write train: true or false into "
            f"messages (format: chat), or set ignore: [{key}]",
            alike=f"{key}, which llmkd does not read",
        )
    if len(set(said.values())) > 1:
        problems.add(f"{place}: {' and '.join(said)} contradict each other; keep one")
    return next(iter(said.values()), None), keys


def _columns(row: dict, read: set[str], names: set[str]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in row.items() if key not in read and plain(key) in names and value not in (None, "", [], {}))


def _truth(value: Any, where: str, problems: ErrorCollector, fix: str = "") -> bool | None:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    shown = f"{value:g}" if isinstance(value, float) else repr(value) if isinstance(value, int | str) else kind(value)
    problems.add(f"{where} is {shown[:40]}, expected true, false, 1 or 0: a turn is trained on or it is not{fix}")
    return None
