"""The two entries of a format, its columns and its functions, agree."""

import typing

import pytest

from llmkd.config import formats as config
from llmkd.config.recipe import Source
from llmkd.data.encoding.formats import FORMATS
from tests.kit.data import tiny

VALUES = {
    "text": "the owl",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the owl"}],
    "text or messages": "the owl",
    "tools": None,
}


def row(name: str, choices: bool) -> dict:
    row_format = config.FORMATS[name]
    return {c: VALUES[column.kind] for c, column in row_format.row.items() if not (column.optional or (choices and c == row_format.answer))}


def test_a_format_has_both_entries_and_a_setting():
    assert list(config.FORMATS) == list(typing.get_args(typing.get_type_hints(Source)["format"]))
    assert list(FORMATS) == [name for name in config.FORMATS if name in config.FORMATS_OF["causal_lm"]]


TEXTS = [name for name, one in config.FORMATS.items() if one.is_text]


def test_only_a_format_of_text_is_rendered():
    assert [name for name, one in FORMATS.items() if one.render] == TEXTS


@pytest.mark.parametrize("name", TEXTS)
def test_a_row_with_just_the_columns_that_are_wanted_is_rendered_and_supervised_as_declared(name):
    (text,) = FORMATS[name].render(row(name, False), Source(path="f", format=name), tiny())
    supervised = "".join(text.text[a:b] for a, b in text.spans)
    assert "the owl" in supervised
    assert (supervised == text.text) == (config.FORMATS[name].supervised == "all")


@pytest.mark.parametrize("name", FORMATS)
def test_a_choice_takes_the_answers_place_where_there_is_an_answer(name):
    assert bool(FORMATS[name].with_answer) == (config.FORMATS[name].supervised == "answer")
    if FORMATS[name].with_answer:
        answered, format_ = FORMATS[name].with_answer(row(name, True), "a wren")
        (text,) = FORMATS[format_].render(answered, Source(path="f", format=format_), tiny())
        assert "".join(text.text[a:b] for a, b in text.spans).startswith("a wren")
