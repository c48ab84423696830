"""Examples: their identity by content, and parts of them."""

import numpy as np
import pytest

from llmkd.data.examples import Examples


def examples(ids=(5, 6, 7, 8, 9), mask=(0, 0, 1, 0, 1), teacher_ids=None) -> Examples:
    offsets = np.array([0, 3, 5])
    made = Examples(np.array(ids, np.int32), np.array(mask, bool), offsets, np.arange(2))
    if teacher_ids is not None:
        made.teacher_view = Examples(np.array(teacher_ids, np.int32), np.array(mask, bool), offsets, np.arange(2))
    return made


def test_the_hash_is_of_tokens_marks_and_what_the_teacher_reads():
    own = examples()
    others = [examples(ids=(5, 6, 4, 8, 9)), examples(mask=(0, 1, 1, 0, 1)), examples(teacher_ids=(1, 2, 7, 8, 9))]
    assert len({one.content_hash(0) for one in (own, *others)}) == 4
    assert [one.student_hash(0) == own.student_hash(0) for one in others] == [False, False, True]
    assert examples(teacher_ids=(5, 6, 7, 8, 9)).content_hash(0) == own.content_hash(0), "a teacher that reads the same"
    assert all(one.content_hash(1) == own.content_hash(1) for one in others), "it depends on the other example"


@pytest.mark.parametrize("chosen", [[1], [1, 0], [0, 0, 1], []])
def test_a_part_keeps_everything_of_each_example(chosen):
    own = examples(teacher_ids=(1, 2, 3, 4, 5))
    own.source, own.teacher_index, own.row = np.array([3, 4]), np.array([1, 0]), np.array([8, 9])
    part = own.take(np.array(chosen, np.int64))
    assert len(part) == len(chosen) == len(part.teacher_view)
    for place, i in enumerate(chosen):
        assert part.content_hash(place) == own.content_hash(i) and part.student_hash(place) == own.student_hash(i)
        assert [part.source[place], part.teacher_index[place], part.row[place]] == [own.source[i], own.teacher_index[i], own.row[i]]
