"""What vLLM and SGLang say of a text, read and checked: against the models' own log-probabilities, and with everything that can be wrong."""

import copy
import json
import math

import numpy as np
import pytest

from llmkd.servers.client import Refused, Server
from llmkd.servers.logprobs import VLLM, ServedModel, SGLang, WrongAnswer, explain

ADAPTER, BASE = ServedModel("adapter", "base"), ServedModel("base")
IDS, PLACES, K = [5, 9, 70, 31, 12, 40, 8], [3, 4, 6], 7


@pytest.fixture(params=[VLLM, SGLang])
def interface(request, server):
    return request.param(Server(server.url, "teacher.server", patience=0), 640)


def changed(server, change) -> None:
    """Let the server's answers be changed by `change(answer)`, which may return another one."""

    def misbehave(answer, number):
        answer = copy.deepcopy(answer)
        return change(answer) or answer

    server.misbehave = misbehave


@pytest.mark.parametrize("model", [ADAPTER, BASE])
def test_both_interfaces_give_what_the_model_says(interface, model, distributions):
    log_p_TV = distributions[model.name](IDS).numpy()
    told = interface.ask(model, IDS, PLACES, K)
    for n, place in enumerate(PLACES):
        row = log_p_TV[place - 1]
        wanted = set(sorted(range(len(row)), key=lambda i: -row[i])[:K])
        listed = {int(a): b for a, b in zip(told.ids_NM[n], told.log_p_NM[n], strict=True) if a >= 0}
        assert wanted <= listed.keys() <= wanted | {IDS[place]}
        assert all(abs(listed[a] - row[a]) < 1e-12 for a in listed)
        assert abs(told.label_log_p_N[n] - row[IDS[place]]) < 1e-12


def test_the_tokens_own_texts_are_read_where_they_are_asked_for(interface, server):
    assert interface.ask(BASE, IDS, PLACES, K).strings == {}
    told = interface.ask(BASE, IDS, PLACES, K, strings=True).strings
    assert {token: text for token, text in told.items() if token in (31, 12, 8)} == {
        i: server.decode(i) for i in (31, 12, 8) if server.decode(i)
    }


def test_the_request_asks_for_the_very_ids_and_for_no_sampling(server):
    VLLM(Server(server.url, "s"), 640).ask(BASE, IDS, PLACES, K)
    SGLang(Server(server.url, "s"), 640).ask(ADAPTER, IDS, PLACES, K)
    vllm, sglang = server.asked
    assert vllm["prompt"] == sglang["input_ids"] == IDS and vllm["prompt_logprobs"] == sglang["top_logprobs_num"] == K
    assert (vllm["temperature"], vllm["top_p"], vllm["max_tokens"], vllm["add_special_tokens"]) == (1, 1, 1, False)
    assert sglang["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0}
    assert (sglang["logprob_start_len"], sglang["lora_path"]) == (2, "adapter")


def test_the_models_are_listed_with_base_and_length(interface):
    assert [(m.name, m.parent, m.positions) for m in interface.models()] == [("base", None, 4096), ("adapter", "base", 4096)]


def test_the_last_id_of_a_vocabulary_is_said_as_0_by_sglang(server, distributions):
    last = distributions["base"]([1]).shape[1] - 1
    ids = [5, 9, last, 7, 8]
    told = SGLang(Server(server.url, "s"), last + 1).ask(BASE, ids, [2, 4], K)
    assert abs(told.label_log_p_N[0] - float(distributions["base"](ids)[1, last])) < 1e-12
    with pytest.raises(WrongAnswer, match=f"read the token 0 at place 3, and {last} was asked"):
        SGLang(Server(server.url, "s"), last + 2).ask(BASE, ids, [2, 4], K)


def _choice(answer):
    return answer["choices"][0]


def _meta(answer):
    return answer["meta_info"]


def _shift(answer):
    _choice(answer)["prompt_logprobs"] = _choice(answer)["prompt_logprobs"][1:] + [{"1": {"logprob": -0.1}}]


def _too_much(answer):
    places = _choice(answer)["prompt_logprobs"]
    places[4] = {a: {"logprob": -0.1} for a in places[4]}


VLLM_WRONG = {
    "cuts texts": lambda a: _choice(a).update(prompt_token_ids=IDS[:-1]),
    "read the token 3 at place 3, and 70 was asked": lambda a: _choice(a)["prompt_token_ids"].__setitem__(2, 3),
    "tells of 6 tokens, and 7 were asked": lambda a: _choice(a)["prompt_logprobs"].pop() and None,
    "answers as 'base', and 'adapter' was asked": lambda a: a.update(model="base"),
    "gives no choices": lambda a: {"object": "error"},
    "gives no prompt_logprobs": lambda a: _choice(a).pop("prompt_logprobs") and None,
    "does not list the text's own token": _shift,
    "lists 3 tokens at a place, and 7 were asked": lambda a: _choice(a)["prompt_logprobs"].__setitem__(
        3, {str(i): {"logprob": -3.0} for i in (31, 1, 2)}
    ),
    "the probabilities sum to": _too_much,
    "no log-probabilities of one distribution": lambda a: _choice(a)["prompt_logprobs"][3]["31"].update(logprob=0.5),
    "has something else than a number": lambda a: _choice(a)["prompt_logprobs"][3]["31"].update(logprob="-0,5"),
    "is no number": lambda a: _choice(a)["prompt_logprobs"][3]["31"].update(logprob=math.nan),
    "other entries in prompt_logprobs": lambda a: _choice(a)["prompt_logprobs"][3].update(the={"logprob": -9.0}),
    "gives no lists": lambda a: _choice(a).update(prompt_logprobs={"3": 1}),
}
SGLANG_WRONG = {
    "read 6 tokens, and 7 were asked": lambda a: _meta(a).update(prompt_tokens=6),
    "lists 6 tokens at a place, and 7 were asked": lambda a: _meta(a)["input_top_logprobs"][1].pop() and None,
    "read the token 3 at place 4, and 31 was asked": lambda a: _meta(a)["input_token_logprobs"][1].__setitem__(1, 3),
    "tells of 4 tokens, and 5 were asked": lambda a: [_meta(a)[n].pop(0) for n in ("input_token_logprobs", "input_top_logprobs")] and None,
    "gives no lists of one length": lambda a: _meta(a)["input_top_logprobs"].pop() and None,
    "is it an SGLang server": lambda a: {"choices": []},
    "lacks log-probabilities": lambda a: _meta(a)["input_top_logprobs"].__setitem__(2, None),
    "a log-probability that is no number": lambda a: _meta(a)["input_token_logprobs"][1].__setitem__(0, None),
    "lists a token twice": lambda a: _meta(a)["input_top_logprobs"][1].__setitem__(0, _meta(a)["input_top_logprobs"][1][1]),
}


@pytest.mark.parametrize(
    ("kind", "said"), [*((VLLM, said) for said in VLLM_WRONG), *((SGLang, said) for said in SGLANG_WRONG)], ids=lambda x: str(x)[:40]
)
def test_a_wrong_answer_is_said(server, kind, said):
    changed(server, (VLLM_WRONG if kind is VLLM else SGLANG_WRONG)[said])
    with pytest.raises(WrongAnswer) as info:
        kind(Server(server.url, "s"), 640).ask(ADAPTER, IDS, PLACES, K)
    assert said in str(info.value)


def test_a_vllm_server_that_returns_no_ids_is_known_by_the_texts_own_tokens(server):
    changed(server, lambda a: _choice(a).pop("prompt_token_ids") and None)
    vllm = VLLM(Server(server.url, "s"), 640)
    assert vllm.ask(BASE, IDS, PLACES, K).label_log_p_N.shape == (3,)

    def another(answer):  # that read another token in the middle of the prompt, where no target is
        _choice(answer).pop("prompt_token_ids")
        _choice(answer)["prompt_logprobs"][1] = {str(i): {"logprob": -3.0} for i in range(200, 210)}

    changed(server, another)
    with pytest.raises(WrongAnswer, match="read other ids"):
        vllm.ask(BASE, IDS, PLACES, K)


def test_an_older_sglang_tells_of_the_whole_text(server, distributions):
    sglang, right = SGLang(Server(server.url, "s"), 640), None
    right = sglang.ask(BASE, IDS, PLACES, K)

    def whole(answer):
        for name, none in (("input_token_logprobs", [[None, 5, None], [-1.0, 9, None]]), ("input_top_logprobs", [None, [[-1.0, 9, None]]])):
            _meta(answer)[name][:0] = none

    changed(server, whole)
    assert np.array_equal(sglang.ask(BASE, IDS, PLACES, K).label_log_p_N, right.label_log_p_N)


def test_probabilities_of_0_are_read(server):
    changed(server, lambda a: json.dumps(a).replace('"31": {"logprob": -', '"31": {"logprob": -99').encode())
    assert VLLM(Server(server.url, "s"), 640).ask(BASE, IDS, PLACES, K).label_log_p_N[0] < -900


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (
            400,
            "Requested prompt logprobs of 64, which is greater than max allowed: 20",
            "t.top_k: found 64, and the server gives at most 20 tokens; start it with --max-logprobs 64, or lower top_k",
        ),
        (400, "This model's maximum context length is 10 tokens.", "t.server: refuses a text of 33 tokens ("),
        (401, "Unauthorized", "t.server: answers 401: Unauthorized; name the environment variable that holds the key as t.api_key_env"),
        (404, "Not Found", "t.server: answers 404: Not Found"),
    ],
)
def test_a_refusal_names_the_setting(status, text, said):
    assert str(explain(Refused(status, text), "t", 64, 33)).startswith(said)
