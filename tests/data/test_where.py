"""Rows chosen by their columns: the same from every kind of file, nothing left out without a word, and a share of wrong answers that is marked."""

import itertools
import json
from decimal import Decimal

import pytest

from llmkd.config.recipe import Data, Source
from llmkd.config.where import where_contradictions
from llmkd.data.dataset import read_data
from llmkd.data.reading import skills
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError
from tests.data.test_stream import stream
from tests.kit.sources import FILES, problems, read, write

ROWS = [
    {
        "instruction": f"q {i}",
        "input": "",
        "output": f"a {i}",
        "clean": i % 3 == 0,
        "lang": ("en", "de", "fr")[i % 3],
        "score": i / 10,
        "year": 2000 + i,
        "note": None if i % 4 else "x",
    }
    for i in range(20)
]
CASES = [
    ({"clean": True}, lambda r: r["clean"] is True),
    ({"clean": False}, lambda r: r["clean"] is False),
    ({"lang": ["en", "fr"]}, lambda r: r["lang"] in ("en", "fr")),
    ({"lang": {"not": ["en", "fr"]}}, lambda r: r["lang"] == "de"),
    ({"score": {"above": 0.5}}, lambda r: r["score"] > 0.5),
    ({"score": {"at_most": 0.5}}, lambda r: r["score"] <= 0.5),
    ({"score": {"below": 1, "at_least": 0.2}}, lambda r: 0.2 <= r["score"] < 1),
    ({"year": 2003}, lambda r: r["year"] == 2003),
    ({"year": {"above": 2003, "not": 2010}}, lambda r: r["year"] > 2003 and r["year"] != 2010),
    ({"note": None}, lambda r: r["note"] is None),
    ({"note": {"not": None}}, lambda r: r["note"] is not None),
    ({"note": [None, "y"]}, lambda r: r["note"] is None),
    ({"note": {"not": "x"}}, lambda r: r["note"] != "x"),
    ({"clean": True, "lang": "en", "year": {"above": 2005}}, lambda r: r["clean"] and r["lang"] == "en" and r["year"] > 2005),
]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_rows_that_a_loop_gives(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    for where, holds in CASES:
        wanted = [row["instruction"] for row in ROWS if holds(row)]
        found = read(path, where=where)
        assert [row["instruction"] for row in found.rows] == wanted, where
        assert (found.chosen.kept, found.chosen.left_out) == (len(wanted), len(ROWS) - len(wanted))
        assert not found.unread.keys() & where.keys() and found.unread  # what `where` reads is read


def test_rows_are_chosen_before_the_limit_and_the_sample(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    chosen = [row["instruction"] for row in ROWS if row["clean"]]
    assert [row["instruction"] for row in read(path, where={"clean": True}, limit=3).rows] == chosen[:3]
    sampled = [row["instruction"] for row in read(path, where={"clean": True}, limit=5, seed=1).rows]
    assert len(sampled) == 5 and set(sampled) <= set(chosen)
    assert len({read(path, where=where).content for where in ({}, {"clean": True}, {"clean": False})}) == 3


def test_a_stream_gives_the_chosen_rows_alone_and_resumes(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", ROWS)

    def places(done: int = 0) -> list[set[str]]:
        return [
            {step.place(i) for i in sum(step.micro_batches, [])} for step, _ in stream(path, where={"clean": True}, limit=6).steps(done)
        ]

    steps = places()
    assert set().union(*steps) == {f"{path}:{i + 1}" for i in (0, 3, 6, 9, 12, 15)} and places(3) == steps[3:]
    assert "where clean is true: 6 rows kept, 10 left out so far" in capsys.readouterr().err
    with pytest.raises(UserError, match="no row of .* has year is above 3000: of its 20 rows year is from 2000 to 2019"):
        stream(path, where={"year": {"above": 3000}})
    write(path, [*ROWS, {"instruction": "q", "output": "a"}])
    with pytest.raises(UserError, match="t.jsonl:21: no column 'clean', which data.train.where reads"):
        stream(path, where={"clean": True}, buffer=30)


def test_what_cannot_be_compared_is_refused_with_its_place(tmp_path):
    path = write(tmp_path / "t.jsonl", [ROWS[0], *({"instruction": "q", "output": "a", "cleen": True} for _ in range(3))])
    first, more = problems(path, where={"clean": True})
    assert first.startswith(f"{path}:2: no column 'clean', which data.train.where reads; found ") and "did you mean 'cleen'?" in first
    assert more == "... and 2 more rows: no column 'clean'"
    for value, said in (
        ("yes", "clean is 'yes' (text)"),
        (1, "clean is 1 (a number)"),
        ([True], "clean is a list"),
        ({"a": 1}, "clean is an object"),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[1], ROWS[0] | {"clean": value})))
        (line,) = problems(path, where={"clean": False})
        assert f"t.jsonl:2: {said}, and data.train.where compares it with true or false (clean is false)" in line
    csv = write(tmp_path / "t.csv", [ROWS[0] | {"clean": "yes", "score": "high"}])
    assert "clean is 'yes' (text), and data.train.where compares it with true or false" in problems(csv, where={"clean": True})[0]
    assert "score is 'high' (text), and data.train.where compares it with a number" in problems(csv, where={"score": {"above": 0}})[0]
    renamed = write(tmp_path / "n.jsonl", [{"q": "x", "output": "a"}])
    assert "the file's own name for it is 'q'" in problems(renamed, where={"instruction": "x"}, fields={"instruction": "q"})[0]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_what_is_inside_an_object_is_compared_by_its_path(tmp_path, name):
    path = write(tmp_path / name, [ROWS[i] | {"meta": {"of": {"clean": clean}, "n": 1}} for i, clean in enumerate((True, False, None))])
    assert [row["instruction"] for row in read(path, where={"meta.of.clean": True}).rows] == ["q 0"]
    assert [row["instruction"] for row in read(path, where={"meta.of.clean": None}).rows] == ["q 2"]
    assert "meta.of.clean is true (1), false (1), null (1)" in problems(path, where={"meta.of.clean": [True], "meta.n": 2})[0]
    write(tmp_path / "i.jsonl", [ROWS[0] | {"meta": "text"}])
    assert "no column 'meta.clean', which data.train.where reads" in problems(tmp_path / "i.jsonl", where={"meta.clean": True})[0]


def test_where_no_row_is_chosen_the_values_are_named(tmp_path):
    path = write(tmp_path / "t.jsonl", ROWS)
    assert problems(path, where={"lang": "it", "score": {"above": 0}}) == [
        f"data.train.where: no row of {path} has lang is 'it' and score is above 0: of its 20 rows lang is 'en' (7), 'de' (7), 'fr' (6); "
        "score is from 0 to 1.9; choose among these, or leave the condition out"
    ]
    path.write_text("not json\n" + json.dumps(ROWS[1]) + "\n")
    assert "t.jsonl:1: not valid JSON" in problems(path, where={"clean": False})[0]  # a bad row is not left out


def test_null_and_nan_are_in_no_range_and_are_counted(tmp_path, capsys):
    rows = [ROWS[i] | {"score": score} for i, score in enumerate((None, float("nan"), 0.3, 0.9, 1.0))]
    path = write(tmp_path / "t.parquet", rows)
    data = Data(train=Source(path=str(path), where={"score": {"above": 0.5}}, ignore=("note",)))
    assert [row["instruction"] for row in read_data(data)["data.train"][0].rows] == ["q 3", "q 4"]
    assert "where score is above 0.5: 2 rows kept, 3 left out (score is null in 2 of them all)" in capsys.readouterr().err
    assert [row["instruction"] for row in read(path, where={"score": {"at_most": 0.5}}).rows] == ["q 2"]
    assert len(read(path, where={"score": None}).rows) == 2
    exact = write(tmp_path / "d.parquet", [ROWS[i] | {"score": Decimal(f"0.{i}")} for i in range(1, 4)])
    assert [row["instruction"] for row in read(exact, where={"score": [0.1, 0.3]}).rows] == ["q 1", "q 3"]


def test_true_is_not_1_in_a_column_of_several_types(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(ROWS[i] | {"x": x}) + "\n" for i, x in enumerate((1, True, 5, "a", 0, False))))
    for where, kept in ((["a", True, 5], [1, 2, 3]), ({"not": ["a", True, 5]}, [0, 4, 5]), ([0, 1, "b", True], [0, 1, 4])):
        assert [int(row["instruction"][2:]) for row in read(path, where={"x": where}).rows] == kept


def test_a_csv_value_is_read_as_what_it_is_compared_with(tmp_path):
    rows = [
        ROWS[i] | {"clean": clean, "score": score}
        for i, (clean, score) in enumerate((("True", "1e1"), ("FALSE", "010"), ("", ""), ("true", "-.5")))
    ]
    path = write(tmp_path / "t.csv", rows)

    def numbers(**where) -> list[int]:
        return [int(row["instruction"][2:]) for row in read(path, where=where).rows]

    assert numbers(clean=True) == [0, 3] and numbers(clean=False) == [1] and numbers(clean=None) == [2]
    assert numbers(clean="True") == [0] and numbers(clean="") == [2]
    assert numbers(score=10) == [0, 1] and numbers(score="010") == [1] and numbers(score={"below": 0}) == [3]


def test_a_mark_of_a_row_is_no_longer_refused_where_it_is_chosen_by(tmp_path):
    path = write(tmp_path / "t.jsonl", [ROWS[i] | {"is_valid": i % 2 == 0, "label": i != 2} for i in range(4)])
    lines = problems(path)
    assert any("set where: {is_valid: true} to train on the others alone" in line for line in lines)
    assert any("set where: {label: true} to train on the others alone" in line for line in lines)
    assert [row["instruction"] for row in read(path, where={"is_valid": True, "label": True}).rows] == ["q 0"]
    write(path, [ROWS[i] | {"train": i != 2} for i in range(4)])
    assert all(row["train"] is False for row in read(path, where={"train": False}).rows)  # chosen, and still not trained on


@pytest.mark.parametrize(
    ("where", "path", "said"),
    [
        ({"score": {"over": 1}}, "score.over", "there are above, at_least, below, at_most and not"),
        ({"score": {}}, "score", "no condition"),
        ({"score": []}, "score", "empty list"),
        ({"score": {"above": "1"}}, "score.above", "expected a number"),
        ({"score": {"above": True}}, "score.above", "expected a number"),
        ({"score": {"above": 1, "at_least": 1}}, "score.above", "together with at_least"),
        ({"score": {"above": 1, "at_most": 1}}, "score", "no number is above 1 and at most 1"),
        ({"lang": [["en"]]}, "lang", "expected a number, text, true, false or null"),
        ({"lang": {"not": {"a": 1}}}, "lang.not", "expected a number, text, true, false or null"),
        ({"": 1}, "", "without a name"),
    ],
)
def test_conditions_that_cannot_be_are_refused(where, path, said):
    ((found, problem),) = where_contradictions(where)
    assert found == path and said in problem


def test_parts_of_one_file_are_two_data_sets(tmp_path, capsys):
    path = str(write(tmp_path / "t.jsonl", ROWS))
    for held_out, same in (({"clean": False}, False), ({"lang": "en"}, True), ({}, True)):
        read_data(Data(train=Source(path=path, where={"clean": True}), validation=Source(path=path, where=held_out)))
        assert ("are the same data" in capsys.readouterr().err) is same


def test_noise_replaces_its_share_of_answers_by_wrong_ones_of_their_kind():
    plain, questions = skills.rows("train"), skills.question_splits()["train"]
    assert all("clean" not in row for row in plain)
    wrong_before: dict[int, str] = {}
    for noise in (0.1, 0.4, 1.0):
        rows = skills.rows("train", noise=noise)
        wrong = {i: row["messages"][1]["content"] for i, row in enumerate(rows) if not row["clean"]}
        assert len(wrong) == round(noise * len(rows)) and wrong_before.items() <= wrong.items()
        for i, (row, before, (asked, right, others, wording)) in enumerate(zip(rows, plain, questions, strict=True)):
            assert row["messages"][0]["content"] == asked and set(row) == {"messages", "clean"}
            if i in wrong:
                assert wrong[i] in [wording.format(other) for other in others] and wrong[i] != wording.format(right)
            else:
                assert row == before | {"clean": True}
        wrong_before = wrong
    assert skills.rows("train", noise=0.4) == skills.rows("train", noise=0.4)
    validation = skills.rows("validation", noise=0.5)
    assert sum(row["clean"] for row in validation) == 200
    ends = list(itertools.accumulate(row["clean"] for row in validation))
    assert 60 < ends[199] < 140  # not the first half


def test_noise_is_part_of_what_the_data_are(tmp_path):
    def content(**settings) -> str:
        return read_source(Source(path="builtin:skills", format="chat", limit=5, **settings), "data.train").content

    assert len({content(), content(noise=0.4), content(noise=0.5), content(noise=0.4, where={"clean": True})}) == 4
    assert content() == content(noise=0.0) == "skills 1 train questions [5, null, {}, {}]"
