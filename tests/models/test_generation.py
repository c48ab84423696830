"""The saved student's generation config: what it was trained from, and the end tokens that training taught."""

import json
import shutil

import pytest

from llmkd.cli import main
from llmkd.errors import UserError
from llmkd.model_folder.generation import generation_settings, stopping_at, stops_at
from llmkd.training.run import run


def settings(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


@pytest.fixture
def never_stops(world, tmp_path):
    """A base whose generation stops at token 5 alone, with settings that transformers loads and does not save."""
    shutil.copytree(world / "student", tmp_path / "base")
    held = {"eos_token_id": [5], "temperature": 0.6, "_from_model_config": True}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(held))
    return str(tmp_path / "base")


def test_adapter_and_merged_model_stop_where_answers_end_and_say_so(make_recipe, never_stops, tmp_path, capsys):
    from transformers import GenerationConfig

    from llmkd.model_folder.files import find
    from llmkd.models import pretrained
    from llmkd.models.adapters import load

    run(make_recipe(student__model=never_stops, train__max_steps=2))
    assert main(["export", str(tmp_path / "out")]) == 0
    for folder in ("adapter", "merged"):
        assert settings(tmp_path / "out" / folder) == {"eos_token_id": [5, 1], "temperature": 0.6}
        assert "- Answers end with `<|end|>`, where generation stops" in (tmp_path / "out" / folder / "README.md").read_text()
        assert GenerationConfig.from_pretrained(tmp_path / "out" / folder).eos_token_id == [5, 1]
    assert "answers end with '<|end|>' (1), at which the saved student's generation stops" in capsys.readouterr().err
    files = find(str(tmp_path / "out/adapter"), "s")
    adapted = load(pretrained.load_pretrained(files.base, "s"), files, "s")
    assert adapted.generation_config.eos_token_id == [5, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_model_trained_in_full_stops_there_too(make_recipe, never_stops, tmp_path, streaming):
    how = {"student__method": "full", "student__lora": None, "data__streaming": streaming}
    run(make_recipe(student__model=never_stops, train__max_steps=2, **how))
    assert settings(tmp_path / "out/model") == {"eos_token_id": [5, 1], "temperature": 0.6}


def test_an_adapters_own_settings_come_before_its_bases(tmp_path):
    base, adapter, config = tmp_path / "base", tmp_path / "adapter", {"text_config": {"eos_token_id": 7}, "pad_token_id": 0}
    base.mkdir(), adapter.mkdir()
    assert generation_settings(config, (None, base), "s") == {"eos_token_id": 7, "pad_token_id": 0}
    (base / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert generation_settings(config, (adapter, base), "s") == {"eos_token_id": 3}
    (adapter / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert generation_settings(config, (adapter, base), "s") == {"eos_token_id": [3, 4]}


@pytest.mark.parametrize("eos", ['"</s>"', '["</s>"]', "[2.5]"])
def test_ids_that_are_none_are_named(tmp_path, eos):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    with pytest.raises(UserError, match=r"^s: .*generation_config.json has eos_token_id: .*, expected a token's id or a list of them"):
        generation_settings({}, (tmp_path,), "s")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [2, 1]}),
        ({"eos_token_id": [3, 2], "_from_model_config": True}, {"eos_token_id": [3, 2, 1]}),
        ({"eos_token_id": [3, 1], "_from_model_config": True}, {"eos_token_id": [3, 1], "_from_model_config": True}),
        ({"eos_token_id": None, "top_k": 4}, {"eos_token_id": 1, "top_k": 4}),
        ({}, {"eos_token_id": 1}),
    ],
)
def test_end_tokens_are_added_behind_those_that_are_there(before, after):
    assert stopping_at(before, {1}) == after and 1 in stops_at(after)
