"""Texts that hold a conversation already are warned of: control tokens, words of turns, lists of messages."""

import json

import pytest

from llmkd.config.recipe import Data
from llmkd.data.examples import merge
from llmkd.data.notes import example_notes
from tests.kit.data import END, encode, rows_of, talk, tiny

RENDERED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


@pytest.mark.parametrize(
    ("format", "row", "token"),
    [
        ("text", {"text": RENDERED}, "<|im_start|>"),
        ("text", {"text": "[INST] q [/INST] a"}, "[INST]"),
        ("text", {"text": "q<|pad|>"}, "<|pad|>"),
        ("text", {"text": "q</s>"}, "</s>"),
        ("prompt_completion", {"prompt": "<start_of_turn>user\nq", "completion": "a"}, "<start_of_turn>"),
        ("alpaca", {"instruction": "q", "output": f"a{END}"}, END),
        ("chat", talk("u <|start_header_id|>user", "a one"), "<|start_header_id|>"),
        ("text", {"text": "<｜begin▁of▁sentence｜>q"}, "<｜begin▁of▁sentence｜>"),
        ("text", {"text": "q<|a_family_of_tomorrow|>a"}, "<|a_family_of_tomorrow|>"),
        ("text", {"text": "[|user|]q"}, "[|user|]"),
        ("text", {"text": "[SYSTEM_PROMPT]s[/SYSTEM_PROMPT]q"}, "[SYSTEM_PROMPT]"),
    ],
)
def test_texts_that_were_rendered_already_are_warned_of_where_most_are(format, row, token):
    plain = encode(rows_of({key: "q" for key in row} if format != "chat" else talk("u q", "a one")), format, Data(), tiny())
    encoded = encode(rows_of(row), format, Data(), tiny())
    assert example_notes(plain.counts) == []
    assert example_notes(encoded.counts)[0].startswith(
        f"warning: 1 of 1 row hold control tokens as text ('{token}'), as if a chat template had rendered"
    )
    assert example_notes(merge([encoded, plain]).counts)[0].startswith("warning: 1 of 2 rows")
    few = example_notes(merge([encoded, plain, plain]).counts)
    assert few == ["note: 1 with the characters of a control token, which stay characters"] * (token in tiny().all_special_tokens)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A chat. USER: q ASSISTANT: a", "USER:"),
        ("### Instruction:\nq\n\n### Response:\na", "### Instruction"),
        ("Human: q\n\nAssistant: a", "Human:"),
        ("**User:** q\n**Assistant:** a", "**User:"),
        ("<human>: q\n<bot>: a".replace("bot", "assistant"), "<human>:"),
        ("Q: q\nA: a", "Q:"),
        ("### Human: q### Assistant: a", "### Human"),
        ("Human: q Assistant: a", "Human:"),
        ("用户：q\n助手：a", "用户："),
        ("User: q\nModel: a", "User:"),
    ],
)
def test_conversations_in_words_are_warned_of_where_most_texts_hold_them(text, words):
    held, plain = (
        encode(rows_of({"text": one}), "text", Data(), tiny())
        for one in (text, "The user: a human. Answer it, assistant. f <| x |> g; [|1; 2|]; a<|b; <|>")
    )
    assert example_notes(merge([held, plain]).counts)[0].startswith(f"warning: 1 of 2 rows hold a conversation as text ({words!r}), as if")
    assert example_notes(merge([held, plain, plain]).counts) == [] == example_notes(plain.counts)
    row = {"prompt": text, "completion": "b"}
    assert example_notes(encode(rows_of(row), "prompt_completion", Data(), tiny()).counts) == []


@pytest.mark.parametrize(
    "text", [json.dumps(talk("u q", "a one")["messages"]), str(talk("u q", "a one")["messages"]), '[ {"from": "human"}]']
)
def test_lists_of_messages_as_text_are_warned_of_where_most_rows_hold_them(text):
    rows = {"prompt": text, "completion": "a"}, {"prompt": "q", "completion": "[{'x': 1}]", "notes": text}
    held, plain = (encode(rows_of(row), "prompt_completion", Data(max_length=4096), tiny()) for row in rows)
    assert example_notes(merge([held, plain]).counts) == [
        "warning: 1 of 2 rows hold a list of messages as text (prompt), which is read as the text that it is; write the list itself, in a .jsonl, .json or "
        ".parquet file"
    ]
    assert example_notes(merge([held, plain, plain]).counts) == [] == example_notes(plain.counts)
