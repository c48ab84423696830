"""A writer that is a model in this process, any that llmkd loads, adapters included. torch is imported with the first ask that needs it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

from ...config.make import Writer as Settings
from ...config.recipe import Data, Source
from ...data.encoding import template_process
from ...data.encoding.tokenizer import shared_vocab
from ...data.prompt_files import prompt_of
from ...data.prompts import Prompt, decoded
from ...errors import Stopped, UserError
from ...model_folder.files import positions, rows_of
from ...model_folder.generation import generation_settings, stops_at
from ...rollouts.batches import by_length
from ..asks import CUT, STOP, Answer, Ask, failed
from ..model import ModelToLoad, forget
from ..rows import Message

_BATCH = 32
_PROBE = [{"role": "user", "content": "Yes"}]
_PLAIN = Source(path="asks", format="chat")


class ModelWriter:
    """Asks are rendered in the model's chat template. An answer depends on the model, its ask and the seed, and up to rounding not on its batch.

    If one answer of a batch is missing, the whole batch is computed, so that each answer is the same as without an interruption.
    """

    def __init__(self, settings: Settings, device: Callable[[], Any], stop: Callable[[], bool]):
        self.settings, self.device, self.stop = settings, device, stop
        self.label = settings.model
        self.model = ModelToLoad(settings.loaded, "writer")
        self.files, self.tokenizer = self.model.files, self.model.tokenizer
        if not self.tokenizer.chat_template:
            raise UserError(f"writer.model: {settings.model} has no chat template, by which it would be asked; name a model that has one")
        self.vocab = shared_vocab(self.tokenizer, {"writer.model": rows_of(self.files.config)})
        stops = stops_at(generation_settings(self.files.config, (self.files.adapter, self.files.base), "writer.model"))
        self.ends = {self.tokenizer.eos_token_id, *stops, *self._rendered(_PROBE).ends}
        self.identity: dict[str, Any] = self.model.fingerprint | {"end tokens": sorted(self.ends)}
        self._writer = None

    def check(self) -> None:
        pass

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        wanted: list[tuple[Ask, Prompt]] = []
        missing = any(ask.key not in known for ask in asks)
        for ask in asks if missing else ():
            prompt = self._prompt(ask)
            if isinstance(prompt, Answer):
                if ask.key not in known:
                    yield ask, prompt
            else:
                wanted.append((ask, prompt))
        template_process.close()
        ordered = sorted(wanted, key=lambda one: _of_key(one[0]))  # stable
        for _, group in groupby(ordered, key=lambda one: _of_key(one[0])):
            for batch in by_length(list(group), self.settings.batch_size or _BATCH, lambda one: len(one[1].ids)):
                if all(ask.key in known for ask, _ in batch):
                    continue
                if self.stop():
                    raise Stopped("stopped by a signal; what is written is kept, and the same command goes on")
                yield from ((ask, answer) for ask, answer in self._batch(batch) if ask.key not in known)

    def _prompt(self, ask: Ask) -> Prompt | Answer:
        """The ask as the model's prompt; a failed answer if that is not possible."""
        try:
            prompt = self._rendered(ask.messages)
        except ValueError as error:
            return failed(f"the prompt cannot be rendered: {error}")
        most = positions(self.files.config)
        if most and len(prompt.ids) >= most:
            return failed(f"the prompt has {len(prompt.ids)} tokens, and the writer {most} positions")
        if max(prompt.ids) >= self.vocab:
            return failed("the prompt has a token for which the writer has no row")
        return prompt

    def _rendered(self, messages: Sequence[Message]) -> Prompt:
        return prompt_of({"messages": list(messages)}, False, "", _PLAIN, Data(), self.tokenizer)[0]

    def _batch(self, batch: list[tuple[Ask, Prompt]]) -> Iterator[tuple[Ask, Answer]]:
        writer = self._loaded()
        sampling = batch[0][0].sampling
        keys = [int(ask.key[:16], 16) for ask, _ in batch]
        found = writer.write([prompt.ids for _, prompt in batch], keys, sampling)
        for (ask, prompt), one in zip(batch, found, strict=True):
            text = decoded(one.ids[: len(one.ids) - one.finished], self.tokenizer)
            yield ask, Answer(text, STOP if one.finished else CUT, len(one.ids), len(prompt.ids))

    def _loaded(self):
        if self._writer is None:
            from ...rollouts.writer import LocalWriter

            self._writer = LocalWriter(self.model.load(self.device(), self.vocab), self.ends, self.settings.batch_size or _BATCH)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer = None
            forget()


def _of_key(ask: Ask) -> tuple:
    """The sampling, which all asks of a batch must share."""
    sampling = ask.sampling
    return (sampling.temperature, sampling.max_new_tokens, sampling.seed, sampling.top_p, sampling.top_k or 0, sampling.min_p)
