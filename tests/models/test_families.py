"""The head and the body of every causal family in transformers: logits, losses and gradients equal the model's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkd.batch import View
from llmkd.errors import UserError
from llmkd.losses.divergences import reverse_kl
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.models import startup_checks
from llmkd.models.families import decoder_of, layers_of
from llmkd.models.language_model import Capabilities, LanguageModel
from llmkd.models.load import checked
from llmkd.models.startup_checks import layer_widths
from llmkd.signals import Dense, Taps
from tests.kit.families import V, tiny
from tests.models.test_last_layer import gap, results, view

REAL = V - 6  # the tokenizer's entries; the model's head is padded

#: Families whose head is known, and what stands between product and logits there: (scale, soft cap).
KNOWN = {
    **dict.fromkeys(
        "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_5 gemma gpt2 gpt_neo gptj codegen ctrl".split(), (1, None)
    ),
    **dict.fromkeys("gpt_neox opt bloom falcon phi phi3 phimoe olmo olmo2 olmo3 olmoe smollm3 stablelm starcoder2".split(), (1, None)),
    **dict.fromkeys(
        "gpt_oss gemma3 glm glm4 helium seed_oss nemotron lfm2 mamba2 deepseek_v3 ernie4_5_moe llama4_text apertus".split(), (1, None)
    ),
    **dict.fromkeys("gemma2 gemma3_text gemma4_text nanochat vaultgemma beam recurrent_gemma".split(), (1, 0.3)),
    **dict.fromkeys("cohere cohere2 cohere2_moe".split(), (0.3, None)),
    **dict.fromkeys("granite granite_swa granitemoe granitemoe_swa granitemoeshared granitemoehybrid".split(), (1 / 3, None)),
    "hyperclovax": (3.0, None),
    "falcon_h1": (0.4, None),
    "minicpm3": (0.5, None),
    "inkling_text": (0.4, None),
    "xlstm": (1, 0.3),
}
#: Families without a plain head: their own forward pass is used.
UNKNOWN = ("modernbert-decoder", "mpt")
#: Not causal without further ado, which a position that sees later ones gives away.
BIDIRECTIONAL = ("bert", "roberta", "electra", "xlm")
LEAKING = (
    "bloom",
    "falcon",
    "mamba2",
    "qwen3_5",
    "gpt_oss",
    "falcon_h1",
    "recurrent_gemma",
    "openai-gpt",
    "xlstm",
    "granitemoehybrid",
    "inkling_text",
)
#: Families that compute a part of themselves in float32, whatever they are held in.
SINGLE = {"xlstm", "recurrent_gemma", "beam", "inkling_text", "mamba2", "falcon_h1", "granitemoehybrid", "qwen3_5", "lfm2", "gemma2"}


def language_model(family: str, **changes) -> LanguageModel:
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {family}")
    return LanguageModel(tiny(family, **changes), REAL).eval()


def batch() -> tuple[View, torch.Tensor]:
    """Three ragged rows, and which of their positions are supervised."""
    ids_BT = torch.randint(0, REAL, (3, 9), generator=torch.Generator().manual_seed(3))
    rows_N = torch.tensor([0, 3, 4, 8, 10, 11, 18, 21, 22])
    return View({"input_ids": ids_BT}, rows_N), torch.randint(0, REAL, (9,), generator=torch.Generator().manual_seed(4))


def own_logits(model: LanguageModel, view: View) -> torch.Tensor:
    return model.base_model(**view.inputs, use_cache=False).logits.flatten(0, 1)[view.rows_N, :REAL].double()


def signal() -> Dense:
    from llmkd.head import Head

    project = torch.nn.Linear(5, REAL, bias=False, dtype=torch.float64)
    project.weight.data = torch.randn(REAL, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Dense(torch.randn(9, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64), Head(project, REAL))


def compare_with_own(model: LanguageModel, rtol: float) -> None:
    """Logits, loss and the gradient of every parameter, against autograd through the model's own logits."""
    view, labels_N = batch()
    objective, answer = Objective(0.4, 2.0, reverse_kl), signal()
    with torch.no_grad():
        assert_close(model.head.logits(model.hidden(view)).double(), own_logits(model, view), rtol=rtol, atol=rtol)
    total, _ = fused_loss(model.hidden(view), model.head, labels_N, objective, answer, chunk=4)
    total.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits_NV = own_logits(model, view)
    log_q, log_p = torch.log_softmax(logits_NV / 2, -1), torch.log_softmax(answer.head.logits(answer.hidden_NH) / 2, -1)
    dense = 0.6 * F.cross_entropy(logits_NV, labels_N, reduction="sum") + 0.4 * 4 * (log_q.exp() * (log_q - log_p)).sum()
    dense.backward()
    assert_close(total.double(), dense, rtol=rtol, atol=rtol)
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        assert (ours[name] is None) == (p.grad is None) or not (p.grad if ours[name] is None else ours[name]).any(), name
        if p.grad is not None and ours[name] is not None:
            assert_close(ours[name], p.grad, rtol=rtol, atol=rtol * largest, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", KNOWN)
def test_the_fused_path_equals_the_models_own_logits(family, capsys):
    model = language_model(family)
    model = checked(model, "student.model")
    assert not model.capabilities.own_forward and not capsys.readouterr().err
    assert (pytest.approx(model.head.scale), model.head.softcap) == KNOWN[family]
    compare_with_own(model, 1e-4 if family in SINGLE else 1e-10)
    compare_last_layer(model)
    compare_taps(model)


#: Families that do not list the embeddings among their hidden states.
FROM_THE_FIRST_LAYER = ("mamba", "mamba2", "falcon_mamba", "rwkv")
#: Families whose layers hand on something else than transformers lists as hidden states, or that do not give these for a batch of text alone.
NOT_TAPPED = ("deepseek_v4", "gemma3n_text", "hrm_text", "hy_v4", "longcat_flash")


def compare_taps(model: LanguageModel, rtol: float = 1e-10) -> None:
    """The states inside are transformers' own before the last layer's; that one's are what is called next in the body, or the head, reads."""
    (on, _), layers, read = batch(), layers_of(model.base_model), []
    L, family = len(layers), model.base_model.config.model_type
    hooks = [layers[-1].register_forward_hook(lambda *_: read.clear())]
    for norm in (module for name, module in decoder_of(model.base_model).named_children() if module is not layers):
        hooks.append(norm.register_forward_pre_hook(lambda module, args: read.append(args[0]) if args else None))
    with torch.no_grad():
        outputs = model.outputs(on, Taps(frozenset(range(L + 1))))
        before_norm = read[0].flatten(0, 1)[on.rows_N] if read else outputs.hidden_NH
        for hook in hooks:
            hook.remove()
        own = model.base_model(**on.inputs, output_hidden_states=True, use_cache=False).hidden_states
    own = [hidden_BTH.flatten(0, 1)[on.rows_N] for hidden_BTH in own]
    assert len(own) == L + 1 and sorted(outputs.layers) == list(range(L + 1))
    first = family in FROM_THE_FIRST_LAYER
    for n in range(first, L + first):
        assert_close(outputs.layers[n], own[n - first], rtol=rtol, atol=rtol)
    assert_close(outputs.layers[L], before_norm, rtol=rtol, atol=rtol)
    widths = layer_widths(model, range(L + 1), "student.model")
    assert widths == {number: one.shape[1] for number, one in outputs.layers.items()}


def compare_last_layer(model: LanguageModel) -> None:
    """Where the last layer may compute the targets alone, it is exact."""
    if model.capabilities.last_layer:
        model.eval().zero_grad(set_to_none=True)
        assert gap(results(model, True, view()), results(model, False, view())) < 1e-6  # some route in float32


def test_weights_that_a_single_token_does_not_use_are_known():
    """A process without an example in a step runs one token, and others would wait for its gradients of RWKV's decay."""
    assert startup_checks.parameters_without_gradient(language_model("rwkv"), "student.model") == [
        f"rwkv.blocks.{n}.attention.time_decay" for n in (0, 1)
    ]
    assert startup_checks.parameters_without_gradient(language_model("llama"), "student.model") == []


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unknown_head_falls_back_to_the_models_own_forward(family, capsys):
    model = language_model(family)
    model = checked(model, "teacher.model")
    assert model.capabilities.own_forward
    assert capsys.readouterr().err.count(f"note: teacher.model: llmkd does not know {family}'s head") == 1
    compare_with_own(model, 1e-10)


def test_the_fallback_computes_only_the_columns_it_needs():
    model, seen = language_model("llama"), []
    model = model.replaced(capabilities=Capabilities(own_forward=True))
    model.base_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    view, _ = batch()
    model.hidden(view)
    assert seen == [6]  # of nine columns the supervised positions stand in six
    compare_with_own(model, 1e-10)


def test_a_head_that_a_family_calls_its_decoder_is_not_taken_for_the_body():
    from llmkd.models.families import decoder_of, layers_of

    plain = language_model("modernbert-decoder").base_model
    assert decoder_of(plain) is plain.model and len(layers_of(plain)) == plain.config.num_hidden_layers


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_a_model_that_sees_later_tokens_is_refused(family):
    with pytest.raises(UserError, match=r"student.model: .* sees? the tokens after it|see the tokens after it"):
        checked(language_model(family), "student.model")


@pytest.mark.parametrize("family", sorted(KNOWN.keys() - set(LEAKING)) + ["modernbert-decoder"])
def test_packing_is_allowed_where_it_is_isolated(family):
    checked(language_model(family), "student.model", packing=True)


@pytest.mark.parametrize("family", LEAKING)
def test_packing_is_refused_where_examples_see_one_another(family):
    with pytest.raises(UserError, match=r"data.packing: .* see one another|data.packing: .* does not accept packed rows"):
        checked(language_model(family), "student.model", packing=True)


@pytest.mark.slow
def test_every_other_causal_family_of_transformers_is_right_or_refused():
    """Those that can be built this small: none may be silently wrong, the last layer at the targets alone is exact or left out, and the states inside
    are transformers' own or refused."""
    compared, refused, unbuilt, shortened, tapped = [], [], [], [], []
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - KNOWN.keys()):
        try:
            model = language_model(family)
        except Exception as error:
            unbuilt.append(f"{family} ({error})")
            continue
        try:
            model = checked(model, family)
        except UserError as error:
            refused.append(str(error))
            continue
        compare_with_own(model, 1e-3)
        compare_last_layer(model)
        if family in NOT_TAPPED:
            with pytest.raises(UserError, match=f"({family})"):
                layer_widths(model, range(3), family)
        else:
            compare_taps(model)
            tapped.append(family)
        compared.append(family)
        shortened += [family] if model.capabilities.last_layer else []
    print(
        f"compared {len(compared)}, hidden states of {len(tapped)}, refused {len(refused)}: {refused}; not built {len(unbuilt)}: {unbuilt}"
    )
    assert len(compared) >= 70 and len(shortened) >= 50 and len(tapped) == len(compared) - len(set(NOT_TAPPED) & set(compared))
    assert all("tokens after it" in text or "fails on a first small batch" in text for text in refused)
