"""A teacher on a server: its signal against the live model's, what it asks and when, and what is noticed before anything is trained."""

import math
import threading
import time

import numpy as np
import pytest
import torch

from llmkd.config.recipe import Data, Teacher
from llmkd.data.collate import collate
from llmkd.data.encoding.tokenizer import load_tokenizer
from llmkd.errors import Stopped, UserError
from llmkd.losses.divergences import DIVERGENCES, make_divergence
from llmkd.servers import client
from llmkd.servers.client import ServerFailed
from llmkd.teachers import connect, listed
from llmkd.teachers.connect import check_served, open_served
from llmkd.teachers.resolve import TeacherSource, with_answers
from llmkd.teachers.served import texts_of
from llmkd.teachers.sparse import TopK
from tests.kit.data import encode, rows_of

K = 12


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.02)
    monkeypatch.setattr(connect, "PROBED", 3)


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(str(world / "student"), "student.model")


@pytest.fixture(scope="module")
def examples(tokenizer):
    rows = [{"instruction": f"Say {i}", "output": " ".join(["Yes."] * (1 + i % 4) + ["owl"] * (i % 3))} for i in range(12)]
    return encode(rows_of(*rows), "alpaca", Data(train=None, max_length=256), tokenizer)


@pytest.fixture
def served(server, tokenizer, tmp_path):
    """Opens the teacher of a server, with settings."""

    def go(name: str = "answers", stop=lambda: False, **settings):
        one = Teacher(**({"server": server.url, "model": "adapter", "top_k": K, "patience": 0.0} | settings))
        source = with_answers(TeacherSource("teacher", one, None, None), Data(train=None, cache_dir=str(tmp_path / name)), tokenizer, 640)
        assert source.part == f"top {one.top_k} tokens"
        return open_served([source], "cpu", 640, stop)["teacher"]

    return go


def live_of(distributions, examples, indices) -> TopK:
    log_p_NV, labels = [], []
    for i in indices:
        ids, marks = examples.example(i)
        places = np.flatnonzero(marks)
        log_p_NV.append(distributions["adapter"](ids.tolist())[places - 1])
        labels.append(torch.from_numpy(ids[places].astype(np.int64)))
    return TopK.of(torch.cat(log_p_NV), K, torch.cat(labels))


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", [(False, False), (True, False), (True, True)])
def test_the_signal_is_the_live_models_top_k_whatever_the_batchs_layout(served, examples, distributions, api, layout):
    indices = [4, 1, 7]
    batch, teacher = collate(examples, indices, 0, *layout), served(api=api)
    live = live_of(distributions, examples, indices)
    told = [teacher.ask(*text) for text in texts_of(batch)]
    exact = [listed.top_k(one.ids_NM, one.log_p_NM, one.label_log_p_N, K, 640) for one in told]
    for name in ("ids_NK", "log_p_NK", "label_log_p_N"):
        assert (torch.cat([getattr(one, name) for one in exact]) - getattr(live, name)).abs().max() < 1e-6
    log_q_NV = torch.randn(batch.num_targets, 640, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    for name in DIVERGENCES:
        divergence = make_divergence(name)
        found = torch.cat(
            [
                one.divergence(divergence, slice(None), part)
                for one, part in zip(exact, log_q_NV.split([len(one.ids_NK) for one in exact]), strict=True)
            ]
        )
        assert (found - live.divergence(divergence, slice(None), log_q_NV)).abs().max() < 1e-6, name
    kept = teacher(batch)  # and as it is kept, in 8 bits and halves
    assert torch.equal(kept.ids_NK, live.ids_NK) and (kept.events(slice(None)) - live.events(slice(None))).abs().max() < 0.06
    metrics = kept.exact_metrics(slice(None), batch.labels_N, log_q_NV)
    assert (metrics["teacher_ce"] + live.label_log_p_N).abs().max() < 0.01 and "teacher_entropy" not in metrics


def test_a_teacher_with_a_context_is_asked_with_it(served, server, tokenizer):
    rows = [{"instruction": "Say 1", "output": "Yes. It is so.", "teacher_context": "Be short."}]
    data = encode(rows_of(*rows), "alpaca", Data(train=None, max_length=256), tokenizer)
    batch = collate(data, [0], 0)
    served()(batch)
    theirs, marks = data.teacher_view.example(0)
    assert server.asked[0]["prompt"] == theirs[: np.flatnonzero(marks)[-1] + 1].tolist() and len(theirs) > len(data.example(0)[0])


def test_nothing_is_asked_twice_by_this_process_or_a_later_one(served, server, examples):
    teacher = served()
    first = teacher(collate(examples, [0, 1, 2], 0))
    again = teacher(collate(examples, [2, 0], 0))
    assert len(server.asked) == 3
    server.stop()  # the later one needs no server
    later = served()(collate(examples, [0, 1, 2], 0))
    assert torch.equal(first.log_p_NK, later.log_p_NK) and torch.equal(first.tail_NS, later.tail_NS)
    counts = examples.num_targets
    assert torch.equal(again.log_p_NK[counts[2] :], first.log_p_NK[: counts[0]])


def test_what_is_expected_is_asked_at_once_and_several_at_one_time(served, server, examples):
    gate = threading.Barrier(3, timeout=5)

    def misbehave(answer, number):
        gate.wait()  # passes when three are asked at one time
        return answer

    server.misbehave = misbehave
    teacher, batch = served(requests=3), collate(examples, [0, 1, 2], 0)
    teacher.expect(batch)
    teacher.expect(batch)  # they are asked already
    deadline = time.monotonic() + 10
    while len(teacher.answers) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(teacher.answers) == 3 and len(server.asked) == 3
    server.misbehave = lambda answer, number: answer
    assert teacher(batch).ids_NK.shape == (batch.num_targets, K)


def test_no_more_requests_at_one_time_than_asked_for(served, server, examples):
    server.misbehave = lambda answer, number: time.sleep(0.03) or answer
    served(requests=2)(collate(examples, list(range(8)), 0))
    assert server.most_at_once <= 2 and len(server.asked) == 8


def test_a_restart_of_the_server_in_the_middle_is_survived(served, server, examples):
    teacher = served(patience=20.0)
    before = teacher(collate(examples, [0], 0))
    server.stop()
    threading.Timer(0.3, server.start).start()
    after = teacher(collate(examples, [0, 5], 0))
    assert torch.equal(after.log_p_NK[: len(before.log_p_NK)], before.log_p_NK)


def test_a_server_that_stays_away_ends_the_run_with_one_line(served, server, examples):
    teacher = served()
    teacher(collate(examples, [0], 0))
    server.stop()
    with pytest.raises(ServerFailed, match="refuses the connection") as info:
        teacher(collate(examples, [1], 0))
    assert info.value.exit_code == 1 and "\n" not in str(info.value)


def test_a_run_that_is_asked_to_stop_waits_for_no_server(served, server, examples, monkeypatch):
    monkeypatch.setattr("llmkd.teachers.served._PATIENT_AFTER_A_SIGNAL", 0.1)
    server.stop()
    started = time.monotonic()
    with pytest.raises(Stopped):
        served(patience=60.0, stop=lambda: time.monotonic() > started + 0.2)(collate(examples, [0], 0))
    assert time.monotonic() - started < 5


def test_a_wrong_answer_ends_the_run_and_is_not_kept(served, server, examples):
    server.misbehave = lambda answer, number: {**answer, "choices": [answer["choices"][0] | {"prompt_token_ids": [1, 2]}]}
    teacher = served()
    with pytest.raises(UserError, match=r"^teacher.server: http://\S+ read the token 1 at place 1, and ") as info:
        teacher(collate(examples, [0], 0))
    assert info.value.exit_code == 2 and not len(teacher.answers)


# ---- before the first step


def checked(teacher, examples, tokenizer) -> str:
    with pytest.raises(UserError) as info:
        check_served(teacher, examples, None, tokenizer)
    return str(info.value).replace(teacher.interface.server.address, "URL")


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_right_server_is_asked_for_few_examples_that_are_kept(served, server, examples, tokenizer, api, caplog):
    teacher = served(api=api)
    with caplog.at_level("INFO", "llmkd"):
        check_served(teacher, examples, None, tokenizer)
    assert len(server.asked) == 4 and len(teacher.answers) == 3  # three, and one of them at the base
    told = -np.concatenate(
        [
            teacher.answers.format.signal(torch.from_numpy(teacher.answers.read([one], [n])), "cpu").label_log_p_N.numpy()
            for one, n in kept(teacher, examples)
        ]
    )
    assert f"serves adapter, with a CE of {told.mean():.2f}"[:-1] in caplog.text and "no better than a guess" in caplog.text
    check_served(teacher, examples, None, tokenizer)
    assert len(teacher.answers) == 6


def kept(teacher, examples):
    hashes = [examples.content_hash(i) for i in range(len(examples))]
    lacking = set(teacher.answers.missing(hashes))
    return [(hashes[i], int(examples.num_targets[i])) for i in range(len(hashes)) if i not in lacking]


def test_where_all_answers_are_kept_no_server_is_asked(served, server, examples, tokenizer):
    teacher = served()
    teacher(collate(examples, list(range(len(examples))), 0))
    server.stop()
    check_served(served(), examples, None, tokenizer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "adapters"}, "teacher.model: found adapters, and URL serves: base, adapter; did you mean adapter?"),
        ({"model": "x"}, "serves: base, adapter; name one of them, or serve it"),
        ({"server": "http://127.0.0.1:9"}, "teacher.server: URL refuses the connection; start it, or correct the address"),
    ],
)
def test_a_server_or_a_model_that_is_not_there(served, examples, tokenizer, settings, said):
    assert said in checked(served(**settings), examples, tokenizer)


def test_without_a_name_the_only_whole_model_is_meant(served, server, examples, tokenizer):
    check_served(served(model=None), examples, None, tokenizer)
    assert {one["model"] for one in server.asked} == {"base"}
    server.parents = {}
    assert "not given, and URL serves several models; name one of: base, adapter" in checked(served("b", model=None), examples, tokenizer)


def test_an_adapter_that_answers_as_its_base(served, server, examples, tokenizer, distributions):
    server.models = {"base": distributions["base"], "adapter": distributions["base"]}
    assert "answers for adapter as for its base base, so the adapter changes nothing" in checked(served(), examples, tokenizer)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_server_with_another_tokenizer(served, server, examples, tokenizer, api):
    own, server.decode = server.decode, lambda token: own((token * 7) % 640)
    assert "has another tokenizer: token " in checked(served(api=api), examples, tokenizer)
    server.decode = lambda token: ""  # a server that says nothing of it
    check_served(served(api=api), examples, None, tokenizer)


def test_other_weights_under_the_same_name(served, server, examples, tokenizer, distributions):
    check_served(served(), examples, None, tokenizer)
    server.models, server.parents = {"base": distributions["base"], "adapter": distributions["base"]}, {}
    assert "serves other weights under this name than those that answered before" in checked(served(), examples, tokenizer)
    noise = lambda ids: distributions["adapter"](ids) + 0.01  # noqa: E731
    server.models = {"adapter": noise}
    check_served(served(), examples, None, tokenizer)


def test_a_server_that_is_too_short_and_one_that_gives_too_few_tokens(served, server, examples, tokenizer):
    longest = max(int(np.flatnonzero(examples.example(i)[1])[-1]) + 1 for i in range(len(examples)))
    server.positions = longest
    line = checked(served(), examples, tokenizer)
    assert f"serves adapter for {longest} tokens, and the longest example has {longest} and needs one more" in line and not server.asked
    server.positions, server.max_logprobs = longest + 1, 5
    assert checked(served(), examples, tokenizer) == (
        f"teacher.top_k: found {K}, and the server gives at most 5 tokens; start it with --max-logprobs {K}, or lower top_k"
    )


def test_a_server_with_a_key(served, server, examples, tokenizer, monkeypatch):
    server.key = "sk-of-the-tests"
    assert "name the environment variable that holds the key as teacher.api_key_env" in checked(served(), examples, tokenizer)
    monkeypatch.setenv("OF_TESTS", "sk-of-the-tests")
    check_served(served(api_key_env="OF_TESTS"), examples, None, tokenizer)


def test_at_another_temperature_the_tail_is_that_of_an_imported_cache(served, examples):
    """Only f(0), the number of tail tokens, and f(1), the tail's mass, are known: at T = 1/s a line between them, by hand."""
    signal = served()(collate(examples, [3], 0))
    found = signal.events(slice(None), 2.0)
    for n in range(len(found)):
        log_p, tail = signal.log_p_NK[n].double(), signal.tail_NS[n, 0].item()
        parts = [*(log_p * 0.5).tolist(), 0.5 * math.log(640 - K) + 0.5 * tail]
        total = math.log(math.fsum(map(math.exp, parts)))
        assert max(abs(a - (b - total)) for a, b in zip(found[n].tolist(), parts, strict=True)) < 1e-4
