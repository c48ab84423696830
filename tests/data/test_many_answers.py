"""Rows of many answers: how many examples they make, how long they take, and the last answer alone."""

import copy
import re

import pytest

from llmkd.config.recipe import Data
from llmkd.data.notes import example_notes
from tests.kit.calls import notes, said
from tests.kit.data import END, PLAIN, encode, kept, made, rows_of, talk

FORGETS = PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
TALK = talk("u q", "a one", "u r", "a two", "u s", "a three")


def test_rows_that_a_template_takes_apart_are_counted_with_the_factor():
    tokenizer = made(FORGETS)
    encoded = encode(rows_of(TALK), "chat", Data(), tokenizer)
    assert kept(encoded, tokenizer) == [f"one{END}", f"two{END}", f"three{END}"]
    (note,) = example_notes(encoded.counts)
    last = int(encoded.lengths[-1])
    assert note.startswith("note: 1 row taken apart into 3 examples, one for each answer") and note.endswith(
        "answers: last trains on these alone"
    )
    assert f"{encoded.lengths.sum()} tokens, {encoded.lengths.sum() / last:.1f} times those of the last examples alone ({last})" in note
    assert notes(TALK, PLAIN) == []
    named = copy.deepcopy(TALK)
    named["messages"][0]["name"] = "bob"
    assert notes(named, FORGETS.replace("m.name or ", ""))[0].endswith("of 1 row: messages[].name (1)")


def test_a_row_of_many_examples_is_said_at_once(capsys):
    long = {"messages": TALK["messages"] * 11}
    encode(rows_of(TALK, long, long), "chat", Data(max_length=4096), made(FORGETS))
    assert capsys.readouterr().err.splitlines() == [
        "note: f.jsonl:2: the chat template makes 33 examples of it, one for each answer; answers: last makes one"
    ]


def test_a_row_that_takes_long_is_said_at_once(capsys, monkeypatch):
    monkeypatch.setattr("llmkd.data.encoding.encode._SLOW", 0.0)
    encode(rows_of(TALK, TALK), "chat", Data(), made(PLAIN))
    encode(rows_of({"text": "q"}), "text", Data(), made(PLAIN))
    assert re.fullmatch(r"note: f\.jsonl:1: the chat template takes \d\.\d s for this row\n", capsys.readouterr().err)


@pytest.mark.parametrize("template", [FORGETS, PLAIN])
def test_the_last_answer_alone(template):
    assert said(TALK, template, answers="last") == [f"three{END}"]
    assert notes(TALK, template, answers="last") == []
    context_only = copy.deepcopy(TALK)
    context_only["messages"][-1]["train"] = False
    assert said(context_only, template, answers="last") == []
    asked = {"messages": [*TALK["messages"], *talk("u t")["messages"]]}
    assert said(asked, template, answers="last") == [f"three{END}"]


def test_the_last_answer_of_a_completion():
    prompt, completion = TALK["messages"][:3], TALK["messages"][3:]
    row = {"prompt": prompt, "completion": completion}
    every, last = (encode(rows_of(row), "prompt_completion", Data(), made(PLAIN), answers=answers) for answers in ("all", "last"))
    assert kept(every, made(PLAIN)) == [f"two{END}three{END}"] and kept(last, made(PLAIN)) == [f"three{END}"]
