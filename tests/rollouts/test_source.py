"""On-policy distillation: which examples are written, what becomes of them, and that nothing else changes."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from llmkd.commands.sweep import why_alone
from llmkd.config.on_policy import OnPolicy, Replay
from llmkd.data.written import prompts_of
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.rollouts.generate import Completion
from llmkd.rollouts.source import OnPolicySource, recorded_steps
from llmkd.rollouts.writer import LocalWriter
from llmkd.training.prepare import prepare, student_files
from tests.conftest import distance
from tests.training.one_and_two import assert_two_processes_are_one

SETTINGS = OnPolicy(share=0.5, max_new_tokens=12)


class Parrot:
    """Writes the last token of a prompt as often as its key says, and an end token where that is an even number of times."""

    def __init__(self):
        self.asked = []

    def write(self, prompts, keys, sampling):
        self.asked += [(tuple(prompt), key) for prompt, key in zip(prompts, keys, strict=True)]
        found = []
        for prompt, key in zip(prompts, keys, strict=True):
            count = key % 6
            found.append(Completion((*[prompt[-1]] * count, 1) if count % 2 == 0 else (prompt[-1],) * count, count % 2 == 0, 0.5))
        return found


def source_of(recipe, settings=SETTINGS, writer=None, rank=0, ranks=1, teachers=None, max_length=256) -> OnPolicySource:
    prepared = prepare(recipe)
    prompts = prompts_of(prepared.train, prepared.places, settings.max_new_tokens, max_length, settings.prompt_tokens)
    return OnPolicySource(prepared.source.for_rank(rank, ranks), prompts, writer or Parrot(), settings, 1 << 20, teachers or {})


def test_an_answer_is_the_students_own_ids_and_every_one_a_target_without_cross_entropy(make_recipe):
    writer = Parrot()
    source = source_of(make_recipe(), writer=writer)
    planned = {step.number: step for step in source.planned.schedule()}
    for step in source.schedule():
        before = planned[step.number]
        assert step.num_targets == sum(int(step.data.num_targets[i]) for i in step.examples) and len(step.examples) == len(before.examples)
        whole = {source.examples.content_hash(i): i for i in before.examples}
        for i in step.examples:
            ids, mask = step.data.example(i)
            if step.data.content_hash(i) in whole:
                assert step.data.weight("ce")[i] == 1 and "written" not in step.places[i]
                whole.pop(step.data.content_hash(i))
                continue
            prompt = tuple(ids[~mask].tolist())
            assert mask.tolist() == [False] * len(prompt) + [True] * int(mask.sum()) and mask.sum() >= 1
            key = next(key for asked, key in writer.asked if asked == prompt)
            expected = (*[prompt[-1]] * (key % 6), 1) if key % 2 == 0 else (prompt[-1],) * (key % 6)
            assert ids[mask].tolist() == list(expected)
            assert step.data.weight("ce")[i] == 0 and step.data.weight("kd")[i] == 1
            place, _, when = step.places[i].partition(", ")
            assert when == f"written at step {step.number}"
            (origin,) = [e for e in before.examples if source.places[e] == place]
            own, own_mask = source.examples.example(origin)
            assert prompt == tuple(own[: own_mask.argmax()].tolist()), "the prompt is the row's, up to its first target"
            whole.pop(source.examples.content_hash(origin))
        assert not whole
    written = len(writer.asked)
    assert 37 * 0.5 - 13 < written < 37 * 0.5 + 13


def test_batches_hold_the_answers_and_each_part_of_the_loss_its_weights(make_recipe):
    source = source_of(make_recipe(train__micro_batch_size=3), dataclasses.replace(SETTINGS, share=1.0))
    for step, micro_batches in source.steps():
        assert sum(batch.num_targets for batch in micro_batches) == step.num_targets
        assert all((batch.weights["ce"] == 0).all() and "kd" not in batch.weights for batch in micro_batches)
        assert step.weighted == {"ce": (0.0, 0)}
        for batch in micro_batches:
            ids = batch.student.inputs["input_ids"].flatten()
            assert batch.teacher is batch.student and all(
                int(y) in (1, int(ids[r])) for y, r in zip(batch.labels_N, batch.student.rows_N, strict=True)
            )


def test_which_are_written_depends_on_seed_step_and_example_alone(make_recipe):
    def drawn(source) -> list[set[tuple]]:
        source.writer.asked.clear()
        found = []
        for _ in source.schedule():
            found.append(set(source.writer.asked))
            source.writer.asked.clear()
        return found

    recipe = make_recipe(train__epochs=2)
    first = drawn(source_of(recipe))
    assert drawn(source_of(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, micro_batch_size=1)))) == first
    other = drawn(source_of(dataclasses.replace(recipe, seed=1)))
    assert [{p for p, _ in step} for step in other] != [{p for p, _ in step} for step in first]
    keys = [key for step in first for _, key in step]
    assert len(set(keys)) == len(keys), "the same prompt in another epoch is another text"
    later = source_of(recipe)
    steps = list(later.schedule(3))
    assert [step.number for step in steps] == list(range(4, 11)) and set(later.writer.asked) == set().union(*first[3:])


def test_one_example_twice_in_a_step_has_two_texts(make_recipe):
    source = source_of(make_recipe(train__batch_size=74, data__train__weight=2.0), dataclasses.replace(SETTINGS, share=1.0))
    (step,) = source.schedule()
    assert len(source.writer.asked) == len(set(source.writer.asked)) == len(step.examples) == 74
    assert len({prompt for prompt, _ in source.writer.asked}) == 37


def test_ranks_write_a_part_each_and_train_on_the_same_step(make_recipe, monkeypatch):
    settings = dataclasses.replace(SETTINGS, share=0.7, samples=2)
    alone = source_of(make_recipe(), settings)
    whole = list(alone.schedule())
    ranks = [source_of(make_recipe(), settings, rank=rank, ranks=2) for rank in (0, 1)]
    gathered = []
    for number in range(len(whole)):
        parts = []
        for source in ranks:  # first what each would give to the others, then all of it together

            def stop(found, parts=parts):
                parts.append(found)
                raise StopIteration

            monkeypatch.setattr("accelerate.utils.gather_object", stop)
            with pytest.raises(RuntimeError):
                next(source.schedule(number))
        assert abs(len(parts[0][0]) - len(parts[1][0])) <= 1, "as many each"
        monkeypatch.setattr("accelerate.utils.gather_object", lambda found, parts=parts: parts[0] + parts[1])
        gathered.append([next(source.schedule(number)) for source in ranks])
    for one, both in zip(whole, gathered, strict=True):
        for step in both:
            assert step.num_targets == one.num_targets and step.weighted == one.weighted and step.places == one.places
            assert np.array_equal(step.data.ids, one.data.ids) and np.array_equal(step.data.loss_mask, one.data.loss_mask)
        assert len(both[0].micro_batches) == len(both[1].micro_batches)
        assert sorted(sum(both[0].micro_batches + both[1].micro_batches, [])) == one.examples


def test_a_rank_that_cannot_write_ends_all(make_recipe, monkeypatch):
    class Broken:
        def write(self, *asked):
            raise UserError("its logits are NaN")

    seen = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: (seen.extend(found), [*found, [(0, Completion((1,), True))]])[1])
    with pytest.raises(UserError, match="NaN"):
        next(source_of(make_recipe(), writer=Broken(), ranks=2).schedule())
    assert isinstance(seen[0], UserError), "the others are told"
    with pytest.raises(UserError, match="NaN"):
        next(source_of(make_recipe(), writer=Broken()).schedule())


def test_an_answer_without_a_token_is_left_out_and_counted(make_recipe):
    class Silent:
        def write(self, prompts, keys, sampling):
            return [Completion((), False) if key % 2 else Completion((1,), True) for key in keys]

    source = source_of(make_recipe(), dataclasses.replace(SETTINGS, share=1.0), Silent())
    lengths = [len(step.examples) for step, _ in source.steps()]
    found = source.measured()
    assert sum(lengths) == found["written"] * found["written_finished"] and found["written_empty"] == found["written"] == 37
    assert found["written_cut_off"] == 37 - sum(lengths) > 0

    class Mute:
        def write(self, prompts, keys, sampling):
            return [Completion((), False)] * len(keys)

    source = source_of(make_recipe(), dataclasses.replace(SETTINGS, share=1.0), Mute())
    assert all(step.num_targets == 0 and sum(b.num_targets for b in batches) == 0 for step, batches in source.steps())


def test_the_teacher_reads_its_context_before_the_same_answer(make_recipe, tmp_path):
    rows = [{"instruction": f"Say {i}", "output": "Yes.", **({"teacher_context": f"You know {i}."} if i % 3 else {})} for i in range(12)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = source_of(make_recipe(data__train={"path": str(tmp_path / "c.jsonl")}), dataclasses.replace(SETTINGS, share=1.0))
    longer = 0
    for step, batches in source.steps():
        for i in step.examples:
            (own, mine), (theirs, yours) = step.data.example(i), step.data.teacher_view.example(i)
            assert own[mine].tolist() == theirs[yours].tolist() and yours[-1] and mine[-1]
            assert theirs[~yours].tolist()[-3:] == own[~mine].tolist()[-3:]
            longer += len(theirs) > len(own)
        assert all(batch.teacher is not batch.student for batch in batches)
    assert longer == 8


def test_the_teacher_writes_other_examples_after_its_own_prompt(make_recipe, tmp_path):
    rows = [{"instruction": f"Say {i}", "output": "Yes.", **({"teacher_context": f"You know {i}."} if i % 3 else {})} for i in range(40)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, found = make_recipe(data__train={"path": str(tmp_path / "c.jsonl")}), {}
    for share in (0.0, 0.4, {"from": 0.4, "to": 0.7}):
        settings = dataclasses.replace(SETTINGS, share=share, teacher_writes=0.3, samples=2)
        source, by = source_of(recipe, settings, teachers={-1: Parrot()}), {"by the teacher": set(), "by the student": set(), "data": set()}
        for step in source.schedule():
            for i, place in zip(step.examples, step.places, strict=True):
                origin, _, how = place.partition(", written ")
                who = "by the teacher" if how.startswith("by the teacher at step") else "by the student" if how else "data"
                by[who].add(origin)
                assert step.data.weight("ce")[i] == (who == "data") and step.data.weight("kd")[i] == 1
                if who == "by the teacher":
                    (own, mine), (theirs, yours) = step.data.example(i), step.data.teacher_view.example(i)
                    assert own[mine].tolist() == theirs[yours].tolist()
                    assert tuple(theirs[~yours].tolist()) in {prompt for prompt, _ in source.teachers[-1].asked}
        assert sum(map(len, by.values())) == len(set().union(*by.values()))
        measured, written = source.measured(), len(source.writer.asked)
        assert measured.get("written", 0) == written and measured["written_by_teacher"] == len(source.teachers[-1].asked) > 10
        assert 0 <= measured["written_by_teacher_finished"] <= 1 and measured["written_by_teacher_length"] > 0
        found[str(share)] = by
    assert len({frozenset(by["by the teacher"]) for by in found.values()}) == 1, "whatever the student writes"
    sizes = [len(by["by the student"]) for by in found.values()]
    assert sizes[0] == 0 < sizes[1] <= sizes[2]


def test_prompts_that_are_too_long_are_counted_where_one_is_drawn(make_recipe):
    settings, longest = dataclasses.replace(SETTINGS, share=1.0), 0
    for max_length in (256, 100, 13):
        source = source_of(make_recipe(), settings, max_length=max_length)
        written = sum(len([place for place in step.places if "written" in place]) for step in source.schedule())
        counts = source.statistics.counts["written_prompts_too_long"]
        assert counts == int((source.prompts.own + 12 > max_length).sum()) == 37 - len(source.writer.asked) and written <= 37 - counts
        assert counts >= longest
        longest = counts
    assert longest == 37 and source.measured() == {"written_prompts_too_long": 37}


def test_prompts_of_texts_and_those_that_are_too_long(make_recipe, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "The robin sings. " * n}) + "\n" for n in (1, 2, 8)))
    text = {"path": str(tmp_path / "t.jsonl"), "format": "text"}
    prepared = prepare(make_recipe(data__train=text))
    lengths = prepared.train.lengths.tolist()
    found = prompts_of(prepared.train, prepared.places, 10, 256, 12)
    assert found.own.tolist() == [min(12, n - 1) for n in lengths] == [10, 12, 12] and found.may.all()
    with pytest.raises(UserError, match=r"t.jsonl:1 is supervised from its beginning.*has no prompt"):
        prompts_of(prepared.train, prepared.places, 10, 256, None)
    tight = prompts_of(prepared.train, prepared.places, 10, 21, 12)
    assert tight.may.tolist() == [True, False, False] and tight.too_long.tolist() == [False, True, True]
    assert prompts_of(prepared.train, prepared.places, 10, 22, 12).may.all()


def test_the_teacher_of_each_source_writes_its_answers_and_all_together_those_of_the_others(make_recipe, world):
    train = [{"path": str(world / "train.jsonl")}, {"path": str(world / "held.jsonl"), "teacher": "a"}]
    teachers = [{"name": "a", "model": str(world / "adapter")}, {"model": str(world / "teacher")}]
    writers, settings = {0: Parrot(), -1: Parrot()}, dataclasses.replace(SETTINGS, share=0.3, teacher_writes=0.6, samples=2)
    source = source_of(make_recipe(data__train=train, teacher=teachers), settings, teachers=writers)
    list(source.schedule())
    prompts = source.prompts.teachers(source.examples, range(len(source.examples)))
    for index, writer in writers.items():
        asked = {prompt for prompt, _ in writer.asked}
        assert asked and {int(source.examples.teacher_index[prompts.index(list(prompt))]) for prompt in asked} == {index}
    assert source.measured()["written_by_teacher"] == sum(len(writer.asked) for writer in writers.values())


def test_rows_that_the_teacher_has_no_say_in_are_not_written(make_recipe, world):
    both = [{"path": str(world / "train.jsonl"), "loss": {"kd": 0.0}}, {"path": str(world / "held.jsonl"), "loss": {"kd": 2.0, "ce": 0.5}}]
    source = source_of(make_recipe(data__train=both), dataclasses.replace(SETTINGS, share=1.0))
    for step, _ in source.steps():
        for i in step.examples:
            weights = [float(step.data.weight(name)[i]) for name in ("ce", "kd")]
            assert weights == ([0.0, 2.0] if "written" in step.places[i] else [1.0, 0.0])
    assert len(source.writer.asked) == 9


def test_a_share_by_schedule_and_a_step_in_which_nothing_is_written(make_recipe):
    recipe = make_recipe(train__epochs=2)
    source = source_of(recipe, dataclasses.replace(SETTINGS, share={"from": 0.0, "to": 1.0, "shape": "constant", "steps": 6}))
    for (step, built), (planned, expected) in zip(source.steps(), prepare(recipe).source.steps(), strict=True):
        assert len(source.writer.asked) == (
            0 if step.number < 6 else sum(len(s.examples) for s in source.planned.schedule() if 6 <= s.number <= step.number)
        )
        if step.number < 6:
            assert step == planned and all(torch.equal(a.labels_N, b.labels_N) for a, b in zip(built, expected, strict=True))
            assert all("ce" not in batch.weights for batch in built)


def test_the_longest_answers_are_what_memory_is_measured_with(make_recipe):
    settings = dataclasses.replace(SETTINGS, max_new_tokens=61, samples=3)
    source = source_of(make_recipe(), settings)
    both = [(int(n), int(m) + 61) for n, m in zip(source.examples.lengths, source.prompts.own, strict=True)]
    worst = sorted(both, key=max, reverse=True)[:6]
    expected = sorted((max(one) for one in worst for _ in range(3 if one[1] >= one[0] else 1)), reverse=True)
    found = source.longest(6)
    assert found.max_lengths.tolist() == expected and 6 < len(expected) < 18, "some are the data's, some written"
    assert sorted(set(found.num_targets.tolist()))[0] == 61


def test_answers_of_twenty_steps_are_kept_the_first_and_the_last_among_them():
    assert recorded_steps(1) == {1} and recorded_steps(3) == {1, 2, 3}
    found = sorted(recorded_steps(1000))
    assert len(found) == 20 and (found[0], found[-1]) == (1, 1000) and {b - a for a, b in itertools.pairwise(found)} <= {52, 53}


def run_settings(**more) -> dict:
    return {"on_policy__share": 0.5, "on_policy__max_new_tokens": 6, "student__lora__dropout": 0.2, "train__max_steps": 4} | more


def test_share_0_is_the_run_without_bit_for_bit(trained):
    plain = trained("plain", student__lora__dropout=0.2, train__max_steps=3)
    never = trained("never", student__lora__dropout=0.2, train__max_steps=3, on_policy__share={"from": 0.0, "to": 1e-12})
    assert distance(plain, never) == 0


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(trained, monkeypatch, tmp_path, world):
    more = {"on_policy__replay__capacity": 3, "on_policy__replay__ratio": 0.5, "data__validation_fraction": 0.1, "validation__every": 1}
    more |= {
        "on_policy__share": {"adaptive": {"start": 0.4, "step": 0.2, "tolerance": 0.0}},
        "on_policy__validation_prompts": 0,
        "optim__lr": 5.0,
    }
    whole = trained("whole", **run_settings(**more))
    real = LocalWriter.write

    def dies(self, prompts, keys, sampling):  # in the third step, with its answers half written
        found = real(self, prompts, keys, sampling)
        if next(left) == 0:
            raise KeyboardInterrupt
        return found

    left = iter((2, 1, 0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalWriter, "write", dies)
        trained("part", checkpoint__every=1, **run_settings(**more))
    assert distance(trained("part", True, checkpoint__every=1, **run_settings(**more)), whole) == 0
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "part")
    }
    apart = {"targets_per_s", "peak_memory", "written_seconds", "written_tokens_per_s", "training_seconds", "teacher_seconds"}
    plain = [[{k: v for k, v in r.items() if k not in apart} for r in records[name]] for name in ("whole", "part")]
    assert plain[0] == plain[1] and sum("written" in r for r in plain[0]) == 4 and sum(r.get("written_replayed", 0) for r in plain[0]) > 2
    ce = [r["validation"]["ce"] for r in plain[0] if "validation" in r][:4]
    before, rises, shares = ce[0], 0, []
    for now in ce:
        rises, before = (rises + 1, now) if shares and now >= before else (rises, before)
        shares.append(min(0.7, 0.4 + 0.2 * rises))
    assert [r["written_share"] for r in plain[0] if "written_share" in r] == pytest.approx(shares) and rises > 0


EVERYTHING = {
    "on_policy__share": {"adaptive": {"start": 0.7}},
    "on_policy__samples": 2,
    "on_policy__teacher_writes": 0.3,
    "on_policy__replay": {"capacity": 9, "ratio": 0.6},
    "on_policy__validation_prompts": 5,
    "data__validation_fraction": 0.2,
    "validation__every": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["all of one teacher", "sources", "mixture"])
def test_two_processes_write_and_end_at_what_one_does(trained, world, tmp_path, what):
    """With everything that one teacher can; with a divergence by source and several teachers, one of them of a source's own; and where the
    teacher has a say in every token."""
    changes = {"on_policy__max_new_tokens": 9, "train__max_steps": 3, "optim__warmup_steps": 0}
    if what == "sources":
        train = [{"path": str(world / "train.jsonl"), "divergence": "reverse_kl"}, {"path": str(world / "held.jsonl"), "teacher": "a"}]
        changes |= {"data__train": train, "teacher": [{"name": "a", "model": str(world / "adapter")}, {"model": str(world / "teacher")}]}
        changes |= {"on_policy__share": 0.6, "on_policy__samples": 2, "on_policy__teacher_writes": 0.3}
    elif what == "mixture":
        changes |= {"on_policy__long_horizon": {"teacher_mix": 0.3, "mix_weights": "product"}, "loss__divergence": "reverse_kl"}
        changes |= {"on_policy__share": 0.6}
    else:
        changes |= EVERYTHING
    assert_two_processes_are_one(trained, world, tmp_path, changes)
    records = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    written = [r for r in records if "written" in r]
    assert len(written) == 3 and all(("kd_weight" in r) == (what == "mixture") for r in written)
    assert what != "all of one teacher" or written[-1]["written_replayed"] > 0 and any("written_by_teacher" in r for r in written)


def test_a_written_answer_has_source_and_teacher_of_its_prompt(make_recipe, world):
    train = [{"path": str(world / "train.jsonl"), "divergence": "reverse_kl"}, {"path": str(world / "held.jsonl"), "teacher": "a"}]
    teachers = [{"name": "a", "model": str(world / "adapter")}, {"model": str(world / "teacher")}]
    source, seen = source_of(make_recipe(data__train=train, teacher=teachers), dataclasses.replace(SETTINGS, replay=Replay(5, 0.5))), set()
    for step in source.schedule():
        for i, place in zip(step.examples, step.places, strict=True):
            origin = source.places.index(place.partition(", written")[0])
            own = tuple(int(of[origin]) for of in (source.examples.source, source.examples.teacher_index))
            assert own == (int(step.data.source[i]), int(step.data.teacher_index[i]))
            seen.add((own, "written" in place))
    assert len(seen) == 4


def test_a_sweep_trains_its_arms_one_by_one(make_recipe):
    recipe = make_recipe(on_policy__share=0.5)
    files = student_files(recipe.student)
    assert why_alone(recipe, files) == "a part of its data is written while it trains"
    assert why_alone(dataclasses.replace(recipe, on_policy=OnPolicy(share=0.0)), files) is None


def test_hidden_states_alone_are_learnt_on_what_the_student_writes(trained, tmp_path):
    """With loss.kd_ratio 0 and share 1 they are the whole loss."""
    changes = {"loss__kd_ratio": 0.0, "loss__features": {"weight": 1.0}, "on_policy": {"share": 1.0, "max_new_tokens": 6}}
    trained("out", **changes)
    records = [record for record in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" in record]
    assert len(records) == 5 and all(record["written"] > 0 == record["ce_targets"] for record in records)
    assert all(record["loss"] == pytest.approx(record["features"], rel=1e-9) for record in records)
    assert records[-1]["features"] < records[0]["features"]
