"""Settings of data: one source, a list of them, a stream."""

from pathlib import Path

import pytest

from llmkd.config import loader
from tests.kit.settings import BASE, found

SOURCES = BASE.replace("  train: {path: t.jsonl}\n", "  train:\n    - {path: a.jsonl}\n    - path: b.jsonl\n      FORMAT\n")


@pytest.mark.parametrize(
    ("line", "start", "words"),
    [
        (
            "format: alpca",
            "r.yaml:7: data.train.1.format: ",
            ["alpaca, chat, prompt_completion, text, tokens, labelled, audio, image or speech", "did you mean alpaca?"],
        ),
        ("fromat: chat", "r.yaml:7: data.train.1.fromat: ", ["did you mean data.train.1.format?"]),
        ("limit: 0", "r.yaml:7: data.train.1.limit: ", ["found 0", "a whole number >= 1"]),
        ("weight: 0", "r.yaml:7: data.train.1.weight: ", ["found 0", "a number > 0"]),
        ("weight: 1000000000", "r.yaml:7: data.train.1.weight: ", ["found 1000000000", "a number > 0, <= 1000"]),
        ("seed: 3", "r.yaml:7: data.train.1.seed: ", ["without limit"]),
        ("chat_template: 3", "r.yaml:7: data.train.1.chat_template: ", ["found 3", "true or false"]),
        ("fields: [a]", "r.yaml:7: data.train.1.fields: ", ["a mapping"]),
        ("fields: {instruction: 3}", "r.yaml:7: data.train.1.fields.instruction: ", ["found 3"]),
        ("fields: {messages: x}", "r.yaml:7: data.train.1.fields.messages: ", ["no such column", "instruction, input, output"]),
        ("roles: {user: human}", "r.yaml:7: data.train.1.roles: ", ["has no roles"]),
    ],
)
def test_a_bad_setting_in_a_list_of_sources_is_named_where_it_stands(refused, line, start, words):
    found(refused(SOURCES.replace("FORMAT", line)), (start, *words))


SOURCE_CONTRADICTIONS = [
    ("  validation: {path: v.jsonl, weight: 2}", "r.yaml:5: data.validation.weight: ", "only training sources"),
    ("  validation: [{path: v.jsonl}, {path: w.jsonl, weight: 2}]", "r.yaml:5: data.validation.1.weight: ", "only training sources"),
    ("  choices: {path: v.jsonl, weight: 2}", "r.yaml:5: data.choices.weight: ", "only training sources"),
    ("  choices: {path: v.jsonl, format: text}", "r.yaml:5: data.choices.format: ", "no answer that choices could replace"),
    ("  validation: []", "r.yaml:5: data.validation: ", "empty list"),
    ("  validation: [{path: builtin:skill}]", "r.yaml:5: data.validation.0.path: ", "builtin:skills"),
    ("  validation: {path: v, format: chat, chat_template: true}", "r.yaml:5: data.validation.chat_template: ", "always rendered"),
    ("  validation: {path: v, format: alpaca, answers: last}", "r.yaml:5: data.validation.answers: ", "one answer each"),
    ("  validation: {path: v, format: alpaca, call_values: json}", "r.yaml:5: data.validation.call_values: ", "no calls; leave it out"),
    ("  validation: {path: v, format: text, chat_template: true}", "r.yaml:5: data.validation.chat_template: ", "no turns"),
    (
        "  validation: {path: v, format: chat, roles: {usr: human}}",
        "r.yaml:5: data.validation.roles.usr: ",
        "system, developer, user, assistant, tool",
    ),
    ("  validation: {path: v, format: chat, roles: {user: assistant}}", "r.yaml:5: data.validation.roles.user: ", "another role"),
    ("  validation: {path: v, format: text, fields: {txt: x}}", "r.yaml:5: data.validation.fields.txt: ", "it has text"),
    (
        "  validation: {path: v, format: prompt_completion, fields: {prompt: text, completion: text}}",
        "r.yaml:5: data.validation.fields.prompt: ",
        "found 'text', which is also read as completion",
    ),
    ("  validation: {path: v, fields: {instruction: output}}", "r.yaml:5: data.validation.fields.instruction: ", "also read as output"),
    ("  validation: {path: v, format: chat, fields: {role: content}}", "r.yaml:5: data.validation.fields.role: ", "also read as content"),
    ("  validation: {path: v, ignore: [output]}", "r.yaml:5: data.validation.ignore: ", "found 'output', which format alpaca reads"),
    ("  validation: {path: v, format: chat, ignore: [role]}", "r.yaml:5: data.validation.ignore: ", "found 'role'"),
    ("  streaming: true", "r.yaml:5: data.streaming: ", "without train.max_steps"),
    ("  streaming: true\n  validation_fraction: 0.1\ntrain: {max_steps: 3}", "r.yaml:6: data.validation_fraction: ", "use data.validation"),
    ("  streaming: true\ntrain: {max_steps: 3, group_by_length: 2}", "r.yaml:6: train.group_by_length: ", "use 1"),
]


@pytest.mark.parametrize(("text", "start", "words"), SOURCE_CONTRADICTIONS)
def test_what_makes_no_sense_of_a_source_is_named(refused, text, start, words):
    found(refused(BASE + text + "\n"), (start, words))


@pytest.mark.parametrize("train", ["[{path: a}, {path: b}]", "{path: a, weight: 2}", "{path: a, limit: 3, seed: 1}"])
def test_what_a_stream_cannot_do_is_named(refused, train):
    text = BASE.replace("{path: t.jsonl}", train) + "  streaming: true\ntrain: {max_steps: 3}\n"
    found(refused(text), ("r.yaml:4: data.train: ", "data.streaming"))


def test_data_in_one_word_and_several_files_in_one_source(refused):
    assert refused(BASE, {"data": "rows.jsonl"})[0].endswith("a mapping of settings; did you mean {train: {path: rows.jsonl}}?")
    (line,) = refused(BASE, {"data.train.path": ["a.jsonl", "b.jsonl"]})
    assert line.endswith("write a list of sources, data.train: [{path: a.jsonl}, {path: b.jsonl}]")


def test_sources_on_the_command_line(load, refused):
    several = SOURCES.replace("FORMAT", "weight: 2")
    recipe = load(several)
    assert [(Path(s.path).name, s.weight) for s in recipe.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]
    assert load(loader.dump(recipe)) == recipe
    words = ["--data.train", "[{path: c.jsonl}, {path: d.jsonl, format: chat}]", "--data.validation.path", "v.jsonl"]
    recipe = load(BASE, loader.parse_overrides(words))
    assert [s.path for s in recipe.data.train] == ["c.jsonl", "d.jsonl"] and recipe.data.validation.path == "v.jsonl"
    assert load(BASE, loader.parse_overrides(["--data.train.path", "x.jsonl"])).data.train.path == "x.jsonl"
    assert load(several, loader.parse_overrides(["--data.train.1.path", "x.jsonl"])).data.train[1].path == "x.jsonl"
    for name in ("data.train.2.weight", "data.train.2"):
        found(refused(several, {name: 3}), (f"--{name}: ", "data.train is a list of 2; it has no 2, but 0 and 1"))
    found(refused(several, {"data.train.path": "x"}), ("--data.train.path: ", "is a list of 2; name one, such as --data.train.0.path"))
    found(refused(several, {"data.train.1.format": "x"}), ("--data.train.1.format: ", "alpaca, chat"))
    found(refused(BASE, {"data.train": [{"path": "a"}, {"path": "b", "limit": 0}]}), ("--data.train.1.limit: ", "found 0"))
    found(refused(BASE, {"data.train": []}), ("--data.train: ", "not given"))
