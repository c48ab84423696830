"""A teacher's answers as they are kept: by several processes, across kills and damage, and by whom they were given."""

import numpy as np
import pytest

from llmkd.errors import UserError
from llmkd.teachers.answers import _ENTRY, _START, Answers
from llmkd.teachers.cache.records import TopKFormat

FORMAT = TopKFormat(100, 8, 8, (1.0,))
HASHES = [f"{i:016x}" for i in (7, 1 << 63, 12345)]


def records(seed: int, targets: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (targets, FORMAT.bytes), np.uint8)


def answers(folder, record_format=FORMAT, provenance=None) -> Answers:
    return Answers(folder, record_format, provenance or {"model": "m"}, "teacher.cache.path")


def filled(folder) -> Answers:
    found = answers(folder)
    for n, one in enumerate(HASHES):
        found.put(one, records(n, n + 1))
    return found


def test_what_was_put_is_read_in_any_order_here_and_later(tmp_path):
    here = filled(tmp_path)
    for found in (here, answers(tmp_path)):
        assert len(found) == 3 and found.missing([*HASHES, "ab"]) == [3]
        assert np.array_equal(found.read([HASHES[2], HASHES[0]], [3, 1]), np.concatenate([records(2, 3), records(0, 1)]))


def test_nothing_is_written_before_an_answer_is_there(tmp_path):
    assert not len(answers(tmp_path / "none")) and not (tmp_path / "none").exists()


def test_processes_read_what_others_add(tmp_path):
    first, second = filled(tmp_path), answers(tmp_path)
    second.put("ab", records(9, 2))
    assert first.missing(["ab"]) == [0]
    first.refresh()
    assert np.array_equal(first.read(["ab", HASHES[1]], [2, 2]), np.concatenate([records(9, 2), records(1, 2)]))
    second.put("cd", records(8, 1))  # behind what was read already
    first.refresh()
    assert first.missing(["ab", "cd"]) == [] and len(list(tmp_path.glob("*.bin"))) == 2


def test_a_kill_at_any_byte_loses_the_last_answer_alone(tmp_path):
    filled(tmp_path)
    (file,) = tmp_path.glob("*.bin")
    whole = file.read_bytes()
    ends = [_START + sum(_ENTRY.size + (n + 1) * FORMAT.bytes for n in range(count)) for count in range(4)]
    assert len(whole) == ends[-1]
    for cut in (0, 5, _START, _START + 3, ends[1] - 1, ends[1], ends[1] + 20, ends[2], ends[3] - 1):
        file.write_bytes(whole[:cut])
        found = answers(tmp_path)
        assert len(found) == sum(end <= cut for end in ends[1:]), cut


def test_a_piece_that_is_finished_later_is_read_then(tmp_path):
    filled(tmp_path)
    (file,) = tmp_path.glob("*.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    reader = answers(tmp_path)
    assert reader.missing(HASHES) == [2]
    file.write_bytes(whole)
    reader.refresh()
    assert np.array_equal(reader.read(HASHES[2:], [3]), records(2, 3))


@pytest.mark.parametrize("place", [_START + _ENTRY.size + 3, _START + 2, _START + _ENTRY.size - 1])
def test_a_flipped_bit_is_noticed_and_what_follows_is_asked_again(tmp_path, place, caplog):
    filled(tmp_path)
    (file,) = tmp_path.glob("*.bin")
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    with caplog.at_level("INFO", "llmkd"):
        assert not len(answers(tmp_path))
    assert caplog.messages == [
        f"note: teacher.cache.path: {file} is damaged after {_START} bytes; the answers that stood there are asked for again"
    ]


def test_a_file_of_other_answers_is_not_read(tmp_path, caplog):
    filled(tmp_path / "a")
    Answers(tmp_path / "b", FORMAT, {"model": "other"}, "s").put("ab", records(1, 1))
    (stray,) = (tmp_path / "b").glob("*.bin")
    stray.rename(tmp_path / "a" / stray.name)
    assert answers(tmp_path / "a").missing(["ab"]) == [0] and "is no file of this folder's answers" in caplog.text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"provenance": {"model": "other"}}, "provenance.model: m -> other"),
        ({"record_format": TopKFormat(100, 4, 8, (1.0,))}, "kind.k: 8 -> 4"),
        ({"record_format": TopKFormat(101, 8, 8, (1.0,))}, "vocab: 100 -> 101"),
    ],
)
def test_a_folder_of_another_teacher_is_refused(tmp_path, other, said):
    filled(tmp_path)
    with pytest.raises(UserError) as info:
        answers(tmp_path, **other)
    assert said in str(info.value) and str(info.value).endswith("choose another folder, or delete it")
    (tmp_path / "answers.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        answers(tmp_path)


def test_another_number_of_targets_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 2 targets of an example .* that has 5"):
        filled(tmp_path).read(HASHES[1:2], [5])


def test_a_disk_that_is_full_leaves_no_piece_behind(tmp_path, monkeypatch):
    import os

    found, real = filled(tmp_path), os.write

    def full(file, content):
        if len(content) > 20:
            real(file, content[:10])
            raise OSError(28, "No space left on device")
        return real(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError):
            found.put("ab", records(5, 3))
    found.put("cd", records(6, 1))
    assert answers(tmp_path).missing([*HASHES, "ab", "cd"]) == [3]
