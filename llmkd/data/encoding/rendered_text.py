"""Recognises texts that a chat template has already rendered, by the tokens or words that begin or end turns: here they are only characters."""

import re
from collections.abc import Iterable

#: How templates spell such tokens: <|im_start|>, <｜User｜>, <|turn>, [|user|], and other spellings of well-known families.
_TURNS = re.compile(
    r"<[|｜]/?[A-Za-z][\w▁/-]{0,40}[|｜]>|\[\|/?[a-z]\w{0,40}\|\]|"
    + "|".join(
        map(
            re.escape,
            "<start_of_turn> <end_of_turn> <|turn> <turn|> [INST] [/INST] <<SYS>> [SYSTEM_PROMPT] [/SYSTEM_PROMPT] </s> <extra_id_1>User ]~b] [e~["
            " <seed:bos> <seed:eos> <role>HUMAN</role> <role>ASSISTANT</role> <reserved_106> <reserved_107> <SPECIAL_11>".split(),
        )
    )
)

#: Words that begin a user's turn and an answer in the plain formats of Vicuna, Alpaca, Anthropic, Guanaco and others.
_WORDS = r"^\W{0,3}(?:WORDS)\W{0,3}[:：]|#{2,4} ?(?:WORDS)\b|<(?:WORDS)>"
_USER = re.compile(
    r"\bUSER: |" + _WORDS.replace("WORDS", "USER|[Uu]ser|[Hh]uman|[Ii]nstruction|[Qq]uestion|Q|[Pp]rompt|[Cc]ustomer|用户|人类|问"),
    re.MULTILINE,
)
_ANSWER = re.compile(
    r"\b(?:ASSISTANT|Assistant|Answer|Response|AI|Bot|Model): |"
    + _WORDS.replace("WORDS", "ASSISTANT|[Aa]ssistant|[Rr]esponse|[Aa]nswer|A|[Bb]ot|[Mm]odel|AI|GPT|gpt|助手|答|回答"),
    re.MULTILINE,
)
#: A list of messages as text, in the spelling of JSON or Python.
_LIST = re.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")
_LOOKED_AT = 20_000  # characters: the words are at the beginning


def turn_words(text: str) -> str | None:
    """The words that begin the first user turn of a text with an answer after it; None if there is none."""
    user = _USER.search(text, 0, _LOOKED_AT)
    return user[0].strip() if user and _ANSWER.search(text, user.end(), _LOOKED_AT) else None


def listed_turns(row: dict, columns: Iterable[str]) -> str | None:
    """The first of these columns that holds a list of messages as text."""
    return next((name for name in columns if isinstance(row.get(name), str) and _LIST.match(row[name])), None)


def turn_token(row: dict, control: re.Pattern) -> str | None:
    """The first token of a chat template, or control token of the tokenizer, in a text of the row or in the content of a message."""
    for value in row.values():
        contents = [one.get("content") for one in value if isinstance(one, dict)] if isinstance(value, list) else [value]
        for text in contents:
            if isinstance(text, str) and (found := _TURNS.search(text) or control.search(text)):
                return found[0]
    return None
