"""Examples of a task that streams nothing are identified by all that they are."""

import dataclasses

from llmkd.config.recipe import Data, Source
from llmkd.data.batching import Batching
from llmkd.data.dataset import Dataset
from llmkd.data.reading.sources import Rows
from llmkd.tasks.planned import encoded_data
from tests.tasks.test_classifier import examples, texts


def test_a_file_of_other_bytes_under_the_same_rows_is_other_data():
    rows = {name: [Rows([], [], "the same rows")] for name in ("data.train", "data.validation")}
    data = Data(train=Source(path="a.jsonl"), validation=Source(path="b.jsonl"))
    one = examples("AutoModelForSequenceClassification")
    other = dataclasses.replace(one, inputs=texts((5, 9, 3, 7, 4, 5)))

    def identity(train, held_out):
        of = {"data.train": train, "data.validation": held_out}
        encode = lambda read, source, name: Dataset(name, of[name], [f"x:{i}" for i in range(6)], [{}])  # noqa: E731
        return encoded_data(rows, data, Batching(seed=0, batch_size=2, micro_batch_size=2, epochs=1), encode).identity

    first, again, train, held_out = identity(one, one), identity(one, one), identity(other, one), identity(one, other)
    assert first == again
    assert first["the training data"] != train["the training data"] and first["the held-out data"] == train["the held-out data"]
    assert first["the training data"] == held_out["the training data"] and first["the held-out data"] != held_out["the held-out data"]
