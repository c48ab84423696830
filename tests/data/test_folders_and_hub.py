"""Folders, saved data sets and the hub: which files are read, and what does not say it is refused."""

import shutil
from pathlib import Path

import pytest

from llmkd.config.recipe import Source
from llmkd.data.reading import sources
from llmkd.errors import UserError
from tests.kit.sources import ROWS, TALKS, problems, read, write


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a.jsonl", "b.csv", "sub/c.parquet", "README.md", ".hidden.jsonl", "_x/d.jsonl"], "train", ["a.jsonl", "b.csv", "sub/c.parquet"]),
        (
            ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet"],
            "train",
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ),
        (["train.jsonl", "validation.jsonl"], "validation", ["validation.jsonl"]),
        (["data/train.jsonl", "data/dev.jsonl"], "validation", ["data/dev.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"]),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], "train_sft", ["train_sft-00000-of-00001.parquet"]),
        (
            ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
            "train",
            ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
        ),
        (["trained_owls.jsonl", "testimony.jsonl"], "train", ["testimony.jsonl", "trained_owls.jsonl"]),
        (["a.jsonl", "dataset_infos.json"], "train", ["a.jsonl"]),
        (["A.JSONL", "b.Csv"], "train", ["A.JSONL", "b.Csv"]),
        (["TRAIN.JSONL", "Test.JSONL"], "train", ["TRAIN.JSONL"]),
        (["gsm_train.jsonl", "gsm_test.jsonl"], "train", ["gsm_train.jsonl"]),
        (["gsm_train.jsonl", "gsm_test.jsonl"], "test", ["gsm_test.jsonl"]),
        (["my-train.jsonl", "my-test.jsonl"], "train", ["my-train.jsonl"]),
        (["Train.csv", "Test.csv"], "train", ["Train.csv"]),
        (["myTrain.csv", "GSMTest.csv", "QADev2.csv"], "train", ["myTrain.csv"]),
        (["owls.trainset.csv", "owls.testset.csv"], "train", ["owls.trainset.csv"]),
        (["Train/a.jsonl", "my_test/a.jsonl"], "train", ["Train/a.jsonl"]),
    ],
)
def test_a_folder_is_its_files_of_the_split_in_order(tmp_path, names, split, expected):
    for n, name in enumerate(names):
        if name.endswith((".md", "infos.json")):
            (tmp_path / name).write_text("{}")
        else:
            write(tmp_path / name, [{"instruction": name, "input": "", "output": str(n)}])
    rows = read(f"{tmp_path}/", split=split)
    assert [row["instruction"] for row in rows.rows] == expected
    assert [place.rsplit(":", 1)[0] for place in rows.places] == [f"{tmp_path}/{name}" for name in expected]
    assert rows.origin["split"] == split


@pytest.mark.parametrize(
    ("names", "split", "words"),
    [
        (["train.jsonl", "test.jsonl"], "validation", "has no split 'validation'; it has test, train"),
        (["a.jsonl"], "test", "no file in .* is named after a split"),
        (["train.jsonl", "notes.jsonl"], "train", "some files are named after a split .train.jsonl. and some are not .notes.jsonl."),
        (["test/train.jsonl"], "train", "names two splits"),
        (["train_test.jsonl"], "train", "names two splits"),
        (["owls.jsonl", "OwlsTest.jsonl"], "train", "some files are named after a split .OwlsTest.jsonl. and some are not .owls.jsonl."),
        (
            ["d/train-00000-of-00003.jsonl", "d/train-00002-of-00003.jsonl"],
            "train",
            "d/train-00001-of-00003.jsonl is missing; 2 of its 3",
        ),
        (["train-00000-of-00001.jsonl", "test-00001-of-00002.jsonl"], "test", "test-00000-of-00002.jsonl is missing; 1 of its 2"),
        (["a.jsonl", "b.jsonl.gz"], "train", "b.jsonl.gz is compressed; unpack it"),
        (["a.txt"], "train", "has no data file .*; it has a.txt"),
        ([], "train", "has no data file .*; it has nothing"),
        (["state.json"], "train", "names no data files"),
    ],
)
def test_a_folder_that_does_not_say_what_to_read_is_refused(tmp_path, names, split, words):
    for name in names:
        path = tmp_path / name
        write(path, ROWS[:1]) if path.suffix.lower() == ".jsonl" else path.write_text("{}")
    with pytest.raises(UserError, match=rf"^data.train.(path|split): .*{words}"):
        read(tmp_path, split=split)


def test_a_link_to_nothing_is_no_file_to_pass_over(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert problems(tmp_path) == [f"data.train.path: {tmp_path}/b.jsonl is a broken link, or not a file; fix or remove it"]


def test_a_folders_content_is_that_of_all_its_files_and_their_names(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "d" / name, ROWS[:2])
    first = read(tmp_path / "d", limit=1)
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    assert read(tmp_path / "e", limit=1).content == first.content
    write(tmp_path / "d/b.jsonl", ROWS[2:4])
    changed = read(tmp_path / "d", limit=1)
    assert changed.rows == first.rows and changed.content != first.content
    (tmp_path / "e/b.jsonl").rename(tmp_path / "e/c.jsonl")
    assert read(tmp_path / "e", limit=1).content != first.content


@pytest.mark.parametrize("many", [False, True])
def test_a_data_set_saved_by_datasets(tmp_path, many):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    data = Dataset.from_list(ROWS)
    (DatasetDict(train=data, test=data.select(range(3))) if many else data).save_to_disk(
        tmp_path / "d", **({} if many else {"num_shards": 3})
    )
    assert read(tmp_path / "d").rows == ROWS
    if many:
        assert read(tmp_path / "d", split="test").rows == ROWS[:3]
    assert any("has no split 'dev'" in problem for problem in problems(tmp_path / "d", split="dev"))
    victim = next((tmp_path / "d").rglob("*.arrow"))
    content, raw = read(tmp_path / "d").content, bytearray(victim.read_bytes())
    raw[raw.index(b"a 1")] ^= 1
    if victim.parent.name != "test":
        victim.write_bytes(raw)
        assert read(tmp_path / "d").content != content
    victim.unlink()
    if victim.parent.name != "test":
        assert "is missing; copy the whole folder" in problems(tmp_path / "d")[0]


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `load_dataset` without a network, which records its arguments."""
    import datasets

    asked, served = [], list(TALKS)

    def load(path, name=None, split=None, revision=None, streaming=False):
        asked.append((path, name, split, revision, streaming))
        if path != "owner/talks":
            raise ConnectionError("no network\nand more")
        data = datasets.Dataset.from_list(served)
        data.info.download_checksums = {f"hf://datasets/owner/talks@{SHA}/train.parquet": {"num_bytes": 1}}
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked, served


def test_a_hub_data_set_has_its_commit_and_the_hash_of_the_rows_that_were_read(hub):
    rows = read("owner/talks", format="chat", split="train", name="en", revision="v2", limit=4)
    asked, served = hub
    assert asked == [("owner/talks", "en", "train", "v2", False)]
    assert rows.origin == {"path": "owner/talks", "name": "en", "split": "train", "revision": SHA, "rows": 4}
    assert rows.places == [f"owner/talks[train]:{i}" for i in range(1, 5)]
    assert rows.rows[1]["messages"][1]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    again = read("owner/talks", format="chat", limit=4).content
    served[1] = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]}
    assert read("owner/talks", format="chat", limit=4).content != again == rows.content


def test_a_data_set_that_the_hub_has_not_is_one_line(hub):
    assert problems("owner/nothing") == [
        "data.train.path: owner/nothing is not a file here and could not be read from the hub (ConnectionError: no network); check the name and the connection"
    ]


@pytest.mark.parametrize("path", ["./owner/talks", "/owner/talks", "a/b/c", "a b", "tests/talks"])
def test_a_mistyped_path_never_goes_to_the_network(hub, path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert "does not exist" in problems(path)[0] and not hub[0]


def test_the_commit_is_the_recipes_where_the_library_does_not_say_it():
    class Data:
        class info:
            download_checksums = None

    assert sources.hub_revision(Data, Source(path="x", revision="v1")) == "v1"
    assert sources.hub_revision(Data, Source(path="x")) is None


def test_offline_a_data_set_of_the_hub_says_what_to_unset(hub, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/nothing' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    assert problems("owner/nothing")[0].endswith("(OfflineModeIsEnabled)); unset HF_HUB_OFFLINE, or name local files")
