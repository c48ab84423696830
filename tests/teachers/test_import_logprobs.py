"""Top-k log-probabilities from elsewhere: three spellings of one thing, and everything that can be wrong with them."""

import json
import math
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.config.recipe import Data
from llmkd.data.collate import collate
from llmkd.errors import UserError
from llmkd.losses.divergences import forward_kl
from llmkd.teachers.cache import import_logprobs as foreign
from llmkd.teachers.cache.shards import ShardPlan, TeacherCache, Writer
from llmkd.teachers.cached import CachedTeacher
from llmkd.teachers.sparse import TopK
from tests.kit.data import PLAIN, encode, rows_of, skills_tokenizer, talk, tiny

K = 6


class World:
    """Examples, what a teacher says of every position, and files that tell of it."""

    def __init__(self, folder, tokenizer=None, rows=None):
        self.folder, self.tokenizer = folder, tokenizer or tiny(PLAIN)
        rows = rows or rows_of(talk("u the owl", "a flies at night"), talk("u the wren", "a is in the garden"), talk("u who", "a nobody"))
        self.encoded = encode(rows, "chat", Data(train=None, max_length=500), self.tokenizer)
        self.vocab = len(self.tokenizer)
        generator = torch.Generator().manual_seed(0)
        self.log_p = [(3 * torch.randn(len(self.ids(i)), self.vocab, generator=generator)).log_softmax(1) for i in range(len(self.encoded))]

    def ids(self, i):
        return self.encoded.example(i)[0].tolist()

    def places(self, i):
        return np.flatnonzero(self.encoded.example(i)[1]).tolist()

    def top(self, i, t, extra=()):
        values, ids = self.log_p[i][t].topk(K)
        return {int(a): float(b) for a, b in zip([*ids, *extra], [*values, *self.log_p[i][t][list(extra)]], strict=True)}

    def ours(self, i):
        places = self.places(i)
        return {"labels": [self.ids(i)[t] for t in places], "top": [[*map(list, self.top(i, t).items())] for t in places]}

    def vllm(self, i):
        ids = self.ids(i)
        told = [None, *({str(a): {"logprob": b, "rank": 1} for a, b in self.top(i, t, [ids[t]]).items()} for t in range(1, len(ids)))]
        return {"prompt_token_ids": [*ids, 5], "prompt_logprobs": [*told, {}]}

    def openai(self, i, leave=0):
        texts = foreign.AnswersReader(None, self.encoded, self.tokenizer, foreign.make_format(self.vocab, K, 16)).token_strings()
        content = []
        for t in self.places(i)[: -leave or None]:
            label, top = self.ids(i)[t], self.top(i, t)
            told = [{"token": texts[a], "logprob": b} for a, b in top.items()]
            content.append({"token": texts[label], "logprob": float(self.log_p[i][t][label]), "top_logprobs": told})
        return {"logprobs": {"content": content}}

    def all(self, spelling):
        return [getattr(self, spelling)(i) for i in range(len(self.encoded))]

    def write(self, lines, k=K + 1, name="cache"):
        path = self.folder / "answers.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        record_format = foreign.make_format(self.vocab, k, 16)
        identities = [self.encoded.content_hash(i) for i in range(len(self.encoded))]
        targets = [len(self.places(i)) for i in range(len(self.encoded))]
        writer = Writer(self.folder / name, record_format, {}, ShardPlan.of(identities, targets, record_format.bytes, 300))
        self.counts = foreign.write(path, self.encoded, self.tokenizer, writer)
        return CachedTeacher(TeacherCache.open(self.folder / name), "cpu")

    def refused(self, lines):
        with pytest.raises(UserError) as info:
            self.write(lines)
        assert not (self.folder / "cache").exists()
        return [problem.replace(f"{self.folder}/", "") for problem in info.value.problems]


@pytest.fixture
def small(tmp_path):
    return World(tmp_path)


def entries(signal):
    """Target by target what is kept, as {id: log-probability}."""
    pairs = zip(signal.ids_NK.tolist(), signal.events(slice(None))[:, :-1].tolist(), strict=True)
    return [{a: b for a, b in zip(*pair, strict=True) if b > -math.inf} for pair in pairs]


@pytest.mark.parametrize("spelling", ["ours", "vllm", "openai"])
def test_each_spelling_says_what_the_teacher_said(small, spelling):
    cached = small.write(small.all(spelling))
    batch = collate(small.encoded, [2, 0, 1], 0)
    signal = cached(batch)
    wanted = [(i, t) for i in (2, 0, 1) for t in small.places(i)]
    assert len(wanted) == batch.num_targets and isinstance(signal, TopK)
    label_log_p = signal.label_log_probs(slice(None), batch.labels_N).tolist()
    for (i, t), found, label in zip(wanted, entries(signal), label_log_p, strict=True):
        expected = small.top(i, t, [] if spelling == "ours" else [small.ids(i)[t]])
        if spelling == "openai":  # bytes that are no character have no string of their own
            assert found.keys() <= expected.keys() and small.ids(i)[t] in found
        else:
            assert found.keys() == expected.keys()
        assert all(abs(found[a] - expected[a]) < 0.01 for a in found)
        if small.ids(i)[t] not in expected:  # then as likely as any other of the rest
            assert abs(label - math.log((1 - sum(map(math.exp, expected.values()))) / (small.vocab - K))) < 0.02
        else:
            assert abs(label - float(small.log_p[i][t][small.ids(i)[t]])) < 0.01
    assert (small.counts["unknown_tokens"] > 0) == (spelling == "openai") and not small.counts["unknown_targets"]
    log_q = torch.randn(batch.num_targets, small.vocab).log_softmax(1)
    dense = forward_kl(log_q, torch.cat([small.log_p[i][t][None] for i, t in wanted]))
    found = signal.divergence(forward_kl, slice(None), log_q)
    assert (found <= dense + 0.02).all() and (found > 0).all()
    assert signal.exact_metrics(slice(None), batch.labels_N, log_q).keys() == {"top1_agreement", "teacher_ce"}


def test_more_than_are_kept_join_the_rest_and_fewer_leave_room(small):
    few = small.write(small.all("ours"), 3)(collate(small.encoded, [0], 0))
    assert [len(entry) for entry in entries(few)] == [3] * len(small.places(0))
    top = sorted(small.top(0, small.places(0)[0]).values())[-3:]
    assert_close(few.tail_NS[0, 0].exp().item(), 1 - sum(math.exp(x) for x in top), rtol=1e-2, atol=1e-3)
    room = small.write(small.all("ours"), 20, "other")(collate(small.encoded, [0], 0))
    assert [len(entry) for entry in entries(room)] == [K] * len(small.places(0))
    assert (room.ids_NK.diff(dim=1) > 0).all()
    log_q = torch.randn(len(room.ids_NK), small.vocab).log_softmax(1)
    whole = room.log_probs(slice(None), log_q)
    assert_close(whole.logsumexp(1), torch.zeros(len(whole)), atol=1e-5, rtol=0)
    assert_close(forward_kl(log_q, whole), room.divergence(forward_kl, slice(None), log_q), atol=1e-5, rtol=1e-4)


def test_rows_may_be_named_and_those_without_an_example_are_counted(small):
    lines = small.all("ours")
    a = small.write([line | {"row": i + 1} for i, line in reversed(list(enumerate(lines)))] + [lines[0] | {"row": 99}])
    assert small.counts["unused"] == 1
    b = small.write(["", *lines], name="other")
    batch = collate(small.encoded, [0, 1, 2], 0)
    assert torch.equal(a(batch).log_p_NK, b(batch).log_p_NK)


def test_a_last_target_without_an_entry_adds_nothing(small):
    lines = small.all("openai")
    lines[1] = small.openai(1, leave=1)
    signal = small.write(lines)(batch := collate(small.encoded, [1], 0))
    assert small.counts["unknown_targets"] == 1 and entries(signal)[-1] == {}
    log_q = torch.randn(batch.num_targets, small.vocab).log_softmax(1)
    value = signal.divergence(forward_kl, slice(None), log_q, 1.0)
    assert value[-1].abs() < 1e-6 and (value[:-1] > 0.01).all()
    ours = small.all("ours")
    ours[1]["top"][-1] = []
    ours[0]["top"].pop()
    small.write(ours, name="other")
    assert small.counts["unknown_targets"] == 2


def test_the_api_puts_it_into_choices(small):
    small.write([{"id": "x", "choices": [line]} for line in small.all("openai")])


def test_strings_that_begin_with_a_space_in_another_kind_of_tokenizer(tmp_path):
    world = World(tmp_path, skills_tokenizer())
    world.write(world.all("openai"))
    reader = foreign.AnswersReader(None, world.encoded, world.tokenizer, foreign.make_format(world.vocab, K, 8))
    assert len(reader.token_strings()) == world.vocab and len(reader.ids_of_strings) > world.vocab / 2


def change(line, *path, to):
    inner = line
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to


WRONG = [
    ("ours", ("labels", 1), 3, r"answers.jsonl:2: target 2 is 3 .* here, and \d+ .* in the example"),
    ("ours", ("labels",), [], r":2: has 0 targets, and the example \d+; it was made with another text"),
    ("ours", ("top", 0), [], r":2: target 1 .* has no log-probabilities"),
    ("ours", ("top", 0), [[5, 0.3]], r":2: target 1: found 0.3 for token 5 .*, expected a log-probability"),
    ("ours", ("top", 0), [[5, math.nan]], "found nan"),
    ("ours", ("top", 0), [[5, "x"]], "found 'x'"),
    ("ours", ("top", 0), [[5, -0.1], [6, -0.2]], r"sum to 1.7236, more than 1"),
    ("ours", ("top", 0), [[5, -1], [5, -2]], "names a token twice"),
    ("ours", ("top", 0), [[99999, -1]], "token 99999 is not one of the vocabulary's"),
    ("ours", ("top", 0), 7, "expected a list of"),
    ("ours", ("top",), None, "expected lists as labels and top"),
    ("ours", ("row",), "x", "row: found 'x'"),
    ("ours", ("row",), 1, "row 1 is also in answers.jsonl:1; remove one of them"),
    ("vllm", ("prompt_token_ids", 4), 3, r":2: token 5 is 3 .* here, and \d+ "),
    ("vllm", ("prompt_logprobs",), [None], "expected lists of one length"),
    ("vllm", ("prompt_logprobs", -3), {"a": 1}, 'prompt_logprobs: expected {"id"'),
    ("vllm", ("prompt_logprobs", -3), {"3": -0.1}, r":2: prompt_logprobs: target \d+ .* is not in its own list"),
    ("openai", ("logprobs", "content", 0, "token"), "zebra", r":2: target 1 is 'zebra' here, and \d+ .* in the example"),
    ("openai", ("logprobs", "content"), None, "logprobs.content: expected token"),
    ("openai", ("logprobs", "content"), [], r"has 0 targets, and the example \d+"),
    ("openai", ("logprobs",), None, "found neither top, prompt_logprobs nor logprobs.content"),
]


@pytest.mark.parametrize("spelling, path, to, said", WRONG)
def test_what_is_wrong_is_named_with_its_line_and_nothing_is_written(small, spelling, path, to, said):
    lines = small.all(spelling)
    change(lines[1], *path, to=to)
    (problem, *more) = small.refused(lines)
    assert re.search(said, problem) and not more


def test_lines_that_are_too_few_too_many_or_no_json(small):
    lines = small.all("ours")
    assert small.refused(lines[:2]) == ["answers.jsonl: has lines for 2 of 3 examples; the first one missing is that of row 3; add them"]
    assert "there are 3 examples, and this is line 4" in small.refused([*lines, lines[0]])[0]
    assert "answers.jsonl:2: is not JSON" in small.refused([lines[0], "{", lines[2]])[0]
    assert "expected an object" in small.refused([lines[0], "[]", lines[2]])[0]
    assert len(small.refused([lines[1], lines[0], lines[2]])) == 2


def test_probabilities_of_zero_are_part_of_the_rest(small):
    lines = small.all("ours")
    lines[0]["top"][0] = [[5, -0.5], [6, -9999.0], [7, -math.inf]]
    signal = small.write(lines)(collate(small.encoded, [0], 0))
    assert entries(signal)[0].keys() == {5} and abs(entries(signal)[0][5] + 0.5) < 1e-3
