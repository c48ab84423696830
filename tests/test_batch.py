"""Where the positions of an example lie in a batch: rows apart, packed, with a shared prefix."""

import numpy as np
import pytest

from llmkd.data.collate import collate, select_examples
from llmkd.data.examples import TokenExamples

#: Three examples that share nine tokens, and one of its own; the token says where it stands: 100 times its example and its place.
LENGTHS, SHARED, PROMPTS = (14, 12, 17, 5), 9, (11, 10, 12, 2)


def examples() -> TokenExamples:
    ids = [np.arange(n) + 100 * (i + 1) for i, n in enumerate(LENGTHS)]
    for x in ids[:3]:
        x[:SHARED] = np.arange(SHARED)
    marks = [np.arange(n) >= prompt for n, prompt in zip(LENGTHS, PROMPTS, strict=True)]
    return TokenExamples(np.concatenate(ids).astype(np.int32), np.concatenate(marks), np.cumsum([0, *LENGTHS]), np.arange(4))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 0, 1]], ids=str)
@pytest.mark.parametrize("how", [{}, {"packing": True}, {"packing": True, "share": True}], ids=str)
def test_each_example_finds_its_own_positions_and_its_targets_among_them(how, order):
    data = examples()
    whole = collate(data, order, 0, **how)
    assert bool(how.get("share")) == bool(whole.student.packed and -1 in whole.student.packed.examples)
    for batch, mine in ((whole, order), (select_examples(whole, [i != 0 for i in order]), [i for i in order if i])):
        view = batch.student
        rows = view.rows_N.split([one.num_targets for one in batch.examples])
        for i, span, mine_n in zip(mine, view.spans, rows, strict=True):
            start, end = data.offsets[i], data.offsets[i + 1]
            own = [*range(span.prefix, span.prefix + span.shared), *range(span.own, span.own + span.length)]
            assert view.inputs["input_ids"].flatten()[own][: LENGTHS[i] - 1].tolist() == data.ids[start : end - 1].tolist()
            assert [own.index(row) for row in mine_n.tolist()] == list(range(PROMPTS[i] - 1, LENGTHS[i] - 1))
            if how:
                assert len(own) == LENGTHS[i] - 1  # and nothing else
