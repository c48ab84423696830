"""A teacher on a server, which is asked for the log-probabilities of each example's tokens.

Each example is one request, whatever the batch's layout, and several requests run at a time; those of the next step run during the current
one (`ServedTeacher.expect`). All answers are stored (`Answers`), and signals are made from the stored ones, so that a run does not depend on
whether its answers are new.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np
import torch

from ..batch import Batch
from ..data.examples import ALL_TEACHERS
from ..errors import Stopped, UserError, report_from_any_rank
from ..servers.client import Refused
from ..servers.logprobs import Listed, LogProbs, ServedModel, WrongAnswer, explain
from ..servers.workers import Workers
from ..signals import Signal
from . import listed
from .answers import Answers

_PATIENT_AFTER_A_SIGNAL = 2.0  # seconds between two looks at whether the run was asked to stop, while it waits for an answer


class ServedTeacher:
    """A teacher on a server; its signals are like those of a cache of kind topk, on `device`.

    interface    the server's interface
    number       of this teacher among several, see `Example.teacher`
    connect      returns the model to ask, given the patience in seconds
    requests     most requests at a time
    stop_asked   whether the run was asked to stop; then nothing waits for the server any more
    """

    def __init__(
        self,
        interface: LogProbs,
        answers: Answers,
        setting: str,
        number: int,
        connect: Callable[[float | None], ServedModel],
        device="cpu",
        requests: int = 8,
        stop_asked: Callable[[], bool] = lambda: False,
    ):
        self.interface, self.answers, self.setting, self.number, self.device = interface, answers, setting, number, device
        self.format, self.metrics, self.stop_asked = answers.format, answers.format.metrics, stop_asked
        self._connect, self._model = connect, None
        self._pending: dict[str, Future] = {}
        self._lock, self._connecting, self._workers = threading.Lock(), threading.Lock(), Workers(requests)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        with report_from_any_rank():
            return self.format.signal(torch.from_numpy(self.kept(batch)), self.device)

    def kept(self, batch: Batch) -> np.ndarray:
        """The records of a batch's targets, uint8 [N, bytes]. Missing ones are asked for."""
        self.expect(batch)
        for example in batch.examples:
            self._wait_for(example.content_hash)
        return self.answers.read([e.content_hash for e in batch.examples], [e.num_targets for e in batch.examples])

    def expect(self, batch: Batch) -> None:
        """Send requests for the examples of a batch that need this teacher and are neither stored nor asked for yet. Does not wait for answers."""
        mine = [i for i, one in enumerate(batch.examples) if one.teacher in (ALL_TEACHERS, self.number)]
        wanted = {batch.examples[i].content_hash: i for i in mine}
        if not (lacking := self._lacking(list(wanted))):
            return
        self.answers.refresh()
        if not (lacking := self._lacking(lacking)):
            return
        texts = texts_of(batch)
        for content_hash in lacking:
            text = texts[wanted[content_hash]]
            with self._lock:
                if content_hash not in self._pending and self.answers.missing([content_hash]):  # another thread may have been faster
                    self._pending[content_hash] = self._workers.submit(lambda text=text, known=content_hash: self._fetch(known, *text))

    def ask(self, ids: Sequence[int], places: Sequence[int], strings: bool = False, model: ServedModel | None = None) -> Listed:
        """The server's log-probabilities at the tokens ids[places], asked for now. UserError for a refusal or a wrong answer."""
        k = self.format.k
        try:
            return self.interface.ask(model or self.model, ids, places, k, strings)
        except WrongAnswer as error:
            raise UserError(f"{self.setting}.server: {self.interface.server.address} {error}") from None
        except Refused as error:
            raise explain(error, self.setting, k, len(ids)) from None

    @property
    def model(self) -> ServedModel:
        return self.connect()

    def connect(self, patience: float | None = None) -> ServedModel:
        """The model to ask, which the first call chooses. `patience` as in `servers.client.Server`."""
        with self._connecting:
            if self._model is None:
                self._model = self._connect(patience)
            return self._model

    def at_once(self, work: Sequence[Callable]) -> list:
        """The results of several functions that ask the server, called at the same time."""
        started = [self._workers.submit(one) for one in work]
        return [self._result(one) for one in started]

    def close(self) -> None:
        """Stop waiting for the server."""
        self.interface.server.end()

    def records(self, told: Listed) -> np.ndarray:
        """The records of one example's targets, uint8 [targets, bytes]."""
        return self.format.encode(listed.top_k(told.ids_NM, told.log_p_NM, told.label_log_p_N, self.format.k, self.format.vocab)).numpy()

    def _lacking(self, hashes: list[str]) -> list[str]:
        lacking = [hashes[i] for i in self.answers.missing(hashes)]
        with self._lock:
            return [one for one in lacking if one not in self._pending]

    def _fetch(self, content_hash: str, ids: list[int], places: list[int]) -> None:
        self.answers.put(content_hash, self.records(self.ask(ids, places)))

    def _wait_for(self, content_hash: str) -> None:
        with self._lock:
            asked = self._pending.get(content_hash)
        if asked is not None:
            self._result(asked)
            with self._lock:
                self._pending.pop(content_hash, None)

    def _result(self, asked: Future):
        try:
            while not wait([asked], _PATIENT_AFTER_A_SIGNAL).done:
                if self.stop_asked():
                    raise Stopped(f"stopped by a signal while {self.setting}.server was asked; continue with --resume")
            return asked.result()
        except BaseException:
            self.close()
            raise


def texts_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """For each example of a batch, the token ids that the teacher reads, up to the last target, and the indices of the targets in them."""
    view, counts = batch.teacher, [example.num_targets for example in batch.examples]
    flat, found = view.inputs["input_ids"].flatten().cpu(), []
    for span, rows_n, labels_n in zip(view.spans, view.rows_N.split(counts), batch.labels_N.split(counts), strict=True):
        places = (rows_n - span.own + span.shared).tolist()  # each predicts the token after it
        ids = [*flat[span.prefix : span.prefix + span.shared].tolist(), *flat[span.own : span.own + span.length].tolist()]
        found.append(([*ids[: places[-1] + 1], int(labels_n[-1])], [place + 1 for place in places]))  # an input ends before its last target
    return found


def expect_of(teachers: Sequence[ServedTeacher], batches: Sequence[Batch]) -> None:
    """Call `expect` of every teacher for every batch."""
    for batch in batches:
        for teacher in teachers:
            teacher.expect(batch)
