"""Hidden states inside a model, taken from the pass that is made anyway: the same under all that changes how a model runs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmkd.batch import Batch, PackedLayout, View
from llmkd.config.recipe import Lora, Student, Teacher
from llmkd.errors import UserError
from llmkd.models import compile as compilation
from llmkd.models.families import layers_of
from llmkd.models.language_model import Capabilities, LanguageModel
from llmkd.models.load import LoadContext, checked, load_models, load_teacher
from llmkd.models.startup_checks import layer_widths
from llmkd.models.taps import tapped
from llmkd.signals import Taps
from llmkd.teachers.live import LiveTeacher
from tests.kit.families import V, tiny
from tests.models.test_compile import graphs, traced  # noqa: F401, a fixture
from tests.models.test_last_layer import stirred, student, view, whole

ALL = Taps(frozenset({0, 1, 2}))
CONTEXT = LoadContext(640, "cpu", seed=7)


def taken(model: LanguageModel, on: View, seed: int = 0) -> dict:
    """The states at the rows, and the gradient of all that trains through them alone."""
    torch.manual_seed(seed)
    outputs = model.outputs(on, ALL)
    assert sorted(outputs.layers) == [0, 1, 2] and all(len(one) == len(on.rows_N) for one in outputs.layers.values())
    found = {f"layer {n}": one.detach().clone() for n, one in outputs.layers.items()} | {"last": outputs.hidden_NH.detach()}
    if outputs.layers[2].requires_grad:
        sum(one.cos().sum() * (n + 1) for n, one in outputs.layers.items()).backward()
        found |= {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    for n, one in outputs.layers.items():
        assert torch.equal(found[f"layer {n}"], one), "the pass that recomputes a layer has put its own in their place"
    return found


def gap(some: dict, others: dict) -> float:
    assert some.keys() == others.keys()
    return max((some[name] - others[name]).abs().max().item() / max(1e-6, others[name].abs().max().item()) for name in some)


def own_states(model: LanguageModel, on: View) -> list[torch.Tensor]:
    """transformers' own after the embeddings and after each layer but the last, at the rows."""
    with torch.no_grad():
        every = model.base_model(**on.inputs, output_hidden_states=True, use_cache=False).hidden_states
    return [hidden_BTH.flatten(0, 1)[on.rows_N] for hidden_BTH in every[:-1]]


def test_every_student_on_a_base_and_the_teacher_beside_them_give_their_own(world):
    arms = [Student(model=str(world / "student"), lora=lora) for lora in (Lora(rank=4), Lora(rank=2))]
    students, (teacher,) = load_models(arms, [("teacher", Teacher(model=str(world / "student")))], CONTEXT)
    one, other = map(stirred, students)
    for model in (one, other, teacher, one):
        found = taken(model.eval(), view())
        for n, expected in enumerate(own_states(model, view())):
            assert torch.equal(found[f"layer {n}"], expected)
        assert gap(taken(whole(model), view()), found) < 1e-12, "the last layer computes the targets alone"
    assert not torch.equal(taken(one, view())["layer 1"], taken(other, view())["layer 1"])
    assert torch.equal(taken(one, view())["last"], one.hidden(view()))


@pytest.mark.parametrize("share", [True, 0.5])
def test_recomputing_a_layer_changes_no_bit(world, share):
    plain, recomputed = (stirred(student(world, **changes)[0]).train() for changes in ({}, {"gradient_checkpointing": share}))
    expected, found = taken(plain, view()), taken(recomputed, view())
    assert any("lora" in name for name in expected) and gap(found, expected) == 0


class Recomputing(nn.Module):
    """A model in the style of older ones, which call their layers inside of what is recomputed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5, dtype=torch.float64) for _ in range(2)])
        self.config = SimpleNamespace(num_hidden_layers=2, get_text_config=lambda: self.config)

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return None

    def forward(self, x, recompute):
        for layer in self.layers:
            x = checkpoint(layer.__call__, x, use_reentrant=False) if recompute else layer(x)
        return x


def test_what_is_taken_inside_of_a_recomputed_layer_counts_for_nothing():
    torch.manual_seed(0)
    model, x, grads = Recomputing(), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), []
    for recompute in (False, True):
        with tapped(model, (0, 1, 2), torch.tensor([1, 4])) as layers:
            out = model(x, recompute)
        kept = dict(layers)
        assert all(one.requires_grad for one in layers.values())
        (sum(one.square().sum() for one in layers.values()) + out.sum()).backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in model.parameters())])
        assert all(layers[n] is kept[n] for n in kept) and len(layers) == 3
        x.grad = None
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_layer_that_runs_twice_is_no_layer_that_can_be_read():
    model, x = Recomputing(), torch.randn(2, 3, 5, dtype=torch.float64)
    with tapped(model, (1,), torch.tensor([0])), pytest.raises(ValueError, match="layer 1 ran twice"):
        model(x, False), model(x, False)
    with tapped(model, (1,), torch.tensor([0])) as layers:
        model(x, False)
    assert len(layers) == 1 and not any("_compiled_call_impl" in vars(one) and one._compiled_call_impl for one in model.layers)


def test_a_compiled_model_gives_them_without_new_code(traced):  # noqa: F811
    model = LanguageModel(tiny("llama"), V - 6).train()
    model = checked(model, "student.model")
    expected = taken(model, view())
    compilation.compile_layers(model, "student.model", packing=False)
    before = graphs()
    assert gap(taken(model, view()), expected) < 1e-12
    assert gap(taken(model, view((0, 2, 5, 26))), taken(model, view((0, 2, 5, 26)))) == 0
    assert graphs() == before


def test_a_packed_row_holds_what_the_rows_apart_do():
    model = LanguageModel(tiny("llama"), V - 6)
    model = checked(model, "student.model", packing=27)
    assert model.capabilities.packed_attention
    on = view()
    inputs = {"input_ids": on.inputs["input_ids"].reshape(1, -1), "position_ids": torch.arange(9).repeat(3)[None]}
    assert gap(taken(model, View(inputs, on.rows_N, PackedLayout.of([9, 9, 9]))), taken(model, on)) < 1e-12


def test_a_model_whose_head_is_not_known_gives_them_too():
    model = LanguageModel(tiny("llama"), V - 6)
    expected = taken(model, view())
    found = taken(model.replaced(capabilities=Capabilities(own_forward=True)), view())
    assert found.pop("last").shape == (9, V) != expected.pop("last").shape
    assert gap(found, expected) == 0


@pytest.mark.parametrize("options", [{"device": "offload"}, {"device": "cpu"}, {"merge_adapter": True}])
def test_a_teacher_that_is_held_otherwise(world, options):
    """The signal holds them, on the batch's device and without a gradient."""
    plain = load_teacher(Teacher(model=str(world / "adapter"), dtype="float32"), CONTEXT)
    other = load_teacher(Teacher(model=str(world / "adapter"), dtype="float32", **options), CONTEXT)
    batch = Batch(torch.zeros(9, dtype=torch.long), torch.zeros(9, dtype=torch.long), view(), view())
    expected, found = (LiveTeacher(model, ALL)(batch) for model in (plain, other))
    assert sorted(found.layers) == [0, 1, 2] and not any(one.requires_grad for one in found.layers.values())
    assert gap(found.layers, expected.layers) < 1e-5
    assert LiveTeacher(plain)(batch).layers == {}, "nothing is kept that nobody asked for"


def test_the_width_is_known_and_what_is_not_there_is_refused(world):
    model = LanguageModel(tiny("gpt2"), V - 6, autocast=torch.bfloat16).train()
    assert layer_widths(model, [0, 1, 2], "student.model") == {0: 32, 1: 32, 2: 32} and model.training
    for wrong in (3, -1):
        words = rf"^teacher.model \(gpt2\) has 2 layers: found layer {wrong}, expected 0 \(embeddings\) to 2$"
        with pytest.raises(UserError, match=words):
            layer_widths(model, [1, wrong], "teacher.model")
    with pytest.raises(UserError, match=r"^student.model \(hrm_text\) does not keep its layers in a list"):
        layer_widths(LanguageModel(tiny("hrm_text"), V - 6), [1], "student.model")
    for family in ("xlm", "deepseek_v4"):  # its list holds attention alone; four states a position
        with pytest.raises(
            UserError, match=rf"^student.model \({family}\) does not pass its hidden states from layer to layer as one tensor"
        ):
            layer_widths(LanguageModel(tiny(family), V - 6), [1], "student.model")


def test_a_layer_that_hands_on_something_else_is_found():
    model = LanguageModel(tiny("llama"), V - 6)
    layer = layers_of(model.base_model)[0]
    run = layer.forward
    assert layer_widths(model, [1], "student.model") == {1: 32}
    layer.forward = lambda *args, **kwargs: (run(*args, **kwargs) * 1.001,)
    model.base_model.model.forward = lambda input_ids, **_: SimpleNamespace(hidden_states=None)
    with pytest.raises(UserError, match=r"^student.model \(llama\) returns no hidden states of its layers"):
        layer_widths(model, [1], "student.model")
