"""Losses and gradient norms of twenty steps for every objective and distance, as they were when golden_losses.json was written.

The file is remade by

    REMAKE=1 python -m pytest tests/training/test_golden_losses.py

and its differences belong to the change that made them, with the reason. Models and data are worked out from sines and whole numbers, so
that no generator of random numbers matters, and everything is in float64: what differs between processors is rounding, 1e-16. The last
test changes all weights by a random part in 1e12, ten thousand times as much, and the results by less than a hundredth of TOLERANCE
(relative). No two objectives are nearer to each other than a hundred times TOLERANCE.
"""

import functools
import json
import operator
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llmkd.config.features import Features
from llmkd.config.on_policy import LongHorizon, OnPolicy
from llmkd.config.recipe import DIVERGENCES, SCHEDULED, Loss, Optim, schedules
from llmkd.config.schedule import SHAPES
from llmkd.config.target_weights import RULES, Keep, TargetWeights, chosen_by
from llmkd.config.terms import AttentionLoss
from llmkd.data.batch_source import PlannedSource
from llmkd.data.batching import BatchPlan
from llmkd.data.examples import TokenExamples
from llmkd.losses.features import DISTANCES, FeatureTerm
from llmkd.losses.terms import Term
from llmkd.models.language_model import LanguageModel
from llmkd.teachers.live import LiveTeacher
from llmkd.training.attention import attention_terms, enable_attention
from llmkd.training.build_student import build_student, long_horizon_terms
from llmkd.training.loop import train

FILE, TOLERANCE, STEPS, V = Path(__file__).with_name("golden_losses.json"), 1e-5, 20, 40
OPTIM = Optim(lr=0.005, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-3, warmup_ratio=0.1, min_lr_ratio=0.1)

#: (kd_ratio, temperature, divergence, its options)
OBJECTIVES = [
    (0.0, 1.0, "forward_kl", {}),
    (1.0, 1.0, "forward_kl", {}),
    (0.5, 2.0, "forward_kl", {}),
    (0.5, 0.5, "forward_kl", {}),
    (0.9, 1.0, "reverse_kl", {}),
    (0.3, 4.0, "reverse_kl", {}),
    (0.5, 1.0, "symmetric_kl", {}),
    (0.7, 2.0, "symmetric_kl", {"forward_weight": 0.2}),
    (0.5, 1.0, "generalized_jsd", {}),
    (1.0, 2.0, "generalized_jsd", {"beta": 0.1}),
    (0.6, 1.0, "generalized_jsd", {"beta": 0.0}),
    (0.6, 1.0, "generalized_jsd", {"beta": 1.0}),
    (0.5, 1.0, "skewed_forward_kl", {}),
    (0.8, 2.0, "skewed_forward_kl", {"alpha": 0.5}),
    (0.5, 1.0, "skewed_reverse_kl", {}),
    (0.8, 2.0, "skewed_reverse_kl", {"alpha": 0.5}),
    (0.5, 1.0, "adaptive_kl", {}),
    (0.5, 2.0, "adaptive_kl", {"head_mass": 0.9}),
    (0.5, 1.0, "total_variation", {}),
    (0.9, 2.0, "total_variation", {}),
    (0.5, 1.0, "alpha_beta", {}),
    (0.5, 1.0, "alpha_beta", {"alpha": 0.0, "beta": 0.5}),
    (0.5, 2.0, "alpha_beta", {"alpha": 1.5, "beta": 0.0}),
    (0.0, 1.0, "forward_kl", {}, {"weight": 2.0, "what": "maps"}),
    (0.5, 1.0, "forward_kl", {}, {"weight": 0.5, "what": "maps", "heads": "mean"}),
    (0.5, 1.0, "forward_kl", {}, {"weight": 0.5, "what": "relations", "relation_heads": 4}),
]
#: Half CE, half forward KL, and the hidden states after the embeddings and the layer, by each distance.
FEATURES = {f"features {distance}": distance for distance in DISTANCES}
#: Half CE, half forward KL, with targets that are weighed or chosen by a rule, and with schedules over the steps.
RULED = {
    "target_weights teacher_entropy": Loss(kd_ratio=0.5, target_weights=TargetWeights("teacher_entropy")),
    "target_weights student_entropy power 2 of both": Loss(
        kd_ratio=0.5, target_weights=TargetWeights("student_entropy", power=2, terms=("ce", "kd"))
    ),
    "target_weights divergence inverted": Loss(kd_ratio=0.5, target_weights=TargetWeights("divergence", invert=True)),
    "target_weights confidence of ce": Loss(kd_ratio=0.5, target_weights=TargetWeights("confidence", terms=("ce",))),
    "target_weights position half_life 3 of both": Loss(
        kd_ratio=0.5, target_weights=TargetWeights("position", half_life=3, terms=("ce", "kd"))
    ),
    "keep half": Loss(kd_ratio=0.5, keep=0.5),
    "keep 0.3 by position": Loss(kd_ratio=0.5, keep=Keep(share=0.3, by="position")),
    "keep 0.6 by divergence inverted": Loss(kd_ratio=0.5, keep=Keep(share=0.6, by="divergence", invert=True)),
    "keep 0.4 by teacher_entropy": Loss(kd_ratio=0.5, keep=Keep(share=0.4, by="teacher_entropy")),
    "keep 0.8 by confidence": Loss(kd_ratio=0.5, keep=Keep(share=0.8, by="confidence")),
    "kd_ratio 1 to 0.3 linear": Loss(kd_ratio={"from": 1.0, "to": 0.3}),
    "kd_ratio 0.2 to 0.9 cosine in 15 steps": Loss(kd_ratio={"from": 0.2, "to": 0.9, "shape": "cosine", "steps": 15}),
    "T 4 to 1 constant in half": Loss(kd_ratio=0.5, temperature={"from": 4.0, "to": 1.0, "shape": "constant", "ratio": 0.5}),
}
#: Of the loss, the first source and the second.
OF_SOURCES = {"reverse KL of the second source": (("forward_kl", {}), ("forward_kl", {}), ("reverse_kl", {}))}
#: On examples with weights of their own (`WEIGHTS`), of which every third was written by the student: the loss, and the long horizon's settings.
WEIGHTED: dict[str, tuple[Loss, LongHorizon | None]] = {
    "weights, normalize targets": (Loss(kd_ratio=0.5), None),
    "weights, normalize weights": (Loss(kd_ratio=0.5, normalize="weights"), None),
    "weights, normalize weights, features 2 to 0.5 linear": (
        Loss(kd_ratio=0.5, normalize="weights", features=Features(weight={"from": 2.0, "to": 0.5})),
        None,
    ),
    "weights, features 0 to 3 constant in 8 steps": (
        Loss(kd_ratio=0.5, features=Features(weight={"from": 0.0, "to": 3.0, "shape": "constant", "steps": 8})),
        None,
    ),
    "weights, attention 0.2 to 4 cosine": (
        Loss(kd_ratio=0.5, attention=AttentionLoss(weight={"from": 0.2, "to": 4.0, "shape": "cosine"})),
        None,
    ),
    "weights, long_horizon gamma 0.9 as it is": (Loss(kd_ratio=0.1, divergence="reverse_kl"), LongHorizon(0.9, length_normalized=False)),
    "weights, long_horizon gamma 1 length_normalized": (Loss(kd_ratio=0.7, divergence="reverse_kl"), LongHorizon(1.0)),
}
#: Of the examples in turn.
WEIGHTS = {"ce": [1, 0.25, 0], "kd": [1, 2, 1], "features": [0.5, 1.5, 0, 1], "attention": [1, 0.5], "long_horizon": [0, 0, 1]}


def name_of(ratio: float, temperature: float, divergence: str, options: dict, attention: dict | None = None) -> str:
    own = [f"{key} {value:g}" for key, value in options.items()]
    own += [f"attention {' '.join(map(str, attention.values()))}"] if attention else []
    return " ".join([f"kd_ratio {ratio:g}, T {temperature:g},", divergence, *own])


NAMES = [name_of(*objective) for objective in OBJECTIVES] + [*FEATURES, *RULED, *OF_SOURCES, *WEIGHTED]


def model(width: int, noise: float = 0.0) -> LanguageModel:
    """A Llama of one layer, `width` wide, with sines for weights. `noise`: of each weight's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}
    made, generator, start = (
        LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).double(),
        torch.Generator().manual_seed(0),
        width,
    )
    with torch.no_grad():
        for p in made.parameters():
            places = torch.arange(start, start + p.numel(), dtype=torch.float64).view(p.shape)
            p.copy_(1 + 0.2 * torch.sin(places) if p.dim() == 1 else 0.5 * torch.sin(places**2 / 7))
            p.mul_(1 + noise * torch.randn(p.shape, generator=generator, dtype=torch.float64))
            start += p.numel()
    return LanguageModel(made, V)


def source(weighted: bool = False) -> PlannedSource:
    """Twenty ragged examples of two sources, of which a first part is not supervised, five a step; with weights, or without."""
    lengths = [6 + 5 * i % 13 for i in range(20)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1], dtype=np.int32) ** 2 * 7 % (V - 3) + 3
    mask = np.concatenate([np.arange(n) > i % 4 for i, n in enumerate(lengths)])
    weights = {name: np.resize(np.array(values, np.float32), 20) for name, values in WEIGHTS.items()} if weighted else {}
    examples = TokenExamples(ids, mask, offsets, np.arange(20), source=np.arange(20) % 2, weights=weights)
    plan = BatchPlan(examples.lengths, seed=0, batch_size=5, epochs=STEPS // 4, max_steps=None)
    return PlannedSource(examples, [], plan, 3)


def feature_term(distance: str) -> FeatureTerm:
    """Two pairs of layers, with sines for maps."""
    term = FeatureTerm([(0, 1), (1, 0)], [(8, 12)] * 2, 0.8, distance, dtype=torch.float64)
    term.scales.copy_(torch.tensor([0.5, 2.0]))
    with torch.no_grad():
        for n, p in enumerate(term.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float64).view(p.shape) ** 2 / 3 + n))
    return term


def losses(
    objectives: list = OBJECTIVES, noise: float = 0.0, features: dict = FEATURES, ruled: dict = RULED, weighted: dict = WEIGHTED
) -> dict[str, list[list[float]]]:
    """For each objective the loss and the gradient norm of every step, of students that train side by side."""
    states, teacher = {}, model(12, noise).requires_grad_(False).eval()

    def build(name: str, loss: Loss, more: Sequence[Term] = (), divergences: tuple = ()) -> None:
        student = model(8, noise)
        if loss.attention:
            enable_attention(loss.attention, student, teacher, "teacher", packing=False)
        terms = [*more, *attention_terms(loss.attention, student, [teacher])]
        states[name] = build_student(loss, OPTIM, student, STEPS, Accelerator(cpu=True), None, terms, divergences)

    def trained(source: PlannedSource) -> dict[str, list[list[float]]]:
        taps = functools.reduce(operator.or_, (state.distiller.teacher_taps for state in states.values()))
        found = {name: [[], []] for name in states}
        for progress in train(source, list(states.values()), LiveTeacher(teacher, taps), Accelerator(cpu=True)):
            for k, (name, rows) in enumerate(found.items()):
                terms = progress.terms[k]
                assert ("kd" in terms) != name.startswith("kd_ratio 0,"), "a student that learns without the teacher of the others"
                for row, value in zip(rows, (terms["loss"], progress.grad_norms[k]), strict=True):
                    row.append(float(f"{value:.10g}"))
        states.clear()
        return found

    for ratio, temperature, divergence, options, *attention in objectives:
        settings = AttentionLoss(**attention[0]) if attention else None
        loss = Loss(kd_ratio=ratio, temperature=temperature, divergence=divergence, divergence_options=options, attention=settings)
        build(name_of(ratio, temperature, divergence, options, *attention), loss)
    for name, distance in features.items():
        build(name, Loss(kd_ratio=0.5), [feature_term(distance)])
    for name, loss in ruled.items():
        build(name, loss)
    for name, divergences in OF_SOURCES.items():
        build(name, Loss(kd_ratio=0.5), (), divergences)
    found = trained(source())
    for name, (loss, ahead) in weighted.items():
        more: list[Term] = [feature_term(loss.features.distance)] if loss.features else []
        build(name, loss, [*more, *long_horizon_terms(OnPolicy(long_horizon=ahead), loss)])
    return found | trained(source(weighted=True))


def gap(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest relative difference."""
    return np.abs(np.array(one) / np.array(other) - 1).max()


@pytest.fixture(scope="module")
def golden() -> tuple[dict, dict]:
    now = losses()
    if os.environ.get("REMAKE"):
        FILE.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in now.items()) + "\n}\n")
    return now, json.loads(FILE.read_text())


def test_every_objective_is_in_the_file(golden):
    assert list(golden[1]) == NAMES
    assert {objective[2] for objective in OBJECTIVES} == DIVERGENCES.keys()
    changed = {(divergence, option) for _, _, divergence, options, *_ in OBJECTIVES for option in options}
    assert changed == {(divergence, option) for divergence, options in DIVERGENCES.items() for option in options}
    assert {loss.target_weights.by for loss in RULED.values() if loss.target_weights} == set(RULES)
    assert {chosen_by(loss.keep, loss.target_weights).by for loss in RULED.values() if loss.keep != 1} == set(RULES)
    every = [*RULED.values(), *(loss for loss, _ in WEIGHTED.values())]
    given = [(name, value) for loss in every for name, value in schedules(loss).items() if isinstance(value, dict)]
    assert {name for name, _ in given} == set(SCHEDULED)
    assert {value.get("shape", "linear") for _, value in given} == SHAPES.keys()
    assert {loss.normalize for loss in every} == {"targets", "weights"}
    assert {ahead.length_normalized for _, ahead in WEIGHTED.values() if ahead} == {True, False}
    assert all(np.array(values).shape == (2, STEPS) for values in golden[1].values())


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradient_norms_are_the_golden_ones(golden, name):
    assert gap(golden[0][name], golden[1][name]) < TOLERANCE


def test_no_two_objectives_are_near_each_other(golden):
    every = list(golden[1].values())
    assert min(gap(a, b) for i, a in enumerate(every) for b in every[:i]) > 100 * TOLERANCE


def test_other_rounding_stays_far_within_the_tolerance(golden):
    some = {"features mse": "mse"}, dict(list(RULED.items())[::3]), dict(list(WEIGHTED.items())[2::3])
    assert max(gap(values, golden[0][name]) for name, values in losses(OBJECTIVES[::4], 1e-12, *some).items()) < TOLERANCE / 100
