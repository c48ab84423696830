"""The cache of teacher answers: written by any number of processes, resumed, read in any order, refused when it is not what it should be."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmkd.config.recipe import Data, Source, Teacher
from llmkd.config.teacher import Cache
from llmkd.data.collate import collate
from llmkd.data.encoding.encode import encode
from llmkd.data.encoding.tokenizer import load_tokenizer
from llmkd.data.reading.sources import read_source
from llmkd.errors import ChangedFiles, UserError
from llmkd.head import Head
from llmkd.losses.divergences import forward_kl
from llmkd.models.families import head_of
from llmkd.models.load import LoadContext, load_teacher
from llmkd.signals import Dense
from llmkd.teachers.cache.records import HiddenFormat, TopKFormat, make_record_format
from llmkd.teachers.cache.shards import ShardPlan, TeacherCache, Writer
from llmkd.teachers.cache.stored_head import StoredHead, effective
from llmkd.teachers.cached import CachedTeacher
from llmkd.teachers.live import LiveTeacher
from llmkd.teachers.sparse import Sampled, TopK

PROVENANCE = {"the tokenizer": "t", "the teacher": {"base": "b", "adapter": "a"}}


@pytest.fixture(scope="module")
def data(world):
    tokenizer = load_tokenizer(str(world / "teacher"), "teacher.model")
    source = Source(path=str(world / "train.jsonl"), format="alpaca")
    return encode(read_source(source, "data.train", False), source, Data(train=source, max_length=256), tokenizer), len(tokenizer)


@pytest.fixture(scope="module")
def teacher(world, data):
    return load_teacher(Teacher(model=str(world / "adapter"), dtype="float32"), LoadContext(data[1], "cpu"))


def plan_of(encoded, record_format, shard_bytes):
    identities = [encoded.content_hash(i) for i in range(len(encoded))]
    return ShardPlan.of(
        identities, np.add.reduceat(encoded.loss_mask.astype(np.int64), encoded.offsets[:-1]), record_format.bytes, shard_bytes
    )


def fill(writer, numbers, encoded, teacher, size=4, packing=False):
    for number in numbers:
        shard = writer.shard(number)
        chosen = shard.examples.tolist()[::-1]
        for start in range(0, len(chosen), size):
            batch = collate(encoded, chosen[start : start + size], 0, packing)
            records = writer.format.record(LiveTeacher(teacher)(batch), batch.labels_N, batch.examples)
            shard.put([e.content_hash for e in batch.examples], [e.num_targets for e in batch.examples], records)
        shard.write()


def write(folder, record_format, encoded, teacher, shard_bytes=4000, **how):
    writer = Writer(folder, record_format, PROVENANCE, plan_of(encoded, record_format, shard_bytes))
    if not writer.begin():
        fill(writer, writer.left(), encoded, teacher, **how)
        writer.finish()
    return writer


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_files(a, b):
    return content(a).keys() == content(b).keys() and all(content(b)[name] == x for name, x in content(a).items())


KINDS = {
    "topk": (Cache(path="x", k=20), TopK),
    "sampled": (Cache(path="x", kind="sampled", num_samples=30, temperature=2.0), Sampled),
    "hidden": (Cache(path="x", kind="hidden"), Dense),
}
each = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def made(tmp_path, data, teacher):
    """A finished cache of topk, with several shards."""
    return write(tmp_path / "cache", make_record_format(KINDS["topk"][0], data[1]), data[0], teacher), tmp_path / "cache"


@each
def test_what_is_read_is_what_the_teacher_said_whatever_the_batch(name, tmp_path, data, teacher):
    encoded, vocab = data
    settings, kind_of_signal = KINDS[name]
    writer = write(tmp_path / "cache", make_record_format(settings, vocab, teacher), encoded, teacher)
    assert len(writer.plan.shards) > 2
    cached = CachedTeacher(TeacherCache.open(tmp_path / "cache"), "cpu")
    for packing in (False, True):
        batch = collate(encoded, [30, 2, 17, 2, 5], 0, packing)
        said, live = cached(batch), LiveTeacher(teacher)(batch)
        assert isinstance(said, kind_of_signal)
        rows, log_p = slice(0, batch.num_targets), live.log_probs(slice(None))
        log_q = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(0)).log_softmax(1)
        assert_close(said.label_log_probs(rows, batch.labels_N), live.label_log_probs(rows, batch.labels_N), rtol=1e-3, atol=1e-3)
        if name == "hidden":
            assert_close(said.log_probs(rows), log_p, rtol=1e-6, atol=1e-5)
            continue
        entropy = torch.special.entr(log_p.exp()).sum(1)
        assert_close(said.exact_metrics(rows, batch.labels_N, log_q)["teacher_entropy"], entropy, rtol=1e-3, atol=1e-3)
        if name == "topk":
            exact = TopK.of(log_p.double(), 20, batch.labels_N).divergence(forward_kl, rows, log_q.double(), 2.0)
            assert_close(said.divergence(forward_kl, rows, log_q, 2.0).double(), exact, rtol=0.02, atol=1e-3)
        else:
            dense = live.divergence(forward_kl, rows, (log_q / 2).log_softmax(1), 2.0).mean()
            assert abs(said.divergence(forward_kl, rows, (log_q / 2).log_softmax(1), 2.0).mean() / dense - 1) < 0.15


@each
def test_processes_batches_and_kills_leave_the_same_files(name, tmp_path, data, teacher):
    encoded, vocab = data
    record_format = make_record_format(KINDS[name][0], vocab, teacher)
    write(tmp_path / "whole", record_format, encoded, teacher, size=len(encoded))
    for rank in (1, 0):
        writer = Writer(tmp_path / "parted", record_format, PROVENANCE, plan_of(encoded, record_format, 4000))
        assert not writer.begin()
        fill(writer, writer.left(rank, 2), encoded, teacher, size=len(encoded))
    writer.finish()
    assert same_files(tmp_path / "whole", tmp_path / "parted")
    killed = Writer(tmp_path / "killed", record_format, PROVENANCE, plan_of(encoded, record_format, 4000))
    killed.begin()
    fill(killed, [0, 2], encoded, teacher, size=len(encoded))
    with open(tmp_path / "killed/shard-00000.safetensors", "r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match=r"not complete: 2 of \d+ shards"):
        TeacherCache.open(tmp_path / "killed")
    again = Writer(tmp_path / "killed", record_format, PROVENANCE, plan_of(encoded, record_format, 4000))
    assert not again.begin() and 2 not in again.left() and 0 in again.left()
    with pytest.raises(UserError, match="lacks shard-00001"):
        again.finish()
    fill(again, again.left(), encoded, teacher, size=len(encoded))
    again.finish()
    assert same_files(tmp_path / "whole", tmp_path / "killed")


def test_an_example_that_comes_twice_is_stored_once(data):
    plan = ShardPlan.of(["0b", "0a", "0b", "0c"], [3, 1, 3, 2], 10, 30)
    assert plan.hash_E.tolist() == [11, 10, 12] and plan.first_E.tolist() == [0, 1, 3] and plan.header()["targets"] == 6
    assert plan.shards == [slice(0, 1), slice(1, 3)]
    long = ShardPlan.of(["0a", "0b", "0c"], [1, 900, 1], 10, 30)  # longer than a shard
    assert long.shards == [slice(0, 2), slice(2, 3)]


def test_a_shard_is_not_written_before_all_its_examples_are_there(tmp_path):
    record_format = TopKFormat(9, 3, 8)
    writer = Writer(tmp_path / "cache", record_format, {}, ShardPlan.of(["0a", "0b"], [1, 2], record_format.bytes))
    writer.begin()
    shard = writer.shard(0)
    shard.put(["0b"], [2], np.ones((2, record_format.bytes), np.uint8))
    with pytest.raises(ValueError, match="1 of its examples have no records"):
        shard.write()


def test_a_finished_cache_is_left_alone_and_other_answers_are_refused(made, data, teacher):
    writer, folder = made
    before = content(folder)
    again = Writer(folder, writer.format, PROVENANCE, writer.plan)
    assert again.begin()
    other = PROVENANCE | {"the teacher": {"base": "b", "adapter": "c"}}
    with pytest.raises(UserError, match=r"provenance.the teacher.adapter: a -> c\); choose another folder, or delete it"):
        Writer(folder, writer.format, other, writer.plan).begin()
    with pytest.raises(UserError, match=r"bytes_per_target: \d+ -> \d+; kind.k: 20 -> 21"):
        record_format = make_record_format(Cache(path="x", k=21), data[1])
        Writer(folder, record_format, PROVENANCE, writer.plan).begin()
    with pytest.raises(UserError, match="plan.content"):
        Writer(folder, writer.format, PROVENANCE, plan_of(data[0].subset(np.arange(len(data[0])) > 0), writer.format, 4000)).begin()
    assert content(folder) == before
    (folder / "cache.json").unlink()  # what is left has no header to compare
    other = Writer(folder, writer.format, other, writer.plan)
    assert not other.begin() and len(other.left()) == len(writer.plan.shards)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [-1, 4, 300, 5000])
def test_one_bit_that_flipped_is_noticed_and_its_file_named(made, data, teacher, at):
    writer, folder = made
    before = content(folder)
    flip(folder / "shard-00001.safetensors", at if at < len(before["shard-00001.safetensors"]) else 900)
    with pytest.raises(UserError, match=r"^teacher.cache.path: .*/shard-00001.safetensors is damaged \(.*checksum\); delete it and run"):
        TeacherCache.open(folder)
    write(folder, writer.format, data[0], teacher)
    assert content(folder) == before


def test_a_shard_that_is_changed_while_it_is_in_use_is_named(made):
    writer, folder = made
    cache, example, count = TeacherCache.open(folder), f"{writer.plan.hash_E[0]:016x}", int(writer.plan.targets_E[0])
    before = cache.read([example], [count])
    flip(folder / "shard-00000.safetensors", -1)
    with pytest.raises(ChangedFiles, match=r"^teacher.cache.path: .*/shard-00000.safetensors was changed while the run was using it"):
        cache.read([example], [count])
    flip(folder / "shard-00000.safetensors", -1)
    assert (TeacherCache.open(folder).read([example], [count]) == before).all()


def test_a_shard_that_is_missing_or_cut_is_named(made, data, teacher):
    writer, folder = made
    before = content(folder)
    last = folder / f"shard-{len(writer.plan.shards) - 1:05d}.safetensors"
    last.write_bytes(last.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{last.name} is damaged"):
        TeacherCache.open(folder)
    last.unlink()
    with pytest.raises(UserError, match=f"t.path: .*{last.name} is missing; run llmkd cache again"):
        TeacherCache.open(folder, "t.path")
    write(folder, writer.format, data[0], teacher)
    assert content(folder) == before


@pytest.mark.parametrize("key, value", [("vocab", 7), ("bytes_per_target", 7), ("provenance", {})])
def test_a_header_that_was_altered_is_noticed(made, key, value):
    _, folder = made
    header = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(header | {key: value}))
    for open_it in (lambda: TeacherCache.open(folder), lambda: made[0].begin()):
        with pytest.raises(UserError, match="cache.json is damaged"):
            open_it()
    (folder / "cache.json").write_text(json.dumps(header | {"version": 9}))
    with pytest.raises(UserError, match="version 9, expected 2"):
        TeacherCache.open(folder)
    (folder / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json is damaged"):
        TeacherCache.open(folder)


@pytest.mark.parametrize("name", ["store.json", "making.json"])
def test_a_cache_of_the_first_version_is_refused_and_left_alone(made, tmp_path, name):
    old = tmp_path / "old"
    old.mkdir()
    (old / name).write_text('{"version": 1}')
    writer = Writer(old, made[0].format, PROVENANCE, made[0].plan)
    for open_it in (lambda: TeacherCache.open(old), writer.begin):
        with pytest.raises(UserError, match="version 1, expected 2; run llmkd cache again, to another folder"):
            open_it()
    assert [path.name for path in old.iterdir()] == [name]


def test_processes_of_a_machine_share_the_checking(made, monkeypatch):
    _, folder = made
    flip(folder / "shard-00001.safetensors", -1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    TeacherCache.open(folder)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="shard-00001"):
        TeacherCache.open(folder)


def test_there_is_no_cache_and_no_such_example(tmp_path, made):
    with pytest.raises(UserError, match="there is no teacher cache at .*nowhere; llmkd cache writes one"):
        TeacherCache.open(tmp_path / "nowhere")
    writer, folder = made
    cache = TeacherCache.open(folder)
    mine, stranger = f"{writer.plan.hash_E[3]:016x}", "00000000000000ab"
    assert cache.missing([mine, stranger, mine, "f" * 16]) == [1, 3]
    with pytest.raises(UserError, match="has no record of an example .00000000000000ab"):
        cache.read([mine, stranger], [int(writer.plan.targets_E[3]), 1])
    with pytest.raises(UserError, match=r"targets of an example .* that has 77"):
        cache.read([mine], [77])


def test_it_can_be_checked_without_torch(made):
    code = f"import sys; from llmkd.teachers.cache.shards import TeacherCache; TeacherCache.open({str(made[1])!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


# Hidden states and the head


class Thin(nn.Module):
    """A Linear with a thin product beside it, as PEFT makes it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(24, 3, bias=False), nn.Linear(3, 70, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, hidden):
        return self.base(hidden) + self.b(self.a(hidden))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_is_the_same_when_it_is_read_back(tmp_path, adapted, dtype, bias):
    torch.manual_seed(0)
    project = nn.Linear(24, 70, bias=bias)
    head = Head((Thin(project) if adapted else project).to(dtype), 61, 0.5, 30.0)
    stored = StoredHead.of(head)
    (tmp_path / "head.safetensors").write_bytes(stored.content())
    back = StoredHead.read(tmp_path, stored.options()).on("cpu")
    hidden = torch.randn(9, 24).to(dtype)
    if not adapted:
        assert torch.equal(back.logits(hidden), head.logits(hidden)) and back.project.weight.dtype == dtype
    else:  # what the live model rounds to bfloat16 is not rounded here
        wide = Head(head.project.double(), 61, 0.5, 30.0).logits(hidden.double())
        assert_close(back.logits(hidden).double(), wide, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in back.project.parameters()) and back.vocab == 61


def test_the_head_of_a_model_with_an_adapter_on_it(world, data):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(world / "teacher"), LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    )
    head = head_of(model.get_base_model(), data[1])
    hidden = torch.randn(5, 24, dtype=torch.float64)
    found = effective(head, block=7)
    assert found.keys() == {"weight"} and (found["weight"] - head.project.weight[: data[1]]).abs().max() > 0.1
    assert_close(hidden @ found["weight"].T, head.logits(hidden).detach())


def test_logits_instead_of_hidden_states_cannot_be_kept_so():
    with pytest.raises(UserError, match="teacher.cache.kind: found hidden.* use topk"):
        StoredHead.of(Head(nn.Identity(), 61))


@pytest.mark.parametrize("dtype, most", [("float32", 1e-12), ("bfloat16", 1e-12), ("int8", 1e-3)])
def test_hidden_states_are_exact_and_nearly_so_in_8_bits(world, data, tmp_path, dtype, most):
    encoded, vocab = data
    model = load_teacher(Teacher(model=str(world / "adapter"), dtype="float32" if dtype == "int8" else dtype), LoadContext(vocab, "cpu"))
    settings = Cache(path="x", kind="hidden", hidden_dtype="int8" if dtype == "int8" else None)
    record_format = make_record_format(settings, vocab, model)
    assert record_format.dtype == dtype and record_format.bytes == {"float32": 96, "bfloat16": 48, "int8": 28}[dtype]
    write(tmp_path / "cache", record_format, encoded, model, size=3)
    batch = collate(encoded, [4, 9, 1], 0)  # as the live one is asked: products of another shape round in another way
    live, said = LiveTeacher(model)(batch), CachedTeacher(TeacherCache.open(tmp_path / "cache"), "cpu")(batch)
    direct = record_format.signal(torch.from_numpy(record_format.record(live, batch.labels_N, batch.examples)), "cpu")
    p, found = live.log_probs(slice(None)), direct.log_probs(slice(None))
    assert forward_kl(found.double().log_softmax(1), p.double().log_softmax(1)).max() <= most
    if dtype != "int8":
        assert torch.equal(found, p)
    else:  # half a step of 127ths of the largest entry
        gap_NH = (direct.hidden_NH - live.hidden_NH).abs()
        assert (gap_NH <= 0.51 / 127 * live.hidden_NH.abs().amax(1, True)).all()
    assert_close(said.log_probs(slice(None)), p, rtol=0, atol=1e-5 if dtype == "float32" else 0.2)
    flip(tmp_path / "cache/head.safetensors", -2)
    with pytest.raises(UserError, match=r"head.safetensors is damaged"):
        TeacherCache.open(tmp_path / "cache")


def test_an_answer_that_is_not_a_number_is_not_kept():
    hidden = torch.randn(3, 4)
    hidden[1, 2] = float("nan")
    signal = Dense(hidden, Head(nn.Linear(4, 9), 9))
    for record_format in (TopKFormat(9, 3, 8), HiddenFormat(9, 4, "float32", StoredHead.of(signal.head))):
        with pytest.raises(UserError, match="its output at a target is NaN"):
            record_format.record(signal, torch.zeros(3, dtype=torch.long), [])


@pytest.mark.parametrize("settings", [*(settings for settings, _ in KINDS.values()), Cache(path="x", kind="hidden", hidden_dtype="int8")])
def test_a_process_that_has_no_example_reads_nothing(settings, tmp_path, data, teacher):
    """The last window of an epoch may leave a process without any."""
    encoded, vocab = data
    write(tmp_path / "cache", make_record_format(settings, vocab, teacher), encoded, teacher)
    batch = collate(encoded, [], 0)
    said = CachedTeacher(TeacherCache.open(tmp_path / "cache"), "cpu")(batch)
    assert said.label_log_probs(slice(0, 0), batch.labels_N).shape == (0,)
