"""`llmkd make`: counts that add up, nothing asked twice, a file that a kill does not change, and limits that hold."""

import json
import math

import pytest

from llmkd.config.make import load_make
from llmkd.errors import UserError
from llmkd.making import pipeline
from llmkd.making.asks import Answer, failed
from llmkd.making.pipeline import report, say_end
from llmkd.making.writers.writer import writer_of
from llmkd.rollouts.append_only import AppendOnly
from tests.kit.making import Function, lines, run_make, write_make

ANSWER = [{"do": "answer"}]


def adds_up(done) -> bool:
    """Of every stage: what it was given and what it made is what it hands on and what it rejects, which stands in the file."""
    given = done.counts[0].rows
    for one in done.counts:
        if one.rows != given or one.passed + one.candidates - one.rejected != one.out or sum(one.reasons.values()) != one.rejected:
            return False
        given = one.out
    out = done.folder
    return given == len(lines(out / "train.jsonl")) and sum(one.rejected for one in done.counts) == len(lines(out / "rejected.jsonl"))


def test_rows_keep_their_columns_and_say_where_they_come_from(tmp_path):
    rows = [{"instruction": "A?", "input": "x", "output": "old", "kind": "k", "n": 3, "text": "t"}, {"instruction": "B?", "output": None}]
    done = run_make(write_make(tmp_path, ANSWER, rows))
    one, two = lines(tmp_path / "out" / "train.jsonl")
    assert one["messages"] == [{"role": "user", "content": "A?\n\nx"}, {"role": "assistant", "content": "To: A?\n\nx"}]
    assert (one["kind"], one["n"], one["text"]) == ("k", 3, "t") and two["messages"][1]["content"] == "To: B?"
    assert one["made"].items() >= {"stage": "1_answer", "writer": "function", "finish": "stop"}.items() and len(one["made"]["parents"]) == 1
    assert adds_up(done)


def test_a_second_run_asks_nothing_and_leaves_the_same_bytes(tmp_path):
    path = write_make(tmp_path, ANSWER)
    run_make(path)
    before = {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
    again = Function()
    run_make(path, again)
    after = {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
    assert not again.asked and before.keys() == after.keys()
    run_make(path, other := Function(), seed=1)
    assert not other.asked  # the most likely tokens depend on no seed
    assert {name for name in before if before[name] != after[name]} <= {"make.json"}  # which says how many answers were new


def test_after_a_kill_at_any_byte_only_what_is_missing_is_asked_for_and_the_data_are_the_same(tmp_path):
    path, answers, train = write_make(tmp_path, ANSWER), tmp_path / "out" / "answers.jsonl", tmp_path / "out" / "train.jsonl"
    run_make(path)
    whole, data = answers.read_bytes(), train.read_bytes()
    first = whole.index(b"\n") + 1
    for cut, left in ((0, 3), (first - 1, 3), (first, 2), (first + 9, 2), (len(whole) - 1, 1), (len(whole), 0)):
        answers.write_bytes(whole[:cut])
        train.unlink()
        writer = Function()
        run_make(path, writer)
        assert len(writer.asked) == left and train.read_bytes() == data, cut
        run_make(path, again := Function())
        assert not again.asked


def test_the_same_question_is_paid_once_and_samples_are_asked_with_seeds_of_their_own(tmp_path):
    rows = [{"instruction": "Same?"}, {"instruction": "Same?"}, {"instruction": "Other?"}]
    writer = Function(lambda ask: f"{ask.sampling.seed}")
    done = run_make(write_make(tmp_path, [{"do": "answer", "samples": 2}], rows), writer, writer__temperature=1.0)
    assert len(writer.asked) == 4 and len({ask.key for ask in writer.asked}) == 4 and done.counts[0].asks == 4
    made = lines(tmp_path / "out" / "train.jsonl")
    assert len(made) == 6 and len({row["made"]["id"] for row in made}) == 6
    assert len({row["messages"][1]["content"] for row in made}) == 2
    other = Function()
    run_make(tmp_path / "make.yaml", other, writer__temperature=1.0, seed=1)
    assert len(other.asked) == 4


def test_an_ask_without_an_answer_is_rejected_with_its_reason_and_asked_again_by_the_next_run(tmp_path, capsys):
    path = write_make(tmp_path, ANSWER)
    says = {0: failed("too busy"), 1: "", 2: Answer("cut", "length", 5, 1)}
    done = run_make(path, Function(lambda ask: says[int(ask.messages[-1]["content"][9])]))
    assert adds_up(done) and done.counts[0].reasons == {"no_answer": 1, "empty": 1} and done.unanswered == 1
    assert [row["reason"] for row in lines(tmp_path / "out" / "rejected.jsonl")] == ["no_answer", "empty"]
    assert lines(tmp_path / "out" / "rejected.jsonl")[0]["detail"] == "too busy"
    assert lines(tmp_path / "out" / "train.jsonl")[0]["made"]["finish"] == "length"
    say_end(done)
    said = capsys.readouterr().err
    assert "note: 1 answer of 1 ended at writer.max_new_tokens" in said and "note: 1 ask got no answer" in said
    again = Function(lambda ask: "now")
    assert run_make(path, again).unanswered == 0 and len(again.asked) == 1
    (tmp_path / "same").mkdir()
    same = run_make(
        write_make(tmp_path / "same", ANSWER, [{"instruction": f"{i // 2}?"} for i in range(4)]),
        Function(lambda ask: says[ask.messages[-1]["content"] == "1?"] or "text"),
    )
    assert same.counts[0].reasons == {"no_answer": 2} and same.unanswered == 1  # one ask for two rows


def test_a_limit_is_never_exceeded_and_the_same_command_goes_on_with_a_higher_one(tmp_path):
    path, writer = write_make(tmp_path, ANSWER, 10), Function(lambda ask: "x" * 40)
    with pytest.raises(UserError, match=r"limit_tokens: the answers have cost \d+ of 100 tokens, and the next ask might"):
        run_make(path, writer, writer__max_new_tokens=14, limit_tokens=100)
    paid = sum(row["tokens"] + row["prompt_tokens"] for row in lines(tmp_path / "out" / "answers.jsonl"))
    assert 100 - 33 < paid <= 100 and not (tmp_path / "out" / "train.jsonl").exists()  # 33: the most that one ask may take
    more = Function(lambda ask: "x" * 40)
    run_make(path, more, writer__max_new_tokens=14, limit_tokens=1000)
    assert len(writer.asked) + len(more.asked) == 10


def test_a_dry_run_asks_and_writes_nothing_and_says_the_most_that_it_costs(tmp_path):
    path, writer = write_make(tmp_path, ANSWER, 5), Function()
    dry = run_make(path, writer, dry_run=True, writer__max_new_tokens=50)
    assert not writer.asked and not (tmp_path / "out").exists()
    assert (dry.counts[0].asks, dry.counts[0].new, dry.counts[0].tokens) == (5, 5, 250)
    assert "5 asks are not answered yet" in report(dry.counts, True)
    new = [{"do": "topics", "topics": ["a", "b"]}, {"do": "expand", "count": 20}, {"do": "expand", "count": 9}]
    assert [one.rejected for one in run_make(write_make(tmp_path, new), dry_run=True).counts] == [
        0,
        4,
        7,
        0,
    ]  # those that are more than wanted
    path = write_make(tmp_path, ANSWER, 5)
    run_make(path, writer, writer__max_new_tokens=50)
    assert run_make(path, writer, dry_run=True, writer__max_new_tokens=50).counts[0].new == 0


def test_a_stage_that_rejects_nearly_all_stops_with_its_reasons(tmp_path):
    path = write_make(tmp_path, ANSWER, 30)
    with pytest.raises(UserError, match=r"1_answer: 30 of 30 candidates are rejected \(max_rejected is 0.95\): empty 30; .*rejected.jsonl"):
        run_make(path, Function(lambda ask: " "))
    assert len(lines(tmp_path / "out" / "rejected.jsonl")) == 30
    (tmp_path / "few").mkdir()
    with pytest.raises(
        UserError, match=r"no row is left: no_answer 2 \(busy\), empty 1 \(cut off by max_new_tokens .*rejected.jsonl has each"
    ) as caught:
        run_make(
            write_make(tmp_path / "few", ANSWER, 3),
            Function(lambda ask: Answer("", "length") if "0" in ask.messages[-1]["content"] else failed("busy")),
        )
    assert "\n" not in str(caught.value) and len(lines(tmp_path / "few" / "out" / "rejected.jsonl")) == 3


def test_a_run_that_ends_between_its_files_or_with_too_many_rejections_is_gone_on_with(tmp_path, monkeypatch):
    path, out = write_make(tmp_path, ANSWER, 30), tmp_path / "out"
    run_make(path)
    for left in range(5):
        calls, real = iter(range(99)), pipeline.write_atomic

        def write(file, content, calls=calls, real=real, left=left):
            if next(calls) == left:
                raise KeyboardInterrupt
            real(file, content)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, "write_atomic", write)
            patch.setattr(pipeline, "write_sealed", lambda file, content, write=write: write(file, str(content)))
            run_make(path, writer__max_new_tokens=9 + left)
    run_make(path, writer__max_new_tokens=20)
    with pytest.raises(UserError, match="30 of 30 candidates are rejected"):
        run_make(path, Function(lambda ask: ""), writer__max_new_tokens=21)
    assert adds_up(run_make(path)) and (out / "make.json").exists()


def test_columns_that_json_cannot_hold_are_refused_before_anything_is_asked(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"instruction": ["A?", "B?"], "day": [datetime.date(2026, 1, 2)] * 2, "score": [1.0, math.nan], "kind": ["k", None]}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    path, writer = write_make(tmp_path, ANSWER, seeds={"path": str(tmp_path / "s.parquet")}), Function()
    with pytest.raises(UserError, match=r"s.parquet:1: day holds what JSON has no form for; set ignore: \[day\] to leave it out"):
        run_make(path, writer)
    run_make(path, writer, seeds__ignore=["day", "score"])
    assert [row.get("kind") for row in lines(tmp_path / "out" / "train.jsonl")] == ["k", None] and len(writer.asked) == 2


def test_a_stage_that_is_to_choose_may_leave_out_nearly_all(tmp_path):
    rows = [{"instruction": f"Question {i}?", "output": "Yes.", "score": float(i)} for i in range(40)]
    path = write_make(tmp_path, [{"do": "select", "by": "score", "top": 0.025}], [row | {"scored_by": "Ann"} for row in rows])
    with pytest.raises(UserError, match=r"scored_by: the row .* has 'Ann' in this column.*set ignore: \[scored_by\]"):
        run_make(path)
    done = run_make(write_make(tmp_path, [{"do": "select", "by": "score", "top": 0.025}], rows))
    assert adds_up(done) and done.counts[0].rejected == 39 and [row["score"] for row in lines(tmp_path / "out" / "train.jsonl")] == [39.0]


def test_a_row_that_is_left_out_says_why_whatever_its_columns_are_called(tmp_path):
    rows = [{"instruction": "A?", "reason": "mine", "stage": 1, "answer": "gold", "n": 2}, {"instruction": "B, and what is it?"}]
    run_make(write_make(tmp_path, [*ANSWER, {"do": "keep", "min_words": 4}], rows))
    (out,) = lines(tmp_path / "out" / "rejected.jsonl")
    assert (out["stage"], out["reason"], out["n"]) == ("2_keep", "too_short", 2) and "answer" not in out
    assert out["columns"] == {"reason": "mine", "stage": 1, "answer": "gold"} and out["messages"][1]["content"] == "To: A?"


def test_rows_of_an_earlier_run_keep_how_they_ended_and_whose_they_are(tmp_path):
    ends = {0: "length", 1: "stop"}
    run_make(write_make(tmp_path, ANSWER, 2), Function(lambda ask: Answer("text", ends[int(ask.messages[-1]["content"][9])], 1, 1)))
    before = lines(tmp_path / "out" / "train.jsonl")
    (tmp_path / "second").mkdir()
    keep = write_make(tmp_path / "second", [{"do": "keep", "finish": "stop"}], before, writer=None)
    seeds = {"path": str(tmp_path / "second" / "seeds.jsonl"), "format": "chat"}
    done = run_make(keep, seeds=seeds)
    (row,) = lines(tmp_path / "second" / "out" / "train.jsonl")
    assert done.counts[0].reasons == {"cut_off": 1}
    assert (row["made"]["finish"], row["made"]["writer"], row["made"]["parents"]) == ("stop", "function", [before[1]["made"]["id"]])
    for stage in ("answer", "explain"):  # how the new answers end, and not the old ones
        run_make(write_make(tmp_path / "second", [{"do": stage}], before), Function(lambda ask: "anew"), seeds=seeds)
        assert [row["made"]["finish"] for row in lines(tmp_path / "second" / "out" / "train.jsonl")] == ["stop"] * 2
    for wrong in ("by hand", {"id": 1}, {"id": "a", "finish": 3}, {"id": "a", "version": "both"}):
        keep = write_make(tmp_path / "second", [{"do": "keep"}], [before[1] | {"made": wrong}], writer=None)
        with pytest.raises(UserError, match=r"seeds.jsonl:1: made is not what llmkd make writes there; set ignore: \[made\]"):
            run_make(keep, seeds=seeds)
    run_make(keep, seeds=seeds | {"ignore": ["made"]})


def test_what_a_killed_process_has_left_is_removed_and_a_second_one_waits(tmp_path):
    path, out = write_make(tmp_path, ANSWER), tmp_path / "out"
    run_make(path)
    (left := out / "train.jsonl.tmp-99-0123abcd").write_text("half")
    with AppendOnly(out / "answers.jsonl", "output_dir").held(), pytest.raises(UserError, match="another process writes to"):
        (train := out / "train.jsonl").rename(kept := tmp_path / "kept")
        train.write_text("what the other process is writing")
        run_make(path)
    kept.rename(train)
    assert left.exists()
    run_make(path)
    assert not left.exists()


def test_what_others_wrote_or_changed_is_left_alone(tmp_path):
    path, out = write_make(tmp_path, ANSWER), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output_dir: .* holds something else \(mine.txt\)"):
        run_make(path)
    (out / "mine.txt").unlink()
    run_make(path)
    (out / "train.jsonl").write_text("edited\n")
    with pytest.raises(UserError, match="train.jsonl: has changed since it was written; move it"):
        run_make(path)
    assert (out / "train.jsonl").read_text() == "edited\n"
    (out / "train.jsonl").unlink()
    summary = (out / "make.json").read_text()
    for other in ('{"sha256": []}', "{}", summary.replace('"rows": ', '"rows": 1')):
        (out / "make.json").write_text(other)
        with pytest.raises(UserError, match="make.json: is damaged; delete it, and the same command writes it again"):
            run_make(path)
    (out / "make.json").write_text(summary)
    raw = (out / "answers.jsonl").read_bytes()
    for other, message in ((raw.replace(b"To:", b"To;", 1), ":1 is damaged"), (raw + raw.splitlines(True)[0], "answer of an earlier line")):
        (out / "answers.jsonl").write_bytes(other)
        with pytest.raises(UserError, match=message):
            run_make(path)


def test_stages_that_ask_for_nothing_need_no_writer(tmp_path):
    """And one that asks is refused in one line; the card then names no writer."""
    rows = [{"instruction": f"Question {i}?", "output": f"Answer {i}." if i else "Text... "} for i in range(3)]
    keep = [{"do": "keep", "min_words": 2}]
    path = write_make(tmp_path, keep, rows, writer=None)
    found = pipeline.make(load_make(path, check_inputs=True), lambda: writer_of(load_make(path).make.writer, None, None))
    assert (found["rows"], found["answers"]) == (2, 0) and len(lines(tmp_path / "out" / "rejected.jsonl")) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "synthetic" not in card and "| writer |" not in card and "2 rows that `llmkd make`" in card and "licence" not in card
    assert load_make(tmp_path / "out" / "make.yaml").make.writer is None
    samples = {"do": "answer", "samples": 2}
    with pytest.raises(UserError, match="writer: not given, and the stage answer asks it; name the model") as caught:
        load_make(write_make(tmp_path, [*keep, samples, {"do": "evolve"}], rows, writer=None))
    assert len(caught.value.problems) == 1


def test_settings_that_are_wrong_are_named_with_their_line(tmp_path):
    def problems(**settings) -> str:
        path = tmp_path / "bad.yaml"
        good = {"output_dir": "out", "writer": {"model": "m"}, "seeds": {"path": "s.jsonl"}, "stages": [{"do": "answer"}]}
        path.write_text(json.dumps(good | settings))
        with pytest.raises(UserError) as caught:
            load_make(path)
        return str(caught.value)

    assert "stages.0.do: found anwser, which is no stage; did you mean answer?" in problems(stages=[{"do": "anwser"}])
    assert "names no stage" in problems(stages=["answer"])
    assert "stages.0 (answer): " in problems(stages=[{"do": "answer", "sample": 2}]) and "did you mean samples?" in problems(
        stages=[{"do": "answer", "sample": 2}]
    )
    assert "stages.0.samples: found 2 with writer.temperature 0" in problems(stages=[{"do": "answer", "samples": 2}])
    assert "seeds: not given, and the stage answer begins with rows" in problems(seeds=None)
    assert "seeds.format: found text, whose rows ask nothing" in problems(seeds={"path": "s.jsonl", "format": "text"})
    assert "writer.model: not given; name the model as the server serves it" in problems(writer={"server": "http://localhost:1"})
    assert "writer.model: not given; name the model that writes" in problems(writer={})
    assert "writer.command: given together with writer.server" in problems(writer={"server": "http://h:1", "model": "m", "command": ["a"]})
    secret = problems(writer={"server": "http://me:hunter2@h:1", "model": "m", "api_key_env": "sk-123-456"})
    assert "writer.server: holds a name or a password" in secret and "writer.api_key_env: is no name" in secret
    assert "hunter2" not in secret and "sk-123" not in secret
    served = {"server": "http://h:1", "model": "m"}
    assert "writer.body: has temperature; set writer.temperature" in problems(writer=served | {"body": {"temperature": 1}})
    assert "writer.body: has max_tokens; set writer.max_new_tokens" in problems(writer=served | {"body": {"max_tokens": 1}})
    assert "writer.body: has best_of; llmkd sends it itself" in problems(writer=served | {"body": {"best_of": 3}})
    longer = {"max_tokens": None, "max_completion_tokens": 4096}
    assert "writer.body: has max_completion_tokens, which is not writer.max_new_tokens (512)" in problems(writer=served | {"body": longer})
    hidden = problems(writer=served | {"body": {"api_key": "sk-123"}})
    assert "writer.body: has what may be a key (not shown)" in hidden and "sk-123" not in hidden
    hidden = problems(writer=served | {"body": {"metadata": [{"token": "sk-123"}]}}) + problems(
        writer={"command": ["a", "--api-key=sk-123"]}
    )
    assert "writer.body: has what" in hidden and "writer.command: has what may be a key (not shown)" in hidden and "sk-123" not in hidden
    harmless = {"max_tokens": None, "max_completion_tokens": 9, "response_format": {"properties": {"key": {"type": "string"}}}}
    load_make(write_make(tmp_path, ANSWER, writer=served | {"body": harmless, "max_new_tokens": 9}))
    harmless = [
        "--api-key-env",
        "KEY",
        "--max-tokens=9",
        "--sort-key=b",
        "A_KEY=$B x",
        'API_KEY="$B" x',
        "-HAuthorization: Bearer $B",
        "A_KEY= x",
    ]
    load_make(write_make(tmp_path, ANSWER, writer={"command": ["a", *harmless]}))
    for secret in ("HF_TOKEN=hf_1 x", "cd a; OPENAI_API_KEY='sk-123' x", "-HAuthorization: Bearer sk-123", "Authorization:Basic sk-123"):
        hidden = problems(writer={"command": ["sh", "-c", secret]})
        assert "writer.command: has what may be a key (not shown)" in hidden and "sk-123" not in hidden, secret
    hidden = problems(writer=served | {"api_key_env": "hf_aBcDeFgHiJkLmNoPqRsT"})
    assert "writer.api_key_env: is no name" in hidden and "hf_a" not in hidden
    load_make(write_make(tmp_path, ANSWER, writer=served | {"api_key_env": "a_variable_of_the_writer"}))
    by = {"do": "select", "by": "ifd", "top": 0.5}
    score = {"do": "score", "student": {"model": "m"}}
    for stages in ([*ANSWER, by], [score, *ANSWER, by], [*ANSWER, score | {"scores": ["ce"]}, by]):
        assert "by: reads ifd, which the rows that answer makes do not have; add a stage score between" in problems(stages=stages)
    assert "rule: reads rifd, which" in problems(stages=[{"do": "reflect_response"}, score, {"do": "select", "rule": "reflection"}])
    assert "teacher_ce: reads teacher_ce, which" in problems(stages=[*ANSWER, {"do": "keep", "teacher_ce": 0.9}])
    for stages in ([*ANSWER, score, by], [by, *ANSWER], [*ANSWER, by | {"by": "stars"}]):
        load_make(write_make(tmp_path, stages))
    assert "writer.top_p: set with temperature 0" in problems(writer={"model": "m", "top_p": 0.5})
    assert "writer.requests: set, but it belongs to writer.server" in problems(writer={"model": "m", "requests": 2})
    assert "writer.dtype: set, but it belongs to a model that llmkd loads" in problems(
        writer={"model": "m", "server": "http://h:1", "dtype": "float32"}
    )


def test_what_changed_is_asked_for_again_with_what_depends_on_it_and_nothing_else(tmp_path):
    """Of two stages that ask. Asks are counted by the writer; what came before a change is not asked again, and a change taken back costs nothing."""
    pairs = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(4)]
    prompt = tmp_path / "mine.txt"
    prompt.write_text("[user]\nIn other words, between <text> and </text>: {text}\n")
    paraphrase, answer = {"do": "paraphrase", "prompt": str(prompt)}, {"do": "answer"}
    known: set[str] = set()

    def asked(stages, **given) -> int:
        writer = Function(
            lambda ask: ask.pretend if "other words" in ask.messages[-1]["content"] else f"{ask.sampling.seed} {ask.messages}"
        )
        path = write_make(tmp_path, stages, pairs)
        done = run_make(path, writer, **{"writer__temperature": 1.0} | given)
        assert adds_up(done) and not {ask.key for ask in writer.asked} & known
        known.update(ask.key for ask in writer.asked)
        return len(writer.asked)

    first = [paraphrase, answer]
    assert asked(first) == 4 + 8
    assert asked(first) == 0
    data = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert asked([answer, paraphrase]) == 0  # questions are the same in either order, and so are their keys
    assert asked([paraphrase, {"do": "keep", "min_words": 1}, answer]) == 0
    assert asked([paraphrase, {"do": "answer", "samples": 2}]) == 8  # one more of each
    assert asked(first, seed=1) == 12
    assert asked(first, writer__top_p=0.5) == 12
    prompt.write_text(prompt.read_text().replace("between", "put between"))
    assert asked(first) == 4  # the paraphrases; their texts stay the same, and so do the asks about them
    prompt.write_text(prompt.read_text().replace("put between", "between"))
    assert asked(first) == 0 and (tmp_path / "out" / "train.jsonl").read_bytes() == data
