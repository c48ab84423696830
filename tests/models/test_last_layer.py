"""The last layer at the target positions alone, and activation checkpointing: the results do not change."""

import dataclasses
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkd.batch import View
from llmkd.config.recipe import Lora, Quantization, Student, Teacher
from llmkd.errors import UserError
from llmkd.models import activation_checkpointing
from llmkd.models.activation_offload import Kept
from llmkd.models.families import layers_of
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, checked, load_models, load_students, load_teacher
from tests.kit.families import V, tiny

N, TOTAL = 9, 27
FAMILIES = "llama qwen2 qwen3 gemma2 gemma3_text phi3 olmo2 granite mistral gpt2 mixtral phi".split()
LORA = Lora(rank=4, dropout=0.3)


def view(rows=(0, 3, 4, 8, 10, 11, 18, 21, 22), packed=False) -> View:
    ids_BT = torch.randint(0, V - 6, (3, 9), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids_BT}
    if packed:
        inputs = {"input_ids": ids_BT.reshape(1, -1), "position_ids": torch.arange(9).repeat(3)[None]}
    return View(inputs, torch.tensor(rows, dtype=torch.long))


def whole(model: LanguageModel) -> LanguageModel:
    """The same model, computing its last layer at all positions."""
    return model.replaced(capabilities=dataclasses.replace(model.capabilities, last_layer=None))


def results(model: LanguageModel, spared: bool, on: View, seed: int = 0) -> dict[str, torch.Tensor]:
    """Hidden states at the rows, and the gradients of all that trains, with the last layer's hooks or without."""
    assert model.capabilities.last_layer is not None
    torch.manual_seed(seed)
    hidden_NH = (model if spared else whole(model)).hidden(on)
    hidden_NH.cos().sum().backward()
    found = {"hidden": hidden_NH.detach()} | {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gap(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert some.keys() == others.keys() and len(some) > 1
    size = max(x.abs().max().item() for name, x in some.items() if name != "hidden")
    assert size > 1e-6
    gaps = {name: (some[name] - others[name]).abs().max().item() for name in some}
    return max(gaps.pop("hidden") / some["hidden"].abs().max().item(), *(one / size for one in gaps.values()))


def lengths_seen(model: LanguageModel, name: str, layer: int = -1) -> list[int]:
    """Filled with how many positions reach the layer's module of that name."""
    seen, found = [], [m for n, m in layers_of(model.base_model)[layer].named_modules() if n.rsplit(".", 1)[-1] == name]
    inner = next(m for m in found[0].modules() if type(m) is nn.Linear)
    inner.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_exact(family):
    model = LanguageModel(tiny(family), V - 6).eval()
    model = checked(model, "student.model")
    assert gap(results(model, True, view()), results(model, False, view())) < 1e-12


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "mlp"])
def test_only_the_rows_reach_the_last_layers_modules(name, packed):
    model = LanguageModel(tiny("llama"), V - 6)
    model = checked(model, "student.model", packing=packed)
    last, first, keys = lengths_seen(model, name), lengths_seen(model, name, 0), lengths_seen(model, "k_proj")
    model.hidden(view(packed=packed))
    assert (last, first, keys) == ([N], [TOTAL], [TOTAL])


@pytest.mark.parametrize("rows", [(), tuple(range(25)), tuple(range(27))])
def test_it_is_left_out_where_nearly_all_positions_are_supervised_or_none_is(rows):
    model = LanguageModel(tiny("llama"), V - 6)
    model = checked(model, "student.model")
    seen = lengths_seen(model, "mlp")
    assert model.hidden(view(rows)).shape == (len(rows), 32) and seen == [TOTAL]


class Mixing(nn.Module):
    """A module whose result at a position needs the position before it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + nn.functional.pad(x, (0, 0, 1, -1)) / 100)


class Blind(nn.Module):
    """A norm that has no gradient where nothing is: as nan as 0 / 0."""

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "name, wrap, dtype, trains",
    [
        ("mlp", Mixing, torch.float64, False),
        ("post_attention_layernorm", Mixing, torch.bfloat16, False),  # less than rounding, and found all the same
        ("post_feedforward_layernorm", lambda inner: Blind(), torch.float64, True),
    ],
)
def test_it_is_left_out_where_something_else_is_read(name, wrap, dtype, trains):
    for changed in (False, True):
        model = LanguageModel(tiny("gemma2", dtype).requires_grad_(trains), V - 6)
        layer = layers_of(model.base_model)[-1]
        if changed:
            setattr(layer, name, wrap(getattr(layer, name)))
        model = checked(model, "student.model")
        assert (model.capabilities.last_layer is None) == changed


@pytest.mark.parametrize("family", ["gpt_oss", "mamba2"])  # a pair from the mlp; none of the modules
def test_it_is_left_out_where_a_family_is_made_otherwise(family):
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {family}")
    model = LanguageModel(tiny(family), V - 6)
    model = checked(model, "student.model")
    assert model.capabilities.last_layer is None


def test_two_models_on_two_threads_compute_their_own_rows():
    """Each stops in the middle of its forward pass until the other is there too."""
    models = [checked(LanguageModel(tiny("llama"), V - 6).eval(), "student.model") for _ in range(2)]
    views = [view(), view((1, 2, 26))]
    with torch.no_grad():
        expected = [model.hidden(on) for model, on in zip(models, views, strict=True)]
        meeting = threading.Barrier(2, timeout=60)
        for model in models:
            layers_of(model.base_model)[0].register_forward_hook(lambda *_: (meeting.wait(), None)[1])

        def hidden(model, on):
            with torch.no_grad():
                return model.hidden(on)

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(hidden, models, views))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def student(world, **changes) -> list[LanguageModel]:
    arms = [Student(model=str(world / "student"), lora=lora, **changes) for lora in (LORA, Lora(rank=2, alpha=64.0))]
    return load_students(arms, LoadContext(640, "cpu", seed=7))


def stirred(model: LanguageModel) -> LanguageModel:
    """With an adapter that does something."""
    with torch.no_grad():
        for n, p in enumerate(model.trainable().values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
    return model


def test_adapters_side_by_side_and_the_teacher_beside_them(world):
    (one, other), (teacher,) = load_models(
        [Student(model=str(world / "student"), lora=lora) for lora in (Lora(rank=4), Lora(rank=2))],
        [("teacher", Teacher(model=str(world / "student")))],
        LoadContext(640, "cpu", seed=7),
    )
    assert one.capabilities.last_layer is other.capabilities.last_layer is not teacher.capabilities.last_layer
    stirred(one), stirred(other)
    for model in (one, other, one):
        with torch.no_grad():
            before = teacher.hidden(view())
        assert gap(results(model, True, view()), results(model, False, view())) < 1e-12
        torch.testing.assert_close(whole(teacher).hidden(view()), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("type_", ["nf4", "int8"])
def test_a_quantised_base(world, type_, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = Student(model=str(world / "student"), dtype="float32", quantization=Quantization(type=type_), lora=Lora(rank=4))
    (model,) = load_students([base], LoadContext(640, "cpu", seed=7))
    if type_ == "int8":
        assert model.capabilities.last_layer is None
        return
    stirred(model)
    assert gap(results(model, True, view()), results(model, False, view())) < 1e-5


def test_after_a_merge_no_hook_of_the_layer_before_it_stays(world):
    last = load_teacher(Teacher(model=str(world / "adapter"), merge_adapter=True), LoadContext(640, "cpu")).capabilities.last_layer
    assert last.modules and {(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in last.modules} == {(1, 1)}


def test_offloaded_and_in_bfloat16(world):
    for settings in (Teacher(model=str(world / "adapter"), device="offload"), Teacher(model=str(world / "adapter"), dtype="bfloat16")):
        teacher = load_teacher(settings, LoadContext(640, "cpu"))
        seen = lengths_seen(teacher, "mlp")
        with torch.no_grad():
            part = teacher.hidden(view())
            everywhere = whole(teacher).hidden(view())
        assert seen == [N, TOTAL]
        torch.testing.assert_close(part, everywhere, rtol=3e-2 if part.dtype == torch.bfloat16 else 1e-12, atol=3e-2)


@pytest.mark.parametrize("share, recomputed", [(True, 3), (0.5, 2), (0.01, 1), (0.99, 3)])
def test_layers_are_recomputed_from_the_first_and_never_the_last(share, recomputed):
    model = LanguageModel(tiny("llama", num_hidden_layers=4), V - 6).train()
    activation_checkpointing.enable(model.base_model, share)
    model = checked(model, "student.model")
    seen = [lengths_seen(model, "mlp", n) for n in range(4)]
    results(model, True, view())
    assert [len(one) for one in seen] == [2] * recomputed + [1] * (4 - recomputed)
    assert seen[-1] == [N]


@pytest.mark.parametrize("share", [True, 0.5, "offload"])
def test_recomputing_changes_no_bit(world, share):
    """Dropout and all; two students in turn, whose backward passes each find their own adapter and rows."""
    kept, again = student(world), student(world, gradient_checkpointing=share)
    for a, b in zip(kept, again, strict=True):
        stirred(a), stirred(b)
        assert gap(results(a, True, view(), seed=5), results(b, True, view(), seed=5)) == 0


@pytest.mark.parametrize("offload", [False, True])
def test_the_inputs_of_recomputed_layers_wait_in_the_hosts_memory(monkeypatch, offload):
    """After the forward pass nothing else holds them; the backward pass takes them back from the last to the first, each once."""
    model, events = LanguageModel(tiny("llama", num_hidden_layers=4), V - 6).train(), []
    activation_checkpointing.enable(model.base_model, True, offload)
    inputs = []
    for layer in layers_of(model.base_model):
        layer.register_forward_pre_hook(lambda module, args: inputs.append((weakref.ref(args[0]), args[0].detach().clone())))
    take = Kept.take
    monkeypatch.setattr(Kept, "take", lambda self: (events.append(self.host), take(self))[1])
    hidden_NH = model.hidden(view())
    alive = [ref() is not None for ref, _ in inputs]
    assert alive == ([False] * 3 if offload else [True] * 3) + [alive[-1]]
    expected = [x for _, x in inputs[:3]]
    hidden_NH.cos().sum().backward()
    assert len(events) == (3 if offload else 0)
    assert all(torch.equal(a, b) for a, b in zip(events, reversed(expected), strict=False))


def test_a_last_layer_that_is_recomputed_is_left_whole():
    model = LanguageModel(tiny("llama"), V - 6).train()
    model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    model = checked(model, "student.model")
    assert model.capabilities.last_layer is None


def test_a_share_is_refused_where_layers_cannot_be_chosen():
    with pytest.raises(
        UserError, match="student.gradient_checkpointing: found 0.5, but the layers of llama cannot be chosen; set it to true"
    ):
        activation_checkpointing.enable(tiny("llama", num_hidden_layers=1), 0.5)
    with pytest.raises(
        UserError, match="student.gradient_checkpointing: found offload, but the layers of llama cannot be chosen; set it to true"
    ):
        activation_checkpointing.enable(tiny("llama", num_hidden_layers=1), True, offload=True)
