"""The files of a model: which of them count, and that a change of any of them is noticed."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmkd.errors import ChangedFiles, UserError
from llmkd.model_folder import hashes, identity
from llmkd.model_folder.files import find
from llmkd.model_folder.identity import fingerprint, same_weights, unchanged, verify, write_record
from llmkd.model_folder.weights import weight_files


def test_offline_a_model_of_the_hub_that_was_never_fetched_is_named_with_the_way_out():
    """The tests' environment is offline."""
    with pytest.raises(UserError) as refused:
        find("nobody/never-fetched", "teacher.model")
    assert refused.value.problems == (
        "teacher.model: nobody/never-fetched is no folder here and could not be downloaded from the hub (HF_HUB_OFFLINE is set, and it is not in the "
        "hub's cache); unset it, or fetch the model first (hf download nobody/never-fetched)",
    )


def model(folder: Path, **tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 4}))
    save_file(tensors or {"a": np.arange(4096, dtype=np.float32), "b": np.ones((2, 3), np.float16)}, folder / "model.safetensors")
    return folder


def sharded(folder: Path, where: dict[str, str]) -> Path:
    """The same tensors in several files; `where` is the index's name for each."""
    tensors = {"a": np.arange(4096, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    model(folder)
    (folder / "model.safetensors").unlink()
    for name, file in where.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def flip(path: Path, at: int) -> None:
    """Flip one bit in place, and put the time of writing back, as a careless tool or a fault may."""
    about = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_every_byte_of_a_tensor_counts_and_the_files_it_is_in_do_not(tmp_path):
    one = fingerprint(model(tmp_path / "one"), "m")
    assert one == fingerprint(sharded(tmp_path / "two", {"a": "model-1.safetensors", "b": "parts/model-2.safetensors"}), "m")
    size = (tmp_path / "one/model.safetensors").stat().st_size
    for at in (size - 1, size - 2000, size - 7000, size - 12 - 16384):
        flip(tmp_path / "one/model.safetensors", at)
        assert fingerprint(tmp_path / "one", "m") != one
        flip(tmp_path / "one/model.safetensors", at)
    assert fingerprint(tmp_path / "one", "m") == one


def test_a_hash_is_that_of_the_pieces_whatever_their_number(tmp_path, monkeypatch):
    import hashlib

    save_file({"a": np.arange(300, dtype=np.uint8)}, tmp_path / "x.safetensors")
    content = np.arange(300, dtype=np.uint8).tobytes()
    monkeypatch.setattr(hashes, "PIECE", 128)
    pieces = b"".join(hashlib.sha256(content[i : i + 128]).digest() for i in (0, 128, 256))
    (found,) = hashes.tensor_hashes([tmp_path / "x.safetensors"])
    assert found == {"a": f"U8 [300] {hashlib.sha256(pieces).hexdigest()}"}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A model whose hash is kept on disk, and the number of files that were read since."""
    reads = []
    monkeypatch.setattr(hashes, "KEPT_FROM", 0)
    monkeypatch.setattr(hashes, "SETTLED", -1e9)  # as if all was written long ago
    monkeypatch.setenv("LLMKD_CACHE", str(tmp_path / "cache"))
    piece = hashes.hash_piece
    monkeypatch.setattr(hashes, "hash_piece", lambda path, *rest: reads.append(path) or piece(path, *rest))

    def go(folder: Path) -> tuple[str, bool]:
        """Its fingerprint in a new process, and whether its files were read for it."""
        hashes.kept.clear()
        reads.clear()
        return fingerprint(folder, "m"), bool(reads)

    return go


def test_a_file_is_read_again_only_when_it_was_changed(tmp_path, kept):
    folder = model(tmp_path / "m")
    first, read = kept(folder)
    assert read and kept(folder) == (first, False)
    flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)  # the time of writing is as before
    other, read = kept(folder)
    assert read and other != first
    shutil.copy2(folder / "model.safetensors", tmp_path / "again")
    os.replace(tmp_path / "again", folder / "model.safetensors")  # another inode
    assert kept(folder) == (other, True) and kept(folder) == (other, False)


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", '{"checksum": 1}', "\xff", "flipped"])
def test_a_damaged_entry_of_the_cache_is_not_believed(tmp_path, kept, damage):
    folder = model(tmp_path / "m")
    first, _ = kept(folder)
    (entry,) = (tmp_path / "cache/hashes").glob("*.json")
    text = entry.read_text()
    digit = text.index("F32") + 20
    changed = text[:digit] + ("1" if text[digit] == "0" else "0") + text[digit + 1 :] if damage == "flipped" else damage
    entry.write_text(changed, encoding="latin-1")
    assert kept(folder) == (first, True) and kept(folder) == (first, False)


@pytest.mark.parametrize("home", ["/dev/null/nothing", "/proc/nothing"])
def test_without_a_place_to_keep_them_hashes_are_computed_each_time(tmp_path, kept, monkeypatch, home):
    folder = model(tmp_path / "m")
    monkeypatch.delenv("LLMKD_CACHE")
    monkeypatch.setenv("HOME", home)
    first, read = kept(folder)
    assert read and kept(folder) == (first, True)


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", 60.0)
    folder = model(tmp_path / "m")
    first, _ = kept(folder)
    assert kept(folder) == (first, True)
    assert not (tmp_path / "cache/hashes").exists()


def test_a_clock_that_goes_back_remembers_no_file_of_the_time_that_was(tmp_path, kept, monkeypatch):
    """A file written after the clock's time could be written to again at the same time by it."""
    monkeypatch.setattr(hashes, "SETTLED", 2.0)
    folder, now = model(tmp_path / "m"), time.time_ns()
    for ahead, remembered in ((-3600, False), (3600, True)):
        monkeypatch.setattr(hashes.time, "time_ns", lambda ahead=ahead: now + ahead * 10**9)
        kept(folder)
        assert (tmp_path / "cache/hashes").exists() == remembered


def test_a_file_that_changes_while_it_is_read_is_a_refusal(tmp_path, monkeypatch):
    folder = model(tmp_path / "m")
    piece = hashes.hash_piece

    def slow(path, *rest):
        time.sleep(0.02)
        flip(path, path.stat().st_size - 1)
        return piece(path, *rest)

    monkeypatch.setattr(hashes, "hash_piece", slow)
    with pytest.raises(UserError, match=r"m: .*model.safetensors was changed while it was read"):
        fingerprint(folder, "m")


def test_a_file_that_changes_while_it_is_loaded_is_named_whatever_else_goes_wrong(tmp_path):
    folder = model(tmp_path / "m")
    with unchanged([folder], "m"):
        os.link(folder / "model.safetensors", tmp_path / "link")
    with pytest.raises(ChangedFiles, match=r"m: .*model.safetensors was changed while it was being loaded"), unchanged([folder], "m"):
        (folder / "model.safetensors").write_bytes(b"")
        raise ValueError("a header of no bytes")


def test_the_files_that_transformers_loads_are_the_ones_that_count(tmp_path):
    folder = sharded(tmp_path / "m", {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    shards = fingerprint(folder, "m")
    save_file({"decoy": np.zeros(3)}, folder / "extra.safetensors")
    assert fingerprint(folder, "m") == shards
    model(folder, c=np.ones(2))  # beside an index, model.safetensors is what is loaded
    assert weight_files(folder, "m") == [folder / "model.safetensors"] and fingerprint(folder, "m") != shards
    (folder / "config.json").write_text('{"transformers_weights": "model-1.safetensors"}')
    assert weight_files(folder, "m") == [folder / "model-1.safetensors"]


@pytest.mark.parametrize("name", ["../out.safetensors", "/out.safetensors", "parts/../../out.safetensors", "./../out.safetensors", 3, None])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = sharded(tmp_path / "m", {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"b": np.ones((2, 3), np.float16)}, tmp_path / "out.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    problem = "which is not in that folder" if isinstance(name, str) else "has no weight_map"
    with pytest.raises(UserError, match=problem):
        find(str(folder), "teacher.model")
    if isinstance(name, str):
        (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(UserError, match="which is not in that folder"):
            find(str(folder), "teacher.model")


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path):
    real = sharded(tmp_path / "blobs", {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    (tmp_path / "snapshot").mkdir()
    for path in real.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert find(str(tmp_path / "snapshot"), "m").base == tmp_path / "snapshot"
    assert fingerprint(tmp_path / "snapshot", "m") == fingerprint(real, "m")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.fp16.safetensors", "holds model.fp16.safetensors: rename it"),
        ("pytorch_model.bin", "only pickled weights"),
        ("x", "no weights"),
    ],
)
def test_a_folder_without_the_file_that_is_loaded_says_what_it_holds(tmp_path, file, said):
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(UserError, match=f"student.model: .* has .*{said}"):
        find(str(folder), "student.model")


@pytest.mark.parametrize(("key", "value"), [("text_config", True), ("text_config", None), ("quantization_config", "4bit")])
def test_a_part_of_a_configuration_that_is_no_object_is_refused(tmp_path, key, value):
    folder = model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f"student.model: .*config.json: {key} is {value!r}, expected an object; copy it again"):
        find(str(folder), "student.model")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    find(str(folder), "student.model")


@pytest.mark.parametrize(
    "config",
    [
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": "owner/kernel@v1:name"},
        {"_attn_implementation_internal": "kernels-community/flash-attn2"},
        {"text_config": {"attn_implementation": "owner/kernel"}},
        {"attn_implementation": {"text_config": "owner/kernel", "": "sdpa"}},
        {"sub": [{"experts_implementation": "owner/kernel"}]},
    ],
)
def test_kernels_from_the_hub_are_refused_in_a_models_configuration(tmp_path, config):
    folder = model(tmp_path / "m")
    for fine in ({"_attn_implementation": "sdpa"}, {"attn_implementation": {"text_config": "eager"}}):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | fine))
        find(str(folder), "student.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    with pytest.raises(UserError, match=r"student.model: .*config.json asks for \w+_implementation\w*: '.*/.*', code from the hub"):
        find(str(folder), "student.model")


def test_what_llmkd_wrote_is_refused_when_any_file_of_it_has_changed(tmp_path):
    folder = model(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    write_record(folder, "m", student="merged")
    verify(folder, None, "m")
    (folder / "config.json").write_text('{"vocab_size": 4, "model_type": "llama", "transformers_version": "9"}')  # says the same
    verify(folder, None, "m")
    for name, text in (("tokenizer.json", "{ }"), ("generation_config.json", '{"eos_token_id": 2}'), ("config.json", "{}")):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"m: .*{name} has changed since llmkd wrote it; copy it again; if .* delete .*llmkd.json"):
            verify(folder, None, "m")
        (folder / name).write_text(before)
    flip(folder / "llmkd.json", (folder / "llmkd.json").read_text().index("merged"))
    with pytest.raises(UserError, match=r"m: .*llmkd.json is damaged"):
        verify(folder, None, "m")
    flip(folder / "llmkd.json", (folder / "llmkd.json").read_text().index("lerged"))
    flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    with pytest.raises(UserError, match=r"m: .*model.safetensors has changed since llmkd wrote it"):
        verify(folder, None, "m")


def test_records_of_earlier_versions_are_compared_by_their_samples(tmp_path, capsys):
    base, adapter = model(tmp_path / "base"), model(tmp_path / "adapter")
    (adapter / "llmkd.json").write_text(json.dumps({"base_fingerprint": identity.sampled_fingerprint(base, "m")}))
    verify(base, adapter, "m")
    assert "is of an earlier version, which recorded samples" in capsys.readouterr().err
    size = (base / "model.safetensors").stat().st_size
    flip(base / "model.safetensors", size - 1)
    assert not same_weights(json.loads((adapter / "llmkd.json").read_text())["base_fingerprint"], base, "m")
    with pytest.raises(UserError, match="was trained on other weights"):
        verify(base, adapter, "m")


def test_an_adapter_goes_on_its_base_with_the_configuration_of_its_training(tmp_path):
    base, adapter = model(tmp_path / "base"), model(tmp_path / "adapter")
    write_record(adapter, "m", base_fingerprint=fingerprint(base, "m"), base_config=identity.base_config_hash(base, "m"))
    known = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(known | {"eos_token_id": 3, "dtype": "bfloat16"}))  # neither changes its logits
    verify(base, adapter, "m")
    (base / "config.json").write_text(json.dumps(known | {"rope_theta": 1e6}))
    with pytest.raises(UserError, match=r"m: .*base/config.json is another configuration than that .*; put it back as it was"):
        verify(base, adapter, "m")


def test_a_damaged_generation_config_is_named(tmp_path):
    folder = model(tmp_path / "m")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"m: .*generation_config.json holds list, expected an object of settings; copy it again"):
        find(str(folder), "m")


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "merges.txt"])
def test_what_has_a_files_name_and_is_none_is_refused(tmp_path, name):
    """transformers would load the model as if the file were not there."""
    folder = model(tmp_path / "m")
    (folder / "README.md").mkdir()
    (folder / "chat_templates").mkdir()
    find(str(folder), "m")
    for make, what in (
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
        (os.mkfifo, "no file"),
    ):
        make(folder / name)
        with pytest.raises(UserError, match=f"m: .*m/{name} is {what}, and has the name of .*; copy it again, or remove it"):
            find(str(folder), "m")
        (folder / name).rmdir() if what == "a folder" else (folder / name).unlink()
