"""Every kind of file gives the same rows, under the names that the settings say; damaged and ambiguous ones are refused."""

import csv
import io
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from llmkd.config.recipe import Source
from llmkd.data.reading.sources import read_sources
from llmkd.errors import UserError
from tests.kit.sources import FILES, ROWS, TALKS, problems, read, write


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    rows = read(path)
    assert rows.rows == ROWS and rows.places[0].startswith(f"{path}:") and len(set(rows.places)) == 40
    assert rows.origin == {"path": str(path), "name": None, "split": None, "revision": None, "rows": 40}
    assert read(path, limit=3).rows == ROWS[:3]
    if name.endswith((".parquet", ".arrow")):
        assert rows.places == [f"{path}:{i}" for i in range(1, 41)]
    if name.endswith(".csv"):
        assert rows.places[:3] == [f"{path}:{n}" for n in (2, 4, 6)]  # every row has a line break in it


def test_a_flipped_byte_is_noticed_by_the_checksums_of_a_parquet_file_that_has_them(tmp_path):
    table = pyarrow.table({"instruction": ["Say this"] * 9, "output": ["a", "b", "c"] * 3})
    how = {"write_page_checksum": True, "use_dictionary": False, "compression": "none", "write_statistics": False}
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", **how)
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole.replace(b"Say this", b"Say thus", 1))
    (problem,) = problems(tmp_path / "t.parquet")
    assert "not readable as parquet (could not verify page integrity, CRC checksum verification failed" in problem


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "t.arrow"])
def test_what_parquet_adds_to_messages_is_not_there(tmp_path, name):
    """A null in an argument that is itself JSON text stays."""
    rows = read(write(tmp_path / name, TALKS), format="chat").rows
    assert rows[0]["messages"] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a 0"}]
    written = {"y": None} if name == "t.jsonl" else {}
    assert rows[1]["messages"][1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1} | written}]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_other_content_or_refused(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    raw, content, rng = path.read_bytes(), read(path).content, random.Random(0)
    for _ in range(60):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            assert read(path).content != content
        except UserError as error:
            assert all(problem.startswith(f"{path}:") or "no rows" in problem or problem.startswith("...") for problem in error.problems)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t_stream.arrow"])
@pytest.mark.parametrize("keep", [0, 1, 7, 0.3, 0.9, -1])
def test_a_truncated_table_is_one_line(tmp_path, name, keep):
    path = write(tmp_path / name, ROWS)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if 0 < keep < 1 else keep])
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:") and "not readable as" in problem and len(problem.splitlines()) == 1


def test_an_arrow_stream_cut_between_two_batches_is_not_whole(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    for batches in (2, 3):
        with pyarrow.ipc.new_stream(tmp_path / f"{batches}.arrow", table.schema) as out:
            for n in range(batches):
                out.write_table(table.slice(10 * n, 10))
    whole, part = (tmp_path / "3.arrow").read_bytes(), (tmp_path / "2.arrow").read_bytes()[:-8]
    assert whole.startswith(part) and len(read(tmp_path / "3.arrow").rows) == 30
    (tmp_path / "3.arrow").write_bytes(part)
    assert problems(tmp_path / "3.arrow") == [
        f"{tmp_path}/3.arrow:1: not readable as Arrow (it stops before its end); fetch or write the file again"
    ]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pyarrow.array([1], pyarrow.timestamp("us", "Mars/Phobos")), "the column 'when' is not readable (UnknownTimeZoneError: "),
        (pyarrow.array([2**62], pyarrow.timestamp("s")), "the column 'when' is not readable ("),
        (pyarrow.array([2**62], pyarrow.duration("s")), "the column 'when' is not readable (OverflowError: "),
    ],
)
def test_a_column_that_has_no_values_is_named(tmp_path, name, column, words):
    table = pyarrow.table({"instruction": ["x"], "output": ["y"], "when": column})
    if name == "t.parquet":
        if pyarrow.types.is_timestamp(column.type) and column.type.unit == "s":
            pytest.skip("parquet cannot hold it")
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as out:
            out.write_table(table)
    (problem,) = problems(tmp_path / name)
    assert problem.startswith(f"{tmp_path}/{name}:1: {words}") and problem.endswith("; fix it, or write the file without it")


BAD_CSV = [
    ("instruction,output\na,b\nc\n", ":3: 1 fields, expected 2 (instruction, output)"),
    ("instruction,output\na,b,c\n", ":2: 3 fields, expected 2"),
    ('instruction,output\n"a\n\n",b\n"c","d","e"\n', ":5: 3 fields"),
    ("instruction,output,output\na,b,c\n", ":1: the header has the column 'output' twice"),
    ("instruction,,output\na,b,c\n", ":1: the header has a column without a name"),
    ('instruction,output\na,"b\n', ":2: not valid CSV (unexpected end of data)"),
    ('instruction,output\n"a"x,b\n', ":2: not valid CSV"),
    ("instruction,output\na,b\0\n", ":2: contains a NUL character"),
    ("\ufeffinstruction,output\na,b\n", ":1: starts with a byte order mark"),
    (b"instruction,output\na,caf\xe9\n", ":2: not UTF-8 (byte 0xe9)"),
    (
        "instruction;output\na;b\n",
        ":1: columns are separated by ';' here (instruction;output), expected commas (the delimiter of csv): save the file with commas",
    ),
    ("a\fb\x1b[2J,output\nc,d\n", ":2: no column 'instruction'; found 'a\\x0cb\\x1b[2J', 'output'"),
    ("instruction,out\x1bput\na,b,c\n", ":2: 3 fields, expected 2 (instruction, out\\x1bput)"),
    ("instruction," + "x" * 9999 + "\na,b,c\n", ":2: 3 fields, expected 2 (instruction, xxx"),
    ("a,b\nc,d\n", ":2: no columns 'instruction' and 'output'; found 'a', 'b'; the first line of a .csv file is its header"),
    ("", " has no rows"),
    ("instruction,output\n", " has no rows"),
    ("instruction,output\na\rb,c\n", ":2: not valid CSV (a carriage return outside quotes; end lines by a line feed)"),
    ("instruction,output\ra,b\rc,d\r", ":1: not valid CSV (a carriage return outside quotes; end lines by a line feed)"),
]


@pytest.mark.parametrize(("text", "words"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_a_bad_csv_is_named(tmp_path, text, words):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = problems(path)
    assert str(path) + words in found[0] and all(len(p.splitlines()) == 1 for p in found), found


def test_a_csv_may_have_long_fields_and_windows_line_ends(tmp_path):
    long = "x" * 300_000
    (tmp_path / "t.csv").write_bytes(f'instruction,output\r\n"{long}",b\r\n\r\nc,"d\r\ne"\r\n'.encode())
    rows = read(tmp_path / "t.csv")
    assert rows.rows == [{"instruction": long, "output": "b"}, {"instruction": "c", "output": "d\r\ne"}]
    assert [place.rsplit(":")[-1] for place in rows.places] == ["2", "4"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pyarrow.array([1, 2]), "output is a number, expected text"),
        (pyarrow.array(["a", None]), ":2: output is null, expected text"),
        (pyarrow.array([b"a", b"b"]), "output is bytes, expected text"),
        (pyarrow.array(["a", "b"]).dictionary_encode(), None),
        (pyarrow.array(["a", "b"], pyarrow.large_string()), None),
    ],
)
def test_columns_of_a_table_have_the_types_of_the_format(tmp_path, column, words):
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["x", "y"], "output": column}), tmp_path / "t.parquet")
    if words is None:
        assert [row["output"] for row in read(tmp_path / "t.parquet").rows] == ["a", "b"]
    else:
        assert words in problems(tmp_path / "t.parquet")[0]


def test_a_random_sample_is_drawn_by_seed_in_the_order_of_the_file(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    one, again, other = (read(path, limit=10, seed=seed).rows for seed in (1, 1, 2))
    assert one == again != other and len(one) == 10
    assert one == sorted(one, key=ROWS.index) and one != ROWS[:10]
    assert read(path, limit=99, seed=1).rows == ROWS
    assert len({read(path, limit=10, seed=s).content for s in (1, 2)} | {read(path, limit=10).content, read(path).content}) == 4


def test_a_sample_hides_no_damage(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    path.write_text(path.read_text() + "{bad\n")
    assert problems(path, limit=1, seed=1) == [
        f"{path}:41: not valid JSON (Expecting property name enclosed in double quotes); correct this row, or remove it"
    ]


def test_columns_and_roles_by_the_files_own_names(tmp_path):
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 7}
    settings = {
        "format": "chat",
        "fields": {"messages": "conversations", "role": "from", "content": "value"},
        "roles": {"user": "human", "assistant": "gpt"},
    }
    assert read(write(tmp_path / "t.parquet", [row]), **settings).rows[0]["messages"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    row["conversations"][1]["from"] = "bot"
    (problem,) = problems(write(tmp_path / "t.jsonl", [row]), **settings)
    assert problem.endswith(
        ":1: conversations[1].from is 'bot', expected one of system, developer, human, gpt, tool; set roles: {user: human, assistant: bot}, or write 'gpt' for it in the file"
    )
    (problem,) = problems(write(tmp_path / "t.jsonl", [{"conversation": []}]), **settings)
    assert problem.endswith("no column 'conversations'; did you mean 'conversation'?")
    asked = {"question": "q", "context": "c", "answer": "a"}
    fields = {"instruction": "question", "input": "context", "output": "answer"}
    found = read(write(tmp_path / "t.csv", [asked]), fields=fields).rows[0]
    assert {k: found[k] for k in fields} == {"instruction": "q", "input": "c", "output": "a"}
    del asked["context"]
    found, more = problems(write(tmp_path / "t.csv", [asked] * 3), fields=fields)  # a header is that of all rows
    assert ":2: no column 'context'" in found and more.startswith("... and 2 more rows: no column 'context'")


def test_a_messages_fields_by_their_own_names_are_not_overwritten_by_ours(tmp_path):
    row = {"conversations": [{"from": "user", "value": "q", "role": "system", "content": "zzz", "name": "n"}]}
    fields = {"messages": "conversations", "role": "from", "content": "value"}
    rows = read(write(tmp_path / "t.jsonl", [row]), format="chat", fields=fields).rows
    assert rows[0]["messages"] == [{"role": "user", "content": "q", "name": "n"}]


def test_a_column_is_not_read_twice(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"input": "q", "output": "a"}])
    assert read(path, fields={"instruction": "input"}).rows == [{"instruction": "q", "output": "a"}]
    path = write(tmp_path / "t.jsonl", [{"input": "q", "output": "a", "instruction": "i"}])
    assert read(path, fields={"instruction": "input", "input": "instruction"}).rows == [{"instruction": "q", "input": "i", "output": "a"}]


def test_every_bad_row_of_every_source_is_named(tmp_path):
    one, two = write(tmp_path / "a.jsonl", [{"x": 1}]), write(tmp_path / "b.jsonl", [{"y": 1}])
    with pytest.raises(UserError) as info:
        read_sources((Source(path=str(one)), Source(path=str(two)), Source(path="no.jsonl")), "data.train")
    starts = [str(one), str(two), "data.train.2.path: no.jsonl: No such file"]
    assert all(p.startswith(s) for p, s in zip(info.value.problems, starts, strict=True)), info.value.problems


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "test"}, "data.train.split: found 'test', and one file has no splits"),
        ({"revision": "abc"}, "data.train.revision: found 'abc', which only a hub data set has"),
        ({"name": "en"}, "data.train.name: found 'en'"),
    ],
)
def test_settings_that_a_file_has_no_use_for_are_refused(tmp_path, settings, words):
    assert problems(write(tmp_path / "t.jsonl", ROWS), **settings)[0].startswith(words)


def test_messages_of_a_csv_file_are_json_text(read):
    turns = [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c"}]
    out = io.StringIO()
    csv.writer(out).writerows([["messages"], [json.dumps(turns)]])
    assert read(out.getvalue(), "t.csv", format="chat").rows == [{"messages": turns}]


def test_a_text_that_completes_a_conversation_is_its_answer(read, refused):
    turns = [{"role": "user", "content": "q"}]
    (row,) = read(json.dumps({"prompt": turns, "completion": "a"}), format="prompt_completion").rows
    assert row == {"prompt": turns, "completion": [{"role": "assistant", "content": "a"}]}
    (problem,) = refused(json.dumps({"prompt": "q", "completion": turns}), format="prompt_completion")
    assert problem.endswith("prompt and completion are of two kinds; give both as text, or the prompt as a list of messages")
