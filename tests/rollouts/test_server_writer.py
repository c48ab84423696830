"""A server that writes: its greedy text is that of the model in this process; what it is asked for, and what it may not answer."""

import json

import pytest

from llmkd.commands.roll import roll
from llmkd.errors import Stopped, UserError
from llmkd.rollouts.sampling import Sampling
from llmkd.rollouts.server_writer import ServerWriter
from llmkd.servers import client
from llmkd.servers.client import Server
from llmkd.servers.logprobs import ServedModel

END = 1


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.02)


def writer(server, patience: float = 0.0, positions: int | None = None, stop=lambda: False) -> ServerWriter:
    model = ServedModel("adapter", "base", positions)
    return ServerWriter(Server(server.url, "teacher.server", patience=patience), model, "teacher", {END}, 640, 3, stop)


def rows(path) -> dict:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {json.dumps(row["input_ids"]): (row["loss_mask"], row["finished"]) for row in found}


def test_a_served_teacher_rolls_what_the_same_teacher_rolls_here(make_recipe, server, tmp_path, capsys):
    roll("teacher", make_recipe(), tmp_path / "here.jsonl", Sampling(0.0, 5), limit=6)
    recipe = make_recipe(teacher={"server": server.url, "model": "adapter"})
    server.misbehave = lambda answer, number: 503 if number == 2 else answer
    found = roll("teacher", recipe, tmp_path / "there.jsonl", Sampling(0.0, 5), limit=6)
    assert rows(tmp_path / "here.jsonl") == rows(tmp_path / "there.jsonl") and found["new"] == 6
    assert roll("teacher", recipe, tmp_path / "there.jsonl", Sampling(0.0, 5), limit=6)["new"] == 0 and len(server.asked) == 7
    with pytest.raises(UserError, match="--to"):
        roll("teacher", make_recipe(teacher={"server": server.url, "model": "base"}), tmp_path / "there.jsonl", Sampling(0.0, 5), limit=6)
    with pytest.raises(UserError, match=r"roll: teacher.api: found sglang, and text is written by vLLM servers only"):
        roll("teacher", make_recipe(teacher={"server": server.url, "api": "sglang"}), tmp_path / "x.jsonl", Sampling(0.0, 5))


def test_the_request_holds_the_sampling_and_nothing_of_the_models_own(server):
    first = writer(server).write([[5, 9, 70]], [(1 << 64) - 2], Sampling(0.7, 4, 6, 0.9, 12, 0.05))
    (asked,) = server.asked
    wanted = {"temperature": 0.7, "max_tokens": 4, "top_p": 0.9, "top_k": 12, "min_p": 0.05, "seed": (1 << 63) - 2 ^ 6}
    assert wanted.items() <= asked.items() and asked["prompt"] == [5, 9, 70] and asked["stop_token_ids"] == [END]
    assert {asked["repetition_penalty"], asked["presence_penalty"], asked["frequency_penalty"]} == {1.0, 0.0}
    again = writer(server).write([[8, 8], [5, 9, 70]], [3, (1 << 64) - 2], Sampling(0.7, 4, 6, 0.9, 12, 0.05))
    assert again[1] == first[0] and writer(server).write([[5, 9, 70]], [4], Sampling(0.7, 4))[0] != first[0]
    assert len(first[0].ids) <= 4 and "top_k" in asked and server.asked[-1]["top_k"] == -1


def test_a_text_stays_within_the_models_positions(server):
    (short, none) = writer(server, positions=5).write([[5, 9, 70], [5] * 5], [1, 2], Sampling(0.0, 9))
    assert len(short.ids) <= 2 and (none.ids, none.finished) == ((), False) and len(server.asked) == 1


def answered(server, **changes):
    server.misbehave = lambda answer, number: {**answer, "choices": [answer["choices"][0] | changes]}
    return writer(server).write([[5, 9, 70]], [1], Sampling(0.0, 3))[0]


@pytest.mark.parametrize(
    ("changes", "ids", "finished"),
    [
        ({"token_ids": [7, 8], "finish_reason": "length", "stop_reason": None}, (7, 8), False),
        ({"token_ids": [7, END], "finish_reason": "stop", "stop_reason": None}, (7, END), True),  # at the tokenizer's own end
        ({"token_ids": [7, 33], "finish_reason": "stop", "stop_reason": 33}, (7, 33), True),  # at an end of the model's generation config
        ({"token_ids": [7], "finish_reason": "stop", "stop_reason": END}, (7, END), True),  # an end token that is left out of the answer
    ],
)
def test_how_a_text_ended(server, changes, ids, finished):
    found = answered(server, **changes)
    assert (found.ids, found.finished) == (ids, finished)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": None}, "returns no token ids"),
        ({"token_ids": ["a"]}, "returns no token ids"),
        ({"prompt_token_ids": [5, 9, 71]}, "read the token 71 at place 3, and 70 was asked"),
        ({"prompt_token_ids": [5, 9]}, "read 2 tokens, and 3 were asked"),
        ({"token_ids": [7], "finish_reason": "abort"}, "for the reason 'abort'"),
        ({"token_ids": [7], "finish_reason": "stop", "stop_reason": "###"}, "ended a text with token 7, which is no end token"),
        ({"token_ids": [7, 8, 9, 7], "finish_reason": "length"}, "wrote 4 tokens, and 3 were asked for at most"),
        ({"token_ids": [7, 640], "finish_reason": "length"}, "wrote token 640, but the student's vocabulary has 640 entries"),
    ],
)
def test_what_is_no_right_answer_is_said(server, changes, said):
    with pytest.raises(UserError, match="teacher.server: http") as info:
        answered(server, **changes)
    assert said in str(info.value)


def test_a_command_that_is_asked_to_stop_waits_for_no_server(server):
    server.stop()
    with pytest.raises(Stopped, match="the same command goes on"):
        writer(server, patience=60.0, stop=lambda: True).write([[5, 9]], [1], Sampling(0.0, 3))
