"""A writer on a server with OpenAI's chat completions: vLLM, llama.cpp's server, Ollama, vendors. Written from their documents. No torch."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from ...config.make import Writer as Settings
from ...errors import UserError
from ...servers.client import Refused, Server, ServerFailed
from ...servers.workers import Workers
from ..asks import Answer, Ask, failed
from .outside import MOST_OF_FINISH, Ending, bad_text, counted, in_a_word

#: Statuses with which every ask would fail: a wrong key, or a path or model that does not exist.
_FOR_ALL = (401, 403, 404, 405, 407)
#: Where servers put a model's reasoning before its answer.
_REASONING = ("reasoning_content", "reasoning")
#: The command ends if so many asks are refused before any is answered, or so many in a row fail although the server responds.
_FIRST = 8
_MOST_OF_MODEL = 200  # characters of a model's name


class ServedWriter:
    """Sends several requests at a time; after a time-out, 429 or 5xx a request is repeated with increasing pauses, see `servers/client.py`."""

    def __init__(self, settings: Settings, stop: Callable[[], bool]):
        self.settings, self.stop = settings, stop
        requests = settings.of_server("requests")
        numbers = (settings.of_server("timeout"), settings.of_server("patience"), requests)
        again = "what is written is kept, and the same command goes on"
        self.server = Server(settings.server, "writer.server", settings.api_key_env, *numbers, again)
        self.requests, self._workers = requests, Workers(requests)
        self.identity: dict[str, Any] = {"api": settings.model} | ({"body": settings.body} if settings.body else {})
        self.label = settings.model
        if self.server.holds_key(json.dumps(dataclasses.asdict(settings))):
            raise UserError(
                f"writer: a setting holds the key that is in {settings.api_key_env}, and would be written into files; take it out"
            )
        self._answered = self._refused = self._broken = 0

    def check(self) -> None:
        try:
            self.server.reach("/v1/models")
        except Refused as error:
            if error.status in (401, 403):
                raise self._explained(error) from None  # with other statuses the server may only lack this page

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        waiting = iter([ask for ask in asks if ask.key not in known])
        running: dict[Future, Ask] = {}
        end = Ending(self.stop, "writer.server")
        try:
            while True:
                while len(running) < self.requests and not end.asked and (ask := next(waiting, None)):
                    running[self._workers.submit(lambda ask=ask: self._one(ask))] = ask
                end.follow(len(running))
                if not running:
                    return
                done, _ = wait(running, 0.5, FIRST_COMPLETED)
                for one in sorted(done, key=lambda one: one.exception() is not None):  # answers first, before an error ends the command
                    yield running.pop(one), one.result()
        except BaseException:
            self.server.end()
            raise

    def close(self) -> None:
        self.server.end()

    def _one(self, ask: Ask) -> Answer:
        sampling = ask.sampling
        content = {
            "model": self.settings.model,
            "messages": list(ask.messages),
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
        }
        if sampling.temperature:
            content |= {"seed": sampling.seed, "top_p": sampling.top_p}
        if sampling.top_k is not None:  # OpenAI does not have it, but all servers of open models do
            content["top_k"] = sampling.top_k
        if sampling.min_p:
            content["min_p"] = sampling.min_p
        content = {name: value for name, value in (content | self.settings.body).items() if value is not None}
        answered = self._answered
        try:
            answer = self._read(self.server.post("/v1/chat/completions", content), ask)
        except Refused as error:
            self._refused += 1
            if error.status in _FOR_ALL or (not self._answered and self._refused >= _FIRST):
                raise self._explained(error) from None
            return failed(f"the server {error}")
        except ServerFailed as error:
            if error.alone is None or not self.server.lives():
                raise
            self._broken += self._answered == answered  # no other ask was answered meanwhile
            if self._broken >= _FIRST:
                raise
            return failed(f"the server {error.alone}")
        self._broken = 0
        if answer.problem is None:
            self._answered += 1
        return answer

    def _explained(self, error: Refused) -> UserError:
        fix = {
            200: "",  # it says what to do
            401: "; name the variable that holds the key in writer.api_key_env",
            403: "; name the variable that holds the key in writer.api_key_env",
            404: "; check writer.server and writer.model",
            407: "; put the proxy's name and password into the environment's variable, as in http://name:password@host:port",
        }.get(error.status, "; check the settings of the writer")
        return UserError(f"writer.server: {self.server.address} {error}{fix}")

    def _read(self, found: Any, ask: Ask) -> Answer:
        """The answer in a response; a failed one if it is not understood. Refused if the response is an error."""
        found = found if isinstance(found, dict) else {}
        choices = found.get("choices")
        if not choices and found.get("error"):
            raise Refused(200, self.server.in_a_line(found))
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict) else None
        message = choice.get("message") if choice and isinstance(choice.get("message"), dict) else {}
        text, finish = message.get("content"), choice and choice.get("finish_reason")
        reasoning = next((said for name in _REASONING if isinstance(said := message.get(name), str) and said.strip()), None)
        if text is None and reasoning:  # it was cut off while reasoning, which cost tokens
            text = ""
        usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
        cost = counted(ask, text if isinstance(text, str) else "", usage.get("completion_tokens"), usage.get("prompt_tokens"))
        if problem := self._problem(choice, message, text, finish):
            return failed(problem, *cost)
        model = found.get("model")
        other = model if isinstance(model, str) and model != self.settings.model and not self.server.holds_key(model) else None
        named = other and in_a_word(other, _MOST_OF_MODEL)
        return Answer(text, in_a_word(finish, MOST_OF_FINISH), *cost, model=named, reasoning=reasoning and len(reasoning))

    def _problem(self, choice: dict | None, message: dict, text: Any, finish: Any) -> str | None:
        """Why a response is no answer; None if it is one."""
        if choice is None:
            return "the server's answer has not one choice"
        if message.get("tool_calls") or message.get("function_call"):
            return "the server's answer calls a tool"
        if not isinstance(text, str):
            return "the server's answer has no text"
        if not isinstance(finish, str):
            return "the server's answer does not say how it ended (finish_reason)"
        return bad_text(text) or ("the server's answer holds the key" if self.server.holds_key(f"{text}\n{finish}") else None)
