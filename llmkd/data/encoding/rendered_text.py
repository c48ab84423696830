"""Texts that a chat template has rendered already: they hold tokens that begin or end turns, which are only characters here, or the words."""

import re
from collections.abc import Iterable

#: Such tokens in the templates of well-known families.
_TURNS = re.compile(
    "|".join(
        map(
            re.escape,
            "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|header_start|> <|eot|> <start_of_turn> <end_of_turn>"
            " <|turn> <turn|> [INST] [/INST] <<SYS>> <|user|> <|assistant|> <|system|> <|end|> <｜User｜> <｜Assistant｜> <|User|> <|Assistant|>"
            " <|start|> <|message|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|start_of_role|> <|end_of_role|> <|im_user|>"
            " <|im_assistant|> <|observation|> <|prompter|> <|begin_of_text|> <|begin_of_sentence|> </s> <extra_id_1>User".split(),
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
    r"\b(?:ASSISTANT|Assistant|Answer|Response|AI|Bot): |"
    + _WORDS.replace("WORDS", "ASSISTANT|[Aa]ssistant|[Rr]esponse|[Aa]nswer|A|[Bb]ot|AI|GPT|gpt|助手|答|回答"),
    re.MULTILINE,
)
#: A list of messages as text, as JSON or as Python writes it.
_LIST = re.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")
_LOOKED_AT = 20_000  # characters: the words are at the beginning


def turn_words(text: str) -> str | None:
    """The words that begin the first user's turn of a text that has an answer after it."""
    user = _USER.search(text, 0, _LOOKED_AT)
    return user[0].strip() if user and _ANSWER.search(text, user.end(), _LOOKED_AT) else None


def listed_turns(row: dict, columns: Iterable[str]) -> str | None:
    """The first of these columns that holds a list of messages as text."""
    return next((name for name in columns if isinstance(row.get(name), str) and _LIST.match(row[name])), None)


def turn_token(row: dict, control: re.Pattern) -> str | None:
    """The first such token, or control token of the tokenizer, in a text of the row or in the content of a message."""
    for value in row.values():
        contents = [one.get("content") for one in value if isinstance(one, dict)] if isinstance(value, list) else [value]
        for text in contents:
            if isinstance(text, str) and (found := _TURNS.search(text) or control.search(text)):
                return found[0]
    return None
