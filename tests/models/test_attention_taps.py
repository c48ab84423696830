"""Attention as it is read inside a model against transformers' own weights (eager, output_attentions)."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.batch import Batch, PackedLayout, View
from llmkd.config.recipe import Lora, Student, Teacher
from llmkd.data.collate import collate
from llmkd.data.examples import TokenExamples
from llmkd.errors import UserError
from llmkd.losses import attention as losses
from llmkd.losses.attention_groups import grouped
from llmkd.models import activation_checkpointing, attention
from llmkd.models import compile as compilation
from llmkd.models.attention_taps import enable_taps
from llmkd.models.language_model import Capabilities, LanguageModel
from llmkd.models.load import LoadContext, checked, load_models
from llmkd.models.taps import attention_tapped, watched
from llmkd.signals import Taps
from llmkd.teachers.live import LiveTeacher
from tests.kit.families import V, tiny
from tests.models.test_compile import graphs, traced  # noqa: F401, a fixture
from tests.models.test_last_layer import stirred, view, whole

STILL = {"attention_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", {}),
    ("gemma3_text", {"sliding_window": 6}),
    ("granite", {"attention_multiplier": 0.3}),
    ("gemma2", {"attn_logit_softcapping": 0.05, "sliding_window": 6}),
    ("deepseek_v3", {}),
]


def examples() -> TokenExamples:
    """Six, in pairs that share their first ten tokens; the last ones are supervised."""
    rng, ids, marks = np.random.default_rng(0), [], []
    for i in range(6):
        start = np.arange(10) + 20 * (i // 2)
        own = rng.integers(1, 90, rng.integers(3, 9))  # not the padding token, whose embedding is 0
        ids.append(np.concatenate([start, own]).astype(np.int32))
        marks.append(np.arange(len(ids[-1])) >= 12)
    return TokenExamples(np.concatenate(ids), np.concatenate(marks), np.cumsum([0, *map(len, ids)]), np.arange(6))


def model_of(family: str, packing: bool = False, **changes) -> LanguageModel:
    model = checked(LanguageModel(tiny(family, **STILL, **changes), 90), "student.model", packing=1000 * packing)
    enable_taps(model, (1, 2), "student.model", packing)
    return model


def maps(model: LanguageModel, batch, layers=(1, 2)) -> dict[int, list[torch.Tensor]]:
    """For each layer and example the attention of its targets, [n, h, m]."""
    with torch.no_grad(), attention_tapped(model.base_model, layers) as taken:
        model.hidden(batch.student)
    view, out = batch.student, {}
    examples = [e for e, one in enumerate(batch.examples) for _ in range(one.num_targets)]
    for number, inputs in taken.items():
        query, key = (x.transpose(1, 2).flatten(0, 1) for x in (inputs.query, inputs.key))
        rows = [[] for _ in batch.examples]
        for group in grouped(view, [one.num_targets for one in batch.examples], 200):
            scores = losses.scores(query[view.rows_N[group.target_bn]], key[group.position_bm], inputs.scaling)
            scores, _ = losses.capped(scores, inputs.softcap)
            map_bhnm = scores.masked_fill(~group.sees((inputs.window,))[:, None], -torch.inf).softmax(-1)
            for i, j in group.real_bn.nonzero().tolist():
                target = int(group.target_bn[i, j])
                rows[examples[target]].append((target, map_bhnm[i, :, j]))
        out[number] = [torch.nn.utils.rnn.pad_sequence([x.T for _, x in sorted(some, key=lambda one: one[0])], True).mT for some in rows]
    return out


@pytest.mark.parametrize("family, changes", FAMILIES, ids=str)
def test_maps_are_those_of_transformers(family, changes):
    """Also of rows that are packed, with a shared prefix and without; an attention of its own (gemma2's) shares none."""
    model, data = model_of(family, packing=True, **changes), examples()
    plain = copy.deepcopy(model.base_model)
    plain.set_attn_implementation("eager")
    batch = collate(data, list(range(6)), 0)
    with torch.no_grad():
        own = plain(input_ids=batch.student.inputs["input_ids"], output_attentions=True, use_cache=False).attentions
    for how in ({}, {"packing": True}, {"packing": True, "share": model.capabilities.packed_attention}):
        found = maps(model, collate(data, list(range(6)), 0, **how))
        for number, rows in found.items():
            for i, row in enumerate(rows):
                n = data.offsets[i + 1] - data.offsets[i] - 1
                expected = own[number - 1][i, :, 11:n, :n].transpose(0, 1)
                assert_close(row[..., :n].to(expected.dtype), expected, rtol=0, atol=1e-6)  # transformers' softmax is in float32
                assert not row[..., n:].any()
    assert (found[2][0].amax(-1) < 0.999).any(), "the maps say something"


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss", "mamba"])
def test_a_family_with_more_than_a_softmax_is_refused(family):
    model = LanguageModel(tiny(family), 90)
    with pytest.raises(UserError, match="its own kind of attention"):
        enable_taps(model, (1,), "teacher.model")


def under_autocast(**changes) -> LanguageModel:
    model = LanguageModel(tiny("llama", num_key_value_heads=2, **STILL, **changes).float(), 90, autocast=torch.bfloat16)
    return checked(model, "student.model")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.003])
def test_what_does_not_explain_a_layers_output_is_refused(monkeypatch, autocast, slope):
    """A bias of positions that nobody names, which moves the output by less than bfloat16's rounding may; and the same mask without one."""
    from transformers.integrations import sdpa_attention

    real = sdpa_attention.sdpa_attention_forward

    def biased(module, query, key, value, mask, *rest, **more):
        back = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
        mask = torch.where(back < 0, -torch.inf, -slope * back).to(query.dtype)[None, None]
        return real(module, query, key, value, mask, *rest, **more)

    model = under_autocast() if autocast else LanguageModel(tiny("llama"), 90)
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", biased)
    with pytest.raises(UserError, match="the attention of layer 2 is more than a softmax") if slope else nullcontext():
        enable_taps(model, (2,), "teacher.model")


def test_under_autocast_a_layer_is_accepted_and_explained_to_the_rounding_of_bfloat16():
    """By the formula in float64, head by head."""
    model, calls = under_autocast().train(), []
    enable_taps(model, (1, 2), "student.model")
    assert model.training and model.autocast == torch.bfloat16
    with torch.no_grad(), watched(model.base_model, (2,), lambda _, *call: calls.append(call)):
        model.hidden(view())
    ((inputs, out_BThd),) = calls
    query, key, value = (x.double() for x in (inputs.query, inputs.key, inputs.value))
    unseen, expected = torch.ones(query.shape[2], query.shape[2]).triu(1).bool(), torch.empty(out_BThd.shape, dtype=torch.float64)
    for head in range(query.shape[1]):
        mine = head // (query.shape[1] // 2)  # of two key heads
        scores = query[:, head] @ key[:, mine].mT / query.shape[3] ** 0.5
        expected[:, :, head] = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value[:, mine]
    assert 1e-4 < ((out_BThd - expected).abs().max() / expected.abs().max()).item() < 0.02


@pytest.mark.parametrize(
    "layers, words", [((0,), "layer 0, but .* layers 1 to 2"), ((1, 3), "layer 3, but teacher.model .llama. has layers 1 to 2")]
)
def test_layers_that_a_model_does_not_have_are_refused(layers, words):
    with pytest.raises(UserError, match=f"loss.attention.layers: found {words}"):
        enable_taps(LanguageModel(tiny("llama"), 90), layers, "teacher.model")


def test_nothing_is_taken_outside_or_from_other_layers_or_models():
    model, other = model_of("llama"), model_of("llama")
    view = collate(examples(), [0, 1], 0).student
    with torch.no_grad(), attention_tapped(model.base_model, (2,)) as taken:
        other.hidden(view)
        assert not taken
        model.hidden(view)
    model.hidden(view)
    assert list(taken) == [2] and not attention.WATCHED


def test_gradients_flow_and_a_recomputed_pass_takes_nothing():
    data, gradients = examples(), []
    for checkpointing in (False, True):
        plain = tiny("qwen3", **STILL)
        if checkpointing:
            activation_checkpointing.enable(plain, True)
        model = checked(LanguageModel(plain, 90), "student.model").train()
        enable_taps(model, (1, 2), "student.model")
        batch = collate(data, list(range(6)), 0)
        with attention_tapped(plain, (1, 2)) as taken:
            model.hidden(batch.student)
        counts = [one.num_targets for one in batch.examples]
        value = losses.map_divergence(taken[1], taken[2].each(torch.detach), batch.student, counts)[0]
        value = value + losses.relation_divergence(taken[1], taken[2].each(torch.detach), batch.student, counts, 4)[0]
        before = dict(taken)
        value.backward()
        assert taken == before and bool(checkpointing) == activation_checkpointing.is_recomputed(plain.model.layers[0])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 5
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-12)


def test_values_are_the_same_packed_with_shared_prefixes_and_apart():
    student, teacher, data = model_of("llama", True, num_key_value_heads=2), model_of("qwen3", True), examples()
    apart = None
    for how in ({}, {"packing": True}, {"packing": True, "share": True}):
        batch = collate(data, list(range(6)), 0, **how)
        counts, taken = [one.num_targets for one in batch.examples], []
        for model in (student, teacher):
            with torch.no_grad(), attention_tapped(model.base_model, (1,)) as inputs:
                model.hidden(batch.student)
            taken.append(inputs[1])
        values = losses.map_divergence(*taken, batch.student, counts)[1], losses.relation_divergence(*taken, batch.student, counts, 4)[1]
        apart = apart or values
        for a, b in zip(apart, values, strict=True):
            assert len(a) == batch.num_targets and a.min() > 1e-3
            assert_close(b, a, rtol=1e-6, atol=1e-8)


BOTH = Taps(attention=frozenset({1, 2}), queries=True)


def terms_of(model: LanguageModel, on: View, taps: Taps = BOTH) -> dict[str, torch.Tensor]:
    """Divergences from scaled copies of the model's own attention, map and relations of each layer, and the gradient of all that trains."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    taken, counts, found = model.outputs(on, taps).attention, [4, 3, 2], {}
    assert sorted(taken) == [1, 2] and not attention.WATCHED
    for number, inputs in taken.items():
        other = inputs.each(lambda x: x.detach() * 0.7)
        found[f"map {number}"] = losses.map_divergence(inputs, other, on, counts)
        found[f"relations {number}"] = losses.relation_divergence(inputs, other, on, counts, 4)
    sum(total for total, _ in found.values()).backward()
    found = {name: values for name, (_, values) in found.items()}
    return found | {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


def on_rows(packed: bool = False) -> View:
    rows = view((0, 3, 4, 8, 10, 11, 15, 21, 22), packed)
    return View(rows.inputs, rows.rows_N, PackedLayout.of([9, 9, 9])) if packed else rows


def near(some: dict, others: dict, limit: float) -> bool:
    return some.keys() == others.keys() and all((some[k] - others[k]).abs().max() <= limit * (1 + others[k].abs().max()) for k in some)


def readable(family: str = "llama", packing: bool = False) -> LanguageModel:
    model = checked(LanguageModel(tiny(family, **STILL), V - 6).train(), "student.model", packing=27 * packing)
    enable_taps(model, (1, 2), "student.model", packing)
    return model


def test_queries_of_the_last_layer_are_right_at_all_positions_where_they_are_asked_for():
    model, on = readable(), on_rows()
    assert model.capabilities.last_layer
    expected, at_targets = terms_of(whole(model), on), terms_of(model, on, Taps(attention=frozenset({1, 2})))
    assert near(terms_of(model, on), expected, 1e-12)
    assert (at_targets["map 2"] - expected["map 2"]).abs().max() < 1e-12, "maps need them at the targets alone"
    assert (at_targets["relations 2"] - expected["relations 2"]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_without_new_code(traced):  # noqa: F811
    model, on = readable(packing=True), on_rows(packed=True)
    expected = terms_of(model, on)
    compilation.compile_layers(model, "student.model", True)
    assert near(terms_of(model, on), expected, 1e-12)
    before = graphs()
    assert near(terms_of(model, on), expected, 1e-12) and graphs() == before


def test_a_model_whose_head_is_not_known_gives_the_same():
    model, on = readable(), on_rows()
    model = whole(model)
    assert near(terms_of(model.replaced(capabilities=Capabilities(own_forward=True)), on), terms_of(model, on), 1e-12)


def test_every_student_on_a_base_and_the_teacher_beside_them_give_their_own(world):
    context = LoadContext(640, "cpu", seed=7)
    arms = [Student(model=str(world / "student"), lora=lora) for lora in (Lora(rank=4), Lora(rank=2))]
    students, (teacher,) = load_models(arms, [("teacher", Teacher(model=str(world / "student")))], context)
    one, other = map(stirred, students)
    for name, model in (("student.model", one), ("student.model", other), ("teacher.model", teacher)):
        enable_taps(model, (1, 2), name)
    on = on_rows()
    apart = [model.outputs(on, BOTH).attention[2].key.detach() for model in (one, other, teacher)]
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(apart) for b in apart[:i])
    for model, key in zip((one, other, teacher), apart, strict=True):
        assert torch.equal(model.outputs(on, BOTH).attention[2].key, key)
    signal = LiveTeacher(teacher, BOTH)(Batch(torch.zeros(9), torch.zeros(9), on, on))
    assert torch.equal(signal.attention[2].key, apart[2]) and not signal.attention[2].key.requires_grad
    assert LiveTeacher(teacher)(Batch(torch.zeros(9), torch.zeros(9), on, on)).attention == {}
