"""A writer of transcripts that is a model in this process, any speech recognition model that llmkd loads. torch is imported with the first ask that
needs it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.make import Writer as Settings
from ...data.audio.decode import decode
from ...data.encoding.targets import frame_of, sequences
from ...data.encoding.tokenizer import shared_vocab
from ...data.media.packages import refuse_missing_packages
from ...data.sequences import SequenceExamples
from ...errors import Stopped, UserError
from ...model_folder.files import rows_of
from ...rollouts.batches import by_length
from ...tasks.media import settings_of
from ...tasks.sequences import LOADED_BY, decoder_positions, generation_of, refuse_decoders_alone
from ...tasks.sound import find_extractor, inputs_of, limit_of
from ...tasks.text_reader import padding_of
from ..asks import CUT, STOP, Answer, Ask, failed
from ..model import ModelToLoad, forget

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 8


class SpeechWriter:
    """Transcripts are decoded greedily, without the tokens that the model's generation config suppresses. A transcript depends on the model and its
    sound, and up to rounding not on its batch.

    If one transcript of a batch is missing, the whole batch is computed, so that each is the same as without an interruption.
    """

    def __init__(self, settings: Settings, device: Callable[[], Any], stop: Callable[[], bool]):
        refuse_missing_packages("audio", "writer.model")
        self.settings, self.device, self.stop = settings, device, stop
        self.label = settings.model
        self.model = ModelToLoad(settings.loaded, "writer")
        files, self.tokenizer = self.model.files, self.model.tokenizer
        refuse_decoders_alone("speech_recognition", {"writer.model": files.config})
        self.extractor = find_extractor(files.base, None, "writer.model")
        generation = generation_of(files.config, files)
        if generation.get("is_multilingual") and settings.target_prefix is None:
            raise UserError(
                "writer.target_prefix: not given, and the model knows several languages; name the language and the task, such as "
                "<|en|><|transcribe|><|notimestamps|>"
            )
        self.frame = frame_of(self.tokenizer, files.config, generation, settings.target_prefix, "writer.model", "writer.target_prefix")
        self.vocab = shared_vocab(self.tokenizer, {"writer.model": rows_of(files.config)})
        self.most = decoder_positions(files.config) - len(self.frame.given) + 1  # the last token needs no position: nothing follows it
        self.identity: dict[str, Any] = self.model.fingerprint | {"targets": [*self.frame], "extractor": settings_of(self.extractor)}
        self._loaded = None

    def check(self) -> None:
        pass

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        """See `Writer.write`. Files of similar size are batched, since their transcripts have similar lengths."""
        for batch in by_length(list(asks), self.settings.batch_size or _BATCH, lambda ask: ask.audio.size):
            if all(ask.key in known for ask in batch):
                continue
            if self.stop():
                raise Stopped("stopped by a signal; what is written is kept, and the same command goes on")
            yield from ((ask, answer) for ask, answer in self._batch(batch) if ask.key not in known)

    def _batch(self, batch: list[Ask]) -> Iterator[tuple[Ask, Answer]]:
        read = []
        for ask in batch:
            clip = self._clip(ask)
            if isinstance(clip, Answer):
                yield ask, clip
            else:
                read.append((ask, clip))
        if not read:
            return
        from ...models.greedy import greedy

        device, most = self.device(), min(read[0][0].sampling.max_new_tokens, self.most)
        inputs = inputs_of(self.extractor, [clip for _, clip in read], self.extractor.sampling_rate)
        if self._loaded is None:
            self._loaded = self._load(inputs, device)
        inputs = {name: x.to(device) for name, x in inputs.items()}
        for (ask, _), ids in zip(read, greedy(self._loaded, inputs, self.frame.given, self.frame.end, most), strict=True):
            text, finished = self.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) < most
            yield ask, Answer(text, STOP if finished else CUT, len(ids) + finished, len(self.frame.given))

    def _clip(self, ask: Ask) -> np.ndarray | Answer:
        """The sound's samples; a failed answer if it cannot be read, or is too long."""
        rate, sound = self.extractor.sampling_rate, ask.audio
        try:
            clip = decode(sound.file, rate, sound.place)
        except UserError as error:
            return failed(str(error))
        if clip.content_hash != ask.messages[0]["content"]:
            return failed(f"{sound.place}: {sound.file}: the file was changed since its rows were read")
        limit = limit_of(self.extractor, rate)
        if limit is not None and len(clip.samples) > limit:
            return failed(f"the clip is {len(clip.samples) / rate:.2f} s long, and the writer reads {limit / rate:g} s; cut it")
        return clip.samples

    def _load(self, inputs: "dict[str, Tensor]", device: Any):
        """The model, tried on the first of some inputs."""
        from ...models.encoder_decoder import EncoderDecoderKind

        found, pad = (
            sequences(["a", "a b"], self.tokenizer, self.frame),
            padding_of(self.tokenizer, self.model.files.config, "writer.model"),
        )
        (ids, masks), offsets = map(np.concatenate, zip(*found, strict=True)), np.cumsum([0, *(len(one) for one, _ in found)])
        examples = SequenceExamples(_OfBatch(inputs), ids, masks, offsets, np.arange(2), ["a", "a b"], pad)
        return self.model.load(device, self.vocab, EncoderDecoderKind(LOADED_BY["audio"][0], len(self.tokenizer), examples))

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded = None
            forget()


@dataclass(frozen=True)
class _OfBatch:
    """The inputs of two sounds, the first and the last of a batch, as `data.inputs.Inputs`."""

    inputs: "dict[str, Tensor]"
    positions = False

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(2, np.int64)

    def content(self, i: int) -> bytes:
        return b"%d" % i

    def batch(self, indices: Sequence[int], draw: Any) -> "dict[str, Tensor]":
        return {name: x[[0 if i == 0 else -1 for i in indices]] for name, x in self.inputs.items()}
