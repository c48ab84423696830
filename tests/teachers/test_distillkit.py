"""Published log-probabilities in DistillKit's forms and in axolotl's columns, packed here by hand: what is read, and what is refused."""

import hashlib
import json
import math
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from llmkd.cli import main
from llmkd.commands import cache_import
from llmkd.data.collate import collate
from llmkd.errors import UserError
from llmkd.teachers.cache import import_logprobs as foreign
from llmkd.teachers.cache.distillkit import CONFIG, Bin, Packed, ParquetSet, Polynomials, read_config
from llmkd.teachers.cache.distillkit_codec import decoded
from llmkd.teachers.cache.import_lines import refuse_unreadable
from llmkd.teachers.cache.shards import ShardPlan, TeacherCache, Writer
from llmkd.teachers.cached import CachedTeacher
from tests.conftest import plain_recipe
from tests.teachers.test_import_logprobs import K, World, entries


def bits(numbers: list[int], width: int) -> bytes:
    """Numbers one after another, each of so many bits, the highest first, filled up with zeros."""
    text = "".join(f"{number:0{width}b}" for number in numbers)
    return bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))


@pytest.mark.parametrize(("delta", "last"), [(False, 3), (True, 3), (True, 1)])
def test_bit_packed_numbers_by_hand(delta, last):
    """The places of the polynomial are 0, 1, 2, 3, or `normalize_t` between 0 and 1."""
    form = Packed(300, 6, 2, (Bin("float16", 3, 2), Bin("float32", 1, 1)), "float32", (0, "sqrt"), "float32", delta, False, last == 1)
    ids = [299, 0, 7, 256, 31, 1]
    row = struct.pack("<ff", -0.5, -1.25) + struct.pack("<ff", -2.0, -0.5)  # exact values; a + b sqrt(j)
    row += struct.pack("<e", 0.25) + bits([1, 7], 3) + struct.pack("<f", 0.125) + bits([1], 1)  # 1 - 4 and 7 - 4 quarters; plus an eighth
    columns = {"compressed_logprobs": np.frombuffer(row, np.uint8)[None], "bytepacked_indices": np.frombuffer(bits(ids, 9), np.uint8)[None]}
    found_ids, found = decoded(form, columns)
    roots = [math.sqrt(j * last / 3) for j in range(4)]
    values = [-0.5, -1.25, -2 - 0.75, -2 - 0.5 * roots[1] + 0.75, -2 - 0.5 * roots[2] + 0.125, -2 - 0.5 * roots[3]]
    assert found_ids.tolist() == [ids] and found[0] == pytest.approx(np.cumsum(values) if delta else values, abs=1e-6)
    for more, said in ((b"\0", "1 bytes more"), (None, "fewer bytes")):
        changed = row + more if more else row[:-1]
        with pytest.raises(ValueError, match=said):
            decoded(form, columns | {"compressed_logprobs": np.frombuffer(changed, np.uint8)[None]})
    with pytest.raises(ValueError, match="has 6 bytes where 6 numbers of 9 bits are wanted"):
        decoded(form, columns | {"bytepacked_indices": columns["bytepacked_indices"][:, :6]})


@pytest.mark.parametrize(("inverse", "root"), [(True, False), (False, True)])
def test_polynomials_by_hand(inverse, root):
    form = Polynomials(300, 9, 6, 1, inverse, root)
    ids = [299, 0, 7, 256, 31, 1, 100, 200, 250]
    packed = [sum(one << 9 * i for i, one in enumerate(part)) for part in (ids[:7], ids[7:])]  # seven of 9 bits in 64, the first lowest
    coeffs = [-3.0, 0.5, *([-0.25] if root else [])]
    exact = [-0.5, -1.0, -1.5, -2.0, -2.25, -2.5]
    columns = {name: np.array([one]) for name, one in (("packed_indices", packed), ("exact_values", exact), ("coeffs", coeffs))}
    found_ids, found = decoded(form, columns)
    rest = [-3 + 0.5 * (1 / j if inverse else j) - (0.25 * math.sqrt(j) if root else 0) for j in (1, 2, 3)]
    assert found_ids.tolist() == [ids] and found[0] == pytest.approx([*exact, *rest])
    with pytest.raises(ValueError, match="which compression_config.yaml does not say"):
        decoded(form, columns | {"coeffs": np.zeros((1, 5))})


# ---- imported


class Sets(World):
    """The same teacher's answers as sets of Parquet files."""

    def row(self, i, form, last=True):
        """An example's row: lists for all places but, without `last`, the last one."""
        ids = self.ids(i)
        top = [self.top(i, t + 1 if t + 1 < len(ids) else t) for t in range(len(ids) - (not last))]  # the list of place t is about t + 1
        tokens, values = [list(one) for one in top], [list(one.values()) for one in top]
        width = (self.vocab - 1).bit_length()
        if form == "raw":
            return {"input_ids": ids, "token_ids": tokens, "top_values": values}
        if form == "polynomials":
            packed = [[sum(one << width * n for n, one in enumerate(row))] for row in tokens]
            return {"input_ids": ids, "packed_indices": packed, "exact_values": values, "coeffs": [[] for _ in tokens]}
        return {
            "input_ids": ids,
            "compressed_logprobs": [list(struct.pack(f"<{K}f", *row)) for row in values],
            "bytepacked_indices": [list(bits(row, width)) for row in tokens],
        }

    def config(self, form):
        if form == "polynomials":
            return {"legacy_logit_compression": {"vocab_size": self.vocab, "k": K, "exact_k": K, "polynomial_degree": 2}}
        return {"d": self.vocab, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False, "polynomial_terms": None}

    def written(self, rows, form="raw"):
        """A folder of the rows, one file each, and the settings next to them."""
        folder = self.folder / "set"
        folder.mkdir(exist_ok=True)
        for i, row in enumerate(rows):
            pa.parquet.write_table(pa.Table.from_pylist([row]), folder / f"data_{9 + i}.parquet")
        if form != "raw":
            (folder / CONFIG).write_text(json.dumps(self.config(form)))
        return folder

    def imported(self, path, name="cache"):
        refuse_unreadable(path)
        record_format = foreign.make_format(self.vocab, K, 16)
        identities = [self.encoded.content_hash(i) for i in range(len(self.encoded))]
        plan = ShardPlan.of(identities, [len(self.places(i)) for i in range(len(self.encoded))], record_format.bytes, 300)
        self.counts = foreign.write(path, self.encoded, self.tokenizer, Writer(self.folder / name, record_format, {}, plan))
        return CachedTeacher(TeacherCache.open(self.folder / name), "cpu")


@pytest.fixture
def sets(tmp_path):
    return Sets(tmp_path)


@pytest.mark.parametrize(("form", "last"), [("raw", True), ("polynomials", False), ("bits", True), ("bits", False)])
def test_each_form_is_what_the_teacher_said_with_the_rest_as_its_tail(sets, form, last):
    batch = collate(sets.encoded, [2, 0, 1], 0)
    wanted = sets.write(sets.all("ours"), K, "wanted")(batch)
    found = sets.imported(sets.written([sets.row(i, form, last) for i in range(3)], form))(batch)
    assert (found.ids_NK == wanted.ids_NK).all() and not sets.counts["rounded"]
    assert np.allclose(found.events(slice(None)), wanted.events(slice(None)), atol=1e-3)
    assert (found.tail_NS.exp() > 0.05).any()  # what is not listed


@pytest.mark.parametrize("columns", [1, 2])
def test_axolotls_columns_end_with_the_text(sets, columns):
    lines = []
    for i in range(3):
        top = [sets.top(i, t, [sets.ids(i)[t]]) for t in range(2, len(sets.ids(i)))]  # of each token but the first two, with its own
        if columns == 1:
            lines.append({"logprobs": [[{"token": f"token_id:{a}", "logprob": b} for a, b in one.items()] for one in top]})
        else:
            lines.append({"logprobs": [list(one.values()) for one in top], "target_token_ids": [list(one) for one in top]})
    signal = sets.write(lines)(collate(sets.encoded, [0, 1, 2], 0))
    wanted = [sets.top(i, t, [sets.ids(i)[t]]) for i in range(3) for t in sets.places(i)]
    assert [one.keys() for one in entries(signal)] == [one.keys() for one in wanted]
    assert all(abs(one[a] - value) < 0.01 for one, told in zip(entries(signal), wanted, strict=True) for a, value in told.items())
    shifted = [{name: value[1:] + value[:1] for name, value in line.items()} for line in lines]
    with pytest.raises(UserError, match=r"only \d of \d+ targets are in their own lists of tokens"):
        sets.write(shifted, name="other")
    with pytest.raises(UserError, match=r"answers.jsonl:1: logprobs: expected \[\{"):
        sets.write([{"logprobs": [7] * len(lines[0]["logprobs"])}, *lines[1:]], name="other")
    for tokens in (5, "", [[math.inf]] * len(lines[0]["logprobs"])):
        with pytest.raises(UserError, match=r"answers.jsonl:1: logprobs: expected \[\{"):
            sets.write([{"logprobs": [[-0.1]] * len(lines[0]["logprobs"]), "target_token_ids": tokens}, *lines[1:]], name="other")
    with pytest.raises(UserError, match=r"answers.jsonl:1: has 99 lists of log-probabilities, and the example \d+ tokens"):
        sets.write([{"logprobs": [[]] * 99}, *lines[1:]], name="other")


def test_probabilities_that_add_up_to_a_little_more_than_1_are_scaled_and_counted(sets):
    rows = [sets.row(i, "raw") for i in range(3)]
    place = sets.places(0)[0] - 1
    rows[0] |= {"top_values": [*rows[0]["top_values"]], "token_ids": [*rows[0]["token_ids"]]}
    rows[0]["token_ids"][place], rows[0]["top_values"][place] = list(range(K)), [math.log(1.04 / K)] * K
    found = sets.imported(sets.written(rows))(collate(sets.encoded, [0], 0))
    assert sets.counts["rounded"] == 1 and list(entries(found)[0].values()) == pytest.approx([math.log(1 / K)] * K, abs=1e-3)
    rows[0]["top_values"][place] = [math.log(1.1 / K)] * K
    with pytest.raises(UserError, match=r"data_9.parquet:1: target 1: the probabilities sum to 1.1000, more than 1"):
        sets.imported(sets.written(rows), "other")


WRONG = [
    (
        {"input_ids": lambda x: [*x[:4], 3, *x[5:]]},
        r"has lines for 2 of 3 examples; the first one missing is that of row 2; add them \(1 lines are about other texts or token ids\)",
    ),
    (
        {"input_ids": lambda x: x[:3]},
        r"has lines for 2 of 3 examples; the first one missing is that of row 2; add them \(1 lines are about other texts or token ids\)",
    ),
    ({"token_ids": lambda x: [[99999 + n for n in range(K)] for _ in x]}, r"token 99999 is not one of the vocabulary's"),
    ({"token_ids": lambda x: [[5] * K for _ in x]}, r"names a token twice at token \d+"),
    ({"top_values": lambda x: [[math.nan] * K for _ in x]}, r"found nan for token"),
    ({"top_values": lambda x: [one[:-1] for one in x]}, r"has \(\d+, 6\) ids and \(\d+, 5\) log-probabilities"),
    ({"top_values": lambda x: [x[0][:-1], *x[1:]]}, r"top_values: expected lists of one length, one for each token"),
    ({"token_ids": lambda x: x[:-2], "top_values": lambda x: x[:-2]}, r"has \d+ lists of tokens for \d+ tokens, expected one for each"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_is_wrong_is_named_with_its_row_and_nothing_is_written(sets, changes, said):
    rows = [sets.row(i, "raw") for i in range(3)]
    rows[1] |= {name: change(rows[1][name]) for name, change in changes.items()}
    with pytest.raises(UserError) as info:
        sets.imported(sets.written(rows))
    assert len(info.value.problems) == 1 and re.search(said, str(info.value)) and not (sets.folder / "cache").exists()


def test_a_place_without_a_probability_is_part_of_the_rest(sets):
    rows = [sets.row(i, "raw") for i in range(3)]
    place = sets.places(0)[0] - 1
    rows[0]["token_ids"][place], rows[0]["top_values"][place] = [5, 0, 0, 0, 0, 0], [-0.5, *[-math.inf] * (K - 1)]
    found = sets.imported(sets.written(rows))(collate(sets.encoded, [0], 0))
    assert entries(found)[0].keys() == {5} and found.tail_NS[0, 0].exp() == pytest.approx(1 - math.exp(-0.5), abs=1e-3)


def test_files_that_cannot_be_read_are_refused_before_any_data(sets):
    folder = sets.written([sets.row(0, "bits")])
    with pytest.raises(UserError, match=rf"compressed_logprobs is packed by settings that are not here; write them to {CONFIG}"):
        refuse_unreadable(folder)
    for text, said in (
        ("[1", "cannot be read"),
        ("[1]", "is not what DistillKit writes"),
        ("{d: 3, k: 2, exact_k: 3}", "exact_k above k"),
        ("{k: 2}", "is not what"),
    ):
        (folder / CONFIG).write_text(text)
        with pytest.raises(UserError, match=said):
            refuse_unreadable(folder)
    (folder / CONFIG).unlink()
    pa.parquet.write_table(pa.table({"text": ["a"]}), folder / "data_9.parquet")
    with pytest.raises(UserError, match=r"data_9.parquet: has the columns text, and of no known form"):
        refuse_unreadable(folder)
    (folder / "data_9.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"data_9.parquet: cannot be read"):
        refuse_unreadable(folder)
    (folder / "data_9.parquet").unlink()
    with pytest.raises(UserError, match="holds no .parquet file"):
        refuse_unreadable(folder)


def test_settings_as_distillkits_own_recipes_have_them(tmp_path):
    path = tmp_path / CONFIG
    path.write_text(
        "teacher:\n  kind: dataset\n  legacy_logit_compression: {vocab_size: 129280, k: 128, exact_k: 32, polynomial_degree: 8, term_dtype: float32}\n"
    )
    assert read_config(path) == Polynomials(129280, 128, 32, 8)
    path.write_text(
        "{d: 300, k: 4, exact_k: 1, polynomial_terms: [0, exp], residual_bins: [{scale_dtype: float16, element_bits: 2, num_elements: 3}]}"
    )
    assert read_config(path) == Packed(300, 4, 1, (Bin("float16", 2, 3),), polynomial_terms=(0, "exp"))


def test_the_hash_of_a_set_is_of_all_that_its_numbers_depend_on(sets):
    folder = sets.written([sets.row(i, "bits") for i in (0, 1)], "bits")
    hashes = [cache_import._hash_of(str(folder))]
    (folder / CONFIG).write_text(json.dumps(sets.config("bits") | {"delta_encoding": True}))
    hashes.append(cache_import._hash_of(str(folder)))
    pa.parquet.write_table(pa.Table.from_pylist([sets.row(2, "bits")]), folder / "data_10.parquet")
    hashes.append(cache_import._hash_of(str(folder)))
    assert len(set(hashes)) == 3
    (path := sets.folder / "one.jsonl").write_text("{}")
    assert cache_import._hash_of(str(path)) == hashlib.sha256(b"{}").hexdigest()
    with pytest.raises(UserError, match="--import: .*: No such file"):
        cache_import._hash_of(str(sets.folder / "none.jsonl"))


def test_rows_are_found_again_in_any_order(sets):
    found = ParquetSet(sets.written([sets.row(i, "raw") for i in (0, 1, 2)]))
    every = [(position, found.parsed(row)["input_ids"]) for _, position, row in found.rows()]
    assert sorted(ids for _, ids in every) == sorted(sets.ids(i) for i in range(3))
    assert all(found.at(position)["input_ids"] == ids for position, ids in [every[2], every[0], every[1], every[1]])


def test_a_set_is_data_and_answers_of_one_run(world, tmp_path, capsys):
    """The folder of a set as data.train and as --import: no other file is needed. Texts that are the same, or too long, do not shift the others."""
    texts = Sets(tmp_path, AutoTokenizer.from_pretrained(world / "student"))
    folder = texts.written([texts.row(i, "bits") for i in (0, 1, 1, 2)], "bits")
    longest = max(len(texts.ids(i)) for i in range(3))
    recipe = plain_recipe(world, tmp_path / "out")
    recipe["data"] = {"train": {"path": str(folder), "format": "tokens"}, "train_on_input": True, "max_length": longest - 1}
    recipe["teacher"] = {"cache": {"path": str(tmp_path / "made"), "kind": "topk", "k": K, "value_bits": 16}}
    made = {}
    for too_long in ("drop", "truncate"):
        recipe["data"]["too_long"], recipe["teacher"]["cache"]["path"] = too_long, str(tmp_path / too_long)
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        assert main(["cache", "--config", str(tmp_path / "recipe.yaml"), "--import", str(folder)]) == 0
        made[too_long] = capsys.readouterr().err
    assert "4 examples" in made["truncate"] and "are about rows" not in made["truncate"]
    fit = sum(len(texts.ids(i)) < longest for i in (0, 1, 1, 2))
    assert f"{fit} examples; {4 - fit} lines are about rows that have no example" in made["drop"] and 0 < fit < 4
