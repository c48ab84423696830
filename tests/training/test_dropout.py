"""LoRA's dropout follows the example: how a step is cut into micro-batches, packed rows, chunks and ranks does not change its gradient."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llmkd.config import loader
from llmkd.config.recipe import Lora
from llmkd.data.batching import TokenBudget
from llmkd.data.collate import position_keys
from llmkd.data.examples import Collator, Draw
from llmkd.models.dropout import ExampleDropout, drop, hashed
from llmkd.models.families import layers_of
from llmkd.models.load import LoadContext, load_students
from llmkd.training.build_student import build_student
from llmkd.training.loop import StudentState, accumulate_gradients, count_targets, unwrap
from llmkd.training.prepare import prepare
from tests.conftest import plain_recipe
from tests.training.test_accumulation import a_rank

EVERYWHERE = Lora(rank=4, dropout=0.3, target_modules=("q_proj", "o_proj", "up_proj", "down_proj", "lm_head"))


@pytest.fixture(scope="module")
def recipe(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("dropout") / "r.yaml"
    path.write_text(json.dumps(plain_recipe(world, path.parent / "out") | {"teacher": None}))
    return loader.load_recipe(path, {"loss.kd_ratio": 0.0})


@pytest.fixture(scope="module")
def prepared(recipe):
    return prepare(recipe)


def students(recipe, vocab: int, *loras: Lora, **student) -> list[StudentState]:
    many = [dataclasses.replace(recipe.student, lora=lora, **student) for lora in loras]
    loaded = load_students(many, LoadContext(vocab, "cpu", 0, packing=4096))
    for one in loaded:
        torch.manual_seed(1)
        for p in one.trainable().values():
            torch.nn.init.normal_(p.data, std=0.3)
    return [build_student(recipe.loss, recipe.optim, one, 4, Accelerator(cpu=True), 7) for one in loaded]


@pytest.fixture(scope="module")
def state(recipe, prepared) -> StudentState:
    return students(recipe, prepared.vocab, EVERYWHERE)[0]


def gradients(prepared, states: list[StudentState], size: int | TokenBudget = 8, ranks: int = 1, step: int = 1, seed: int = 0):
    """Of each student in a step of the run: the sum over micro-batches of all ranks, one after the other."""
    sums: list[dict] = [{} for _ in states]
    for rank in range(ranks):
        source = prepared.source.for_rank(rank, ranks)
        source.seed, source.micro_batch_size = seed, size
        source.examples = dataclasses.replace(source.examples, collator=Collator(packing=isinstance(size, TokenBudget) and size.packing))
        planned = next(one for one in source.schedule() if one.number == step)
        batches, alone = source.build(planned), a_rank(rank, 1)
        done = accumulate_gradients(seed, planned, count_targets(planned, batches, alone), dict(enumerate(states)), None, alone, batches)
        for total, one in zip(sums, states, strict=True):
            for name, p in one.parameters.items():
                if p.grad is not None:
                    total[name] = total.get(name, 0.0) + p.grad / done.scale
            one.optimizer.zero_grad(set_to_none=True)
    return sums


def gap(some: dict, others: dict) -> float:
    assert some.keys() == others.keys() and len(some) > 8
    return max((some[name] - others[name]).abs().max().item() for name in some) / max(x.abs().max().item() for x in others.values())


CUTS = {
    "micro-batches of three": {"size": 3},
    "two ranks": {"size": 2, "ranks": 2},
    "packed": {"size": TokenBudget(90, packing=True)},
    "packed in one row": {"size": TokenBudget(4096, packing=True)},
    "packed on three ranks": {"size": TokenBudget(70, packing=True), "ranks": 3},
}


@pytest.fixture(scope="module")
def whole(prepared, state) -> dict:
    return gradients(prepared, [state])[0]


@pytest.mark.parametrize("cut", CUTS)
def test_how_a_step_is_cut_does_not_matter(prepared, state, whole, cut):
    assert gap(gradients(prepared, [state], **CUTS[cut])[0], whole) < 1e-12


def test_masks_follow_seed_and_step_and_are_there(prepared, state, whole):
    assert gap(gradients(prepared, [state])[0], whole) == 0, "the same step again"
    sums = [whole, *(gradients(prepared, [state], step=n, seed=k)[0] for n, k in ((2, 0), (1, 1)))]
    batch = prepared.train.batch([0, 1, 2, 3], Draw(0, 0, 1))
    assert batch.student.keys.unique().numel() == sum(len(prepared.train.example(i)[0]) - 1 for i in range(4)) + 1, "padding has one"
    hidden = []
    for keys in (batch.student.keys, batch.student.keys, batch.student.keys + 1, None, None):
        hidden.append(unwrap(state).student.hidden(dataclasses.replace(batch.student, keys=keys)).detach())
    assert torch.equal(hidden[0], hidden[1]) and len({x.sum().item() for x in hidden}) == 4
    assert all(gap(a, b) > 1e-2 for a, b in ((sums[0], sums[1]), (sums[0], sums[2])))
    state.distiller.eval()
    try:
        without = gradients(prepared, [state])[0]
    finally:
        state.distiller.train()
    assert gap(without, whole) > 1e-2


def test_a_student_beside_others_a_recomputed_layer_and_dora(recipe, prepared, state, whole):
    beside = students(recipe, prepared.vocab, EVERYWHERE, Lora(rank=2, dropout=0.5))
    both = gradients(prepared, beside, size=3)
    assert gap(both[0], whole) < 1e-12
    dora = dataclasses.replace(EVERYWHERE, dora=True, target_modules=("q_proj", "up_proj", "lm_head"))
    for changes in ({"lora": EVERYWHERE, "gradient_checkpointing": True}, {"lora": dora}):
        (one,) = students(recipe, prepared.vocab, changes.pop("lora"), **changes)
        assert gap(gradients(prepared, [one], TokenBudget(60, packing=True), 2)[0], gradients(prepared, [one])[0]) < 1e-12


def test_it_is_the_textbooks_dropout_of_the_mask(prepared, state):
    """Each adapter's part of an output, worked out from the module's inputs, and each mask in an order of its own."""
    student = unwrap(state).student
    batch, seen, masks = prepared.train.batch([3, 9, 4], Draw(0, 0, 1)), [], set()
    layer = student.base_model.model.layers[0].mlp.up_proj
    hooks = [layer.lora_dropout["default"].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))]
    hooks += [
        module.register_forward_hook(lambda module, args, out: masks.add((out == 0).numpy().tobytes()))
        for one in student.base_model.model.layers[0].mlp.modules()
        for module in getattr(one, "lora_dropout", {}).values()
    ]
    student.hidden(batch.student)
    for hook in hooks:
        hook.remove()
    (x, out), kept = seen[0], round(0.3 * 65536)
    assert ((out == 0) | torch.isclose(out, x * 65536 / (65536 - kept), rtol=1e-14)).all() and 0.2 < (out == 0).double().mean() < 0.4
    assert len(masks) == 2, "every module has masks of its own"
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: drop(x, torch.arange(5, dtype=torch.int32), 9, 0.5), x)


def test_masks_have_the_statistics_of_independent_draws():
    """Of the mask of 2 steps of 3 examples of 256 positions at 255 features: its mean, and its covariance between steps, examples, positions,
    features and modules, in standard deviations; and of all pairs of rows and of columns the mean square covariance, in those of draws."""
    keys = torch.from_numpy(np.concatenate([position_keys((0, step, f"e{e}"), 256) for step in (1, 2) for e in range(3)]))
    for p in (0.05, 0.5):
        d, other = ((hashed(keys, module, 255) < round(p * 65536) - 32768).double() - p for module in (5, -5))
        s, shifts = p * (1 - p), (256, 768)
        assert abs(d.sum()) < 4 * (s * d.numel()) ** 0.5
        pairs = [(d, other), (d[:, 1:], d[:, :-1]), (d[1:], d[:-1]), (d[:, 2:], d[:, :-2]), *((d[n:], d[:-n]) for n in shifts)]
        for a, b in pairs:
            assert abs((a * b).sum()) < 4 * s * a.numel() ** 0.5
        for covariance, n in ((d @ d.T, 255), (d.T @ d, len(d))):
            off = covariance[~torch.eye(len(covariance), dtype=torch.bool)]
            assert abs(off.square().mean() / (s * s * n) - 1) < 0.05


def test_every_dropout_of_peft_is_replaced_and_an_experts_is_ordinary(state):
    found = [type(m) for m in unwrap(state).student.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert len(found) == 2 * 4 + 1 and set(found) == {ExampleDropout}
    module = next(m for m in unwrap(state).student.model.modules() if type(m) is ExampleDropout)
    torch.manual_seed(0)
    drawn = [module(torch.ones(10_007, 3)) for _ in "ab"]
    assert not torch.equal(*drawn) and module.p == 0.3


def test_two_models_on_two_threads_have_their_own_masks(recipe, prepared, state):
    """Each stops after its first layer until the other is there too."""
    models = [unwrap(one).student for one in (state, *students(recipe, prepared.vocab, EVERYWHERE))]
    views = [prepared.train.batch(rows, Draw(0, 0, 1)).student for rows in ([0, 1, 2], [3, 4])]
    with torch.no_grad():
        expected = [model.hidden(view) for model, view in zip(models, views, strict=True)]
    meeting = threading.Barrier(2, timeout=60)
    hooks = [layers_of(model.base_model)[0].register_forward_hook(lambda *_: (meeting.wait(), None)[1]) for model in models]

    def hidden(model, view):
        with torch.no_grad():
            return model.hidden(view)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(hidden, models, views))
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
