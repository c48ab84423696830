"""Marks and numbered lists: how they are read from an answer, and why others are refused."""

import pytest

from llmkd.making.asks import Answer
from llmkd.making.marks import Unreadable, marked, marked_answer, numbered


def test_marks_are_read_where_each_stands_once_in_its_order():
    assert marked("so <task> a\nb </task> then <answer>c < d</answer>", "task", "answer") == ("a\nb", "c < d")
    for text, reason in (
        ("<task>a", "marks_missing"),
        ("a</task>", "marks_missing"),
        ("</task>a<task>", "marks_missing"),
        ("<answer>b</answer><task>a</task>", "marks_missing"),
        ("<task>a<answer>b</answer></task>", "marks_missing"),
        ("<task>a</task><task>b</task><answer>c</answer>", "marks_repeated"),
        ("<task> </task><answer>c</answer>", "empty"),
        ("<Task>a</Task><answer>c</answer>", "marks_missing"),
    ):
        with pytest.raises(Unreadable) as caught:
            marked(text, "task", "answer")
        assert caught.value.reason == reason, text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<task>\u200b</task><answer>b</answer>", "empty"),
        ("<task>...</task><answer>b</answer>", "empty"),
        ("<task>a</task><answer>…</answer>", "empty"),
        ('<task>{"task": "a"}</task><answer>b</answer>', "json"),
        ("Write it between <task> and </task>, and then <answer>b</answer>.", "copies_the_prompt"),
        ("<task>First judge the task, how complex it is, and so on</task><answer>b</answer>", "copies_the_prompt"),
        ("<task>a</task><answer>+</answer>", None),
        ('<task>Write {"a": 1} as YAML</task><answer>{"a": 1}</answer>', None),
        ("<task>judge how complex and clear it is, the river named</task><answer>b</answer>", None),  # words of the row
    ],
)
def test_what_stands_between_marks_is_a_text_of_its_own(text, reason):
    prompt = (
        "First judge the task, how complex it is: {instruction} judge how complex and clear it is, the river. Between <task> and </task>."
    )
    given = "judge how complex and clear it is, the river"
    try:
        marked_answer(Answer(text), "task", "answer", prompt=prompt, given=given)
        found = None
    except Unreadable as error:
        found = error.reason
    assert found == reason


def test_numbers_in_other_scripts_in_bold_and_in_code():
    assert numbered("问题：\n1、河流？\n2．为什么？\n３）怎样？") == ["河流？", "为什么？", "怎样？"]
    assert numbered("١. سؤال\n٢. آخر") == ["سؤال", "آخر"]
    assert numbered("1. **Why?**\n**2. How?**\n**3.** Where **now**?\n4. **Note:** who?") == [
        "Why?",
        "How?",
        "Where **now**?",
        "**Note:** who?",
    ]
    code = "1. Sort this:\n```\n2. pear\n3. fig\n```\n2. Next?"
    assert numbered(code) == [code[3:-9], "Next?"]
    assert numbered(" " * 10**6 + "\n1. a" + " " * 10**6) == ["a"]  # in time that grows as the text does


def test_a_numbered_list_is_read_in_its_order():
    assert numbered("Here they are:\n1. One\n2) Two, of\n1999. a year\n**3.** Three\n5. no four") == [
        "One",
        "Two, of\n1999. a year",
        "Three\n5. no four",
    ]
    with pytest.raises(Unreadable):
        numbered("- One\n- Two")
