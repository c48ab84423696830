"""Sounds and images as rows: folders of classes, names of files, and what a row says of its file."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkd.config.data import BUILTIN_SOUNDS, Source
from llmkd.config.media import pattern_problem
from llmkd.data.reading.media import media_files, media_of, media_rows
from llmkd.data.reading.problems import BadRow
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError

ENDINGS = (".wav", ".mp3")


@pytest.fixture
def folder(tmp_path):
    def write(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return tmp_path

    return write


def rows(root: Path, pattern: str | None = None) -> list[tuple[str, dict]]:
    return [(place, get()) for place, get in media_rows(root, "in", "audio", media_files(root, "in", ENDINGS, "data.train"), pattern)]


def test_the_folder_of_a_file_is_its_class(folder):
    root = folder("owl/b.wav", "owl/a.MP3", "wren/c.wav", "_noise_/d.wav", "README.md", ".cache/owl/e.wav", "owl/._b.wav")
    assert [(place, row["label"]) for place, row in rows(root)] == [
        ("in/_noise_/d.wav", "_noise_"),
        ("in/owl/a.MP3", "owl"),
        ("in/owl/b.wav", "owl"),
        ("in/wren/c.wav", "wren"),
    ]
    assert rows(root)[1][1]["audio"] == str(root / "owl/a.MP3")


@pytest.mark.parametrize(("name", "says"), [("a.wav", "in no folder of a class"), ("train/owl/a.wav", "2 folders deep")])
def test_a_file_without_a_class_is_refused(folder, name, says):
    with pytest.raises(BadRow, match=says):
        rows(folder(name))


def test_names_are_read_by_a_pattern(folder):
    root = folder("x/3_ann_12.wav", "7_bob_0.wav")
    pattern = r"(?P<label>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.wav"
    assert [{**row, "audio": None} for _, row in rows(root, pattern)] == [
        {"audio": None, "label": "7", "speaker": "bob", "index": "0"},
        {"audio": None, "label": "3", "speaker": "ann", "index": "12"},
    ]
    with pytest.raises(BadRow, match=r"'7_bob_0.wav' does not match the pattern '\(\?P<fold>x\)/"):
        rows(root, r"(?P<fold>x)/(?P<label>\d).*")  # with a slash: the whole path
    assert pattern_problem(pattern, "audio") is None


@pytest.mark.parametrize(
    ("pattern", "says"), [("(?P<label", "no regular expression"), (r"\d_.*", "without a named group"), ("(?P<audio>.*)", "the file itself")]
)
def test_a_pattern_that_reads_nothing_is_refused(pattern, says):
    assert says in pattern_problem(pattern, "audio")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.txt"], "in has no file with one of the endings .wav, .mp3; it has a.txt"),
        (["owl/a.wav", "owl/b.m4a"], "in/owl/b.m4a cannot be read; convert it to .wav"),
    ],
)
def test_a_folder_without_files_that_can_be_read_is_refused(folder, names, says):
    with pytest.raises(UserError, match=says):
        media_files(folder(*names), "in", ENDINGS, "data.train")


def test_a_row_names_its_file_or_holds_it():
    assert media_of("a/b.wav", "rows/f.jsonl:3") == Path("rows/a/b.wav") and media_of("/a.wav", "f.csv:2") == Path("/a.wav")
    assert media_of(b"RIFF", "f.parquet:1") == media_of({"bytes": b"RIFF", "path": "a.wav"}, "f.parquet:1") == b"RIFF"
    assert media_of({"path": "a.wav"}, "f.parquet:1") == Path("a.wav")
    for value, says in (
        (None, "found null"),
        (" ", "an empty text"),
        (3, "a number"),
        ({"array": []}, "an object"),
        ("https://a.b/c.wav", "the address"),
    ):
        with pytest.raises(BadRow, match=says):
            media_of(value, "f.jsonl:3")


def source(path: Path, **settings) -> Source:
    return Source(path=str(path), format="audio", **settings)


PATTERN = r"(?P<label>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.wav"


def test_rows_of_a_folder_are_chosen_by_what_their_names_say(folder):
    root = folder(*(f"{digit}_{name}_{index}.wav" for digit in (0, 1) for name in ("ann", "bob") for index in (0, 5, 12)), "SHA256SUMS")
    read = read_source(source(root, pattern=PATTERN, where={"index": {"at_least": 5}, "speaker": "ann"}), "data.train")
    assert [(row["label"], Path(row["audio"]).name) for row in read.rows] == [
        ("0", "0_ann_12.wav"),
        ("0", "0_ann_5.wav"),
        ("1", "1_ann_12.wav"),
        ("1", "1_ann_5.wav"),
    ]
    assert read.places[0] == f"{root}/0_ann_12.wav" and not read.unread
    others = read_source(source(root, pattern=PATTERN, where={"index": 0}), "data.validation")
    assert others.content != read.content and len(others.rows) == 4


def test_every_misnamed_file_is_named(folder):
    with pytest.raises(UserError) as caught:
        read_source(source(folder("0_ann_1.wav", "zero_ann_1.wav", "00_bob_1.wav"), pattern=PATTERN), "data.train")
    assert "00_bob_1.wav" in caught.value.problems[0] and "1 more row" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ('{"audio": "a.wav", "label": "x"}\n{"audio": "b.wav", "label": 3}\n', {}, None),
        ('{"file": "a.wav", "class": "x"}\n', {"fields": {"audio": "file", "label": "class"}}, None),
        ('{"file": "a.wav", "label": "x"}\n', {}, "f.jsonl:1: no column 'audio'; found 'file', 'label'; set fields: {audio: NAME}"),
        ('{"audio": "a.wav", "label": null}\n', {}, "f.jsonl:1: label is null, expected the name of a class"),
        ('{"audio": "a.wav", "label": true}\n', {}, "label is true or false, expected the name"),
        ('{"audio": "a.wav", "label": "x"}\n', {"pattern": "(?P<label>.)"}, "f.jsonl is no folder of sounds or images"),
    ],
)
def test_rows_of_a_file_name_a_sound_and_its_label(tmp_path, rows, settings, says):
    (tmp_path / "f.jsonl").write_text(rows)
    if says is None:
        read = read_source(source(tmp_path / "f.jsonl", **settings), "data.train")
        assert [row["label"] for row in read.rows] == ["x", 3][: len(read.rows)] and read.rows[0]["audio"] == "a.wav"
        return
    with pytest.raises(UserError, match=re.escape(says)):
        read_source(source(tmp_path / "f.jsonl", **settings), "data.train")


def test_the_generated_sounds_are_a_source():
    read = read_source(source(BUILTIN_SOUNDS, split="validation", limit=7), "data.validation")
    assert len(read.rows) == 7 and isinstance(read.rows[0]["audio"], bytes) and read.places[6] == "builtin:sounds[validation]:7"
    with pytest.raises(UserError, match="data.train.split: found 'tests', expected train, validation, test"):
        read_source(source(BUILTIN_SOUNDS, split="tests"), "data.train")


def test_sounds_and_images_of_data_sets_are_the_bytes_of_their_files(tmp_path, monkeypatch):
    """As `datasets` saves them, in a folder as the hub's, and from the hub, where the library would decode them with a package that is not here.

    Their classes have the names that the data set gives them.
    """
    import datasets

    files = [b"RIFF one", b"RIFF two"]
    rows = [{"audio": {"bytes": one, "path": f"{n}.wav"}, "label": n} for n, one in enumerate(files)]
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list(rows).cast(features)
    assert data.features["audio"].decode
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "as_hub" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "as_hub" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split, revision, streaming: data)
    for path in (tmp_path / "saved", tmp_path / "as_hub", "owner/sounds"):
        read = read_source(Source(path=str(path), format="audio"), "data.train")
        assert [(media_of(row["audio"], place), row["label"]) for row, place in zip(read.rows, read.places, strict=True)] == [
            (files[0], "no"),
            (files[1], "yes"),
        ]
        chosen = read_source(Source(path=str(path), format="audio", where={"label": "yes"}), "data.train")
        assert [row["label"] for row in chosen.rows] == ["yes"]
    for wrong, says in ((2, "label is 2, and the data set names 2 classes, from 0"), (-1, "label is null, expected the name of a class")):
        table = pa.table({"audio": ["a.wav"], "label": [wrong]}).replace_schema_metadata(data.data.schema.metadata)
        pq.write_table(table, tmp_path / "wrong.parquet")
        with pytest.raises(UserError, match=f"wrong.parquet:1: {says}"):
            read_source(Source(path=str(tmp_path / "wrong.parquet"), format="audio"), "data.train")
    (tmp_path / "as_hub" / "no").mkdir()
    (tmp_path / "as_hub" / "no" / "a.wav").write_bytes(files[0])  # then the folder is one of sounds, and its rows are no sounds
    assert [row["label"] for row in read_source(Source(path=str(tmp_path / "as_hub"), format="audio"), "data.train").rows] == ["no"]
