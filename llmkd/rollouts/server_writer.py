"""A writer on a server, which returns the token ids that follow each prompt."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait

from ..errors import Stopped, UserError
from ..servers.client import Refused, Server
from ..servers.completions import Continuation, complete
from ..servers.logprobs import ServedModel, WrongAnswer, explain
from ..servers.workers import Workers
from .generate import Completion
from .sampling import Sampling


class ServerWriter:
    """A `Writer` on a vLLM server. The key of each text is sent as the seed of its request. Unlike with a model in this process, a text also
    depends on the server's arithmetic, and so on its other requests at the time.

    setting      names the teacher, for messages
    end_ids      a completion ends with the first of these, or where the model's own generation config ends it
    requests     the most requests at a time
    stop_asked   whether the command was asked to stop; then it no longer waits for the server
    log_probs    also request the tokens' log-probabilities
    """

    resume = "the same command goes on"

    def __init__(
        self,
        server: Server,
        model: ServedModel,
        setting: str,
        end_ids: Collection[int],
        vocab: int,
        requests: int = 8,
        stop_asked: Callable[[], bool] = lambda: False,
        log_probs: bool = False,
    ):
        self.server, self.model, self.setting, self.end_ids, self.vocab = server, model, setting, frozenset(end_ids), vocab
        self.stop_asked, self.log_probs, self._workers = stop_asked, log_probs, Workers(requests)

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling) -> list[Completion]:
        return self.at_once(
            [lambda prompt=prompt, key=key: self._one(prompt, key, sampling) for prompt, key in zip(prompts, keys, strict=True)]
        )

    def at_once(self, work: Sequence[Callable]) -> list:
        """The results of several functions that make requests, called at the same time. Stopped if the command is asked to stop meanwhile."""
        started = [self._workers.submit(one) for one in work]
        try:
            for one in started:
                while not wait([one], 2.0).done:
                    if self.stop_asked():
                        raise Stopped(f"stopped by a signal while {self.setting}.server was asked; {self.resume}")
            return [one.result() for one in started]
        except BaseException:
            self.server.end()
            raise

    def _one(self, prompt: Sequence[int], key: int, sampling: Sampling) -> Completion:
        room = sampling.max_new_tokens if self.model.positions is None else min(sampling.max_new_tokens, self.model.positions - len(prompt))
        if room < 1:
            return Completion((), False)
        settings = {
            "temperature": sampling.temperature,
            "max_tokens": room,
            "top_p": sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "min_p": sampling.min_p,
        }
        seed = (key ^ sampling.seed) % 2**63
        try:
            ids, finished, log_p = self._ask([int(one) for one in prompt], seed, settings)
            if ids and max(ids) >= self.vocab:
                raise WrongAnswer(f"wrote token {max(ids)}, but the student's vocabulary has {self.vocab} entries")
        except WrongAnswer as error:
            raise UserError(f"{self.setting}.server: {self.server.address} {error}") from None
        except Refused as error:
            raise explain(error, self.setting, longest=len(prompt)) from None
        return Completion(tuple(ids), finished, log_p=None if log_p is None else tuple(log_p))

    def _ask(self, prompt: list[int], seed: int, settings: dict) -> Continuation:
        return complete(self.server, self.model, prompt, self.end_ids, seed, settings, self.log_probs)
