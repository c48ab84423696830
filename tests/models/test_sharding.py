"""Models to be sharded are read as they lie in their files; what the processes then do with them is in training/test_parallel.py."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmkd.config.recipe import Lora, Student, Teacher
from llmkd.model_folder.files import ModelFiles
from llmkd.models import pretrained
from llmkd.models.adapters import is_lora_alone
from llmkd.models.kinds import CAUSAL
from llmkd.models.load import LoadContext, _cast_later, load_models
from llmkd.models.parts import whole as whole_of
from llmkd.models.pretrained import load_as_stored, load_pretrained
from llmkd.models.probe import hidden_and_gradients
from llmkd.models.sharding import reshard
from llmkd.models.shared_weights import storage_bytes
from tests.kit.families import tiny
from tests.models.test_last_layer import view


def test_a_model_that_is_cast_later_is_the_one_that_is_cast_as_it_is_read(tmp_path):
    """Gemma's scale of embeddings is a buffer in the type of the weights: the square root of the width, which bfloat16 rounds."""
    tiny("gemma3_text", torch.bfloat16, hidden_size=40).save_pretrained(tmp_path)
    right = load_pretrained(tmp_path, "student.model", "float32")
    model, types = load_as_stored(tmp_path, "student.model", "float32", "auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and set(types.values()) == {torch.float32}
    for p in model.parameters():
        p.data = p.data.to(types[id(p)])
    for kind in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(one, kind)()) for one in (right, model))
        assert expected.keys() == found.keys()
        assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in expected.items())
    assert model.config.dtype == right.config.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_teacher_and_student_on_one_base_hold_it_once_in_parts(tmp_path, mesh_of_one, tied):
    """And each says what it says alone, before and after a step's passes: each has its own adapter."""
    tiny("llama", torch.float32, vocab_size=96, tie_word_embeddings=tied).save_pretrained(tmp_path)
    settings = [Student(model=str(tmp_path), lora=Lora(rank=2))], [("teacher", Teacher(model=str(tmp_path)))]
    (own,), (theirs,) = load_models(*settings, LoadContext(96, "cpu"))
    (student,), (teacher,) = load_models(*settings, LoadContext(96, "cpu", sharded={"student": mesh_of_one, "teacher": mesh_of_one}))
    every = sum(p.nbytes for p in teacher.parameters())
    shared = storage_bytes(student).keys() & storage_bytes(teacher).keys()
    assert sum(storage_bytes(teacher)[place] for place in shared) == every == sum(p.nbytes for p in theirs.parameters())
    for _ in range(2):
        for found, expected in ((student, own), (teacher, theirs)):
            assert all(map(torch.equal, hidden_and_gradients(found, view()), hidden_and_gradients(expected, view())))
        with torch.no_grad():
            for one in (reshard(student.model), own.model):
                next(p for p in one.parameters() if p.requires_grad).add_(1.0)
    reshard(teacher.model)
    assert len(storage_bytes(student).keys() & storage_bytes(teacher).keys()) == len(shared)


@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_an_adapter_on_a_base_that_is_cast_later_is_that_on_one_that_is_cast_as_it_is_read(
    tmp_path, mesh_of_one, monkeypatch, stored, dtype
):
    """A new one's values are drawn in float32, which a base in bfloat16 would round; one from a folder has its file's."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny("llama", stored, vocab_size=96).save_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    read = []
    monkeypatch.setattr(pretrained, "load_as_stored", lambda *given: read.append(load_as_stored(*given)) or read[-1])
    lora = Lora(rank=2, target_modules=("q_proj", "down_proj", "lm_head"))
    settings = [Student(model=str(base), dtype=dtype, lora=lora)], [("teacher", Teacher(model=str(adapter), dtype=dtype, share_base=False))]
    whole, cut = (
        load_models(*settings, LoadContext(96, "cpu", sharded=dict.fromkeys(which, mesh_of_one))) for which in ((), ("student", "teacher"))
    )
    assert len(read) == 2 and all(set(types.values()) == {getattr(torch, dtype)} for _, types in read)
    for (found,), (expected,) in zip(cut, whole, strict=True):
        for a, b in zip(found.parameters(), expected.parameters(), strict=True):
            assert a.dtype == b.dtype and torch.equal(whole_of(a), b)
        assert all(map(torch.equal, hidden_and_gradients(found, view()), hidden_and_gradients(expected, view())))


def test_a_model_of_its_files_type_is_only_read(tmp_path):
    tiny("llama", torch.bfloat16).save_pretrained(tmp_path)
    for dtype in ("auto", "bfloat16"):
        model, types = load_as_stored(tmp_path, "student.model", dtype, "auto")
        assert not types and {p.dtype for p in model.parameters()} == {torch.bfloat16}


#: By what an adapter's configuration says, whether the base's values may come later.
ALONE = {
    "plain": ({}, True),
    "scaled otherwise": ({"use_rslora": True, "rank_pattern": {"q_proj": 4}}, True),
    "directions": ({"use_dora": True}, False),
    "copies": ({"modules_to_save": ["lm_head"]}, False),
    "rows": ({"trainable_token_indices": [3]}, False),
    "experts": ({"target_parameters": ["mlp.experts"]}, False),
    "biases of the base": ({"bias": "all"}, False),
    "values of the base": ({"init_lora_weights": "pissa"}, False),
    "another kind": ({"peft_type": "IA3"}, False),
    "a section": ({"eva_config": {"rho": 2.0}}, False),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_adapter_of_two_matrices_alone_needs_no_value_of_its_base(tmp_path, name):
    changes, alone = ALONE[name]
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="base").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    files = ModelFiles(tmp_path, tmp_path, {})
    assert is_lora_alone(files, "teacher.model") == alone
    assert _cast_later([Student(model="a")], [files], CAUSAL) == alone


@pytest.mark.parametrize(("lora", "later"), [({}, True), ({"dora": True}, False), ({"modules_to_save": ("norm",)}, False)])
def test_a_new_adapter_that_reads_the_base_is_put_on_one_that_is_cast(tmp_path, lora, later):
    many = [Student(model="a", lora=Lora()), Student(model="a", lora=Lora(**lora))]
    assert _cast_later(many, [ModelFiles(tmp_path, None, {})] * 2, CAUSAL) == later


def test_a_student_that_is_cast_later_is_told_of_by_the_type_that_it_gets(tmp_path, mesh_of_one, capsys):
    tiny("llama", torch.bfloat16, vocab_size=96).save_pretrained(tmp_path)
    for dtype, told in (("float32", False), ("bfloat16", True)):
        load_models(
            [Student(model=str(tmp_path), dtype=dtype, method="full")], [], LoadContext(96, "cpu", sharded={"student": mesh_of_one})
        )
        assert ("bfloat16 weights lose updates" in capsys.readouterr().err) == told
