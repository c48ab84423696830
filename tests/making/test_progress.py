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
    assert (
        said
        == [
            "1_answer: 5 answers",
            "1_answer: 1 of 5 answers, 4 tokens a second, about 30 seconds left",  # at 20 s: 40 tokens in 10 s; 4 answers of 10 s, of which 10 s have passed
            "1_answer: 3 of 5 answers, 4 tokens a second, about 14 seconds left",  # at 36 s, 16 s later: 3 in 30 s; 2 of 10 s, of which 6 s have passed
        ]
    )  # 30 s and 50 s are too early


def test_items_of_several_sizes_count_by_them(monkeypatch, said):
    clock(monkeypatch, [40, 60, 61])
    assert list(progress.shown([[1] * 256, [2] * 256, [3]], "2_score", 513, "row", size=len))
    assert said == [
        "2_score: 513 rows",
        "2_score: 256 of 513 rows, about 20 seconds left",  # at 60 s: 257 rows of 40/256 s each, of which 20 s have passed
    ]


def test_answers_that_come_in_batches_are_not_counted_one_by_one(monkeypatch, said):
    clock(monkeypatch, [40] * 4 + [80] * 4 + [120] * 4)
    assert len(list(progress.shown(range(12), "1_answer", 12, "answer"))) == 12
    assert said == [
        "1_answer: 12 answers",
        "1_answer: 4 of 12 answers, about 40 seconds left",  # when the second four come: the third are left
        "1_answer: 8 of 12 answers, about a second left",
    ]


def test_a_speed_that_is_not_known_yet_is_not_told(monkeypatch, said):
    clock(monkeypatch, [0, 0, 100])
    assert len(list(progress.shown(range(3), "2_score", 3, "row"))) == 3 and said == ["2_score: 3 rows"]  # two were computed before


def test_nothing_is_said_of_nothing(said):
    assert list(progress.shown([], "1_answer", 0, "answer")) == [] and not said
