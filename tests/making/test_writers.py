"""Writers: servers that misbehave, programs that end, files of answers, and a model in this process."""

import json
import sys
import threading

import pytest

from llmkd.config.make import Writer as Settings
from llmkd.errors import Stopped, UserError
from llmkd.making.asks import Answer, Ask, canonical, failed, key_of
from llmkd.making.pipeline import say_end
from llmkd.making.writers import outside
from llmkd.making.writers.writer import writer_of
from llmkd.rollouts.sampling import Sampling
from tests.kit.making import Function, lines, run_make, write_make
from tests.kit.served import serving

KEY = "sk-a-secret-of-tests"


def writer(device=None, stop=lambda: False, **settings):
    return writer_of(Settings(**settings), lambda: device, stop)


def asks(count: int, one, temperature: float = 0.0, text: str = "Question {}?") -> list[Ask]:
    out = []
    for i in range(count):
        said = ({"role": "user", "content": text.format(i)},)
        sampling = canonical(Sampling(temperature, 12, seed=i))
        out.append(Ask(key_of(said, sampling, one.identity), said, sampling))
    return out


def written(one, wanted: list[Ask], known=()) -> list[Answer]:
    found = {ask.key: answer for ask, answer in one.write(wanted, known)}
    return [found[ask.key] for ask in wanted if ask.key not in known]


def chat(content: dict) -> dict:
    message = {"role": "assistant", "content": f"To: {content['messages'][-1]['content']}"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"model": content["model"], "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


@pytest.fixture
def fake():
    with serving({"m": None}) as server:
        server.chat = chat
        yield server


def with_choice(**changes) -> dict:
    return chat({"model": "m", "messages": [{"content": "?"}]}) | {
        "choices": [{"message": {"content": "text"}, "finish_reason": "stop"} | changes]
    }


def test_a_server_that_is_busy_broken_or_cut_short_is_asked_again_and_each_answer_comes_once(fake):
    bad = [
        (429, {"Retry-After": "0"}),
        (500, {"Retry-After": "0"}),
        (503, {"Retry-After": "0"}),
        b'{"choices": [{"mess',
        b"",
        b"\xff\xfe",
        b"[" * 99_999,
    ]
    fake.misbehave = lambda answer, number: bad[number] if number < len(bad) else answer
    one = writer(server=fake.url, model="m", requests=3, patience=60.0)
    found = written(one, wanted := asks(5, one))
    assert found == [Answer(f"To: Question {i}?", "stop", 3, 7) for i in range(5)] and fake.most_at_once <= 3
    sent = fake.asked[0]
    assert sent.keys() == {"model", "messages", "temperature", "max_tokens"} and sent["max_tokens"] == 12
    before = len(fake.asked)
    assert written(one, wanted, {ask.key for ask in wanted}) == [] and len(fake.asked) == before


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({}, "not one choice"),
        ([], "not one choice"),
        ({"choices": []}, "not one choice"),
        ({"choices": [{}, {}]}, "not one choice"),
        ({"choices": ["text"]}, "not one choice"),
        (with_choice(message=None), "no text"),
        (with_choice(message={"content": None, "tool_calls": []}), "no text"),
        (with_choice(message={"content": ["text"]}), "no text"),
        (with_choice(message={"content": "Let me look.", "tool_calls": [{"type": "function"}]}), "calls a tool"),
        (with_choice(message={"content": "", "function_call": {"name": "f"}}), "calls a tool"),
        (with_choice(finish_reason=KEY), "holds the key"),
        (with_choice(finish_reason=None), "does not say how it ended"),
        (with_choice(message={"content": "half \ud800"}), "half of a surrogate pair"),
        (with_choice(message={"content": f"my key is {KEY}"}), "holds the key"),
        ((400, {"body": {"error": {"message": "content filtered"}}}), "answers 400: content filtered"),
        ((400, {"body": "x" * 290 + KEY}), "xx(the key)"),
        ((302, {"Location": f"http://elsewhere?{KEY}"}), "?(the key)); name that address"),
    ],
)
def test_an_answer_of_another_shape_is_no_answer_of_that_ask_alone(fake, monkeypatch, answer, problem):
    monkeypatch.setenv("THE_KEY", KEY)
    fake.misbehave = lambda right, number: answer if "1?" in fake.asked[number]["messages"][0]["content"] else right
    one = writer(server=fake.url, model="m", requests=1, api_key_env="THE_KEY")
    found = written(one, asks(3, one))
    assert (
        problem in found[1].problem
        and KEY[:5] not in found[1].problem
        and found[1].text == ""
        and [a.problem for a in (found[0], found[2])] == [None, None]
    )


def test_a_key_that_is_no_secret_may_stand_in_a_text_and_one_that_is_may_not_stand_in_settings(fake, monkeypatch):
    monkeypatch.setenv("THE_KEY", "EMPTY")
    fake.misbehave = lambda answer, number: with_choice(message={"content": "The list is EMPTY."})
    one = writer(server=fake.url, model="m", api_key_env="THE_KEY")
    assert written(one, asks(1, one))[0].text == "The list is EMPTY."
    monkeypatch.setenv("THE_KEY", KEY)
    with pytest.raises(UserError, match="writer: a setting holds the key that is in THE_KEY") as caught:
        writer(server=fake.url, model="m", api_key_env="THE_KEY", body={"user": f"me:{KEY}"})
    assert KEY not in str(caught.value)


def test_what_was_cut_off_is_marked_and_what_is_not_counted_is_estimated(fake):
    replies = [
        with_choice(finish_reason="length"),
        with_choice() | {"usage": {"prompt_tokens": -1, "completion_tokens": 10**30}, "model": "m-2026"},
        with_choice(finish_reason="\x1b[1m \ud800\n!" + "x" * 99) | {"model": "m\ud800" + "x" * 999},
    ]
    fake.misbehave = lambda answer, number: replies[number]
    one = writer(server=fake.url, model="m", requests=1)
    cut, plain_one, hostile = written(one, asks(3, one))
    assert hostile.finish == "\\x1b[1m \\ud800 !" + "x" * 24 and hostile.model == "m\\ud800" + "x" * 193
    assert (cut.finish, cut.tokens, cut.model) == ("length", 3, None)
    assert (plain_one.tokens, plain_one.prompt_tokens, plain_one.model) == (5, 7, "m-2026")  # 4 and 11 bytes


def test_reasoning_apart_from_the_text_is_counted_and_of_an_answer_cut_off_in_it_nothing_is_asked_again(fake, tmp_path, capsys):
    replies = [
        with_choice(message={"content": "Four.", "reasoning_content": "2 + 2"}),
        with_choice(message={"content": None, "reasoning": "Well, let"}, finish_reason="length"),
        with_choice(message={"content": "<think>2</think> Four.", "reasoning_content": None}),
        with_choice(message={"content": "So </think> four.", "reasoning": " "}),
    ]
    fake.misbehave = lambda answer, number: replies[number]
    settings = {"server": fake.url, "model": "m", "requests": 1}
    path = write_make(tmp_path, [{"do": "answer"}], 4, writer=settings)
    for _ in range(2):
        done = run_make(path, writer(**settings))
        say_end(done)
        said = capsys.readouterr().err
        assert "note: 2 answers came with reasoning apart from the text; it is not kept" in said
        assert "note: 2 answers of 3 have <think> in the text" in said and "got no answer" not in said
    assert len([one for one in fake.asked if one]) == 4 and done.counts[0].reasons == {"empty": 1}
    assert [one.get("reasoning") for one in lines(tmp_path / "out" / "answers.jsonl")] == [5, 9, None, None]
    assert "cut off by max_new_tokens before its first word" in lines(tmp_path / "out" / "rejected.jsonl")[0]["detail"]


def test_further_fields_of_a_request_are_sent_and_are_a_part_of_the_key(fake):
    body = {"max_tokens": None, "max_completion_tokens": 12, "chat_template_kwargs": {"enable_thinking": False}}
    one, other = writer(server=fake.url, model="m", body=body), writer(server=fake.url, model="m")
    written(one, asks(1, one))
    fields = {"model": "m", "messages": [{"role": "user", "content": "Question 0?"}], "temperature": 0.0, "max_completion_tokens": 12}
    assert fake.asked[0] == fields | {"chat_template_kwargs": {"enable_thinking": False}}
    assert asks(1, one)[0].key != asks(1, other)[0].key


def test_what_concerns_every_ask_ends_the_command(fake, monkeypatch):
    fake.key = KEY
    one = writer(server=fake.url, model="m")
    with pytest.raises(UserError, match="answers 401: wrong key None; name the variable that holds the key in writer.api_key_env"):
        one.check()
    monkeypatch.setenv("THE_KEY", "sk-another")
    one = writer(server=fake.url, model="m", api_key_env="THE_KEY")
    with pytest.raises(UserError) as caught:
        written(one, asks(2, one))
    assert "sk-another" not in str(caught.value) and "(the key)" in str(caught.value)
    fake.key = None
    fake.misbehave = lambda answer, number: (422, {"body": {"detail": "max_tokens is not known"}})
    one = writer(server=fake.url, model="m", requests=1)
    with pytest.raises(UserError, match="answers 422: max_tokens is not known; check the settings of the writer"):
        written(one, asks(50, one))
    assert len([ask for ask in fake.asked if ask]) < 20
    before, fake.misbehave = len(fake.asked), lambda answer, number: {"error": {"message": "no credit", "code": 402}}
    one = writer(server=fake.url, model="m", requests=1)
    with pytest.raises(UserError, match="answers 200: no credit$"):
        written(one, asks(50, one))
    assert len(fake.asked) - before < 20
    fake.broken_list = True
    writer(server=fake.url, model="m").check()  # a list of models that fails says nothing of chat
    fake.stop()
    one = writer(server=fake.url, model="m", patience=0.0)
    with pytest.raises(UserError, match="refuses the connection"):
        one.check()


def test_an_ask_that_a_living_server_fails_at_is_no_answer_of_that_ask_alone_and_eight_in_a_row_end_the_command(fake):
    bad = {"1?": 500, "2?": b'{"choices": [', "3?": "hang", "5?": 503}

    def misbehave(right, number):
        return next((answer for text, answer in bad.items() if text in fake.asked[number]["messages"][0]["content"]), right)

    fake.misbehave = misbehave
    settings = {"server": fake.url, "model": "m", "requests": 1, "patience": 0.0, "timeout": 0.2}
    one = writer(**settings)
    found = written(one, asks(5, one))
    assert [answer.text for answer in found] == ["To: Question 0?", "", "", "", "To: Question 4?"]
    assert [answer.problem for answer in found[1:4]] == [
        "the server answers 500: status 500",
        "the server gives an answer that is no whole JSON (13 bytes: '{\"choices\": [')",
        "the server has not answered within 0.2 seconds",
    ]
    with pytest.raises(UserError, match="answers 503: status 503; start it"):  # it is busy, whatever is asked
        written(one, asks(6, one))
    bad.clear()
    bad[""] = 500
    before = len(fake.asked)
    with pytest.raises(UserError, match="answers 500: status 500; "):
        written(one := writer(**settings), asks(50, one))
    assert len(fake.asked) - before == 8
    fake.misbehave = lambda right, number: fake.stop() or right
    with pytest.raises(UserError, match="closed the connection before its answer was whole; start it"):  # it is gone, whatever is asked
        written(one := writer(**settings), asks(1, one))
    with pytest.raises(UserError, match="refuses the connection"):
        written(one := writer(**settings), asks(1, one))


@pytest.mark.parametrize(("requests", "answer", "which"), [(1, 500, [*range(7), *range(8, 15)]), (16, "hang", [*range(0, 16, 2)])])
def test_asks_that_fail_between_others_do_not_end_the_command(fake, requests, answer, which):
    """Neither two rows of seven nor eight that are asked at one moment, and so time out at one."""
    fake.misbehave = lambda right, number: answer if int(fake.asked[number]["messages"][0]["content"][9:-1]) in which else right
    one = writer(server=fake.url, model="m", requests=requests, patience=0.0, timeout=0.5)
    found = written(one, asks(16, one))
    assert [i for i, answer in enumerate(found) if answer.problem] == which


def test_what_was_paid_for_and_is_no_answer_counts_toward_the_limit_also_of_the_next_run(fake, tmp_path):
    fake.chat = lambda content: {"choices": [{"message": {"tool_calls": [{}]}}], "usage": {"prompt_tokens": 20, "completion_tokens": 15}}
    settings = {"server": fake.url, "model": "m", "requests": 1, "max_new_tokens": 20}
    path = write_make(tmp_path, [{"do": "answer"}], 6, writer=settings, limit_tokens=100)
    for _ in range(2):
        with pytest.raises(UserError, match="limit_tokens: the answers have cost 70 of 100 tokens"):
            run_make(path, writer(**settings))
    assert len(fake.asked) == 2 and all(one["problem"] for one in lines(tmp_path / "out" / "answers.jsonl"))
    fake.chat = chat
    done = run_make(path, writer(**settings), limit_tokens=10_000)
    assert done.answers.tokens == 70 + 6 * 10 and done.counts[-1].out == 6
    assert len(writer(recorded=str(tmp_path / "out" / "answers.jsonl")).by_ask) == 6
    fake.chat = lambda content: (
        chat(content) | {"usage": {"prompt_tokens": 9_000, "completion_tokens": 1}}
    )  # more than a prompt of its bytes can have
    with pytest.raises(UserError, match=r"cost 9,131 of 5,000 tokens.*5 asks left"):
        run_make(path, writer(**settings), limit_tokens=5_000, writer__max_new_tokens=21)


def test_a_stop_is_followed(fake, monkeypatch):
    monkeypatch.setattr(outside, "GRACE", 0.1)
    released = threading.Event()
    fake.misbehave = lambda answer, number: released.wait(10) and answer
    one = writer(server=fake.url, model="m", stop=lambda: True)
    with pytest.raises(Stopped, match="the same command goes on"):
        written(one, asks(1, one))
    released.set()
    asked = len(fake.asked)
    fake.misbehave = lambda answer, number: answer
    stops = iter([False, True])
    one = writer(server=fake.url, model="m", requests=2, stop=lambda: next(stops))
    kept = []
    with pytest.raises(Stopped):
        kept.extend(one.write(asks(9, one), ()))
    assert len(fake.asked) - asked == len(kept) == 1  # what was asked when the signal came is kept


def test_a_key_stands_in_no_file(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("THE_KEY", KEY)
    fake.key, fake.misbehave = KEY, lambda answer, number: with_choice(message={"content": KEY}) if number == 1 else answer
    settings = {"server": fake.url, "model": "m", "api_key_env": "THE_KEY", "requests": 1}
    path = write_make(tmp_path, [{"do": "answer"}], 3, writer=settings)
    run_make(path, writer(**settings))
    files = [one for one in tmp_path.rglob("*") if one.is_file()]
    assert len(files) == 8 and not any(KEY.encode() in one.read_bytes() for one in files)
    assert [row["reason"] for row in lines(tmp_path / "out" / "rejected.jsonl")] == ["no_answer"]


PROGRAM = """
import json, sys
for line in sys.stdin:
    ask = json.loads(line)
    text = ask["messages"][-1]["content"]
    if "1?" in text:
        print(json.dumps({"key": ask["key"], "error": "too hard", "tokens": 8}), flush=True)
    elif "stop" in text:
        sys.exit("out of paper")
    elif "noise" in text:
        print("loading ...", flush=True)
    else:
        print(json.dumps({"key": ask["key"], "error": None, "text": "To: " + text, "finish": "length" if "0" in text else "\\ud800", "tokens": 4}), flush=True)
"""


def test_a_program_answers_in_json_lines_and_its_end_is_told(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    one = writer(command=(sys.executable, "-IS", str(tmp_path / "p.py")), requests=2)
    found = written(one, asks(3, one))
    assert (
        found[0] == Answer("To: Question 0?", "length", 4, 7)
        and found[1] == failed("the program says: too hard", 8)
        and found[2].finish == "\\ud800"
    )
    for text, message in (
        ("stop {}", "has ended with exit code 1 before it answered all asks; its last words: out of paper"),
        ("noise {}", "has written 'loading ...\\\\n', expected a line of JSON"),
    ):
        with pytest.raises(UserError, match=message):
            written(one, asks(1, one, text=text))
    one.close()
    deaf = writer(command=("sleep", "60"), timeout=0.2)
    with pytest.raises(UserError, match="sleep has written nothing for 0.2 seconds; raise writer.timeout"):
        written(deaf, asks(2, deaf, text="x" * 200_000 + "{}"))
    with pytest.raises(UserError, match="writer.command: /no/such cannot be started"):
        written(absent := writer(command=("/no/such",)), asks(1, absent))


def test_a_recorded_file_is_that_of_a_run_or_made_by_hand(tmp_path):
    path = write_make(tmp_path, [{"do": "answer", "samples": 2}])
    run_make(path, Function(lambda ask: f"{ask.messages[-1]['content']} {ask.sample}"), writer__temperature=1.0)
    record = (tmp_path / "out" / "answers.jsonl").rename(tmp_path / "record.jsonl")
    data = (tmp_path / "out" / "train.jsonl").read_text().replace('"function"', f'"{record}"')
    for one in (tmp_path / "out").iterdir():
        one.unlink()
    run_make(path, writer(recorded=str(record)), writer__temperature=1.0)
    assert (tmp_path / "out" / "train.jsonl").read_text() == data
    with record.open("a") as file:
        file.write(json.dumps({"asked": lines(record)[1]["asked"], "text": "of another writer"}) + "\n")
    with pytest.raises(UserError, match="record.jsonl:7: has another answer to the ask of an earlier line"):
        writer(recorded=str(record))
    by_hand = {"messages": [{"role": "user", "content": "Question 0?"}], "text": "yes", "reasoning": "Well."}
    (tmp_path / "hand.jsonl").write_text(json.dumps(by_hand) + "\n")
    one = writer(recorded=str(tmp_path / "hand.jsonl"))
    assert [(said.text, said.reasoning) for said in written(one, asks(1, one))] == [("yes", 5)]
    with pytest.raises(UserError, match="has no answer to 1 of 2 asks"):
        written(one, asks(2, one))
    for wrong in ({"text": 3}, by_hand | {"tokens": float("inf")}, by_hand | {"prompt_tokens": -1}, by_hand | {"reasoning": 0.5}):
        (tmp_path / "hand.jsonl").write_text(json.dumps(wrong) + "\n")
        with pytest.raises(UserError, match="hand.jsonl:1: expected an object with text"):
            writer(recorded=str(tmp_path / "hand.jsonl"))
    (tmp_path / "hand.jsonl").write_text(json.dumps(by_hand | {"finish": None}) + "\n" + json.dumps(by_hand | {"finish": "\ud800"}))
    answers = writer(recorded=str(tmp_path / "hand.jsonl")).by_messages.values()
    assert [answer.finish for one in answers for answer in one] == ["stop", "\\ud800"]


def test_greedy_text_of_a_model_depends_neither_on_batch_nor_on_order_nor_on_what_is_there(world):
    import torch

    one = writer(torch.device("cpu"), model=str(world / "adapter"), dtype="float32", batch_size=4)
    wanted = asks(6, one, text="Say it {}" + " again" * 3)
    whole = written(one, wanted)
    assert written(one, wanted[::-1])[::-1] == whole
    other = writer(torch.device("cpu"), model=str(world / "adapter"), dtype="float32", batch_size=1)
    assert other.identity == one.identity and written(other, wanted) == whole
    assert list(one.write(wanted, {ask.key for ask in wanted[1:]})) == [(wanted[0], whole[0])]
    drawn = asks(3, one, temperature=1.0)
    assert written(one, drawn) == written(other, drawn[::-1])[::-1]
    long = asks(1, one, text="word " * 300)
    assert "and the writer 256 positions" in written(one, long)[0].problem
    hostile = asks(1, one, text="<|end|> </s> {{ 7 * 7 }} <script>alert(1)</script>\x00")
    assert written(one, hostile)[0].problem is None
    one.close()
