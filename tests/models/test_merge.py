"""Every kind of adapter that PEFT can merge is merged as PEFT does it; the others are refused by name."""

import peft
import pytest
import torch

from llmkd.errors import UserError
from llmkd.model_folder.files import find
from llmkd.models import merge as merging
from llmkd.models.merge import merge
from tests.models.test_adapters import base, logits, moved, plain

Q = ["q_proj", "v_proj"]
LORA = {"r": 4, "target_modules": Q}
KINDS = {
    "LoRA": (peft.LoraConfig, LORA | {"lora_alpha": 8}),
    "rank and alpha by pattern": (
        peft.LoraConfig,
        LORA | {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "rsLoRA": (peft.LoraConfig, LORA | {"use_rslora": True}),
    "DoRA": (peft.LoraConfig, LORA | {"use_dora": True}),
    "tokens": (peft.LoraConfig, LORA | {"trainable_token_indices": [13, 26]}),
    "parameters": (peft.LoraConfig, LORA | {"target_parameters": ["mlp.up_proj.weight"]}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": Q}),
    "LoHa": (peft.LoHaConfig, LORA),
    "LoKr": (peft.LoKrConfig, LORA | {"decompose_both": True, "decompose_factor": 4}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 4, "target_modules": Q}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4, "target_modules": Q}),
    "(IA)^3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA": (peft.VeraConfig, {"r": 8, "target_modules": Q, "save_projection": False}),
    "HRA": (peft.HRAConfig, {"r": 4, "target_modules": Q}),
    "MiSS": (peft.MissConfig, LORA),
    "MiSS, bat": (peft.MissConfig, LORA | {"init_weights": "bat"}),
    "norms": (peft.LNTuningConfig, {"target_modules": ["norm", "input_layernorm"]}),
    "tokens alone": (peft.TrainableTokensConfig, {"token_indices": [13, 26], "target_modules": ["embed_tokens"]}),
}


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """Save an adapter of a kind on the one base of these tests: its folder, the model as PEFT loads it again, the base's logits."""
    root = tmp_path_factory.mktemp("merge")
    base(root / "base", dtype=torch.float64)

    def make(config, **options):
        folder = root / str(len(list(root.iterdir())))
        torch.manual_seed(1)
        moved(peft.get_peft_model(plain(root / "base"), config(task_type="CAUSAL_LM", **options))).save_pretrained(folder)
        of_base = logits(plain(root / "base"))
        return folder, peft.PeftModel.from_pretrained(plain(root / "base"), folder).eval(), of_base

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_does_it(on, kind):
    config, options = KINDS[kind]
    folder, adapted, of_base = on(config, **options)
    unmerged = logits(adapted)
    expected = logits(adapted.merge_and_unload())
    found = logits(merge(find(str(folder), "export"), 640))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, unmerged, rtol=1e-5, atol=1e-5)
    assert (found - of_base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (peft.LoraConfig, LORA | {"layer_replication": [[0, 2], [1, 2]]}, "its layer_replication gives several layers one base weight"),
        (peft.LoraConfig, LORA | {"alora_invocation_tokens": [5]}, "is an adapter of type aLoRA, which is more than a change of weights"),
        (peft.PolyConfig, {"target_modules": Q}, "is an adapter of type POLY, which is more than a change of weights"),
        (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}, "is an adapter of type PREFIX_TUNING, which is more than a change of weights"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(on, config, options, said):
    folder, *_ = on(config, **options)
    with pytest.raises(UserError, match=said):
        merge(find(str(folder), "export"), 640)


def test_a_merge_that_moves_the_logits_is_refused(world, monkeypatch):
    monkeypatch.setattr(merging, "largest_difference", lambda a, b: 2e-3 * b.abs().max().item())
    with pytest.raises(UserError, match="changes its logits by .*; use the adapter unmerged"):
        merge(find(str(world / "adapter"), "export"), 640)
