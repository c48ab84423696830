"""Encodes texts as the sequences of a decoder: its start token, the tokens that every target begins with, the text, and the end token."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import UserError

_BATCH = 1024  # texts that are tokenised at a time


class Frame(NamedTuple):
    """The tokens that all sequences of a decoder have in common.

    start    the token that the decoder starts from
    prefix   tokens after it that are given, not predicted
    end      the token that ends a target
    """

    start: int
    prefix: tuple[int, ...]
    end: int

    @property
    def given(self) -> tuple[int, ...]:
        return self.start, *self.prefix


def sequences(texts: Sequence[str], tokenizer, frame: Frame) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sequence of each text, int32 [tokens], and its loss mask, bool [tokens].

    Supervised are the tokens of the text, those that the tokenizer puts around a target, and the end. If the tokenizer itself writes the
    decoder's start or the frame's prefix, they are not written a second time.
    """
    out, beginnings = [], (own_beginning(tokenizer, frame.start), list(frame.prefix))
    for at in range(0, len(texts), _BATCH):
        for ids in tokenizer(text_target=list(texts[at : at + _BATCH]), add_special_tokens=True, verbose=False)["input_ids"]:
            written = next((len(one) for one in beginnings if one and ids[: len(one)] == one), 0)
            ids = ids[written:]
            sequence = np.array([*frame.given, *ids, *([] if ids and ids[-1] == frame.end else [frame.end])], np.int32)
            out.append((sequence, np.arange(len(sequence)) >= len(frame.given)))
    return out


def own_beginning(tokenizer, start: int) -> list[int]:
    """The tokens that a tokenizer writes before a target if they begin with the decoder's start (Whisper); none if they do not (BART)."""
    ids = tokenizer(text_target="", add_special_tokens=True)["input_ids"]
    return [start, *(token for token in ids[1:] if token != tokenizer.eos_token_id)] if ids[:1] == [start] else []


def frame_of(tokenizer, config: dict, generation: dict, prefix: str | None, setting: str, named: str = "data.target_prefix") -> Frame:
    """The frame of a model's sequences, from its tokenizer, its config.json and its generation config.

    prefix  control tokens as text, from the setting `named`; None for those of the tokenizer (for Whisper, with language and task)
    """
    named_starts = generation.get("decoder_start_token_id"), config.get("decoder_start_token_id"), config.get("bos_token_id")
    start = next((token for token in named_starts if token is not None), None)
    if type(start) is not int:
        raise UserError(
            f"{setting}: neither config.json nor generation_config.json says from which token the decoder starts; write decoder_start_token_id into config.json"
        )
    if prefix is not None:
        ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        if unknown := [token for token in tokenizer.convert_ids_to_tokens(ids) if token not in tokenizer.get_added_vocab()]:
            raise UserError(
                f"{named}: found {prefix!r}, of which {unknown[0]!r} is no control token of the tokenizer; expected these alone, such as "
                "<|en|><|transcribe|><|notimestamps|>"
            )
        ids = ids[1:] if ids[:1] == [start] else ids
    else:
        ids = own_beginning(tokenizer, start)[1:]
    return Frame(start, tuple(ids), tokenizer.eos_token_id)
