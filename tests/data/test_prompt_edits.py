"""Edits of a prompt: what each may change, how often, and that they are a pure function."""

import re
from collections import Counter

import pytest

from llmkd.data.prompt_edits import EDITS, edited

TEXT = "The owl flies at night,\n\n  the wren sings: in the garden. 42!"
LONG = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500))


def draws(text: str, name: str, probability: float, n: int = 30) -> list[str]:
    return [edited(text, [{name: probability}], 0, epoch, "a") for epoch in range(n)]


def test_an_edit_is_a_function_of_seed_epoch_and_content():
    many = [{name: 0.3} for name in EDITS]
    assert edited(TEXT, many, 1, 2, "a") == edited(TEXT, many, 1, 2, "a")
    assert len({edited(TEXT, many, *key) for key in ((1, 2, "a"), (2, 2, "a"), (1, 3, "a"), (1, 2, "b"))}) == 4


@pytest.mark.parametrize("name", EDITS)
def test_never_and_nothing_to_edit_leave_the_text(name):
    assert set(draws(TEXT, name, 0.0)) == {TEXT}
    for text in ("", " \n ", "42", "a"):
        assert set(draws(text, name, 1.0, 5)) == {text}


def test_swapping_keeps_every_word_and_every_space():
    for text in draws(TEXT, "swap", 0.5):
        assert sorted(text.split()) == sorted(TEXT.split()) and re.findall(r"\s+", text) == re.findall(r"\s+", TEXT)
    assert edited("a b c d e", [{"swap": 1.0}], 0, 0, "a") == "b a d c e"


def test_deleting_leaves_the_others_in_their_order_and_one_at_least():
    for text in draws(TEXT, "delete", 0.5):
        rest = iter(TEXT.split())
        assert text.split() and all(word in rest for word in text.split()) and text == text.strip()
    assert {len(text.split()) for text in draws(TEXT, "delete", 1.0)} == {1}


def test_a_typo_swaps_two_letters_of_a_word():
    for text in draws(TEXT, "typo", 1.0):
        changed = [(a, b) for a, b in zip(re.split(r"(\s+)", TEXT), re.split(r"(\s+)", text), strict=True) if a != b]
        assert len(changed) == len(TEXT.split()) - 1  # all words but 42!
        for a, b in changed:
            where = [i for i in range(len(a)) if a[i] != b[i]]
            assert Counter(a) == Counter(b) and len(where) == 2 and where[1] == where[0] + 1 and a[where[0]].isalpha()


@pytest.mark.parametrize("name", EDITS)
def test_each_word_is_drawn_with_the_given_probability(name):
    """500 words at 0.2: about 100, give or take 4 standard deviations of 9; a swap takes two words, so of n draws (500 - n) are swaps."""
    text = edited(LONG, [{name: 0.2}], 3, 0, "a")
    changed = 500 - len(text.split()) if name == "delete" else sum(a != b for a, b in zip(LONG.split(), text.split(), strict=True))
    expected = 500 * 2 * 0.2 / 1.2 if name == "swap" else 100
    assert abs(changed - expected) < (60 if name == "swap" else 36)
