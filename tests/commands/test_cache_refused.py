"""What a teacher cache is refused for: damage, another run than it was made for, another attempt's folder; and mistakes in writing one."""

import json
import shutil
from pathlib import Path

import pytest

from llmkd.cli import main
from llmkd.commands.cache import cache
from llmkd.errors import UserError
from llmkd.training import prepare as preparing
from llmkd.training.run import run
from tests.conftest import plain_recipe
from tests.kit.cache import from_cache


def refusal(recipe) -> str:
    with pytest.raises(UserError) as info:
        run(recipe)
    assert not Path(recipe.output_dir).exists()
    return str(info.value)


def test_one_flipped_bit_is_found_and_the_shard_named(make_recipe, damaged):
    shard = damaged() / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 4
    shard.write_bytes(raw)
    words = refusal(make_recipe(teacher={"cache": {"path": str(shard.parent)}}))
    assert "teacher.cache.path" in words and "shard-00000.safetensors" in words and "checksum" in words


def test_a_missing_or_short_shard_and_a_changed_header_are_named(make_recipe, damaged):
    folder = damaged()
    shard, header = folder / "shard-00000.safetensors", folder / "cache.json"
    raw, text = shard.read_bytes(), header.read_text()
    recipe = make_recipe(teacher={"cache": {"path": str(folder)}})
    shard.write_bytes(raw[:-100])
    assert "shard-00000.safetensors" in refusal(recipe)
    shard.unlink()
    assert "shard-00000.safetensors is missing" in refusal(recipe)
    shard.write_bytes(raw)
    header.write_text(text.replace('"vocab": ', '"vocab": 1'))
    assert "cache.json is damaged" in refusal(recipe)
    header.unlink()
    assert "llmkd cache writes one" in refusal(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data__max_length": 110, "data__too_long": "truncate"},
            ["lacks", "data.train", "data.max_length 256, now 110", "data.too_long drop, now truncate"],
        ),
        ({"data__train": "held"}, ["lacks 9 of 9 examples of data.train", "held.jsonl:1", "the training data"]),
        ({"data__validation": "held"}, ["lacks 9 of 9 examples of the held-out rows", "held.jsonl:1"]),
        ({"teacher__model": "stranger"}, ["was made by a teacher on another base", "with another adapter, or with none"]),
        ({"teacher__model": "adapter"}, ["by a teacher with dtype float32, not float64"]),
        ({"teacher__cache__kind": "hidden"}, ["teacher.cache.kind: found hidden", "was made with topk"]),
        ({"teacher__cache__k": 5}, ["teacher.cache.k: found 5"]),
    ],
)
def test_another_run_than_the_cache_was_made_for_is_refused_with_what_differs(world, caches, make_recipe, changes, words):
    def substituted(name, value):
        if name.startswith("data__") and value == "held":
            return {"path": str(world / "held.jsonl")}
        return str(world / value) if name == "teacher__model" else value

    recipe = from_cache(make_recipe, caches, "topk", "x", **{name: substituted(name, value) for name, value in changes.items()})
    said = refusal(recipe)
    assert all(word in said for word in words), said


def test_another_tokenizer_or_chat_template_is_refused(world, caches, make_recipe, tmp_path):
    other = tmp_path / "student"
    shutil.copytree(world / "student", other)
    file = other / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(text))
    assert "was made with another tokenizer" in refusal(from_cache(make_recipe, caches, "topk", "x", student__model=str(other)))
    shutil.copy(world / "student" / "tokenizer.json", file)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (other / name).exists():
            (other / name).write_text((other / name).read_text().replace("<|end|>", "<|end|> "))
    assert "was made with another chat template" in refusal(from_cache(make_recipe, caches, "topk", "x", student__model=str(other)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss__divergence": "reverse_kl"}, "loss.divergence: found reverse_kl"),
        ({"loss__temperature": 2.0}, "loss.temperature: found 2"),
        ({"checkpoint__best_by": "top1_agreement", "data__validation_fraction": 0.2}, "checkpoint.best_by: found top1_agreement"),
    ],
)
def test_samples_are_refused_for_what_they_are_not_right_for(caches, make_recipe, changes, words):
    assert words in refusal(from_cache(make_recipe, caches, "sampled", "x", **changes))


def test_two_attempts_never_write_one_cache(make_recipe, tmp_path):
    """One would take the other's unfinished files for those of an attempt that was killed."""
    from llmkd.output.run_folder import lock_folder

    recipe = make_recipe(teacher__cache={"path": str(tmp_path / "cache"), "k": 8})
    with lock_folder(tmp_path / "cache"), pytest.raises(UserError, match=r"teacher.cache.path: .*cache is in use by"):
        cache(recipe)
    cache(recipe)


def test_a_cache_is_not_written_over_by_another(caches, make_recipe):
    with pytest.raises(UserError, match="holds another teacher cache .*provenance.teacher.dtype: float32 -> float64"):
        cache(make_recipe(teacher__cache__path=str(caches / "narrow"), teacher__cache__k=8, data__validation_fraction=0.2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "teacher.cache.path: not given"),
        ({"teacher": {"cache": {"path": "x"}}}, "teacher.model: not given"),
        ({"teacher__cache__path": "x", "loss__kd_ratio": 0}, "loss.kd_ratio: found 0"),
        (
            {"teacher__cache__path": "x", "teacher__cache__num_samples": 5},
            "teacher.cache.num_samples: is of kind sampled, and kind is not given",
        ),
        ({"teacher__cache__path": "recipe.yaml"}, "teacher.cache.path: recipe.yaml is a file"),
        ({"teacher__cache__path": "x", "data__streaming": True, "train__max_steps": 3}, "data.streaming: found true"),
    ],
)
def test_mistakes_in_writing_are_named_before_anything_is_written(make_recipe, changes, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as info:
        cache(make_recipe(**changes))
    assert words in str(info.value) and not Path("x").exists()


@pytest.mark.parametrize(("at", "options"), [("alpha", {"lora_alpha": 1}), ("order", {})])
def test_an_adapter_that_is_read_otherwise_is_another_teacher(world, caches, make_recipe, tmp_path, at, options):
    """The same weights scaled by another lora_alpha; but the order in which its modules are listed says nothing."""
    shutil.copytree(world / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": sorted(config["target_modules"])[::-1]} | options))
    teacher = {"model": str(tmp_path / "adapter"), "dtype": "float32", "cache": {"path": str(caches / "narrow")}}
    recipe = make_recipe("x", teacher=teacher, train__max_steps=2)
    if at == "alpha":
        assert "was made by a teacher with another adapter" in refusal(recipe)
    else:
        run(recipe)


def test_a_base_that_is_read_otherwise_is_another_teacher(world, caches, make_recipe, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    teacher = {"model": str(world / "adapter"), "base": str(tmp_path / "teacher"), "dtype": "float32"}
    said = refusal(make_recipe("x", teacher=teacher | {"cache": {"path": str(caches / "narrow")}}))
    assert "was made by a teacher on another base" in said and "dtype" not in said and "adapter, or" not in said


def test_the_settings_that_a_cache_was_made_by_may_stay_in_the_recipe(make_recipe, tmp_path):
    for n, options in enumerate(
        (
            {"kind": "hidden", "hidden_dtype": "int8"},
            {"kind": "topk", "k": 9, "value_bits": 5},
            {"kind": "sampled", "num_samples": 7, "temperature": 2.0, "seed": 3},
        )
    ):
        recipe = make_recipe(
            f"out{n}", teacher__cache={"path": str(tmp_path / f"{n}")} | options, loss__temperature=2.0, train__max_steps=2
        )
        cache(recipe)
        run(recipe)


@pytest.mark.parametrize("temperatures", [[1.0, 2.0], [2.0, 1.0]])
def test_an_arm_that_samples_are_not_right_for_is_named_before_anything_runs(world, caches, tmp_path, capsys, temperatures):
    """Whichever arm of the group reads the cache for all."""
    base = plain_recipe(world, tmp_path / "none") | {"teacher": {"cache": {"path": str(caches / "sampled")}}}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    sweep = {"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "grid": {"loss.temperature": temperatures}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    assert main(["train", "--config", str(tmp_path / "sweep.yaml")]) == 2
    err = capsys.readouterr().err
    assert "arm temperature-2: loss.temperature: found 2" in err and "temperature-1:" not in err
    assert not (tmp_path / "sweep").exists()


def test_a_cache_of_an_earlier_version_which_took_samples_of_the_weights_is_read_and_not_continued(make_recipe, world, damaged):
    import hashlib

    from llmkd.model_folder.identity import config_hash, sampled_fingerprint
    from llmkd.training.prepare import prepare

    folder = damaged()
    header = json.loads((folder / "cache.json").read_text())
    del header["checksum"]
    for name, model in (("base", "teacher"), ("adapter", "adapter")):
        header["provenance"]["teacher"][name] = f"{sampled_fingerprint(world / model, 'm')} {config_hash(world / model, 'm')}"
    checksum = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (folder / "cache.json").write_text(json.dumps(header | {"checksum": checksum}))
    made_by = {"model": str(world / "adapter"), "dtype": "float32"}
    prepare(make_recipe(teacher=made_by | {"cache": {"path": str(folder)}}, data__validation_fraction=0.2))
    with pytest.raises(UserError, match="by a teacher with another adapter, or with none"):
        prepare(
            make_recipe(teacher=made_by | {"model": str(world / "teacher"), "cache": {"path": str(folder)}}, data__validation_fraction=0.2)
        )
    kind = {"kind": "topk", "k": 4096, "value_bits": 16, "path": str(folder)}
    with pytest.raises(UserError, match="an earlier version recorded samples of the weights only: runs read that cache, and it cannot"):
        cache(make_recipe(teacher=made_by | {"cache": kind}, data__validation_fraction=0.2))


def test_a_cache_over_another_vocabulary_is_refused(make_recipe, caches, monkeypatch):
    """With one and the same tokenizer: a model without rows for its last entries."""
    real = preparing.check_cache
    monkeypatch.setattr(preparing, "check_cache", lambda *given: real(*given[:-1], given[-1] - 1))
    assert "over 640 tokens, and the models of this run have 639; write another" in refusal(from_cache(make_recipe, caches, "topk", "out"))
