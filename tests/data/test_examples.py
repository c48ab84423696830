"""Examples: their identity by content, parts of them, and the weights of single targets."""

import numpy as np
import pytest

from llmkd.data.collate import collate
from llmkd.data.examples import TokenExamples, concat


def examples(ids=(5, 6, 7, 8, 9), mask=(0, 0, 1, 0, 1), teacher_ids=None) -> TokenExamples:
    offsets = np.array([0, 3, 5])
    made = TokenExamples(np.array(ids, np.int32), np.array(mask, bool), offsets, np.arange(2))
    if teacher_ids is not None:
        made.teacher_view = TokenExamples(np.array(teacher_ids, np.int32), np.array(mask, bool), offsets, np.arange(2))
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


def test_weights_of_single_targets_multiply_those_of_their_examples():
    """Two examples of targets (7) and (9, 3), of weights 2 and 1 as examples."""
    own, plain = examples(ids=(5, 7, 8, 9, 3), mask=(0, 1, 0, 1, 1)), examples()
    own.offsets = np.array([0, 2, 5])
    own.weights, own.token_weights = {"kd": np.array([2, 1], np.float32)}, {"kd": np.array([9, 0.5, 9, 0, 3], np.float32)}
    assert own.weighted([0, 1]) == {"kd": (1 + 0 + 3, 2)} and own.weighted([0]) == {}, "1 all in all is no weight"
    assert own.weighted([1, 1]) == {"kd": (6.0, 2)}
    both = concat([plain, own.take(np.array([1, 0]))], [0, 0], {})
    assert both.weighted([0, 1, 2, 3]) == {"kd": (2 + 3 + 1, 4)} and both.unweighted().weighted([2]) == {}
    batch = collate(both, [3, 2, 0], 0, packing=True)
    assert (
        batch.labels_N.tolist() == [7, 9, 3, 7]
        and batch.weights["kd"].tolist() == [1, 0, 3, 1]
        and batch.carriers("kd").tolist() == [0, 2, 3]
    )
