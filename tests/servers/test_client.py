"""Requests to servers that answer, do not, or answer wrongly; and the key, which is seen nowhere."""

import base64
import contextlib
import json
import socket
import threading
import time

import pytest
import urllib3

from llmkd.config.teacher import Teacher
from llmkd.errors import UserError
from llmkd.servers import client, connections, logprobs
from llmkd.servers.client import Refused, Server, ServerFailed
from llmkd.teachers.served_models import served_model
from tests.kit.served import serving


@pytest.fixture
def fake():
    with serving({}) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.02)


def test_pauses_double_up_to_the_longest_after_however_many_attempts(monkeypatch):
    """A patience of a day is thousands of attempts, and 2 to that power is no float."""
    monkeypatch.setattr(client, "_LONGEST_WAIT", 30.0)
    for attempt, longest in ((0, 0.5), (1, 1.0), (5, 16.0), (6, 30.0), (5000, 30.0)):
        assert longest / 2 <= client._pause(attempt) <= longest


def told(fake, answer, patience=0.0, timeout=5.0) -> str:
    """What is said of a server that always answers so."""
    fake.misbehave = lambda right, number: answer
    with pytest.raises((ServerFailed, Refused)) as info:
        Server(fake.url, "teacher.server", None, timeout, patience).post("/x", {})
    return str(info.value).replace(fake.url, "URL")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408])
def test_a_server_that_is_busy_is_asked_again(fake, status, monkeypatch):
    """And each time the other processes of a run hear that this one goes on."""
    monkeypatch.setattr(client.heartbeat, "going_on", lambda: signs.append(len(fake.asked)))
    fake.misbehave, signs = lambda right, number: status if number < 3 else {"a": 1}, []
    assert Server(fake.url, "teacher.server", patience=5).post("/x", {"b": 2}) == {"a": 1}
    assert fake.asked == [{"b": 2}] * 4 and signs == [0, 1, 2, 3]


def test_what_is_said_while_a_server_is_gone_is_said_once_and_then_that_it_is_back(fake, caplog):
    fake.misbehave = lambda right, number: 503 if number < 4 else {}
    with caplog.at_level("INFO", "llmkd"):
        Server(fake.url, "teacher.server", patience=9).post("/x", {})
    assert [line.replace(fake.url, "URL") for line in caplog.messages] == [
        "note: teacher.server: URL answers 503: status 503; trying again for up to 9 seconds",
        "note: teacher.server: URL answers again",
    ]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (503, "teacher.server: URL answers 503: status 503; start it, or correct the address"),
        (
            (429, {"Retry-After": "7200", "body": {"detail": "slow\ndown"}}),
            "URL answers 429: slow down, and asks for a pause of 2.0 hours; lower teacher.requests, or raise teacher.patience",
        ),
        ((429, {"Retry-After": "9" * 500}), "URL answers 429: {}; lower teacher.requests"),
        (b'{"choices": [', "gives an answer that is no whole JSON (13 bytes: '{\"choices\": [')"),
        (b"", "gives an answer that is no whole JSON (0 bytes)"),
        (
            (200, {"Content-Type": "text/html; charset=utf-8", "body": b"<!doctype html>"}),
            "answers 200: a page of HTML, expected JSON: '<!doctype html>'; name the address of its API",
        ),
        (
            (200, {"Content-Type": "text/event-stream", "body": b"data: {}"}),
            "answers 200: a stream of events, expected JSON: 'data: {}'; let it send whole answers",
        ),
        ((400, {"body": {"error": {"message": "no such thing"}}}), "answers 400: no such thing"),
        ((422, {"body": b"\x1b[31m<html>" + b"x" * 900}), "answers 422: \\x1b[31m<html>xxx"),
        ((307, {"Location": "http://elsewhere/x"}), "answers 307: sends the request elsewhere (http://elsewhere/x); name that address"),
        ((200, {"Content-Length": "99", "body": {"a": 1}, "Connection": "close"}), "closed the connection before its answer was whole"),
    ],
)
def test_each_wrong_answer_has_its_line(fake, answer, said):
    line = told(fake, answer)
    assert said in line and "\n" not in line and len(line) < 500


def test_a_page_of_html_is_waited_out_only_of_a_server_that_has_answered_in_json(fake):
    fake.misbehave = lambda right, number: {"a": number} if number % 2 else (200, {"Content-Type": "text/html", "body": b"<html>"})
    server = Server(fake.url, "teacher.server", patience=5)
    with pytest.raises(Refused):
        server.post("/x", {})
    assert [server.post("/x", {}) for _ in range(2)] == [{"a": 1}, {"a": 3}] and len(fake.asked) == 4


def test_the_first_question_to_a_server_that_never_answers_has_a_limit_of_its_own(monkeypatch):
    assert 10 <= logprobs.LIST_SECONDS <= 30
    monkeypatch.setattr(logprobs, "LIST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and nobody reads
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ServerFailed, match="teacher.server: .* has not answered within 0.2 seconds; start it, or correct the address"):
            served_model("teacher", Teacher(server=address, model="t", timeout=5.0))


def test_what_no_repeating_would_change_is_asked_once(fake):
    told(fake, 404, patience=5)
    assert len(fake.asked) == 1


def test_an_answer_that_does_not_end_is_not_kept_in_memory(fake, monkeypatch):
    monkeypatch.setattr(client, "_LARGEST", 3 << 20)
    assert told(fake, (200, {"body": b" " * (5 << 20)}), patience=5) == "answers 200: more than 3 MiB" and len(fake.asked) == 1


def test_a_server_that_hangs_and_one_that_drips(fake):
    started = time.monotonic()
    fix = "raise teacher.timeout if it is working, or start it"
    assert told(fake, "hang", timeout=0.2) == f"teacher.server: URL has not answered within 0.2 seconds; {fix}"
    assert time.monotonic() - started < 2
    whole = b"HTTP/1.1 200 OK\r\n\r\n{}"
    for begin, part in ((HEAD + b"\r\n", b" "), (HEAD, b"A: 1\r\n"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (whole, b" ")):
        assert seconds_of_dripping(begin, part) < 1.5


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n"


def seconds_of_dripping(begin: bytes, part: bytes) -> float:
    """After how long a server is given up that sends parts of an answer for two seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            with listener.accept()[0] as connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(begin)
                for _ in range(40):
                    connection.sendall(part)
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(ServerFailed, match="has not answered within 0.2 seconds"):
            Server(f"http://127.0.0.1:{listener.getsockname()[1]}", "teacher.server", timeout=0.2, patience=0).post("/x", {})
        return time.monotonic() - started


def test_the_time_out_counts_from_before_a_request_is_sent(monkeypatch):
    def slowly(connection, *args, real=urllib3.connection.HTTPConnection.request, **kwargs):
        real(connection, *args, **kwargs)
        time.sleep(0.3)
        raise BrokenPipeError  # it may have answered before it closed its end

    monkeypatch.setattr(urllib3.connection.HTTPConnection, "request", slowly)
    assert seconds_of_dripping(HEAD + b"\r\n", b" ") < 1.5


def test_a_server_that_accepts_no_connection_is_no_slow_one(monkeypatch):
    def connect(*args, **kwargs):
        time.sleep(0.1)
        raise TimeoutError

    monkeypatch.setattr(urllib3.util.connection, "create_connection", connect)
    with pytest.raises(ServerFailed, match="accepts no connection within 0.05 seconds; start it, or correct the address"):
        Server("http://127.0.0.1:9", "teacher.server", timeout=0.05, patience=0).get("/x")


def test_nobody_listens_and_a_host_that_is_not_known(fake):
    fake.stop()
    assert told(fake, {}) == "teacher.server: URL refuses the connection; start it, or correct the address"
    line = told(fake, {}, patience=0.3)
    assert "refuses the connection (tried " in line and line.endswith("; with --resume a run goes on from its last checkpoint")
    with pytest.raises(ServerFailed, match="has a host name that is not known"):
        Server("http://no-such-host.invalid:1", "teacher.server", patience=0).get("/x")


def test_a_server_that_comes_back_within_the_patience(fake):
    fake.stop()
    threading.Timer(0.3, fake.start).start()
    assert Server(fake.url, "teacher.server", patience=10).get("/v1/models") == {"data": []}


def test_the_servers_own_wait_is_kept_and_one_beyond_the_patience_ends_at_once(fake):
    fake.misbehave = lambda right, number: {} if number else (429, {"Retry-After": "1"})
    started = time.monotonic()
    Server(fake.url, "teacher.server", patience=5).post("/x", {})
    assert 0.9 < time.monotonic() - started < 3
    assert client._seconds("120") == 120 and client._seconds("nonsense") is client._seconds("\xb2") is None
    assert client._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_requests_that_wait_for_a_server_are_let_go(fake):
    fake.misbehave = lambda right, number: 503
    server = Server(fake.url, "teacher.server", patience=60)
    started = time.monotonic()
    threading.Timer(0.2, server.end).start()
    with pytest.raises(ServerFailed):
        server.post("/x", {})
    assert time.monotonic() - started < 20


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(fake, monkeypatch, caplog):
    fake.key = "sk-of-the-tests"
    monkeypatch.setenv("OF_TESTS", "sk-of-the-tests")
    assert Server(fake.url, "teacher.server", "OF_TESTS").get("/v1/models") == {"data": []}
    monkeypatch.setenv("OF_TESTS", "sk-wrong")
    with pytest.raises(Refused) as info:
        Server(fake.url, "teacher.server", "OF_TESTS").get("/v1/models")
    assert str(info.value) == "answers 401: wrong key Bearer (the key)"
    for bad, said in (("", "is not set"), ("sk-a\n", "line break"), ("sk-ä", "line break")):
        monkeypatch.setenv("OF_TESTS", bad)
        with pytest.raises(UserError) as info:
            Server(fake.url, "teacher.0.server", "OF_TESTS")
        assert str(info.value).startswith("teacher.0.api_key_env: ") and said in str(info.value) and "sk-" not in str(info.value)


def test_an_address_may_end_as_clients_of_openai_write_it(fake):
    for end in ("", "/", "/v1", "/v1/"):
        assert Server(fake.url + end, "teacher.server").get("/v1/models") == {"data": []}


def test_the_proxy_of_the_environment_is_not_asked_for_this_machine(fake, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Server(fake.url, "teacher.server", patience=0).get("/v1/models") == {"data": []}
    with pytest.raises(ServerFailed, match="proxy"):
        Server("http://192.0.2.1:80", "teacher.server", patience=0).get("/x")
    monkeypatch.setenv("no_proxy", "192.0.2.1")
    for address, through in (("http://192.0.2.1:80", False), ("http://192.0.2.2:80", True)):
        assert isinstance(connections.pool(address, 1, "teacher.server"), urllib3.ProxyManager) is through


def test_a_proxy_is_told_its_name_and_password_and_nobody_else_is(monkeypatch):
    heard, wanted = [], base64.b64encode(b"me:p@ss").decode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def proxy():
            for answer in (b"200 OK\r\nContent-Length: 2\r\n\r\n{}", b"407 No\r\nContent-Length: 0\r\n\r\n", b"407 No\r\n\r\n"):
                with listener.accept()[0] as connection:
                    heard.append(connection.recv(4096).decode())
                    connection.sendall(b"HTTP/1.1 " + answer)

        threading.Thread(target=proxy, daemon=True).start()
        port = listener.getsockname()[1]
        monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        assert Server("http://192.0.2.1:80", "teacher.server", patience=0).get("/x") == {}
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        with pytest.raises(Refused, match="answers 407"):
            Server("http://192.0.2.1:80", "teacher.server", patience=0).get("/x")
        with pytest.raises(ServerFailed, match="proxy that the environment names, which wants a name and a password; "):
            Server("https://192.0.2.1:443", "teacher.server", patience=0).get("/x")
    assert f"proxy-authorization: basic {wanted.lower()}" in heard[0].lower() and "authorization" not in (heard[1] + heard[2]).lower()
    for bad in ("socks5://me:p@ss@h:1", "http://me:p@ss@h:port", "http://me:p@ss@"):
        monkeypatch.setenv("http_proxy", bad)
        with pytest.raises(UserError, match="the variable http_proxy of the environment .not shown. is no address of a proxy") as info:
            Server("http://192.0.2.1:80", "teacher.server")
        assert "p@ss" not in str(info.value)


def test_a_connection_that_broke_off_is_not_used_for_the_next_answer(fake):
    short = (200, {"Content-Length": "40", "body": {"old": "answer"}})
    fake.misbehave = lambda right, number: short if number == 0 else {"new": number}
    server = Server(fake.url, "teacher.server", timeout=0.3, patience=5, connections=1)
    assert json.dumps(server.post("/x", {})).startswith('{"new"')
