"""Mistakes that a run refuses: teachers that do not fit, and settings that cannot be; one line each, and nothing is left."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


def other_depth(world: Path, to: Path) -> str:
    tensors = load_file(world / "adapter/adapter_model.safetensors")
    extra = {k.replace("layers.1", "layers.2"): v.clone() for k, v in tensors.items() if "layers.1" in k}
    return _adapter(world, to, tensors | extra)


def shallow(world: Path, to: Path) -> str:
    return _adapter(world, to, {k: v for k, v in load_file(world / "adapter/adapter_model.safetensors").items() if "layers.1" not in k})


def not_finite(world: Path, to: Path) -> str:
    tensors = load_file(world / "adapter/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    return _adapter(world, to, tensors)


def truncated(world: Path, to: Path) -> str:
    path = Path(_adapter(world, to, load_file(world / "adapter/adapter_model.safetensors"))) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return str(to)


def another_base(world: Path, to: Path) -> str:
    from llmkd.model_folder.identity import fingerprint

    _adapter(world, to, load_file(world / "adapter/adapter_model.safetensors"))
    (to / "llmkd.json").write_text(json.dumps({"base_fingerprint": fingerprint(world / "stranger", "x")}))
    return str(to)


def pickled(world: Path, to: Path) -> str:
    shutil.copytree(world / "teacher", to)
    (to / "model.safetensors").rename(to / "pytorch_model.bin")
    return str(to)


def lacking(world: Path, to: Path) -> str:
    shutil.copytree(world / "teacher", to)
    tensors = load_file(to / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return str(to)


def other_tokenizer(world: Path, to: Path) -> str:
    shutil.copytree(world / "teacher", to)
    state = json.loads((to / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    a, b = sorted(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (to / "tokenizer.json").write_text(json.dumps(state))
    return str(to)


def _adapter(world: Path, to: Path, tensors: dict) -> str:
    shutil.copytree(world / "adapter", to)
    save_file(tensors, to / "adapter_model.safetensors")
    return str(to)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_depth, "holds left-over"),
        (shallow, "lacks"),
        (not_finite, "not finite"),
        (truncated, "should be"),
        (another_base, "other weights"),
        (pickled, "pickled"),
        (lacking, "lacks 1 tensors"),
        (other_tokenizer, "not the same"),
        (lambda w, to: str(to), "there is no folder"),
        (lambda w, to: "nobody/nothing-of-the-kind", "could not be downloaded from the hub"),
        (lambda w, to: str(w / "train.jsonl"), "is a file"),
        (lambda w, to: str(w), "neither config.json nor adapter_config.json"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(command, world, tmp_path, make, words):
    code, lines = command("--teacher.model", make(world, tmp_path / "bad"))
    assert code == 2 and len(lines) == 1 and words in lines[0] and "teacher.model" in lines[0], lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.train.path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.max_length", "1000"], "256 positions"),
        (["--data.max_length", "5"], "none of"),
        (["--student.lora.target_modules", "[nothing_like_it]"], "student.lora.target_modules"),
        (["--data.train.format", "chat"], "no column 'messages'"),
        (["--student.model", "/dev/null"], "student.model"),
        (["--output_dir", "/proc/nowhere"], "output_dir"),
        (["--data.validation_fraction", "0.001"], "validation_fraction"),
        (["--optim.warmup_steps", "99"], "whole run has 5 steps"),
        (["--student.tokenizer", "builtin:skills", "--student.model", "recipes/nowhere"], "student.model"),
        (["--student.method", "full", "--student.dtype", "float16"], "student.dtype"),
        (["--output_dir", "x" * 300], "File name too long"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(command, tmp_path, arguments, words):
    code, lines = command(*arguments)
    assert code == 2 and lines and words in lines[0], lines
    assert not (tmp_path / "out").exists()
