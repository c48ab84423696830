"""The built-in CNN against the same sums in float64, and as a transformers model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification

from llmkd.models.builtin_cnn import BuiltinCnnConfig, BuiltinCnnForClassification, register

SOUND = {"inputs": "input_features", "width": 4, "blocks": 2, "num_labels": 3}


def small(**changes) -> BuiltinCnnForClassification:
    torch.manual_seed(0)
    return BuiltinCnnForClassification(BuiltinCnnConfig(**{**SOUND, **changes})).eval()


def by_hand(weights: dict, x_HW: np.ndarray) -> np.ndarray:
    """Logits of one example with one channel, block by block, in float64."""
    x, i = x_HW[None].astype(np.float64), 0
    while f"blocks.{i}.convolution.weight" in weights:
        kernel, (height, width) = weights[f"blocks.{i}.convolution.weight"], x.shape[1:]
        padded, out = np.pad(x, ((0, 0), (1, 1), (1, 1))), np.zeros((len(kernel), height, width))
        for row in range(3):
            for column in range(3):
                out += np.einsum("oc,chw->ohw", kernel[:, :, row, column], padded[:, row : row + height, column : column + width])
        out = (out - out.mean()) / np.sqrt(out.var() + 1e-5)
        out = out * weights[f"blocks.{i}.norm.weight"][:, None, None] + weights[f"blocks.{i}.norm.bias"][:, None, None]
        out = np.maximum(out, 0)[:, : height // 2 * 2, : width // 2 * 2]
        x, i = out.reshape(len(out), height // 2, 2, width // 2, 2).max((2, 4)), i + 1
    return weights["classifier.weight"] @ np.concatenate([x.mean((1, 2)), x.max((1, 2))]) + weights["classifier.bias"]


def test_logits_are_those_by_hand_and_do_not_follow_from_the_batch():
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():  # also those that begin as zeros and ones
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, 9, 14)
    logits = model(input_features=x).logits
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    for i in range(3):
        assert np.abs(logits[i].detach().numpy() - by_hand(weights, x[i].numpy())).max() < 1e-4
        assert torch.allclose(model(input_features=x[i : i + 1]).logits[0], logits[i], atol=1e-5)
    states = model(input_features=x, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 4 * 7, 4), (3, 2 * 3, 8)]


@pytest.mark.parametrize(
    ("auto", "inputs"), [(AutoModelForAudioClassification, "input_features"), (AutoModelForImageClassification, "pixel_values")]
)
def test_it_is_saved_and_loaded_by_the_auto_classes(auto, inputs, tmp_path):
    register()
    register()
    model = small(inputs=inputs, id2label={0: "owl", 1: "wren", 2: "crow"})
    model.save_pretrained(tmp_path)
    again, x = auto.from_pretrained(tmp_path), torch.randn(2, model.config.channels, 8, 8)
    assert torch.equal(again(**{inputs: x}).logits, model(**{inputs: x}).logits) and again.config.id2label[2] == "crow"
    assert again.main_input_name == inputs and torch.equal(auto.from_config(again.config).classifier.bias, torch.zeros(3))


def test_new_weights_differ_by_seed_and_keep_the_scale_of_their_input():
    models = [small(width=16, blocks=3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    deviation = models[0](input_features=torch.randn(8, 40, 60)).logits.std().item()
    assert 0.05 < deviation < 5
