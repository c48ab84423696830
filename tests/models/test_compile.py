"""torch.compile, layer by layer: the same numbers to rounding, the same names, and a last layer that still computes its rows alone."""

import shutil

import pytest
import torch
import torch._inductor.config

from llmkd.config.recipe import Lora, Quantization, Student
from llmkd.errors import UserError
from llmkd.models import compile as compilation
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, checked, load_students
from llmkd.models.parts import is_part
from llmkd.models.probe import hidden_and_gradients
from llmkd.models.sharding import shard
from llmkd.training.run import run
from tests.conftest import distance
from tests.kit.families import V, tiny
from tests.models.test_last_layer import results, stirred, view


@pytest.fixture
def traced(monkeypatch):
    """Traced and guarded as when compiled, and then run as it is: what takes long is left out."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    compilation.configure_torch_compile(torch.device("cpu"))
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_one_graph_serves_the_layers_that_are_alike(traced):
    model = LanguageModel(tiny("llama", num_hidden_layers=3), V - 6).train()
    model = checked(model, "student.model")
    names, expected, before = list(model.state_dict()), results(model, True, view()), graphs()
    compilation.compile_layers(model, "student.model", packing=False)
    assert list(model.state_dict()) == names
    assert graphs() - before == 2, "one for the last layer, and one for the others"
    found = results(model, True, view())
    assert graphs() - before == 2, "another shape"
    assert max((found[name] - expected[name]).abs().max() for name in expected) == 0


def test_a_layer_is_compiled_and_sharded(traced, mesh_of_one):
    """What gathers its weights is no part of the code: the gradients of sharded weights are there, and those of the whole model."""
    whole, cut = (LanguageModel(tiny("llama", num_hidden_layers=1), V - 6).train() for _ in range(2))
    shard(cut.model, mesh_of_one, "student")
    before = graphs()
    compilation.compile_layers(cut, "student.model", packing=False)
    assert graphs() - before == 1
    for _ in range(2):
        expected, found = hidden_and_gradients(whole, view()), hidden_and_gradients(cut, view())
        assert len(found) == len(expected) == 1 + len(list(whole.parameters())) - 1, "all but the head's"
        assert max((a - b).abs().max() for a, b in zip(expected, found, strict=True)) == 0
    assert graphs() - before == 1 and all(is_part(p) for p in cut.parameters())


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_is_refused(traced, monkeypatch):
    model = LanguageModel(tiny("llama"), V - 6)
    model = checked(model, "student.model")

    def different(model, args, out):
        return out + 1e-3 if torch.compiler.is_compiling() else out

    for layer in model.base_model.model.layers:
        layer.register_forward_hook(different)
    with pytest.raises(UserError, match=r"^train.compile: student.model \(llama\), compiled, differs by .*; set train.compile: false$"):
        compilation.compile_layers(model, "student.model", packing=True)
    monkeypatch.setattr(compilation, "layers_of", lambda model: None)
    with pytest.raises(UserError, match="does not keep its layers in a list"):
        compilation.compile_layers(model, "student.model", packing=False)


def test_without_a_compiler_it_is_refused_before_a_model_is_loaded(make_recipe, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr("llmkd.training.build.load_models", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"^train.compile: found true, but torch.compile fails here \(RuntimeError: no g\+\+\)"):
        run(make_recipe(train__compile=True))


def test_it_is_refused_with_a_teacher_that_is_offloaded(make_recipe):
    with pytest.raises(UserError, match=r"train.compile: found true, but teacher.device is offload"):
        make_recipe(train__compile=True, teacher__device="offload")


@pytest.mark.slow
def test_a_compiled_run_is_the_run_and_is_resumed_bit_for_bit(trained, make_recipe, monkeypatch, tmp_path, world):
    """The student's layers are checkpointed, the teacher's are not. All is traced, differentiated and guarded as it is before C++ is written, which takes minutes here.
    One layer of the student, and LoRA on two of its seven matrices: each costs seconds."""
    from llmkd.files import read_jsonl
    from llmkd.training import loop

    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    changes = {
        "student__lora__dropout": 0.3,
        "student__lora__target_modules": ["q_proj", "down_proj"],
        "teacher__model": str(world / "teacher"),
    }
    changes |= {"student__layers": [0], "student__gradient_checkpointing": True, "validation__teacher_check": 0}
    changes |= {"checkpoint__every": 3, "train__max_steps": 4}  # without the last step, whose single row takes code of its own
    killed, out, move = tmp_path / "killed", tmp_path / "whole", loop.optimizer_step

    def copying(learner, step, *rest):
        move(learner, step, *rest)
        if step == 3:  # what a run leaves that is killed after its checkpoint of three steps
            shutil.copytree(out, killed)

    torch._dynamo.reset()
    plain, before = trained("plain", **changes), graphs()
    monkeypatch.setattr(loop, "optimizer_step", copying)
    whole = trained("whole", train__compile=True, **changes)
    monkeypatch.setattr(loop, "optimizer_step", move)
    assert graphs() > before
    assert distance(plain, whole) < 1e-3  # norms are in float32, and AdamW's first steps divide by what is next to nothing
    losses = [
        [record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in record] for name in ("plain", "whole")
    ]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    shutil.rmtree(out)
    killed.rename(out)
    assert not (out / "adapter").exists()
    assert distance(trained("whole", resume=True, train__compile=True, **changes), whole) == 0


def compared_with_eager(models: list[LanguageModel]) -> None:
    expected = [results(stirred(model), True, view()) for model in models]
    for model in models:
        compilation.compile_layers(model, "student.model", packing=False)
    for model, one in zip(models * 2, expected * 2, strict=True):
        found = results(model, True, view())
        assert found.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(found[name], one[name], rtol=1e-3, atol=1e-4 * one[name].abs().max().item())


@pytest.mark.slow
def test_students_side_by_side_and_a_base_in_four_bit(world, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    base = {"model": str(world / "student"), "dtype": "float32", "quantization": Quantization(type="nf4"), "layers": (0,)}
    on = {"target_modules": ("q_proj", "down_proj")}
    arms = [Student(**base, lora=Lora(rank=4, dropout=0.3, **on)), Student(**base, lora=Lora(rank=2, **on))]
    compilation.configure_torch_compile(torch.device("cpu"))
    compared_with_eager(load_students(arms, LoadContext(640, "cpu", seed=7)))


@pytest.mark.slow
def test_the_code_that_is_written_gives_the_same_under_dropout(world, monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no processes that import torch again
    torch._dynamo.reset()
    compilation.configure_torch_compile(torch.device("cpu"))
    student = Student(
        model=str(world / "student"), dtype="float32", layers=(0,), lora=Lora(rank=4, dropout=0.3, target_modules=("q_proj", "down_proj"))
    )
    compared_with_eager(load_students([student], LoadContext(640, "cpu", seed=7)))
