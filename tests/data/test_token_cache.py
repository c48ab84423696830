"""Rows are tokenised once; the key covers everything that tokens depend on, and damaged entries are made again."""

import copy
import json
import os
import signal
import time
from pathlib import Path

import pytest

from llmkd.config.recipe import Data, Source
from llmkd.data.encoding.encode import encode as encode_rows
from llmkd.data.encoding.token_cache import load_or_encode
from llmkd.data.examples import TokenExamples
from llmkd.data.reading.sources import Rows, read_source
from llmkd.errors import UserError
from tests.kit.data import GOOD, MARKED, encode, rows_of, same, talk, tiny
from tests.kit.processes import launch


class Cache:
    """A cache folder, and the warnings about it."""

    def __init__(self, folder: Path):
        self.folder, self.warnings, self.encode = folder, [], encode_rows

    def __call__(self, rows: Rows, format: str = "alpaca", tokenizer=None, **data) -> TokenExamples:
        self.warnings = []
        settings = Data(**({"cache_dir": str(self.folder)} | data))
        source = Source(path="f.jsonl", format=format)
        return load_or_encode(rows, source, settings, tokenizer or tiny(), "data.train", self.warnings.append, self.encode)

    @property
    def entries(self) -> list[Path]:
        return sorted((self.folder / "tokens").iterdir())


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def no_encoding(cache):
    def never(*args):
        raise AssertionError("tokenised again")

    return lambda: setattr(cache, "encode", never)


ROWS = rows_of(*({"instruction": f"q {i}", "output": "owl " * (i + 1)} for i in range(9)))


def test_a_hit_equals_a_miss_bit_for_bit(cache, no_encoding):
    made = cache(ROWS)
    assert same(made, encode(ROWS, "alpaca", Data(), tiny()))
    no_encoding()
    assert same(cache(ROWS), made) and not cache.warnings
    assert len(cache.entries) == 1


def test_padding_and_plain_use_of_the_tokenizer_do_not_change_the_key(cache, no_encoding):
    cache(ROWS)
    tiny()(["a", "the owl"], padding=True, truncation=True, max_length=3)
    no_encoding()
    cache(ROWS)


def test_content_is_the_key_and_not_the_time_or_size_of_the_file(cache, read, tmp_path):
    first = cache(read(GOOD))
    before = os.stat(tmp_path / "t.jsonl")
    read(GOOD.replace('"b"', '"c"'))
    os.utime(tmp_path / "t.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    rows = read_source(Source(path=str(tmp_path / "t.jsonl")), "data.train")
    after = os.stat(tmp_path / "t.jsonl")
    assert (after.st_size, rows.rows[0]["output"]) == (before.st_size, "c")
    assert not same(cache(rows), first) and len(cache.entries) == 2


@pytest.mark.parametrize(
    ("data", "tokenizer"),
    [
        ({"max_length": 100}, {}),
        ({"too_long": "truncate"}, {}),
        ({"train_on_input": True}, {}),
        ({}, {"seen": "unheard of words"}),
        ({}, {"template": MARKED}),
    ],
)
def test_what_shapes_the_examples_is_in_the_key(cache, data, tokenizer):
    made, other = cache(ROWS), cache(ROWS, tokenizer=tiny(**tokenizer), **data)
    assert len(cache.entries) == 2
    assert same(cache(ROWS), made) and same(cache(ROWS, tokenizer=tiny(**tokenizer), **data), other)


def test_the_tokens_that_a_template_may_name_are_in_the_key(cache):
    one, two = (copy.deepcopy(tiny("{% for m in messages %}{{ m.content }}{{ sep_token }}{% endfor %}")) for _ in range(2))
    one.sep_token, two.sep_token = "<|im_end|>", "<|im_start|>"
    rows = rows_of(talk("u q", "a one"))
    assert not same(cache(rows, "chat", one), cache(rows, "chat", two)) and len(cache.entries) == 2


def test_the_format_and_the_limit_are_in_the_key(cache, read):
    text = '{"instruction": "a", "output": "b", "text": "c"}\n' * 2
    cache(read(text))
    cache(read(text, format="text"), format="text")
    cache(read(text, limit=1))
    assert len(cache.entries) == 3


@pytest.mark.parametrize("at", [0, 9, 100, 0.5, -1])
def test_a_flipped_byte_is_noticed_reported_and_made_again(cache, no_encoding, at):
    made = cache(ROWS)
    path = cache.entries[0] / "tokens.safetensors"
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw)) if at == 0.5 else at] ^= 1
    path.write_bytes(raw)
    assert same(cache(ROWS), made)
    assert len(cache.warnings) == 1 and "damaged" in cache.warnings[0] and str(cache.entries[0]) in cache.warnings[0]
    no_encoding()
    assert same(cache(ROWS), made) and not cache.warnings


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{", b"\xff", b"{}", b'{"sha256": 1}'])
def test_a_damaged_manifest_is_noticed_reported_and_made_again(cache, no_encoding, manifest):
    made = cache(ROWS)
    (cache.entries[0] / "manifest.json").write_bytes(manifest)
    assert same(cache(ROWS), made) and "damaged" in cache.warnings[0]
    no_encoding()
    assert same(cache(ROWS), made) and not cache.warnings


@pytest.mark.parametrize("missing", ["tokens.safetensors", "manifest.json"])
def test_an_entry_that_lacks_a_file_is_made_again(cache, no_encoding, missing):
    made = cache(ROWS)
    (cache.entries[0] / missing).unlink()
    assert same(cache(ROWS), made)
    no_encoding()
    assert same(cache(ROWS), made)


def test_changed_counts_are_noticed(cache):
    made = cache(ROWS)
    path = cache.entries[0] / "manifest.json"
    path.write_text(path.read_text().replace('"too_long": 0', '"too_long": 5'))
    assert same(cache(ROWS), made)


@pytest.mark.parametrize("folder", ["file/below", "x" * 300])
def test_a_cache_that_cannot_be_written_does_not_fail_the_run(tmp_path, folder):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / folder)
    assert len(cache(ROWS)) == 9
    assert len(cache.warnings) == 1 and "cannot be written" in cache.warnings[0]


def test_a_full_disk_does_not_fail_the_run_and_leaves_nothing_behind(cache, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert len(cache(ROWS)) == 9
    assert "No space left" in cache.warnings[0] and cache.entries == []


@pytest.mark.parametrize(
    ("rows", "format", "data", "words"),
    [
        ([talk("u q")] * 3, "chat", {}, ["none of f.jsonl's 3 rows", "0 are longer", "3 have no answer"]),
        ([json.loads(GOOD)] * 2, "alpaca", {"max_length": 5}, ["none of f.jsonl's 2 rows", "2 are longer than data.max_length = 5"]),
        ([{"text": ""}], "text", {}, ["none of f.jsonl's 1 rows", "1 have no answer"]),
        (
            [
                {"messages": [*talk("u q")["messages"], {"role": "assistant", "content": "a", "train": False}]},
                {"messages": [], "train": False},
            ],
            "chat",
            {},
            ["0 have no answer, 2 are marked as not trained on); remove the marks, or list their keys under ignore"],
        ),
    ],
)
def test_rows_with_nothing_to_train_on_are_refused_with_counts(cache, rows, format, data, words):
    with pytest.raises(UserError) as info:
        cache(rows_of(*rows), format, **data)
    (problem,) = info.value.problems
    assert problem.startswith("data.train: ") and all(word in problem for word in words), problem
    assert not (cache.folder / "tokens").exists()


def test_chat_without_a_template_is_refused(cache):
    with pytest.raises(UserError, match=r"^data.train.format: found chat, and the tokenizer has no chat template"):
        cache(rows_of(talk("u q", "a x")), "chat", tokenizer=tiny(None))


# ---- several processes


def make_entry(folder: Path, how: str) -> None:
    """Prints the number of tokens, or what is wrong; `how`: work, fail, or die in the middle."""

    def slow(*args):
        with open(folder / "made", "a") as log:
            log.write(f"{os.getpid()}\n")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return encode_rows(*args)

    rows = Rows([{"instruction": "q", "output": "" if how == "fail" else "owl"}] * 3, ["f:1"] * 3, "content")
    try:
        examples = load_or_encode(rows, Source(path="f.jsonl"), Data(cache_dir=str(folder)), tiny(), "data.train", encode=slow)
        print(examples.ids.sum())
    except UserError as error:
        print(error)


@pytest.mark.slow
def test_the_processes_of_a_launch_make_an_entry_once(tmp_path):
    said = launch(2, make_entry, tmp_path, "work").stdout.splitlines()
    assert len(said) == 2 and len(set(said)) == 1 and int(said[0]) > 0
    assert len((tmp_path / "made").read_text().splitlines()) == 1


@pytest.mark.slow
def test_where_the_first_fails_the_others_try_and_fail_alike(tmp_path):
    said = launch(2, make_entry, tmp_path, "fail").stdout.splitlines()
    assert len(said) == 2 and len(set(said)) == 1 and "none of f.jsonl's 3 rows" in said[0]
    assert len((tmp_path / "made").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    assert launch(1, make_entry, tmp_path, "die").returncode == -signal.SIGKILL and (tmp_path / "made").exists()
    start = time.perf_counter()
    assert len(Cache(tmp_path)(rows_of({"instruction": "q", "output": "owl"}))) == 1
    assert time.perf_counter() - start < 5
