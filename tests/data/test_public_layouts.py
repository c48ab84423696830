"""Rows as well-known public data sets have them, made up: read, or refused in one line with what reads them; what is proposed works as it stands."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llmkd.config.data import data_contradictions
from llmkd.config.recipe import Data, Source
from llmkd.data.reading.problems import ErrorCollector
from llmkd.data.reading.row_checks import check_row

#: name, row, and how llmkd answers it in format alpaca: read (""), or a line that ends so.
LAYOUTS = [json.loads(line) for line in (Path(__file__).parent / "public_layouts.jsonl").read_text().splitlines()]
ASKED, TOLD = "Name a river in Kenya, please.", "The Tana is a river in Kenya."
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]
ROWS = {
    "alpaca": {"instruction": ASKED, "output": TOLD},
    "chat": {"messages": MESSAGES},
    "prompt_completion": {"prompt": ASKED, "completion": TOLD},
    "text": {"text": TOLD},
}


def checked(row: dict, **settings) -> tuple[dict, list[str], Counter]:
    problems, unread = ErrorCollector(), Counter()
    source = Source(**{"path": "t.jsonl", **settings, "ignore": tuple(settings.get("ignore", ()))})
    assert [*data_contradictions(Data(train=source), None, 1)] == []
    return check_row(row, "t.jsonl:1", source, problems, unread=unread), problems.found, unread


def proposed(problem: str) -> list[dict]:
    """The settings that a line proposes, as they are pasted: the first, and those with another answer in its place."""
    found = re.search(
        r"[;,:] set ((?:format|fields|roles|where|ignore|chat_template): .*?)(?: \((.*)\))?(?: to (?:train|read) .*|, or .*|;.*)?$", problem
    )
    if not found or "NAME" in found[1]:
        return []
    first, others = yaml.safe_load(f"{{{found[1]}}}"), re.match(r"or (\w+): (.*?)(?:;|$)", found[2] or "")
    return [first, *({**first, "fields": first["fields"] | {others[1]: name}} for name in (others[2].split(" or ") if others else ()))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout["name"])
def test_a_public_layout_is_read_or_refused_with_what_reads_it(layout):
    said, (_, found, _) = layout["said"], checked(layout["row"])
    assert len(found) == bool(said) and all(problem.endswith(f"; {said}") for problem in found)
    works = [settings for problem in found for settings in proposed(problem)]
    assert bool(works) == ("set " in said and "NAME" not in said)
    for settings in works:
        _, problems, unread = checked(layout["row"], **settings)
        assert problems == [], settings
        assert not unread.keys() & {*settings.get("fields", {}).values()}


def test_the_layouts_are_many_and_most_are_read():
    """Guards the table itself: a proposal that is no longer found by `proposed` would be tested by nothing."""
    pasted = [layout["name"] for layout in LAYOUTS if proposed("; " + layout["said"])]
    assert len(LAYOUTS) > 70 and len(pasted) > 45


MEANINGS = {
    "a system message": "system_prompt sysPrompt preamble persona bot_persona personality scenario custom_system_message developer_instructions",
    "the functions that may be called": "tool_schema toolSchemas available_functions function_definitions apis tools_json",
    "calls of functions, or what these gave": "tool_calls function_call tool_results",
    "earlier turns": "history chat_history past past_user_inputs previous_turns prior_messages conversation_history",
    "examples that the prompt shows": "few_shot fewShotExamples shots demonstrations exemplars in_context_examples positive_examples",
    "the choices of a question": "choices options option_a answer_choices",
    "an answer's reasoning": "reasoning thinking cot chain_of_thought rationale deepseek_reasoning gemini_thinking_trajectory explanation",
    "something else than text": "image images image_url audio video_path screenshots",
    "one half of a preference": "rejected response_rejected losing_response response_b",
}


@pytest.mark.parametrize("what", MEANINGS)
def test_a_column_with_a_meaning_is_refused_in_every_format(what):
    for name, format in itertools.product(MEANINGS[what].split(), ("alpaca", "chat", "prompt_completion")):
        for value in ("some words", ["some", "words"]):
            row = ROWS[format] | {name: value}
            _, problems, _ = checked(row, format=format)
            assert len(problems) == 1 and f"may hold {what}" in problems[0] and f"ignore: [{name}]" in problems[0], (name, format, value)
            for settings in proposed(problems[0]):
                assert checked(row, **{"format": format, **settings})[1] == []
            assert checked(row, format=format, ignore=[name])[1] == []
        for nothing in (None, "", " ", "None", "[]", [], {}, [[]], [None], {"a": ""}):
            assert checked(ROWS[format] | {name: nothing}, format=format)[1] == []


@pytest.mark.parametrize("format", ["alpaca", "prompt_completion"])
@pytest.mark.parametrize(
    "name", "query question context passage documents definition problem instructions inputs retrieved_contexts".split()
)
def test_a_part_of_a_prompt_that_is_not_read_is_refused(format, name):
    row = ROWS[format] | {name: "some words"}
    _, (problem,), _ = checked(row, format=format)
    assert "may hold a part of a prompt" in problem
    if format == "alpaca":
        (settings,) = proposed(problem)
        assert settings == {"fields": {"input": name}} and checked(row, **settings)[0]["input"] == "some words"


BENIGN = {
    **dict.fromkeys("id source category url split lang topic title author license subject domain topic_name".split(), "some words"),
    **dict.fromkeys("persona_id system_fingerprint document_url reasoning_effort context_source question_type tool_names".split(), "x y"),
    **dict.fromkeys("score rating num_tools history_length image_count reasoning_tokens few_shot_count thinking_budget".split(), 3),
    **dict.fromkeys("has_tools uses_reasoning synthetic redacted is_human human_verified".split(), False),
    **dict.fromkeys(("num_correct", "pass_rate", "incorrect_count"), 0),
    "original_question": "some words",
    "reasoning": "on",
    "toxic": False,
    "is_correct": True,
    "meta": {"persona_id": 3, "split": "train"},
    "operating_system": "Linux",
    "status": "done",
    "selected": 0,
    "quality": "good",
    "label": "no",
    "moderation": [{"flagged": False}],
}


@pytest.mark.parametrize("format", ROWS)
def test_columns_that_say_nothing_to_the_model_are_counted_only(format):
    _, problems, unread = checked(ROWS[format] | BENIGN, format=format)
    assert problems == [] and unread == dict.fromkeys(BENIGN, 1)


def test_a_copy_of_what_is_read_loses_nothing():
    """Such as UltraChat's prompt, which is the first message, and a preference's better half where messages are the same."""
    copies = {
        "prompt": ASKED.upper(),
        "instruction": f"{ASKED} \n".replace(" a ", "  a "),
        "chosen": MESSAGES,
        "history": json.dumps(MESSAGES[:1]),
    }
    _, problems, unread = checked(ROWS["chat"] | copies, format="chat")
    assert problems == [] and unread == dict.fromkeys(copies, 1)
    for name, value in (("prompt", ASKED + " Now."), ("history", [["river", "Tana"]]), ("rejected", MESSAGES), ("context", "Kenya")):
        assert len(checked(ROWS["chat"] | {name: value}, format="chat")[1]) == 1, name


BAD = [
    *(
        {name: False}
        for name in "accepted is_correct isValid approved passed answer_is_correct label kto_tag is_safe helpful chosen selected upvoted".split()
    ),
    *({name: "False"} for name in ("is_correct", "accepted", "label")),
    {"is_correct": "0"},  # as a table has it
    *({name: True} for name in "rejected is_bad wrong incorrect toxic invalid discarded".split()),
    {"correct": 0},
    {"solution_is_valid": "No"},
    {"status": "rejected"},
    {"review_status": "Rejected"},
    {"quality": "bad"},
    {"quality": "low"},
    {"verdict": "incorrect"},
    {"feedback": "thumbs_down"},
    {"meta": {"review": {"accepted": False}}},
]


@pytest.mark.parametrize("mark", BAD, ids=str)
def test_a_row_that_says_it_is_bad_is_refused_with_the_choice_of_the_others(mark):
    for format in ROWS:
        _refused_with_the_others(format, mark)


def _refused_with_the_others(format, mark):
    row = ROWS[format] | mark
    _, (problem,), _ = checked(row, format=format)
    ((name, value),) = mark.items()
    path, value = (name, value) if name != "meta" else ("meta.review.accepted", False)
    assert problem.startswith(f"t.jsonl:1: {path} is {value!r}: it may say that the answer is a bad one") and f"ignore: [{name}]" in problem
    (settings,) = proposed(problem)
    assert settings["where"].keys() == {path} and checked(row, format=format, **settings)[1] == []
    assert checked(row, format=format, ignore=[name])[1] == []


@pytest.mark.parametrize(
    "mark", [*BAD[:-7], {"meta": {"accepted": False}}, {"status": "rejected"}, {"quality": "bad"}, {"rating": "poor"}], ids=str
)
def test_a_turn_that_says_it_is_bad_is_refused(mark):
    ((name, value),) = mark.items()

    def talk(answer: dict, asked: dict | None = None) -> dict:
        return {"messages": [MESSAGES[0] | (asked or {}), MESSAGES[1] | answer]}

    _, (problem,), _ = checked(talk(mark), format="chat")
    assert problem.startswith(f"t.jsonl:1: messages[1].{name}") and f"ignore: [{name}]" in problem
    assert checked(talk(mark), format="chat", ignore=[name])[1] == []
    for settings in proposed(problem):
        found, problems, _ = checked(talk(mark), format="chat", **settings)
        assert problems == [] and found["messages"][1]["train"] is False
    assert bool(proposed(problem)) == (value is False or value == 0)
    if name not in ("label", "kto_tag"):  # which may be a mark of what is trained on, whoever says it
        assert checked(talk({}, mark), format="chat")[1] == []


@pytest.mark.parametrize(
    "mark", [{"score": 0}, {"reward": 0.0}, {"rating": 1}, {"is_correct": True}, {"quality": "good"}, {"rejected": False}], ids=str
)
def test_numbers_and_good_marks_are_left_alone(mark):
    _, problems, _ = checked({"messages": [MESSAGES[0], MESSAGES[1] | mark]}, format="chat")
    assert problems == []


def test_a_column_inside_an_object_is_named_by_its_path():
    row = {"translation": {"en": ASKED, "de": TOLD, "fr": "x"}, "meta": {"a": 1}, "meta.b": 2}
    settings = {"format": "prompt_completion", "fields": {"prompt": "translation.en", "completion": "translation.de"}}
    found, problems, unread = checked(row, **settings)
    assert (found["prompt"], found["completion"], problems) == (ASKED, TOLD, [])
    assert unread == {"translation.fr": 1, "meta": 1, "meta.b": 1}
    _, (problem,), _ = checked({"translation": {"en": ASKED}}, **settings)
    assert "no column 'translation.de'" in problem
    own = checked({"a.b": ASKED, "a": {"b": "x"}, "text": TOLD}, format="text", fields={"text": "a.b"})
    assert own[0]["text"] == ASKED  # a column of that very name comes first
    assert checked({"a": {"b": {"c": TOLD}}}, format="text", fields={"text": "a.b.c"})[0]["text"] == TOLD


@pytest.mark.parametrize(
    "system",
    ["Be brief.", [{"type": "text", "text": "Be brief."}], {"parts": [{"text": "Be brief."}]}, {"role": "system", "content": "Be brief."}],
    ids=str,
)
def test_a_system_message_may_be_parts_or_a_message(system):
    found, problems, _ = checked(ROWS["chat"] | {"system": system}, format="chat")
    assert found["system"] == "Be brief." and problems == []
    assert len(checked(ROWS["chat"] | {"system": {"parts": [{"image": "x"}]}}, format="chat")[1]) == 1
    assert len(checked(ROWS["chat"] | {"system": {"text": "x"}}, format="chat")[1]) == 1


def test_an_optional_column_that_is_null_in_the_first_row_is_proposed_too():
    rows = [{"question": ASKED, "context": context, "answer": TOLD} for context in (None, "", "some words")]
    talks = [{"conversations": MESSAGES, "system_prompt": system} for system in (None, "", "Be brief.")]
    for first, *others in (rows, talks):
        (settings,) = proposed(checked(first)[1][0])
        assert [checked(row, **settings)[1] for row in others] == [[], []]


def test_the_choice_of_rows_inside_an_object_works(read, refused):
    lines = "".join(json.dumps({"meta": {"q": ASKED, "accepted": good}, "answer": str(good)}) + "\n" for good in (False, True))
    fields = {"instruction": "meta.q", "output": "answer"}
    (problem,) = refused(lines, fields=fields)
    (settings,) = proposed(problem)
    assert [row["output"] for row in read(lines, fields=fields, **settings).rows] == ["True"]


def test_the_choice_of_rows_that_is_proposed_works_in_a_table(read, refused):
    table = "instruction,output,is_correct\nq,a,True\nq,b,False\n"
    (problem,) = refused(table, "t.csv")
    (settings,) = proposed(problem)
    assert [row["output"] for row in read(table, "t.csv", **settings).rows] == ["a"]


def test_a_line_of_many_columns_still_ends_with_its_proposal():
    row = {f"a_column_with_a_long_name_{i}": i for i in range(60)} | {"question": ASKED, "answer": TOLD}
    _, (problem,), _ = checked(row)
    assert problem.endswith("and 56 more; set fields: {instruction: question, output: answer}")


@pytest.mark.parametrize("given", [{"ignore": ["note"]}, {"fields": {"teacher_context": "t"}, "ignore": ["note"]}], ids=str)
def test_what_a_recipe_says_already_stays_in_what_is_proposed(given):
    """Each line is pasted in place of the one that there is."""
    base = {"instruction": ASKED, "output": TOLD, "note": "n", "t": "hint"}
    for name, value in itertools.chain(
        {"persona": "p", "rejected": "r", "context": "c"}.items(), {"skip": True, "is_valid": False}.items()
    ):
        _, (problem,), _ = checked(base | {name: value}, **given)
        assert f"ignore: [note, {name}]" in problem
        for settings in proposed(problem):
            assert checked(base | {name: value}, **{**given, **settings})[1] == []
            assert "fields" not in settings or settings["fields"].items() >= given.get("fields", {}).items()


def test_fields_and_conditions_of_a_recipe_stay_in_what_is_proposed_for_marks():
    settings = {"format": "chat", "fields": {"messages": "talk"}, "where": {"lang": "en"}}
    row = {"talk": [MESSAGES[0], MESSAGES[1] | {"is_correct": False}], "lang": "en"}
    (said,) = proposed(checked(row, **settings)[1][0])
    assert said == {"fields": {"messages": "talk", "train": "is_correct"}} and checked(row, **{**settings, **said})[1] == []
    row = {"talk": MESSAGES, "lang": "en", "is_correct": False}
    (said,) = proposed(checked(row, **settings)[1][0])
    assert said == {"where": {"lang": "en", "is_correct": True}}
