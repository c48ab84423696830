"""Batch sources: the loop takes any of them, counts the targets where a source states none, and nobody asks which one it is."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd.config import loader
from llmkd.data.batch_source import Step
from llmkd.data.collate import collate
from llmkd.models.load import LoadContext, load_teacher
from llmkd.teachers.live import LiveTeacher
from llmkd.training.build import longest_row
from llmkd.training.build_student import build_student
from llmkd.training.launch import start
from llmkd.training.loop import count_targets, train
from llmkd.training.prepare import prepare
from llmkd.training.step_result import TargetCounts
from llmkd.training.student_run import StudentRun
from llmkd.training.trainer import Trainer
from tests.conftest import plain_recipe
from tests.kit.models import load_student
from tests.kit.processes import launch

REPO = Path(__file__).parents[2]


def test_nobody_asks_which_source_it_is():
    asked = re.compile(r"isinstance\([^)]*(Stream|Source)\b|type\(\w*source\w*\)")
    assert not [path.name for path in (REPO / "llmkd").rglob("*.py") if asked.search(path.read_text(encoding="utf-8"))]


class Rollouts:
    """As a student that writes would be: a step's examples follow from the weights at that moment, are built when they are asked for, and
    hold as many targets as they happen to. Each rank has one micro-batch of two or three examples, and may be given less than others."""

    seed, total_steps = 7, 4

    def __init__(self, data, parameters, rank: int = 0, ranks: int = 1):
        self.data, self.parameters, self.rank, self.ranks = data, parameters, rank, ranks
        self.asked, self.chosen = [], []

    def steps(self, done: int = 0):
        for number in range(done + 1, self.total_steps + 1):
            total = sum(float(p.detach().abs().sum()) for p in self.parameters.values())
            self.asked.append(total)
            draw = np.random.default_rng([self.seed, number, int(1e6 * total)])
            chosen = draw.permutation(len(self.data))[: int(draw.integers(4, 7))].tolist()
            self.chosen.append(chosen)
            yield Step(number, 0), [collate(self.data, chosen[r :: max(2, self.ranks)], 0) for r in range(self.rank, 2, self.ranks)]


def parts(recipe, accelerator):
    """The data, a student with its optimizer, and the teacher."""
    prepared = prepare(recipe)
    student = load_student(recipe.student, prepared.vocab, "cpu", recipe.seed)
    teacher = LiveTeacher(load_teacher(recipe.teacher, LoadContext(prepared.vocab, "cpu")))
    return prepared.train, build_student(recipe.loss, recipe.optim, student, 4, accelerator), teacher


@pytest.mark.parametrize(("processes", "unused", "looks"), [(2, ("x",), True), (1, ("x",), False), (2, (), False)])
def test_processes_do_not_wait_for_gradients_that_never_come(make_recipe, processes, unused, looks):
    recipe, ddp = make_recipe(), SimpleNamespace(find_unused_parameters=False)
    student = load_student(recipe.student, 64, "cpu", recipe.seed)
    student = student.replaced(capabilities=dataclasses.replace(student.capabilities, parameters_without_gradient=unused))
    two = SimpleNamespace(device="cpu", num_processes=processes, ddp_handler=ddp, prepare_model=lambda model: model)
    build_student(recipe.loss, recipe.optim, student, 4, two)
    assert ddp.find_unused_parameters is looks


@pytest.mark.parametrize(
    ("train_settings", "longest"),
    [
        ({"micro_batch_size": 4}, 400),
        ({"micro_batch_tokens": 250}, 250),
        ({"micro_batch_tokens": 50}, 100),
        ({"micro_batch_tokens": 5000}, 800),
    ],
)
def test_a_packed_row_holds_at_most_a_step_and_at_least_an_example(make_recipe, train_settings, longest):
    recipe = make_recipe(data__max_length=100, data__packing=True)
    settings = dataclasses.replace(recipe.train, **{"micro_batch_size": None, "micro_batch_tokens": None} | train_settings)
    assert longest_row(settings, recipe.data) == longest


@pytest.mark.parametrize(("by", "kept"), [("ce", 1), ("top1_agreement", 2)])
def test_the_best_step_has_the_lowest_cross_entropy_or_the_highest_agreement(by, kept):
    recipe = SimpleNamespace(checkpoint=SimpleNamespace(best_by=by), validation=SimpleNamespace(samples=0))
    run = SimpleNamespace(recipe=recipe, main=False, best=None, validated=None)
    for step, value in ((1, 0.2), (2, 0.5), (3, 0.4)):
        StudentRun.record_validation(run, step, SimpleNamespace(metrics=lambda value=value: {by: value}))
    assert (run.best["step"], run.validated) == (kept, 3)


def test_a_step_that_has_a_checkpoint_is_not_saved_again():
    saved = []
    student = SimpleNamespace(save=lambda step, state: saved.append(step), prune=lambda: None, failure=None)
    source, accelerator = SimpleNamespace(state=lambda step: {}), SimpleNamespace(wait_for_everyone=lambda: None)
    trainer = object.__new__(Trainer)
    vars(trainer).update(written=3, main=True, students=[student], source=source, accelerator=accelerator)
    for step in (2, 3, 4, 4):
        trainer.save(step)
    assert saved == [4]


def one_process():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def test_a_source_that_depends_on_the_weights_is_asked_after_each_step(make_recipe):
    """And its loss is divided by the targets that there are, whatever a plan would have said."""
    accelerator = one_process()
    data, state, teacher = parts(make_recipe(), accelerator)
    source, fresh = Rollouts(data, state.parameters), load_student(make_recipe().student, len(prepare(make_recipe()).tokenizer), "cpu", 0)
    found = []
    for progress in train(source, [state], teacher, accelerator):
        assert len(source.asked) == progress.step, "a batch was built before the weights it depends on"
        found.append(progress)
    assert len(found) == 4 and len(set(source.asked)) == 4
    counts = [int(data.num_targets[chosen].sum()) for chosen in source.chosen]
    assert [progress.num_targets for progress in found] == counts and len(set(counts)) > 1
    batch = collate(data, source.chosen[0], 0)
    logits = fresh.eval().head.logits(fresh.hidden(batch.student))
    expected = torch.nn.functional.cross_entropy(logits, batch.labels_N)
    assert found[0].terms[0]["ce"] == pytest.approx(expected.item(), rel=1e-9)


class Stated:
    """The batches of another source, with their targets counted beforehand."""

    def __init__(self, source):
        self.source, self.seed, self.total_steps = source, source.seed, source.total_steps

    def steps(self, done: int = 0):
        for step, micro_batches in self.source.steps(done):
            yield Step(step.number, step.epoch, sum(micro.num_targets for micro in micro_batches)), micro_batches


def test_targets_that_are_counted_are_those_that_are_stated(make_recipe):
    accelerator, weights = one_process(), []
    for wrapped in (lambda source: source, Stated):
        data, state, teacher = parts(make_recipe(student__lora__dropout=0.3), accelerator)
        assert len(list(train(wrapped(Rollouts(data, state.parameters)), [state], teacher, accelerator))) == 4
        weights.append({name: p.detach().clone() for name, p in state.parameters.items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_rank_waits_for_others_only_where_the_source_does_not_know():
    reduced = []

    def reduce(counts, how):
        reduced.append((counts.tolist(), how))
        return counts + torch.tensor([5, 1.5, 2, 1, 5, 5, 0])  # the other rank has 5 targets, of which 2 carry a weight for the first term

    two = SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)
    micro_batches = [SimpleNamespace(num_targets=3, weights={}), SimpleNamespace(num_targets=0, weights={})]
    assert count_targets(Step(1, 0, 11), None, two) == TargetCounts(11) and not reduced
    assert count_targets(Step(1, 0, 0), None, two) == TargetCounts(1), "a step without targets"
    assert count_targets(Step(1, 0), micro_batches, two) == TargetCounts(8, {"ce": (4.5, 5)})
    assert reduced == [([3, 3, 3, 0, 3, 3, 0], "sum")]
    alone = SimpleNamespace(num_processes=1)
    assert count_targets(Step(1, 0), micro_batches, alone) == TargetCounts(3)
    assert count_targets(Step(1, 0), [], alone) == TargetCounts(1)
    micro_batches[0].weights["kd"] = torch.tensor([-2.0, 0.0, 0.5])
    assert count_targets(Step(1, 0), micro_batches, alone) == TargetCounts(3, {"kd": (2.5, 2)})


def train_rollouts(recipe: str, out: str) -> None:
    accelerator = start()
    data, state, teacher = parts(loader.load_recipe(recipe), accelerator)
    source = Rollouts(data, state.parameters, accelerator.process_index, accelerator.num_processes)
    counts = [progress.num_targets for progress in train(source, [state], teacher, accelerator)]
    if accelerator.is_main_process:
        save_file({name: p.detach().contiguous() for name, p in state.parameters.items()} | {"counts": torch.tensor(counts)}, out)


@pytest.mark.slow
def test_two_ranks_count_their_targets_together(world, tmp_path):
    """Each has other examples, and neither knows of the other's how many targets they have."""
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    done = launch(2, train_rollouts, str(tmp_path / "r.yaml"), str(tmp_path / "two.safetensors"))
    assert done.returncode == 0, done.stderr[-3000:]
    data, state, teacher = parts(loader.load_recipe(tmp_path / "r.yaml"), one_process())
    found = list(train(Rollouts(data, state.parameters), [state], teacher, one_process()))
    two = load_file(tmp_path / "two.safetensors")
    assert two.pop("counts").tolist() == [progress.num_targets for progress in found]
    assert max((two[name] - p.detach()).abs().max().item() for name, p in state.parameters.items()) < 1e-12
