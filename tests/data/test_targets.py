"""The decoder's sequences of texts, written out by hand."""

import pytest

from llmkd.data.encoding.targets import Frame, frame_of, sequences
from llmkd.data.reading import skills
from tests.kit.sequences import speech_tokenizer

START, EN, TASK, TIMES, END = 257, 258, 259, 261, 256
CONFIG = {"decoder_start_token_id": 9}
GENERATION = {"decoder_start_token_id": START}


@pytest.mark.parametrize(
    ("language", "prefix", "given"),
    [
        (None, None, [START, TIMES]),
        (None, "<|en|><|transcribe|><|notimestamps|>", [START, EN, TASK, TIMES]),
        (None, "<|startoftranscript|><|en|>", [START, EN]),
        ("en", None, [START, EN, TASK, TIMES]),
        ("en", "<|notimestamps|>", [START, TIMES]),
        (None, "", [START]),
    ],
)
def test_a_target_begins_as_the_tokenizer_writes_it_or_as_it_is_named_and_once(language, prefix, given):
    """The generation config names the start, as in transformers, where config.json says otherwise."""
    reader = speech_tokenizer()
    reader.set_prefix_tokens(language=language, task=language and "transcribe")
    frame = frame_of(reader, CONFIG, GENERATION, prefix, "student.model")
    assert frame == Frame(START, tuple(given[1:]), END)
    for (ids, mask), text in zip(sequences(["ab", "c"], reader, frame), ("ab", "c"), strict=True):
        own = [reader.convert_tokens_to_ids(letter) for letter in text]
        assert ids.tolist() == [*given, *own, END] and mask.tolist() == [False] * len(given) + [True] * (len(own) + 1)


@pytest.mark.parametrize("generation", [{}, {"decoder_start_token_id": None}])
def test_a_tokenizer_that_writes_no_start(generation):
    """A generation config that leaves the start out, or has null for it, leaves it to config.json."""
    reader = skills.tokenizer()
    frame = frame_of(reader, {"decoder_start_token_id": 0, "bos_token_id": 1}, generation, None, "student.model")
    (ids, mask), *_ = sequences(["it is 3 ."], reader, frame)
    own = reader("it is 3 .", add_special_tokens=False)["input_ids"]
    assert frame.given == (0,) and ids.tolist() == [0, *own, reader.eos_token_id] and mask.tolist() == [False] + [True] * (len(own) + 1)
