"""Sounds and images as rows: folders of classes, names of files, and what a row says of its file."""

from pathlib import Path

import pytest

from llmkd.config.media import pattern_problem
from llmkd.data.reading.files import BadRow
from llmkd.data.reading.media import media_files, media_of, media_rows
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
