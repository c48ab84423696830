"""Earlier answers in the place of fresh ones: which are drawn, that a checkpoint has them, and that no other buffer is taken."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmkd.config import loader
from llmkd.config.on_policy import OnPolicy, Replay
from llmkd.data.written import refuse_replay
from llmkd.errors import UserError
from llmkd.rollouts.replay import Answer, ReplayBuffer
from llmkd.training import checkpoint
from llmkd.training.build import restore
from tests.conftest import plain_recipe
from tests.rollouts.test_source import source_of

SETTINGS = OnPolicy(share=0.6, max_new_tokens=12, samples=2, replay=Replay(capacity=7, ratio=0.4))


def test_fresh_until_it_is_full_then_by_the_ratio_each_of_the_newest_alike():
    """Against a plain list: 3 answers a step are asked for, and the buffer is of 5."""
    buffer, kept, fresh, drawn = ReplayBuffer(Replay(capacity=5, ratio=0.3), 3, 2000), [], 0, np.zeros(5)
    for step in range(1, 2001):
        found = buffer.draw(step, [3 * step + n for n in range(3)])
        if len(kept) < 5:
            assert found == [None] * 3
        else:
            assert all(one is None or one in kept for one in found)
            fresh += found.count(None)
            for one in found:
                drawn += [one == other for other in kept]
        written = [Answer(step, n, (step, n)) for n, one in enumerate(found) if one is None]
        buffer.add(written)
        kept = [*kept, *written][-5:]
    asked = 3 * 1998
    assert abs(fresh / asked - 0.3) < 3 * (0.3 * 0.7 / asked) ** 0.5
    share = drawn / drawn.sum()
    assert drawn.sum() == asked - fresh and (abs(share - 0.2) < 3.5 * (0.2 * 0.8 / drawn.sum()) ** 0.5).all()
    assert buffer.draw(9, [1, 2, 3]) == buffer.draw(9, [1, 2, 3]) and buffer.draw(9, [2]) == buffer.draw(9, [1, 2, 3])[1:2]


def test_the_ratio_decreases_from_all_to_none():
    buffer = ReplayBuffer(Replay(capacity=1), 0, 401)
    buffer.add([Answer(1, 0, (1,))])
    fresh = [buffer.draw(step, range(1000)).count(None) / 1000 for step in (1, 101, 301, 401)]
    assert fresh == pytest.approx([1, 0.75, 0.25, 0], abs=0.05) and fresh[0] == 1 and fresh[-1] == 0
    assert ReplayBuffer(None, 0, 9).draw(3, range(50)) == [None] * 50


def test_a_replayed_answer_is_that_of_its_own_prompt_and_says_when_it_was_written(make_recipe):
    source, written, again = source_of(make_recipe(train__epochs=3), SETTINGS), {}, 0
    for step in source.schedule():
        for i, place in zip(step.examples, step.places, strict=True):
            if "written" in place:
                origin, _, when = place.partition(", written at step ")
                text = tuple(step.data.example(i)[0].tolist())
                assert step.data.weight("ce")[i] == 0
                if int(when) == step.number:
                    written.setdefault((origin, step.number), set()).add(text)
                else:
                    assert text in written[origin, int(when)]
                    again += 1
        assert all(one.step <= step.number for one in source.replay.answers)
    found = source.measured()
    assert found["written_replayed"] == again > 20 and found["written"] == len(source.writer.asked)


def test_a_run_goes_on_from_a_checkpoint_with_the_same_answers(make_recipe, tmp_path):
    """From the buffer after each step, also when the next was written already; through the file."""
    recipe = make_recipe(train__epochs=2)
    steps, states = [], {}
    source = source_of(recipe, SETTINGS)
    for step in source.schedule():
        if step.number > 1:
            before = source.state(step.number - 1)
            assert before.keys() == states[step.number - 1].keys()
            assert all(np.array_equal(array, states[step.number - 1][name]) for name, array in before.items())
        steps.append(step)
        states[step.number] = source.state(step.number)
    learnt = checkpoint.Snapshot({"w": torch.zeros(1)}, {})
    for done in (1, 3, 6):
        checkpoint.save(tmp_path, done, learnt, {"best": None, "validated": None, **states[done]}, {})
        resumed = source_of(recipe, SETTINGS)
        resumed.restore(checkpoint.verified(tmp_path / f"step-{done}", {}).state)
        for one, other in zip(steps[done:], resumed.schedule(done), strict=True):
            assert one.places == other.places and one.micro_batches == other.micro_batches
            assert np.array_equal(one.data.ids, other.data.ids) and np.array_equal(one.data.loss_mask, other.data.loss_mask)
        without = source_of(recipe, SETTINGS)
        differ = any(one.places != other.places for one, other in zip(steps[done:], without.schedule(done), strict=True))
        assert differ == (done > 1), "it matters, once it is full"


FOREIGN = {
    "missing": ({"replay.ids": None}, "it has no replay buffer"),
    "other numbers": ({"replay.ids": np.zeros(3)}, "its replay buffer has other arrays"),
    "cut": ({"replay.ids": np.zeros(3, np.int32)}, "inconsistent lengths"),
    "one step less": ({"replay.steps": np.ones(6, np.int64)}, "inconsistent lengths"),
    "of another tokenizer": ({"replay.ids": lambda ids: ids + (1 << 20)}, "not of 1 to 12 tokens of the vocabulary"),
    "of later steps": ({"step": 1}, "answers of later steps"),
    "in another order": ({"replay.steps": lambda steps: steps - np.arange(7)}, "or in another order"),
    "of other data": ({"replay.examples": lambda examples: (examples + 1) % 37}, "which is a different one in this data"),
    "of more data": ({"replay.examples": lambda examples: examples + 37}, "which is a different one in this data"),
}


@pytest.fixture(scope="module")
def state(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    (folder / "r.yaml").write_text(json.dumps(plain_recipe(world, folder / "out")))
    source = source_of(loader.load_recipe(folder / "r.yaml"), SETTINGS)
    for step in source.schedule():
        if step.number == 3:
            return source, {"step": 3, **source.state(3)}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_buffer_that_is_not_of_this_run_is_refused(state, name):
    source, whole = state
    change, said = FOREIGN[name]
    changed = {key: value(whole[key]) if callable(value) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=said):
        source.restore(whole | changed)
    source.restore(whole)
    assert [one.ids for one in source.replay.answers][-1] == tuple(whole["replay.ids"][whole["replay.offsets"][-2] :].tolist())


def test_a_checkpoint_with_such_a_buffer_is_named(state, tmp_path):
    source, whole = state
    learnt = checkpoint.Snapshot({"w": torch.zeros(1)}, {})
    held = {"best": None, "validated": None, **whole, "replay.examples": whole["replay.examples"][::-1].copy()}
    folder = SimpleNamespace(checkpoints=tmp_path, path=tmp_path, run={})
    for kept, said in ((held, "in this data"), ({"best": None, "validated": None}, "it has no replay buffer")):
        checkpoint.save(tmp_path, 3, learnt, {k: v for k, v in kept.items() if k != "step"}, {})
        with pytest.raises(
            UserError, match=f"^{tmp_path}/step-3: .*{said}; resume with the recipe and the data that wrote it, or start again"
        ):
            restore([SimpleNamespace(folder=folder, restore=lambda saved: None)], source, main=True)


def test_a_larger_buffer_than_was_set_is_refused(state):
    source, whole = state
    buffer = ReplayBuffer(Replay(capacity=6), 0, 9)
    with pytest.raises(ValueError, match="holds 7 answers, but on_policy.replay.capacity is 6"):
        buffer.restore(whole, source.examples, 1 << 20, 12)


def test_a_buffer_that_would_never_be_full_is_refused():
    settings = dataclasses.replace(SETTINGS, replay=Replay(capacity=100))
    with pytest.raises(
        UserError, match="on_policy.replay.capacity: found 100, and the student writes 86 answers or so before the last step"
    ):
        refuse_replay(settings, 8, 10)
    refuse_replay(settings, 8, 12)
    refuse_replay(dataclasses.replace(settings, replay=None), 8, 1)


def test_without_a_buffer_a_checkpoint_has_no_arrays(make_recipe):
    source = source_of(make_recipe(), dataclasses.replace(SETTINGS, replay=None))
    next(source.schedule())
    assert source.state(1) == {} and "written_replayed" not in source.measured()
    source.restore({"step": 1})
