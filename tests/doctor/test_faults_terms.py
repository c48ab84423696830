"""Faults planted in loss.features and loss.attention: each is caught by the check that is for it."""

import pytest
import torch

from llmkd.losses import attention, features
from llmkd.losses.attention_groups import Group

STATES, ATTENTION = "hidden states are compared", "attention is compared"
PAIRS = [[1, 2], [2, 1]]


@pytest.fixture(scope="module")
def with_maps(make_setup):
    return make_setup(**{"loss.features": {"distance": "cosine", "layers": PAIRS}, "loss.attention": {"layers": PAIRS}})


@pytest.fixture(scope="module")
def with_relations(make_setup):
    relations = {"what": "relations", "relation_heads": 4, "weight": 0.3}
    return make_setup(**{"loss.features": {"weight": 2.0, "layers": "last"}, "loss.attention": relations, "data.packing": True})


@pytest.mark.parametrize("check", [STATES, ATTENTION])
@pytest.mark.parametrize("name", ["with_maps", "with_relations"])
def test_sound_terms_pass(name, check, request, asked):
    result = asked(request.getfixturevalue(name), check)
    assert result.status == "passed" and " targets " in result.found, result


@pytest.mark.parametrize("check", [STATES, ATTENTION])
def test_without_the_term_nothing_is_asked(setup, asked, check):
    assert asked(setup, check).status == "not asked"


def changed_slope(real):
    def other(*given):
        value, slope = real(*given)
        return value, slope * 1.01

    return other


def scaled(real, by):
    return lambda *given: real(*given) * by


@pytest.mark.parametrize("name", ["with_maps", "with_relations"])
@pytest.mark.parametrize("fault", ["value", "gradient", "own position"])
def test_attention_that_no_textbook_has(name, fault, request, caught, monkeypatch):
    if fault == "value":
        monkeypatch.setattr(attention, "scores", lambda q, k, scaling, real=attention.scores: real(q, k, 1.01 * scaling))
    elif fault == "gradient":
        monkeypatch.setattr(attention, "divergence", changed_slope(attention.divergence))
    else:
        sees = Group.sees
        monkeypatch.setattr(
            Group, "sees", lambda self, windows: sees(self, windows) & (self.position_bm != self.position_bm[:, :1])[:, None]
        )
    caught(request.getfixturevalue(name), ATTENTION)


@pytest.mark.parametrize("fault", ["value", "scale"])
def test_hidden_states_that_no_textbook_has(with_maps, fault, caught, monkeypatch):
    term = with_maps.distiller.terms["features"]
    if fault == "value":
        monkeypatch.setattr(term, "distance", scaled(features.cosine, 1.01))
    else:
        with torch.no_grad():
            monkeypatch.setitem(term._buffers, "scales", term.scales * 1.01)
    caught(with_maps, STATES)
