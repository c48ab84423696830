"""How far a stage is: lines in a log, with a speed and the time that is left."""

import pytest

from llmkd.making import progress


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "info", lines.append)
    return lines


def clock(monkeypatch, seconds) -> None:
    """The time at the beginning and after each item."""
    times = iter([0.0, *seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))


def test_a_log_has_a_line_now_and_then(monkeypatch, said):
    clock(monkeypatch, [10, 20, 30, 36, 50])
    items = progress.shown(range(5), "1_answer", 5, "answer", tokens=lambda item: 40)
    assert list(items) == [0, 1, 2, 3, 4]
    assert said == [
        "1_answer: 5 answers",
        "1_answer: 2 of 5 answers, 4 tokens a second, about 30 seconds left",  # 80 tokens in 20 s; 10 s an answer, and 3 are left
        "1_answer: 4 of 5 answers, 4 tokens a second, about 9 seconds left",  # 15 s after the line before: 160 tokens in 36 s
    ]  # 10 s and 30 s are too early, and the last answer is the end


def test_items_of_several_sizes_count_by_them(monkeypatch, said):
    clock(monkeypatch, [40, 60, 61])
    assert list(progress.shown([[1] * 256, [2] * 256, [3]], "2_score", 513, "row", size=len))
    assert said == [
        "2_score: 513 rows",
        "2_score: 256 of 513 rows, about 40 seconds left",
        "2_score: 512 of 513 rows, about a second left",
    ]


def test_nothing_is_said_of_nothing(said):
    assert list(progress.shown([], "1_answer", 0, "answer")) == [] and not said
