"""Every setting says whether a resumed run may change it, which caches on disk follow from it, and whether it is a path."""

import dataclasses

import pytest

from llmkd.config.data import Data, Source
from llmkd.config.dotted import flatten
from llmkd.config.fields import metadata, shaping
from llmkd.config.recipe import Recipe
from llmkd.config.schema import describe, may_change_on_resume, section_of

SETTINGS = [path for path, *_ in describe()]

#: What a resumed run may change. Everything else is what it learns from, and stays.
CHANGEABLE = (
    *("output_dir", "report_to", "push_to_hub", "push_to_hub.repo", "push_to_hub.private"),
    *("student.gradient_checkpointing", "student.keep_encoded", "teacher.device", "teacher.share_base", "loss.chunk_size"),
    *("teacher.server", "teacher.requests", "teacher.timeout", "teacher.patience", "teacher.api_key_env"),
    *("teacher.shard", "train.shard", "train.timeout"),
    *("on_policy.batch_size", "on_policy.validation_prompts", "on_policy.record"),
    *(path for path in SETTINGS if path.startswith("on_policy.engine.") and path.rpartition(".")[2] not in ("push_every", "importance")),
    *("train.compile", "train.log_every", "train.micro_batch_size", "train.micro_batch_tokens"),
    *("validation.every", "validation.micro_batch_size", "validation.teacher_check", "validation.samples", "validation.sample_tokens"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.best_by"),
    *("data.cache_dir", "data.packing", "data.share_prefixes", "data.workers"),
    *(path for path in SETTINGS if path.split(".")[:2] == ["data", "choices"]),
)
PATHS = {
    "output_dir": "output",
    "student.model": "model",
    "student.base": "model",
    "student.tokenizer": "model",
    "teacher.model": "model",
    "teacher.base": "model",
    "teacher.cache.path": "output",
    "data.train.path": "data",
    "data.validation.path": "data",
    "data.choices.path": "data",
    "data.cache_dir": "output",
    "on_policy.engine.adapters": "output",
}


def declared(path: str, kind=Recipe):
    *sections, last = path.split(".")
    for section in sections:
        kind = section_of(kind, section)
    return metadata(kind, last)


def test_every_setting_says_whether_it_may_change_on_resume():
    assert len(SETTINGS) > 100
    undecided = [path for path in SETTINGS if declared(path).changeable is None]
    assert not undecided, "declare these fields by fixed(...) or changeable(...)"


def test_what_a_resumed_run_may_change():
    assert {path for path in SETTINGS if may_change_on_resume(path)} == set(CHANGEABLE)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("teacher.0.device", True),
        ("teacher.1.cache.path", False),
        ("data.train.0.limit", False),
        ("data.choices.fields.prompt", True),
        ("loss.divergence_options.beta", False),
        ("student.architecture.hidden_size", False),
        ("seed", False),
        ("no.such.setting", False),
    ],
)
def test_items_of_lists_and_settings_without_a_field(path, expected):
    assert may_change_on_resume(path) is expected


def test_what_shapes_the_caches():
    """The token cache's key holds these values in this order; a teacher cache knows its examples by their content as well."""
    source = Source(path="x", format="chat", chat_template=False)
    data = Data(max_length=9, too_long="truncate", train_on_input=True, teacher_context="c")
    shape = {"max_length": 9, "too_long": "truncate", "train_on_input": True, "teacher_context": "c"}
    assert list(shaping(source, "tokens").items()) == [
        ("format", "chat"),
        ("chat_template", False),
        ("answers", "all"),
        ("call_values", "refuse"),
    ]
    assert list(shaping(data, "tokens").items()) == list(shaping(data, "teacher").items()) == list(shape.items())
    assert shaping(source, "teacher") == {}
    every = {cache: {path for path in SETTINGS if cache in declared(path).shapes} for cache in ("tokens", "teacher")}
    assert every["teacher"] == {f"data.{name}" for name in shape}
    assert every["tokens"] == every["teacher"] | {
        f"data.{part}.{name}"
        for part in ("train", "validation", "choices")
        for name in ("format", "chat_template", "answers", "call_values")
    }


def test_which_settings_are_paths():
    assert {path: declared(path).path for path in SETTINGS if declared(path).path} == PATHS


def test_flatten_keeps_an_empty_mapping_as_a_value():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [{"e": 2}]}
    assert flatten({}) == {}
    two = dataclasses.replace(Data(), train=(Source(path="x"), Source(path="y")))
    assert flatten(two, lists=True)["train.1.path"] == "y" and flatten(two)["train"] == two.train
