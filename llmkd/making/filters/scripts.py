"""The script that a text is written in, by Unicode's names of its letters. It tells Russian from English, but not English from French."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence

from .words import Reason

#: Scripts by the first word of their letters' Unicode names.
SCRIPTS = {
    "latin": "LATIN",
    "cyrillic": "CYRILLIC",
    "greek": "GREEK",
    "han": "CJK",
    "hiragana": "HIRAGANA",
    "katakana": "KATAKANA",
    "hangul": "HANGUL",
    "arabic": "ARABIC",
    "hebrew": "HEBREW",
    "devanagari": "DEVANAGARI",
    "bengali": "BENGALI",
    "tamil": "TAMIL",
    "telugu": "TELUGU",
    "thai": "THAI",
    "georgian": "GEORGIAN",
    "armenian": "ARMENIAN",
    "ethiopic": "ETHIOPIC",
}
_BY_NAME = {name: script for script, name in SCRIPTS.items()}


@functools.cache
def _script(letter: str) -> str | None:
    """A letter's script; "other" for scripts without an entry, None for characters that are not letters (digits, signs, modifiers)."""
    if unicodedata.category(letter) not in ("Lu", "Ll", "Lt", "Lo"):
        return None
    return _BY_NAME.get(unicodedata.name(letter, "?").split()[0], "other")


def letters_by_script(text: str) -> Counter:
    counted = Counter()
    for character, count in Counter(unicodedata.normalize("NFKC", text)).items():
        if script := _script(character):
            counted[script] += count
    return counted


def other_script(text: str, scripts: Sequence[str], least: float) -> Reason | None:
    """A reason if less than the share `least` of a text's letters are in these scripts; None otherwise, and for a text without letters."""
    counted = letters_by_script(text)
    share = sum(counted[script] for script in scripts) / (counted.total() or 1)
    if not counted or share >= least:
        return None
    return "script", f"{share:.0%} of the letters are {' or '.join(scripts)}, and most are {counted.most_common(1)[0][0]}"
