"""From rows to batches: examples that are too long or have no answer are counted, and labels are aligned."""

import numpy as np
import pytest
import torch

from llmkd.config.recipe import Data
from llmkd.data.collate import collate
from llmkd.data.examples import TokenExamples
from llmkd.errors import UserError
from tests.kit.data import END, encode, kept, rows_of, talk, tiny

# ---- too long, or without an answer

SHORT, LONG = {"instruction": "q", "output": "owl"}, {"instruction": "q", "output": "owl " * 200}


@pytest.mark.parametrize(("policy", "examples"), [("drop", 1), ("truncate", 2)])
def test_what_is_too_long_is_dropped_or_cut_and_counted(policy, examples):
    encoded = encode(rows_of(SHORT, LONG), "alpaca", Data(max_length=120, too_long=policy), tiny())
    assert encoded.counts["too_long"] == 1 and encoded.counts["rows"] == 2 and len(encoded) == encoded.counts["examples"] == examples
    assert encoded.lengths[1:].tolist() == [120] * (examples - 1)
    assert kept(encoded, tiny())[0] == "owl" + END


def test_an_example_of_just_the_longest_length_is_kept_whole():
    whole = encode(rows_of(SHORT), "alpaca", Data(), tiny())
    for policy in ("drop", "truncate", "refuse"):
        encoded = encode(rows_of(SHORT), "alpaca", Data(max_length=int(whole.lengths[0]), too_long=policy), tiny())
        assert encoded.counts["too_long"] == 0 and encoded.ids.tolist() == whole.ids.tolist()


def test_what_is_too_long_can_be_refused_with_its_place():
    with pytest.raises(UserError) as info:
        encode(rows_of(SHORT, LONG), "alpaca", Data(max_length=120, too_long="refuse"), tiny())
    (problem,) = info.value.problems
    assert problem.startswith("f.jsonl:2: ") and "data.max_length (120)" in problem


@pytest.mark.parametrize("max_length", [2, 3, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 30])
def test_split_trains_every_token_exactly_once(count, max_length):
    tokenizer = tiny()
    text = "0123456789abcdefghijklmnopqrstuvwxyz"[:count]
    encoded = encode(rows_of({"text": text}), "text", Data(max_length=max_length, too_long="split"), tokenizer)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert [i for n in range(len(encoded)) for i in collate(encoded, [n], 0).labels_N.tolist()] == whole[1:]
    assert [i for n in range(len(encoded)) for i in encoded.example(n)[0][n > 0 :]] == whole
    assert encoded.lengths.max() <= max_length and encoded.counts["targets"] == len(whole) - 1


def test_an_example_without_a_supervised_token_is_counted_and_dropped():
    encoded = encode(rows_of(talk("u q"), talk("u q", "a x"), talk("s x")), "chat", Data(), tiny())
    assert (len(encoded), encoded.row.tolist(), encoded.counts["unsupervised"]) == (1, [1], 2)
    cut = encode(rows_of(LONG, SHORT), "alpaca", Data(max_length=10, too_long="truncate"), tiny())
    assert (len(cut), cut.counts["too_long"], cut.counts["unsupervised"]) == (0, 2, 2)


# ---- batches


@pytest.fixture
def ragged() -> TokenExamples:
    """Seven examples of distinct tokens with random loss masks, none of which is empty."""
    rng = np.random.default_rng(0)
    lengths = [2, 9, 5, 12, 3, 3, 8]
    marks = [rng.random(n) < 0.4 for n in lengths]
    for mark in marks:
        mark[0] = False
        mark[rng.integers(1, len(mark))] = True
    ids = np.arange(100, 100 + sum(lengths), dtype=np.int32)
    return TokenExamples(ids, np.concatenate(marks), np.concatenate([[0], np.cumsum(lengths)]), np.arange(7))


@pytest.mark.parametrize("examples", [[0], [3, 1], [6, 5, 4, 3, 2, 1, 0], [2, 2]])
def test_a_label_is_the_token_after_its_position(ragged, examples):
    batch = collate(ragged, examples, 7)
    inputs = batch.student.inputs["input_ids"]
    assert batch.student is batch.teacher and list(batch.student.inputs) == ["input_ids"] and inputs.dtype == torch.int64
    told = []
    for label, position, example in zip(batch.labels_N.tolist(), batch.student.rows_N.tolist(), batch.example_N.tolist(), strict=True):
        b, t = divmod(position, inputs.shape[1])
        ids, marks = ragged.example(example)
        assert examples[b] == example and marks[t + 1] and label == ids[t + 1] and inputs[b, t] == ids[t]
        told.append((b, t + 1))
    assert sorted(told) == [(b, t) for b, example in enumerate(examples) for t in np.flatnonzero(ragged.example(example)[1]).tolist()]
    assert (batch.labels_N >= 0).all() and batch.num_targets == len(told)


def test_inputs_are_padded_on_the_right_and_end_before_their_last_target(ragged):
    inputs = collate(ragged, [1, 3], 7).student.inputs["input_ids"].tolist()
    for row, example in zip(inputs, [1, 3], strict=True):
        ids, marks = ragged.example(example)
        last = int(np.flatnonzero(marks)[-1])
        assert row == ids[:last].tolist() + [7] * (len(row) - last)


def test_changing_one_token_changes_its_label_and_its_input_alone(ragged):
    before = collate(ragged, [3, 1], 7)
    for k in range(12):
        changed = TokenExamples(ragged.ids.copy(), ragged.loss_mask, ragged.offsets, ragged.row)
        changed.ids[ragged.offsets[3] + k] = 9999
        after = collate(changed, [3, 1], 7)
        labels = (after.labels_N != before.labels_N).nonzero().flatten().tolist()
        assert [int(before.student.rows_N[n]) for n in labels] == ([k - 1] if ragged.example(3)[1][k] else [])
        inputs = (after.student.inputs["input_ids"] != before.student.inputs["input_ids"]).nonzero().tolist()
        assert inputs in ([], [[0, k]])


def test_a_micro_batch_without_examples_has_one_padding_token_and_no_target(ragged):
    batch = collate(ragged, [], 7)
    assert batch.student.inputs["input_ids"].tolist() == [[7]]
    assert batch.num_targets == len(batch.example_N) == len(batch.student.rows_N) == 0
    assert batch.labels_N.dtype == batch.student.rows_N.dtype == torch.int64
