"""Every setting that is a number with a fraction: beyond its range it is refused in one line, and at the ends of its range float32 still computes."""

import copy
import math

import pytest
import torch
from torch import nn

from llmkd.config.divergences import DIVERGENCES
from llmkd.config.recipe import Optim, Recipe
from llmkd.config.schema import describe
from llmkd.config.target_weights import TargetWeights as Settings
from llmkd.config.validation import check
from llmkd.errors import UserError
from llmkd.head import Head
from llmkd.losses.divergences import make_divergence
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.losses.target_weights import TargetWeights
from llmkd.rollouts.draw import probabilities
from llmkd.rollouts.sampling import Sampling
from llmkd.signals import Dense
from llmkd.training import optim as optimizers

EXTREME = [-0.0, 1e-300, 1e-46, 1e-30, 1e30, 1e300, -1e300, math.inf, math.nan, "1e-3 "]
SERVER = {"server": "http://127.0.0.1:1", "model": "t"}
#: What a setting needs around it to be given at all.
AROUND = {
    "teacher.ema": {"teacher": {}},
    "teacher.timeout": {"teacher": SERVER},
    "teacher.patience": {"teacher": SERVER},
    "teacher.cache.temperature": {"teacher": {"model": "t", "cache": {"path": "c", "kind": "sampled"}}},
    "loss.target_weights": {"loss": {"target_weights": {"by": "position"}}},
    "loss.keep.share": {"loss": {"keep": {}}},
    "on_policy.share.adaptive": {
        "on_policy": {"share": {"adaptive": {}}},
        "validation": {"every": 1},
        "data": {"train": {"path": "t.jsonl"}, "validation_fraction": 0.1},
    },
    "data.features": {"task": "classification", "data": {"train": {"path": "t.jsonl", "format": "audio"}, "features": {"kind": "log_mel"}}},
    "on_policy.engine": {"on_policy": {"engine": {"server": SERVER["server"]}}},
}
PLAIN = {"output_dir": "o", "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": {"path": "t.jsonl"}}}
SCHEDULES = ["loss.temperature.from", "loss.temperature.to", "loss.kd_ratio.from", "loss.features.weight.to", "on_policy.share.from"]
OPTIONS = [f"loss.divergence_options.{option}" for option in {option for options in DIVERGENCES.values() for option in options}]
NUMBERS = [path for path, kind, *_ in describe(Recipe) if "a number" in kind and not path.startswith(("data.validation.", "data.choices."))]


def problems(path: str, value) -> list[str]:
    """What is found wrong with a recipe where one setting has that value."""
    data = copy.deepcopy(PLAIN | next((around for start, around in AROUND.items() if path.startswith(start)), {}))
    keys, here = path.split("."), data
    for key in keys[:-1]:
        here = here.setdefault(key, [0.9, 0.999] if key == "betas" else {})
    if "betas" in keys:
        here[int(keys[-1])] = value
    else:
        here.update(({"from": 0.5, "to": 0.6} if path in SCHEDULES else {}) | {keys[-1]: value})
    if "divergence_options" in keys:
        data["loss"]["divergence"] = next(name for name, options in DIVERGENCES.items() if keys[-1] in options)
    try:
        check(Recipe, data, "r.yaml", {}, [], set())
    except UserError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("path", sorted({*NUMBERS, *SCHEDULES, *OPTIONS, "optim.betas.0", "optim.betas.1"}))
def test_a_number_beyond_its_range_is_refused_in_one_line(path):
    for value in EXTREME:
        found = problems(path, value)
        if isinstance(value, str) or not (value == 0 or 1e-30 <= abs(value) <= 1e30):
            assert found and found[0].startswith(f"r.yaml: {path}: found "), (value, found)
        if found and found[0].startswith(f"r.yaml: {path}: found "):
            assert len(found) == 1, (value, found)


@pytest.mark.parametrize("option", ["alpha", "beta"])
def test_a_mixture_holds_none_of_a_distribution_or_so_much_that_float32_tells(option):
    """With a share of 1e-9 the skewed divergences and the JSD of distributions far apart are infinite in float32."""
    path = f"loss.divergence_options.{option}"
    for value in (1e-30, 1e-9, 9e-4):
        (line,) = problems(path, value)
        assert line == f"r.yaml: {path}: found {value!r}, expected 0, 1, or a share from 0.001 to 0.999, which float32 tells from them"
    assert problems(path, 0.0) == problems(path, 1e-3) == problems(path, 0.9) == []


def test_numbers_of_the_users_rows_are_as_they_are():
    assert problems("data.train.where.score", 1e-300) == problems("data.train.where.score", 1e300) == []


GENERATOR = torch.Generator().manual_seed(0)
N, H, V = 6, 5, 11
HIDDEN, TEACHER = (3 * torch.randn(N, H, generator=GENERATOR) for _ in range(2))
LABELS = torch.randint(V, (N,), generator=GENERATOR)
WEIGHT, THEIRS = (torch.randn(V, H, generator=GENERATOR) for _ in range(2))


def head(weight: torch.Tensor) -> Head:
    project = nn.Linear(H, V, bias=False)
    project.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return Head(project, V)


def loss_of(objective: Objective, weights: dict | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = HIDDEN.clone().requires_grad_(True)
    total, terms = fused_loss(hidden, head(WEIGHT), LABELS, objective, Dense(TEACHER, head(THEIRS)), weights=weights)
    total.backward()
    return total.detach(), terms["kd"], hidden.grad


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_the_divergence_at_the_ends_of_the_temperature(temperature):
    """sum p (log p - log q) T^2 in float64, and for the gradient the differences (q - p) T times the head's weight."""
    q, p = ((x.double() @ w.double().T / temperature).log_softmax(-1) for x, w in ((HIDDEN, WEIGHT), (TEACHER, THEIRS)))
    _, terms, gradient = loss_of(Objective(1.0, temperature))
    torch.testing.assert_close(terms.double(), (p.exp() * (p - q)).sum(-1) * temperature**2, rtol=2e-3, atol=0)
    torch.testing.assert_close(gradient.double(), (q.exp() - p.exp()) @ WEIGHT.double() * temperature, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {option: end}) for name, all_of in DIVERGENCES.items() for option, (_, high, _) in all_of.items() for end in (0, 1e-3, high)],
)
def test_options_of_a_divergence_at_their_ends(name, options):
    for temperature in (1e-3, 1.0, 1e3):
        total, terms, gradient = loss_of(Objective(1e-30, temperature, make_divergence(name, **options)))
        assert total.isfinite() and terms.isfinite().all() and gradient.isfinite().all(), temperature


def test_weights_and_rules_at_their_ends():
    for ce, kd in ((1e-6, 1000), (1000, -1000)):
        weights = {"ce": torch.full((N,), float(ce)), "kd": torch.full((N,), float(kd))}
        assert all(one.isfinite().all() for one in loss_of(Objective(0.5, 1e3), weights))
    for power, half_life in ((0.01, 0.01), (100, 1e6)):
        rule = TargetWeights.of(Settings(by="position", power=power, half_life=half_life))
        found = rule.weights(rule.scores(LABELS, slice(None), torch.arange(N)))
        assert found.isfinite().all() and found[0] == 1 and found.min() >= 0


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-30},
        {"lr": 1e3},
        {"eps": 1e-30},
        {"eps": 1000.0},
        {"weight_decay": 1e3},
        {"betas": (0.0, 0.0)},
        {"betas": (1 - 2**-53, 1 - 2**-53)},
    ],
    ids=str,
)
def test_the_optimizer_at_the_ends_of_its_settings(settings):
    """A parameter whose gradient is 0, and one with gradients from 1e-20 to 1e10."""
    still, moved = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = optimizers.build(Optim(**settings), {"still": still, "moved": moved})
    for _ in range(3):
        still.grad, moved.grad = torch.zeros(3, 2), torch.logspace(-20, 10, 6).view(3, 2)
        optimizer.step()
    assert still.isfinite().all() and moved.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_sampling_at_the_ends_of_its_temperature(temperature):
    logits, least = 100 * HIDDEN, {"top_p": 1e-30, "min_p": 1e-30}
    p = probabilities(logits, Sampling(temperature))
    torch.testing.assert_close(p, (logits.double() / temperature).softmax(-1), rtol=1e-12, atol=0)
    assert (probabilities(logits, Sampling(temperature, **least)).argmax(-1) == logits.argmax(-1)).all()
