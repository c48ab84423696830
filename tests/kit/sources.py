"""Shared by the tests of sources: rows, and files of every kind that hold them."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmkd.config.recipe import Source
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError

ROWS = [{"instruction": f'q {i}, "x"\né', "input": "", "output": f"a {i}"} for i in range(40)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None},
            {"role": "assistant", "content": f"a {i}", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}] if i % 2 else None},
        ]
    }
    for i in range(6)
]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix.lower() == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix.lower() == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix.lower() == ".csv":
        text = io.StringIO()
        out = csv.DictWriter(text, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
        path.write_text(text.getvalue())
    elif path.suffix.lower() == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        kind = pyarrow.ipc.new_stream if path.stem.endswith("stream") else pyarrow.ipc.new_file
        with kind(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=9)
    return path


def read(path: Path | str, **settings):
    return read_source(Source(path=str(path), **settings), "data.train")


def problems(path: Path | str, **settings) -> list[str]:
    with pytest.raises(UserError) as info:
        read(path, **settings)
    return list(info.value.problems)


FILES = ["t.json", "t.jsonl", "t.csv", "t.parquet", "t.arrow", "t_stream.arrow"]
