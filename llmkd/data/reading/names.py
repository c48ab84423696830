"""The names that public data sets give to columns, keys of messages and roles, without case and punctuation (`values.plain`)."""

from collections.abc import Iterator
from typing import Any

from .values import plain, words_of

PROMPTS = (
    "instruction prompt question query problem input inputs inputspretokenized user human questions prompts source request task q message"
    " usermessage userprompt userquery inputtext sourcetext src srctext problemstatement docstring nl original"
).split()
#: Next to a text, a column with one of these names has another meaning: where the text is from, who wrote it.
ASKING = [name for name in PROMPTS if name not in "source user human task message original src".split()]
#: Columns to train on come before columns to check results by: a solution before an answer.
ANSWERS = (
    "output response completion solution answer target reply assistant bot generation chosen responses answers completions targets"
    " targetspretokenized outputs expectedoutput modeloutput modelresponse goldanswer finalanswer summary highlights gpt attempt preferredoutput preferredresponse outputtext targettext tgt tgttext sql patch rewritten code a"
).split()
DEFINITIONS = "definition taskdefinition taskdescription taskinstruction".split()  # of the task for each input
INPUTS = "input context document passage article background dialogue dialog".split()
TEXTS = "text content document body passage article story abstract code rawcontent doc txt paragraph".split()
SYSTEMS = (
    "system systemprompt systemmessage systemmsg sysprompt systeminstruction systeminstructions systemcontent sys developer developerprompt"
    " developermessage developerinstructions preamble persona"
).split()
TOOLS = (
    "tools functions tooldefinitions tooldefs toolspecs toolschema toolschemas toollist availabletools functiondefinitions functionschema"
    " functionschemas functionlist availablefunctions apis apilist availableapis toolset"
).split()
IDS = "inputids tokenids tokens".split()
MASKS = "lossmask completionmask assistantmasks assistantmask assistanttokensmask trainmask targetmask responsemask mask".split()
ROLE_KEYS = "role from speaker author sender".split()
CONTENT_KEYS = "content value text message utterance body parts".split()
ROLE_NAMES = {
    "user": "user human prompter customer client question usermessage".split(),
    "assistant": "assistant gpt bot model chatgpt ai chatbot agent assistantmessage bing bard answer".split(),
    "system": ["system", "systemprompt"],
    "tool": "tool function observation toolresponse ipython toolresult functionresponse".split(),
}
_CODES = set(
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id is it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta th tr uk ur vi zh".split()
)
_LANGUAGES = set(
    "ara ben bul cat ces dan deu ell eng est fas fin fra heb hin hrv hun ind isl ita jpn kor lit lav nld nob pol por ron rus slk slv spa srp"
    " swe swh tam tha tur ukr urd vie zho arabic chinese czech danish dutch english finnish french german greek hebrew hindi hungarian"
    " indonesian italian japanese korean norwegian polish portuguese romanian russian spanish swahili swedish thai turkish ukrainian vietnamese".split()
)


def named(row: dict, names: list[str], empty: bool = False) -> list[str]:
    """The columns with one of these names, in the names' order. The last name of a path, such as translation.de, counts. `empty`: include null columns."""
    return [column for name in names for column in row if plain(column.rpartition(".")[2]) == name and (empty or row[column] is not None)]


def ending_in(row: dict, names: list[str]) -> list[str]:
    """The columns of texts whose last word is one of these names, such as deepseek_solution."""
    last = {column: words_of(column)[-1] for column, value in row.items() if isinstance(value, str) and len(words_of(column)) > 1}
    return [column for name in names if len(name) > 4 for column in last if last[column] == name and row[column][:1] not in ("[", "{", "")]


def languages(row: dict) -> list[str]:
    """The columns of texts in one object that are named by a language: en, translation.de, pt_BR, sentence_eng_Latn."""
    found: dict[str, list[str]] = {}
    for column, value in row.items():
        outer, _, name = column.rpartition(".")
        if isinstance(value, str) and value and _is_language(name) and column not in ("id", "is", "it", "no"):
            found.setdefault(outer, []).append(column)
    return max(found.values(), key=len, default=[])


def _is_language(name: str) -> bool:
    words = words_of(name)
    coded = bool(words) and words[0] in _CODES and (len(words) == 1 or (len(words) == 2 and name[-2:].isupper()))
    coded = coded or (len(words) == 2 and bool({words[0], words[1]} & (_CODES - {"id", "is", "it", "no"})))
    return coded or bool(_LANGUAGES.intersection(words))


def is_role(value: Any) -> bool:
    return isinstance(value, str) and any(plain(value) in known for known in ROLE_NAMES.values())


def flat(row: dict) -> Iterator[tuple[str, Any]]:
    """The columns of a row, then those inside its objects with their paths as names."""
    yield from row.items()
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
