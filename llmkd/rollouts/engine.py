"""A server that writes during training: a `Writer` whose model is the student's base on the server, with the adapter that is pushed to it.

The log-probabilities of its answers are compared with the student's own: those of equal weights differ by rounding only.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..config.engine import Engine
from ..console import info
from ..errors import UserError, on_main_process
from ..models.language_model import LanguageModel
from ..servers.client import Refused
from ..servers.completions import Continuation, complete
from ..servers.logprobs import ServedModel
from .generate import Completion
from .own_log_probs import scores
from .pushed_adapter import SETTING, PushedAdapter
from .sampling import Sampling
from .server_writer import ServerWriter

WATCHED = 8  # answers that each process compares with the student in a step
PROBED, PROBED_TOKENS = 8, 32  # answers, and tokens of each, that are compared before the first step
_MOVED = 5.0  # the adapter is changed by so many times the tolerance, to see whether the server uses it


class EngineWriter(ServerWriter):
    """Writes with the adapter that was pushed last. The first process saves and pushes it; each process compares the student with the server.

    base         the student's base, as the server has it
    accelerator  of the run's processes
    batch_size   answers whose log-probabilities the student computes at a time
    """

    resume = "continue with --resume"

    def __init__(
        self,
        settings: Engine,
        adapter: PushedAdapter,
        base: ServedModel,
        end_ids: Collection[int],
        vocab: int,
        accelerator,
        stop_asked=lambda: False,
        batch_size: int = 32,
    ):
        super().__init__(adapter.server, base, SETTING, end_ids, vocab, settings.requests, stop_asked, log_probs=True)
        self.settings, self.adapter, self.base, self.accelerator, self.batch_size = settings, adapter, base, accelerator, batch_size
        self.step, self.pushed = 0, None  # the current step, and the step after which the adapter was pushed

    @property
    def student(self) -> LanguageModel:
        return self.adapter.student

    @property
    def staleness(self) -> int:
        """Optimizer steps since the adapter was pushed."""
        return self.step - 1 - self.pushed

    def start_step(self, step: int) -> None:
        """Called on all ranks before the answers of a step are written: push the adapter if that is due."""
        self.step = step
        if self.pushed is None or self.staleness >= self.settings.push_every:
            self.push(step - 1)

    def push(self, after: int) -> None:
        """Push the adapter, which has trained for `after` steps."""
        self.adapter.name = on_main_process(self.accelerator, lambda: self.adapter.push(lambda load: self.at_once([load])))
        self.model, self.pushed = self.adapter.served(self.base), after

    def close(self) -> None:
        """Remove the adapter from the server."""
        if self.accelerator.is_main_process:
            self.adapter.close()

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling) -> list[Completion]:
        found = [replace(one, staleness=self.staleness) for one in super().write(prompts, keys, sampling)]
        every = [i for i, one in enumerate(found) if one.ids]
        compared = self._compared(prompts, found, every if self.settings.importance else every[:WATCHED])
        gap = _mean_gap(list(compared.values()))
        if self.staleness == 0 and not gap <= self.settings.tolerance:
            raise UserError(
                f"{SETTING}.server: {self.server.address} gives its answers other log-probabilities than the student, by {gap:.3g} nats on average "
                f"({SETTING}.tolerance: {self.settings.tolerance:g}): serve the student's own base, in its dtype and quantisation, with "
                "--logprobs-mode raw_logprobs and without a proxy that answers from a cache; or raise the tolerance"
            )
        return [compared.get(i, one) for i, one in enumerate(found)]

    def _compared(self, prompts: Sequence[Sequence[int]], found: list[Completion], chosen: list[int]) -> dict[int, Completion]:
        """The `chosen` answers, by index, with the student's entropy, the difference of log-probabilities and the importance weights."""
        own = scores(self.student, [prompts[i] for i in chosen], [found[i].ids for i in chosen], self.batch_size)
        compared = {}
        for i, mine in zip(chosen, own, strict=True):
            apart_T = mine.log_p_T - np.array(found[i].log_p)
            weights = None if self.settings.importance is None else prefix_weights(apart_T, self.settings.importance)
            compared[i] = replace(found[i], entropy=float(mine.entropy_T.mean()), apart=float(np.abs(apart_T).mean()), weights=weights)
        return compared

    def _ask(self, prompt: list[int], seed: int, settings: dict) -> Continuation:
        try:
            return self._complete(prompt, seed, settings)
        except Refused as error:
            if error.status != 404:
                raise
            self.adapter.again()
            return self._complete(prompt, seed, settings)

    def _complete(self, prompt: list[int], seed: int, settings: dict) -> Continuation:
        return complete(self.server, self.model, prompt, self.end_ids, seed, settings, log_probs=True)

    def check(self, prompts: Sequence[Sequence[int]], sampling: Sampling, done: int) -> None:
        """Before the first step, on the first process: UserError if the server does not write like the student with its adapter.

        An untrained adapter changes nothing, so a server without it would go unnoticed. So an adapter with random changes is pushed, too.
        """
        few = replace(
            sampling, temperature=1.0, top_p=1.0, top_k=None, min_p=0.0, max_new_tokens=min(sampling.max_new_tokens, PROBED_TOKENS)
        )
        keys = list(range(len(prompts)))
        everyone, self.accelerator = self.accelerator, _Alone()
        try:
            self.step = done + 1
            self.push(done)
            found = self.write(prompts, keys, few)
            texts = [(prompt, one.ids) for prompt, one in zip(prompts, found, strict=True) if one.ids]
            with moved(self.student, texts, _MOVED * self.settings.tolerance, self.batch_size):
                self.push(done)
                try:
                    self.write(prompts, keys, few)
                except UserError as error:
                    if f"{SETTING}.tolerance" not in str(error):
                        raise
                    raise UserError(
                        f"{SETTING}.server: {self.server.address} does not write with the adapter that is pushed to it: after a change of the adapter, its "
                        "answers did not change, or in another way; is it vLLM with --enable-lora, and the student's own base?"
                    ) from None
        finally:
            self.adapter.close()
            self.accelerator, self.pushed = everyone, None
        gap = _mean_gap([one for one in found if one.apart is not None])
        info(
            f"{SETTING}: {self.server.address} writes as {self.base.name} with the student's adapter: its log-probabilities differ from the student's by "
            f"{gap:.2g} nats on average"
        )


class _Alone:
    """Replaces the accelerator while the first process works by itself."""

    is_main_process, num_processes = True, 1


def prefix_weights(log_ratio_T: np.ndarray, most: float) -> tuple[float, ...]:
    """The importance weight of each target of an answer: the product of the ratios of the tokens before it, at most `most`.

    log_ratio_T   for each token the log-probability under the student that learns, minus that under the one that wrote

    The divergence at a target depends only on the tokens before it. So its expectation over the student's own text q is its expectation over
    the writer's text w, weighted by the ratio of the probabilities of these tokens: E_q[D(y_<t)] = E_w[prod_{s<t} q(y_s) / w(y_s) D(y_<t)].
    Unlike in a policy gradient, the ratio of the target's own token is not part of it. `most` bounds the variance, at the cost of exactness.
    """
    before_T = np.concatenate([[0.0], np.cumsum(log_ratio_T)[:-1]])
    return tuple(np.exp(np.minimum(before_T, np.log(most))).tolist())


def _mean_gap(compared: Sequence[Completion]) -> float:
    """The mean absolute difference of log-probabilities over all tokens of answers that were compared; 0 without answers."""
    tokens = sum(len(one.ids) for one in compared)
    return sum(one.apart * len(one.ids) for one in compared) / max(1, tokens)


@contextlib.contextmanager
def moved(student: LanguageModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]], least: float, batch_size: int) -> Iterator[None]:
    """Inside, the student's adapter has random changes, large enough that the log-probabilities of the answers in `texts` (prompt, answer) differ
    by at least `least` nats on average."""
    names = ("lora_B", "lora_embedding_B")
    held = {p: p.detach().clone() for name, p in student.trainable().items() if any(f".{one}." in f".{name}." for one in names)}
    generator = torch.Generator().manual_seed(0)
    noise = {p: torch.randn(p.shape, generator=generator).to(p) for p in held}
    own = functools.partial(scores, student, [prompt for prompt, _ in texts], [answer for _, answer in texts], batch_size)
    before = np.concatenate([one.log_p_T for one in own()])
    try:
        for size in (2.0**k for k in range(-10, 11)):
            with torch.no_grad():
                for p, value in held.items():
                    p.copy_(value + size * noise[p])
            if np.abs(np.concatenate([one.log_p_T for one in own()]) - before).mean() >= least:
                break
        yield
    finally:
        with torch.no_grad():
            for p, value in held.items():
                p.copy_(value)
