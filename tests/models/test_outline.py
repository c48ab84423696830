"""What a model has inside by its configuration alone, against the loaded model; and what is refused by it before anything is loaded."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkd.config.features import Features
from llmkd.config.terms import AttentionLoss
from llmkd.errors import UserError
from llmkd.models.attention_taps import enable_taps
from llmkd.models.families import layers_of
from llmkd.models.language_model import LanguageModel
from llmkd.models.outline import outline, shapes_inside, show_attention
from llmkd.models.startup_checks import layer_widths
from llmkd.signals import Taps
from llmkd.training.layer_pairs import refuse_by_outline
from tests.kit.families import V, configuration, tiny


def sizes(inputs) -> list[int]:
    """Heads, and the widths of all queries, keys and values."""
    return [inputs.query.shape[1], *(x.shape[1] * x.shape[3] for x in (inputs.query, inputs.key, inputs.value))]


def compared(family: str, built: torch.nn.Module) -> tuple[int, int]:
    """How many widths of hidden states and of attention a family's outline tells, each equal to the built model's. None of them is refused
    that the built model has."""
    model = outline(configuration(family).to_dict())
    if model is None or layers_of(model) is None:
        return 0, 0
    loaded, every = LanguageModel(built, V), range(1, len(layers_of(model)) + 1)
    states, _ = shapes_inside(model, Taps(frozenset(every))) or ({}, {})
    if states and all(one.ndim == 2 for one in states.values()):
        try:
            assert layer_widths(loaded, every, family) == {number: one.shape[1] for number, one in states.items()}
        except UserError:  # by what values tell
            states = {}
    elif states:
        with pytest.raises(UserError):
            layer_widths(loaded, every, family)
    try:
        show_attention(model, family)
    except UserError:
        with pytest.raises(UserError):
            enable_taps(loaded, (1,), family)
        return len(states), 0
    found = (shapes_inside(model, Taps(attention=frozenset(every))) or ({}, {}))[1]
    for number, inputs in found.items():
        try:
            own = enable_taps(loaded, (number,), family)[number]
        except UserError:
            return len(states), 0
        assert sizes(inputs) == sizes(own), number
    return len(states), len(found)


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_an_outline_tells_what_the_loaded_model_has(family):
    assert compared(family, tiny(family)) == (2, 2)


@pytest.mark.slow
def test_an_outline_tells_what_the_loaded_model_has_in_every_family():
    states, attention = 0, 0
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            built = tiny(family)
        except Exception:  # it cannot be built this small
            continue
        found = compared(family, built)
        states, attention = states + bool(found[0]), attention + bool(found[1])
    print(f"hidden states of {states} families, attention of {attention}")
    assert states >= 120 and attention >= 80


@pytest.mark.parametrize(
    "student, teacher, terms, words",
    [
        ("llama", "hrm_text", (Features(), None), r"^teacher.model \(hrm_text\) does not keep its layers in a list"),
        ("hrm_text", "llama", (None, AttentionLoss()), r"^student.model \(hrm_text\) does not keep its layers in a list"),
        ("deepseek_v4", "llama", (Features(), None), r"^student.model \(deepseek_v4\) does not pass its hidden states .* as one tensor"),
        ("llama", "gpt_oss", (None, AttentionLoss()), r"^loss.attention: teacher.model \(gpt_oss\) uses its own kind of attention"),
        (
            "llama",
            "gpt2",
            (None, AttentionLoss(what="relations", relation_heads=3)),
            r"found 3, .*\(32, 16, 16 and 32, 32, 32 in student and teacher\); these do: 1, 2, 4, 8, 16$",
        ),
        ("llama", "qwen2", (Features(layers=((1, 3),)), None), "^loss.features.layers: found layer 3 of the teacher, which has 2 layers"),
    ],
    ids=str,
)
def test_what_is_refused_without_weights(student, teacher, terms, words):
    configs = {"student.model": configuration(student).to_dict(), "teacher.model": configuration(teacher).to_dict()}
    with pytest.raises(UserError, match=words):
        refuse_by_outline(*terms, "teacher", configs)


def test_what_cannot_be_built_from_its_configuration_is_not_refused():
    assert outline({"model_type": "unheard of"}) is None
    for configs in ({}, {"student.model": {"model_type": "unheard of"}, "teacher.model": configuration("llama").to_dict()}):
        refuse_by_outline(Features(layers=((9, 9),)), AttentionLoss(), "teacher", configs)
