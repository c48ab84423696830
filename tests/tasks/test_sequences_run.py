"""Runs of encoder-decoder models, from a recipe to the folder that they leave; and what is refused before one."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmkd.commands.export import export
from llmkd.commands.preview_examples import preview
from llmkd.config import loader
from llmkd.data.examples import Draw
from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.kit.processes import assert_one_end, launch, train_each
from tests.kit.sequences import V, saved, speech_model, speech_rows, text_rows, tiny
from tests.kit.sweeps import state

FORMS = {"text_to_text": ("t5", "prompt_completion", text_rows), "speech_recognition": ("whisper", "speech", speech_rows)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sequences")


@pytest.fixture(scope="module")
def recipe(folder):
    made = {}

    def recipe(task: str, name: str, /, **changes):
        family, form, rows = FORMS[task]
        if task not in made:
            (folder / task).mkdir()
            model = saved(tiny(family, 3).float() if family == "t5" else speech_model(), folder / task / "whole")
            train, held = rows(folder / task)
            made[task] = {
                "task": task,
                "student": {"model": str(model), "layers": {"decoder": [0, 2]}, "freeze": "encoder", "method": "full"},
                "teacher": {"model": str(model)},
                "data": {
                    "train": {"path": str(train), "format": form},
                    "validation": {"path": str(held), "format": form},
                    "max_length": 40,
                },
                "loss": {"kd_ratio": 0.5, "temperature": 2},
                "train": {"batch_size": 4, "max_steps": 4, "micro_batch_size": 2},
                "optim": {"lr": 1e-2},
                "validation": {"every": 2, "teacher_check": 0, "error_rates": {"max_tokens": 5}},
                "checkpoint": {"every": 2, "best_by": "wer"},
            }
        (folder / "base.yaml").write_text(json.dumps(made[task] | {"output_dir": str(folder / name)}))
        return loader.load_recipe(folder / "base.yaml", {key.replace("__", "."): value for key, value in changes.items()})

    return recipe


def test_a_speech_student_is_used_by_the_pipeline_and_its_encoder_is_the_teachers(recipe, folder, capsys):
    speech = run(recipe("speech_recognition", "speech", student__keep_encoded=20, validation__error_rates__max_tokens=4))
    said = capsys.readouterr().err
    assert said.count("error_rates.max_tokens: found 4, and 1 of 3 held-out targets are longer") == 1
    assert "encoder layers 0, 1, 2 and decoder layers 0, 2" in said and "its encoder is the student's" in said
    assert "5 from 8,000 Hz" in said and {"wer", "cer"} <= speech["validation"].keys() and speech["best"]["by"] == "wer"
    before, after = (load_file(folder / name / "model.safetensors") for name in ("speech_recognition/whole", "speech/model"))
    frozen = [name for name in after if ".encoder." in name]
    assert len(frozen) > 20 and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["model.decoder.layers.0.fc1.weight"], after["model.decoder.layers.0.fc1.weight"])
    assert "pipeline('automatic-speech-recognition'" in (folder / "speech/model/README.md").read_text()
    best = load_file(export(folder / "speech", checkpoint="2") / "model.safetensors")
    assert best.keys() == after.keys() and not torch.equal(
        best["model.decoder.layers.0.fc1.weight"], after["model.decoder.layers.0.fc1.weight"]
    )
    recognise = transformers.pipeline("automatic-speech-recognition", model=str(folder / "speech/model"))
    assert isinstance(
        recognise({"raw": np.zeros(8000, np.float32), "sampling_rate": 16000}, generate_kwargs={"max_new_tokens": 3})["text"], str
    )


@pytest.mark.slow
def test_an_adapter_resumes_bit_for_bit_and_learns_from_a_cache_as_from_the_teacher(recipe, folder):
    """Also with dropout in the adapter, and prompts that are edited for the student in every epoch."""
    from llmkd.commands.cache import cache

    given = {"student__method": "lora", "student__lora__dropout": 0.2, "student__lora__rank": 2}
    given |= {"data__augment": {"prompt": [{"swap": 0.5}], "teacher_sees": "clean"}}
    train = prepare(recipe("text_to_text", "unused", **given)).train
    drawn, plain = train.batch(range(10), Draw(0, 1, 4)), train.batch(range(10))
    assert not torch.equal(drawn.student.inputs["input_ids"], plain.student.inputs["input_ids"])
    assert all(torch.equal(drawn.teacher.inputs[name], x) for name, x in plain.student.inputs.items())
    assert torch.equal(drawn.student.inputs["decoder_input_ids"], plain.student.inputs["decoder_input_ids"])
    whole = run(recipe("text_to_text", "whole_run", **given))
    run(recipe("text_to_text", "resumed", **given))
    newest = folder / "resumed/checkpoints/step-4"
    for path in sorted(newest.iterdir()):
        path.unlink()
    newest.rmdir()
    (folder / "resumed/summary.json").unlink()
    resumed = run(recipe("text_to_text", "resumed", **given), resume=True)
    assert resumed["validation"] == whole["validation"]
    ours, theirs = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("whole_run", "resumed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("decoder" in name for name in ours) and not any(".encoder." in name for name in ours)
    for kind, own in (("hidden", {}), ("topk", {"teacher__cache__k": V, "teacher__cache__value_bits": 16})):
        cached = given | own | {"teacher__cache__path": str(folder / kind), "teacher__cache__kind": kind}
        cache(recipe("text_to_text", "unused", **cached))
        kept = run(recipe("text_to_text", f"kept_{kind}", **cached))
        known = [name for name in whole["validation"] if kind == "hidden" or not name.startswith("teacher_")]  # whose values have 16 bits
        assert all(kept["validation"][name] == pytest.approx(whole["validation"][name], abs=2e-5) for name in known if name != "perplexity")


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("text_to_text", {"data__packing": True}, "data.packing: set with task: text_to_text"),
        ("text_to_text", {"student__layers": [0]}, "name the layers of each part"),
        ("text_to_text", {"student__layers": {"decoder": [2, 0]}}, "student.layers.decoder: found"),
        ("text_to_text", {"validation__error_rates": None}, "checkpoint.best_by: found wer, which is not measured"),
        ("text_to_text", {"student__keep_encoded": 3}, "student.keep_encoded: set for an encoder that trains, or reads text"),
        ("speech_recognition", {"data__train__format": "prompt_completion"}, "which task: speech_recognition does not read"),
        (
            "causal_lm",
            {"data__train__format": "prompt_completion", "data__validation__format": "prompt_completion"},
            "student.freeze: set with",
        ),
    ],
)
def test_what_does_not_go_is_refused_by_name(recipe, task, changes, said):
    with pytest.raises(UserError, match=said):
        recipe("text_to_text" if task == "causal_lm" else task, "refused", **changes, task=task)


def test_what_is_refused_of_models_and_rows(recipe, folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="validation.error_rates: needs jiwer"):
        patch.setitem(sys.modules, "jiwer", None)
        run(recipe("speech_recognition", "refused"))
    with pytest.raises(UserError, match="data.target_prefix: found 'it is', of which 'it' is no control token"):
        run(recipe("text_to_text", "refused", data__target_prefix="it is"))
    (folder / "bad.jsonl").write_text(json.dumps({"audio": "absent.wav", "text": "one"}) + "\n")
    with pytest.raises(UserError, match="bad.jsonl:1.*absent.wav: No such file"):
        run(recipe("speech_recognition", "refused", data__train__path=str(folder / "bad.jsonl")))
    with pytest.raises(UserError, match="max_tokens: found 48, and the models' 48 positions .* use at most 47"):
        run(recipe("speech_recognition", "refused", validation__error_rates__max_tokens=48))
    with pytest.raises(UserError, match="data.max_length: found 2, .* leave no place in 2; raise it"):
        run(recipe("speech_recognition", "refused", data__max_length=2, data__too_long="truncate"))
    config = folder / "speech_recognition/whole/config.json"
    text = config.read_text()
    config.write_text(text.replace('"apply_spec_augment": false', '"apply_spec_augment": true'))
    with pytest.raises(UserError, match="student.model: its config.json says apply_spec_augment: true"):
        run(recipe("speech_recognition", "refused"))
    config.write_text(text)
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        run(recipe("speech_recognition", "refused", teacher__model=str(folder / "text_to_text/whole")))


def test_targets_that_are_long_or_empty_and_the_teacher_of_a_source(recipe, folder):
    """Of 4 tokens and an end, none, and 8 words; of the decoder's positions a transcript has 48."""
    texts = ("it is 1", " ", "it is it is it is it is")
    rows = folder / "targets.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "what is", "completion": text}) + "\n" for text in texts))
    given = {"data__train__path": str(rows), "data__validation__path": str(rows), "data__max_length": 6}
    cut = prepare(recipe("text_to_text", "unused", **given, data__too_long="truncate"))
    assert [mask.tolist() for _, mask in map(cut.train.example, range(2))] == [[False, *[True] * 5]] * 2
    assert cut.train.row.tolist() == [0, 2] and cut.train.texts == [texts[0], texts[2]] and cut.places[1].endswith("targets.jsonl:3")
    assert cut.train.counts["unsupervised"] == 1 and cut.train.counts["too_long"] == 1
    dropped = prepare(recipe("text_to_text", "unused", **given)).train
    assert dropped.row.tolist() == [0] and dropped.example(0)[0].tolist() == cut.train.example(0)[0].tolist()
    with pytest.raises(UserError, match=r"targets.jsonl:3: its target has 10 tokens, and at most 6 are used"):
        prepare(recipe("text_to_text", "unused", **given, data__too_long="refuse"))
    (both := folder / "both.jsonl").write_text(
        "".join(
            json.dumps({"prompt": "what is " * n, "completion": "it is " * n, "train": i > 0}) + "\n" for i, n in enumerate((1, 1, 9, 9))
        )
    )
    counted = prepare(recipe("text_to_text", "unused", **given | {"data__train__path": str(both)}, data__too_long="truncate")).train.counts
    assert counted["too_long"] == 2  # rows, of whose sources and targets both are cut
    words = folder / "speech_recognition/long.jsonl"
    speech = recipe("speech_recognition", "unused", data__train__path=str(words), data__max_length=128)
    words.write_text("".join(json.dumps({"audio": f"{i}.wav", "text": "a" * n}) + "\n" for i, n in enumerate((45, 46))))
    assert prepare(speech).train.row.tolist() == [0]
    model = str(folder / "text_to_text/whole")
    two = {"teacher": [{"name": name, "model": model, "weight": 1} for name in "ab"], "data__train__teacher": "b"}
    assert prepare(recipe("text_to_text", "unused", **two)).train.teacher_index.tolist() == [1] * 10


@pytest.mark.parametrize(
    ("task", "shown", "counts"),
    [
        ("text_to_text", ["train.jsonl:3", "what is 0 plus 2 ?", "⟦it is 2 .", "⟧"], {"examples": 10, "marked": 0}),
        (
            "speech_recognition",
            ["train.jsonl:3", "source  0.30 s of sound", "<|notimestamps|>⟦two<|endoftext|>⟧"],
            {"targets": 24, "longest": 6},
        ),
    ],
)
def test_rows_are_shown_with_what_is_read_and_what_is_predicted(recipe, task, shown, counts):
    """Of bytes and an end: zero, one, two, three, zero are 5, 4, 4, 6 and 5 targets."""
    numbers = preview(recipe(task, "unused"), example=2, out=(out := io.StringIO()))
    said = out.getvalue()
    at = [said.index(part) for part in shown]
    assert at == sorted(at) and counts.items() <= numbers["data.train"][0].items() and said.count("⟦") == 1


def test_arms_side_by_side_are_what_each_is_alone(recipe, folder):
    """Two adapters on one base, whose frozen encoder's states are kept once."""
    from llmkd.commands.sweep import run_sweep

    given = {"student__method": "lora", "student__lora__rank": 2, "student__lora__dropout": 0.2, "validation__every": None}
    given |= {"checkpoint__best_by": None, "train__max_steps": 2, "student__keep_encoded": 9}
    (folder / "arms.yaml").write_text(loader.dump(recipe("speech_recognition", "base", **given)))
    arms = {"ce": {"loss.kd_ratio": 0}, "kd": {"loss.temperature": 1}}
    (folder / "sweep.yaml").write_text(json.dumps({"output_dir": str(folder / "sweep"), "recipe": "arms.yaml", "arms": arms}))
    out = run_sweep(folder / "sweep.yaml", {}, False)
    assert [group["arms"] for group in state(out)["groups"]] == [["kd", "ce"]]
    alone = run(recipe("speech_recognition", "kd", **given, loss__temperature=1.0))
    ours, theirs = (load_file(of / "adapter/adapter_model.safetensors") for of in (out / "arms/kd", folder / "kd"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)
    assert json.loads((out / "arms/kd/summary.json").read_text())["validation"] == alone["validation"]


@pytest.mark.slow
def test_two_processes_end_at_what_one_does(recipe, folder):
    given, commands = {"student__dtype": "float64", "teacher__dtype": "float64"}, []
    for task in FORMS:
        run(recipe(task, f"{task}_one", **given))
        (folder / f"{task}_two.yaml").write_text(loader.dump(recipe(task, f"{task}_two", **given)))
        commands.append(["--config", str(folder / f"{task}_two.yaml")])
    done = launch(2, train_each, commands)
    assert not done.returncode, done.stderr
    for task in FORMS:
        assert_one_end(folder / f"{task}_one", folder / f"{task}_two")
