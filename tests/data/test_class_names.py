"""Classes that a data set numbers and names: the answer to a question, and the key of the token cache."""

import datasets
import pytest

from llmkd.config.data import Source
from llmkd.data.reading.sources import read_source

ROWS = [{"question": f"q{i}", "choices": ["x", "y", "z"], "answer": i} for i in (2, 0)]
FIELDS = {"instruction": "question"}


def named(names: str) -> datasets.Dataset:
    data = datasets.Dataset.from_list(ROWS)
    return data.cast_column("answer", datasets.ClassLabel(names=list(names)))


@pytest.fixture
def hub(monkeypatch):
    """What the hub has, by name."""
    found = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, revision, streaming: found[path])
    return found


def test_an_answer_is_its_number_and_is_chosen_by_its_name(tmp_path, hub):
    """As MMLU has it."""
    named("ABC").to_parquet(tmp_path / "questions.parquet")
    hub["owner/questions"] = named("ABC")
    for path in (str(tmp_path / "questions.parquet"), "owner/questions"):
        source = Source(path=path, format="alpaca", fields=FIELDS)
        assert [row["answer"] for row in read_source(source, "data.choices", choices=True).rows] == [2, 0]
        only = Source(path=path, format="alpaca", fields=FIELDS, where={"answer": "C"})
        assert [row["instruction"] for row in read_source(only, "data.choices", choices=True).rows] == ["q2"]


def test_rows_whose_numbers_have_other_names_are_other_rows(hub):
    content = []
    for names in ("ABC", "CBA", "ABC"):
        hub["owner/questions"] = named(names).select_columns(["question", "answer"])
        content.append(
            read_source(Source(path="owner/questions", format="alpaca", fields=FIELDS | {"output": "answer"}), "data.train").content
        )
    assert content[0] == content[2] != content[1]
