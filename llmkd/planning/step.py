"""Watches one optimizer step of the training loop: memory and floating-point operations in each of its phases.

The loop, its students and its teacher are those of a run. On fake tensors the result is a plan, on real ones a measurement.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config.recipe import Recipe
from ..data.batch_source import Step
from ..models.families import layers_of
from ..models.language_model import LanguageModel
from ..models.model import Model
from ..signals import Signal, Teacher
from ..training.loop import StepHooks, StudentState, train, unwrap
from ..training.parallel import REPLICATED, Replicated
from .live_memory import LiveMemory, Phase, local

TEACHER, FORWARD, LOSS, BACKWARD, OPTIMIZER = "teacher's pass", "student's pass", "loss", "backward pass", "optimizer step"
BUCKETS, WRITING, STATES, INPUTS = "exchange of gradients", "writing", "encoder's states", "inputs"
#: The parts of memory, in the order in which they are shown.
PARTS = (
    "student's weights",
    "trained",
    "teacher's weights",
    "gradients",
    BUCKETS,
    "optimizer",
    STATES,
    INPUTS,
    "activations",
    "teacher's pass",
    "head and loss",
    "backward pass",
    WRITING,
)


class OneProcess:
    """Replaces the Accelerator for one process; no gradients are exchanged."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def strategy(self, recipe: Recipe) -> Replicated:
        """The strategy with which the processes hold the students."""
        return REPLICATED

    def shard(self, recipe: Recipe, setting: str, model: LanguageModel) -> None:
        """Shard a student or teacher if the recipe says so, there are several processes, and it is not sharded yet."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


ON_CPU = OneProcess("cpu")


@dataclass(frozen=True)
class Ready:
    """The arguments of the loop: students and teacher; and the models that hold their weights.

    elsewhere   the `id`s of models whose weights are on another device
    """

    students: list[StudentState]
    teacher: Teacher | None
    student_models: list[LanguageModel]
    teacher_models: list[LanguageModel]
    elsewhere: frozenset[int] = frozenset()


class OneStep:
    """A batch source with one step that is not the last, since the loop reads the last one's metrics."""

    seed, total_steps = 0, 2

    def __init__(self, batches: Sequence[Batch]):
        self.batches = list(batches)

    def steps(self, done: int = 0) -> Iterator[tuple[Step, list[Batch]]]:
        counts = np.array([example.num_targets for batch in self.batches for example in batch.examples])
        data = SimpleNamespace(num_targets=counts)  # nothing else of a step's examples is read
        yield Step(1, 0, sum(batch.num_targets for batch in self.batches), {}, list(range(len(counts))), [], data), self.batches


def watched_step(
    ready: Ready,
    batch: Batch,
    gradients: bool,
    accelerator: OneProcess = ON_CPU,
    round_to: int = 1,
    before: Callable[[], None] = lambda: None,
    inputs: Iterable[Tensor] = (),
) -> dict[str, Phase]:
    """The phases of a step with one micro-batch, with the optimizer's state in memory, as in every step after the first.

    gradients   whether gradients of earlier micro-batches of the step are in memory
    before      called when everything is in memory and the step begins
    inputs      tensors of the batch that are counted as the models' inputs

    A sharded student's gradients of earlier micro-batches may be whole; then the step runs two micro-batches, and operations are those of one.
    The backward pass has a phase for each layer, such as "backward pass 3"; that of the last layer is "backward pass".
    """
    memory = all_there(ready, round_to)
    for x in inputs:
        memory.add(x, INPUTS)
    with contextlib.ExitStack() as stack:
        twice = gradients and not all(state.strategy.alone for state in ready.students)
        with memory:
            for state in ready.students:
                _have_state(memory, state, gradients and not twice)
        for state in ready.students:
            for hook in _hooks(memory, state):
                stack.callback(hook.remove)
        for number, layer in enumerate(layers_apart(ready.student_models[0])):  # those of all students
            stack.callback(layer.register_forward_pre_hook(functools.partial(_note_layer, memory, number)).remove)
        teacher = ready.teacher and functools.partial(_asked, memory, ready.teacher)
        accelerator, source = _watched(accelerator, memory), OneStep([batch] * (1 + twice))
        memory.forget()
        before()
        with (
            memory,
            contextlib.closing(train(source, ready.students, teacher, accelerator, hooks=StepHooks(wants_metrics=_never))) as steps,
        ):
            next(steps)
        for phase in memory.phases.values():
            phase.flops //= 1 + twice
        return memory.phases


def all_there(ready: Ready, round_to: int = 1) -> LiveMemory:
    """A `LiveMemory` with the weights of all models and the optimizers' state so far."""
    memory = LiveMemory(round_to)
    for model in ready.teacher_models:
        _add(memory, model, "teacher's weights", id(model) in ready.elsewhere)
    for model in ready.student_models:
        _add(memory, model, "student's weights")
    for state in ready.students:
        _add(memory, unwrap(state), "student's weights")
        for parameter in state.parameters.values():
            memory.rename(local(parameter), "trained")
        for tensor in (x for held in state.optimizer.state.values() for x in held.values() if isinstance(x, Tensor)):
            memory.add(local(tensor), "optimizer")
    return memory


def _have_state(memory: LiveMemory, state: StudentState, gradients: bool) -> None:
    """Give the optimizer its state, by a step along zero gradients. With `gradients` these stay in memory."""
    memory.enter(OPTIMIZER, "optimizer")
    for parameter in state.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
        memory.rename(local(parameter.grad), "gradients")
    state.optimizer.step()
    if not gradients:
        state.optimizer.zero_grad(set_to_none=True)


def _never(step: int) -> bool:
    return False


def _add(memory: LiveMemory, model: nn.Module, part: str, elsewhere: bool = False) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        memory.add(local(tensor), part, elsewhere)


def _watched(accelerator: OneProcess, memory: LiveMemory) -> OneProcess:
    """A copy of the accelerator that reports the beginning of the backward pass."""
    watched = copy.copy(accelerator)

    def backward(loss: Tensor) -> None:
        memory.enter(BACKWARD, BACKWARD)
        accelerator.backward(loss)

    watched.backward = backward
    return watched


def _asked(memory: LiveMemory, teacher: Teacher, batch: Batch) -> Signal:
    memory.enter(TEACHER, TEACHER)
    return teacher(batch)


def _hooks(memory: LiveMemory, state: StudentState) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Hooks that report the beginning of phases. They change no results, and keep no tensor."""
    distiller = unwrap(state)
    yield distiller.register_forward_pre_hook(lambda *_: memory.enter(FORWARD, "activations"))
    for term in distiller.terms.values():
        yield term.register_forward_pre_hook(lambda *_: memory.enter(LOSS, "head and loss"))
    distiller.student.set_active_adapter()  # the parameters of inactive adapters do not require a gradient
    for parameter in state.parameters.values():
        yield parameter.register_post_accumulate_grad_hook(lambda p: memory.rename(local(p.grad), "gradients"))
    yield state.optimizer.register_step_pre_hook(lambda *_: memory.enter(OPTIMIZER, "optimizer"))


def layers_apart(model: Model) -> Iterable[nn.Module]:
    """The layers of a causal language model, which have their own phases and are sharded one by one; () for any other model."""
    return layers_of(model.base_model) or () if isinstance(model, LanguageModel) else ()


def _note_layer(memory: LiveMemory, number: int, layer: nn.Module, args: tuple) -> None:
    """Begin the phase of the layer before when the gradient of this layer's input is known."""
    if number and args and args[0].requires_grad and not memory.phase.startswith(BACKWARD):  # a recomputed layer has its hook already
        args[0].register_hook(lambda grad: memory.enter(f"{BACKWARD} {number - 1}", BACKWARD))
