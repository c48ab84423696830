"""On-policy distillation as a batch source: planned data, in which the student writes some answers itself with the weights of that step.

GKD (Agarwal et al., arXiv 2306.13649): with probability lambda an example's answer is a sample from the student, and no gradient flows through
the sampling.
"""

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..config.on_policy import OnPolicy
from ..console import warn
from ..data.batch_source import ExampleSource, PlannedSource, Step, WrittenText
from ..data.examples import TokenExamples, concat
from ..data.written import Prompts, answered, of_written
from ..process import heartbeat
from .generate import Completion
from .replay import Answer, ReplayBuffer
from .sampling import Sampling, uniform
from .share import Share
from .statistics import Statistics, Watch
from .writer import Writer, text_key, write_on_all_ranks

if TYPE_CHECKING:
    from ..batch import Batch

RECORDED = 20  # steps of a run from which answers are recorded in samples.jsonl


class OnPolicySource(ExampleSource):
    """The steps of planned data, built one by one, since each depends on the weights after the one before.

    Which answers are written, and their text, is a function of (weights, seed, step, example). Each rank writes some of them; then all ranks
    have all answers, and split the step as if it had been planned.

    before_writing   called on all ranks with each step's number, before its answers are written
    at_end           called once, after the last step or when training ends earlier
    """

    reads_while_training = True  # weights that are not finite cannot write the next step's answers

    def __init__(
        self,
        planned: PlannedSource,
        prompts: Prompts,
        writer: Writer,
        settings: OnPolicy,
        vocab: int,
        teachers: Mapping[int, Writer] = MappingProxyType({}),
    ):
        """`teachers`: by an example's `teacher_index`, the writers of the answers of `settings.teacher_writes`."""
        if settings.long_horizon:
            planned = copy.copy(planned)
            planned.examples = of_written(planned.examples)
        super().__init__(planned.seed, planned.total_steps, planned.micro_batch_size)
        self.rank, self.ranks, self.device = planned.rank, planned.ranks, planned.device
        self.examples, self.places = planned.examples, planned.places
        self.planned, self.prompts, self.writer, self.teachers, self.settings = planned, prompts, writer, teachers, settings
        self.by_teacher = Statistics("written_by_teacher")
        self.sampling, self.statistics = sampling_of(settings, planned.seed), Statistics()
        fits = self.examples.num_targets[prompts.may] <= settings.max_new_tokens
        self.watch, self.vocab = Watch(settings.max_new_tokens, vocab, float(fits.mean()) if len(fits) else 0.0), vocab
        self.share, self.newest = Share(settings.share, planned.total_steps, 1 - settings.teacher_writes), 0.0
        self.replay = ReplayBuffer(settings.replay, planned.seed, planned.total_steps)
        self.recorded: tuple[int, list[WrittenText]] = 0, []  # the newest step with recorded answers, and these answers
        self.before_writing: Callable[[int], None] = lambda step: None
        self.at_end: Callable[[], None] = lambda: None

    def steps(self, done: int = 0) -> "Iterator[tuple[Step, list[Batch]]]":
        with contextlib.closing(self.schedule(done)) as steps, contextlib.ExitStack() as end:
            end.callback(self.at_end)
            for step in steps:
                batches = self.build(step)
                self.on_built(batches)
                yield step, batches

    def schedule(self, done: int = 0) -> Iterator[Step]:
        for planned in self.planned.schedule(done):
            share = self.newest = self.share.at(planned.number)
            names = _identities(planned.number, [self.examples.content_hash(i) for i in planned.examples])
            own, theirs = self._drawn(planned, names, share)
            yield self._written(planned, own, theirs, names) if own or theirs else self.resplit(planned)

    def _drawn(self, planned: Step, names: list[tuple], share: float) -> tuple[list[int], list[int]]:
        """The step's examples whose answers the student writes, and those whose answers the teacher writes, by their places in the step."""
        own, theirs, too_long = [], [], 0
        for n, (i, name) in enumerate(zip(planned.examples, names, strict=True)):
            draw = uniform(self.seed, text_key(*name, "is written"), 0)
            if draw < share:
                chosen = own
            elif draw >= 1 - self.settings.teacher_writes:
                chosen = theirs
            else:
                continue
            if self.prompts.may[i]:
                chosen.append(n)
            too_long += bool(self.prompts.too_long[i])
        self.statistics.counts["written_prompts_too_long"] += too_long
        return own, theirs

    def _written(self, planned: Step, own: list[int], theirs: list[int], names: list[tuple]) -> Step:
        """The step with new answers to some of its examples in place of the data's; see `_drawn`."""
        asked = self._asked(planned, own, names)
        again = self.replay.draw(planned.number, [text_key(*name, "is fresh") for _, name in asked])
        fresh = [one for one, earlier in zip(asked, again, strict=True) if earlier is None]
        written = iter(self._write(planned.number, fresh))
        both = [earlier or next(written) for earlier in again], self._write_as_teacher(planned.number, self._asked(planned, theirs, names))
        self.statistics.counts.update({"written_replayed": len(asked) - len(fresh)} if self.replay.capacity else {})
        kept = sorted({*range(len(planned.examples))} - {*own, *theirs})
        indices = [planned.examples[n] for n in kept]
        parts, places = [self.examples.take(np.array(indices, np.int64))] if indices else [], [self.places[i] for i in indices]
        for answers, how in zip(both, ("written", "written by the teacher"), strict=True):
            if whole := [one for one in answers if one.ids]:
                of_each = [[getattr(one, name) for one in whole] for name in ("example", "ids", "weights")]
                parts.append(answered(self.examples, self.prompts, *of_each, by_student=how == "written"))
                places += [f"{self.places[one.example]}, {how} at step {one.step}" for one in whole]
        return self._step(planned, parts, places)

    def _asked(self, planned: Step, chosen: list[int], names: list[tuple]) -> list[tuple[int, tuple]]:
        """The answers to write to the `chosen` examples: for each its example, and the name of its text."""
        return [(planned.examples[n], (*names[n], sample)) for n in chosen for sample in range(self.settings.samples)]

    def _write(self, step: int, asked: list[tuple[int, tuple]]) -> list[Answer]:
        """Answers that the student writes with its current weights."""
        found = self._ask(
            self.writer, self.prompts.ids(self.examples, [i for i, _ in asked]), asked, self.statistics, lambda: self.before_writing(step)
        )
        for text in self.watch.add(found):
            warn(text)
        answers = [Answer(step, i, one.ids, one.weights) for (i, _), one in zip(asked, found, strict=True)]
        self.replay.add([one for one in answers if one.ids])
        if step in recorded_steps(self.total_steps):
            few = zip(asked[: self.settings.record], found, strict=False)
            self.recorded = step, [self._text(example, one) for (example, _), one in few]
        return answers

    def _write_as_teacher(self, step: int, asked: list[tuple[int, tuple]]) -> list[Answer]:
        """Answers that each example's teacher writes, or all teachers together."""
        found: dict[tuple, Completion] = {}
        for writer in dict.fromkeys(self.teachers.values()):  # in the same order on all ranks
            mine = [(i, name) for i, name in asked if self.teachers[int(self.examples.teacher_index[i])] is writer]
            written = self._ask(writer, self.prompts.teachers(self.examples, [i for i, _ in mine]), mine, self.by_teacher)
            found |= zip((name for _, name in mine), written, strict=True)
        return [Answer(step, i, found[name].ids) for i, name in asked]

    def _ask(
        self,
        writer: Writer,
        prompts: list[list[int]],
        asked: list[tuple[int, tuple]],
        statistics: Statistics,
        before: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        if not asked:
            return []
        heartbeat.at("answers that a model writes", patient=True)
        began = time.monotonic()
        before()
        found = write_on_all_ranks(writer, prompts, [text_key(*name) for _, name in asked], self.sampling, self.rank, self.ranks)
        statistics.add(found, time.monotonic() - began)
        return found

    def _text(self, example: int, answer: Completion) -> WrittenText:
        ids, loss_mask = self.examples.example(example)
        return WrittenText(self.places[example], self.prompts.ids(self.examples, [example])[0], answer.ids, ids[loss_mask], answer.finished)

    def texts(self, step: int) -> Sequence[WrittenText]:
        return self.recorded[1] if self.recorded[0] == step else ()

    def _step(self, planned: Step, parts: list[TokenExamples], places: list[str]) -> Step:
        source = np.concatenate([np.zeros(0, np.int64), *(part.source for part in parts)])
        data = concat(parts, [0] * len(parts), {}, source) if parts else self.examples.take(np.zeros(0, np.int64))
        every = list(range(len(data)))
        return self.resplit(Step(planned.number, planned.epoch, int(data.num_targets.sum()), data.weighted(every), every, [], data, places))

    def longest(self, count: int) -> TokenExamples:
        """The examples that could become longest, with as many answers as are written to each, all of maximal length."""
        room, prompts = self.settings.max_new_tokens, self.prompts
        most = np.where(prompts.may, np.maximum(prompts.own, prompts.theirs) + room, 0)
        lengths = np.maximum(self.examples.max_lengths, most)
        chosen = np.argsort(-lengths, kind="stable")[:count]
        new = np.repeat(chosen[most[chosen] == lengths[chosen]], self.settings.samples)
        parts = [self.examples.take(chosen[most[chosen] < lengths[chosen]])]
        parts += [answered(self.examples, prompts, new.tolist(), [[0] * room] * len(new))] if len(new) else []
        found = concat(parts, [0] * len(parts), {}, np.concatenate([part.source for part in parts]))
        return found.take(np.argsort(-found.max_lengths, kind="stable"))

    def max_lengths(self, step: Step) -> np.ndarray:
        return self.planned.max_lengths(step) if step.data is self.examples else super().max_lengths(step)

    def measured(self) -> dict[str, float]:
        return self.statistics.read() | self.by_teacher.read() | ({"written_share": self.newest} if self.share.changes else {})

    def checked(self, metrics: dict[str, float]) -> None:
        self.watch.checked(metrics["ce"], metrics["teacher_ce"])

    def validated(self, metrics: dict[str, float]) -> None:
        self.share.validated(metrics["ce"])
        for text in self.watch.validated(metrics):
            warn(text)

    def state(self, step: int) -> dict:
        return self.share.state() | self.replay.state(step, self.examples)

    def restore(self, state: dict) -> None:
        self.share.restore(state)
        self.replay.restore(state, self.examples, self.vocab, self.settings.max_new_tokens)


def sampling_of(settings: OnPolicy, seed: int) -> Sampling:
    return Sampling(settings.temperature, settings.max_new_tokens, seed, settings.top_p, settings.top_k, settings.min_p)


def recorded_steps(total: int) -> set[int]:
    """The steps of a run of `total` steps from which answers are recorded: RECORDED of them, evenly spaced, including the first and the last."""
    return {1 + round(n * (total - 1) / (RECORDED - 1)) for n in range(RECORDED)}


def _identities(step: int, hashes: Sequence[str]) -> list[tuple]:
    """The names of the texts of a step's examples, which do not depend on their order: (step, content hash, number of equal ones before it)."""
    before: Counter = Counter()
    names = []
    for one in hashes:
        names.append((step, one, before[one]))
        before[one] += 1
    return names
