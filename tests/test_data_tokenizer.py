"""Two tokenizers are the same only if every id, control token and encoding is; the first differences are named."""

import copy
import json

import pytest
from data_kit import END, tiny
from tokenizers import Tokenizer, normalizers

from llmkd.data.tokenizer import tokenizer_differences, vocab_size


def changed(change=None, **named):
    """The tiny tokenizer with its state changed."""
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tiny().backend_tokenizer.to_str())
    if change:
        change(state)
    special = {"eos_token": END, "pad_token": "<|pad|>", "additional_special_tokens": ["<|im_start|>"]} | named
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), clean_up_tokenization_spaces=False, **special)


def swap(state):
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def other_merges(state):
    state["model"]["merges"] = list(reversed(state["model"]["merges"]))


def fewer_merges(state):
    del state["model"]["merges"][5:]


def lower(state):
    state["normalizer"] = {"type": "Lowercase"}


def without_splitting(state):
    state["added_tokens"][1]["single_word"] = True


def a_plain_token(state):
    state["added_tokens"][1]["special"] = False


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: changed(swap), ["'a' is ", "'b' is "]),
        (lambda: changed(other_merges), ["merge 0 joins "]),
        (lambda: changed(fewer_merges), ["is encoded differently (from token ", "merges are "]),
        (lambda: changed(lower), ["'Hello, world!", "encoded differently"]),
        (lambda: changed(without_splitting), ["'a <|im_start|>b<|im_start|> <|im_start|>' is encoded differently"]),
        (lambda: changed(eos_token="<|im_start|>"), [f"eos_token_id is '{END}' (2) here and '<|im_start|>' (1) there"]),
        (lambda: changed(bos_token="<|im_start|>"), ["bos_token_id is none here and '<|im_start|>' (1) there"]),
    ],
)
def test_the_first_entries_that_differ_are_named(other, words):
    found = tokenizer_differences(tiny(), other())
    assert all(any(word in line for line in found) for word in words), found
    assert tokenizer_differences(other(), other()) == []


def test_an_added_token_is_named_with_its_id():
    other = copy.deepcopy(tiny())
    other.add_tokens(["<extra>"])
    size = vocab_size(tiny())
    assert tokenizer_differences(tiny(), other)[0] == f"'<extra>' is absent here and {size} there"
    assert vocab_size(other) == size + 1


def test_the_padding_token_and_the_template_may_differ():
    assert tokenizer_differences(tiny(), tiny(pad=END)) == [] == tokenizer_differences(tiny(), tiny(None))


def test_differences_come_in_the_order_of_the_ids():
    found = tokenizer_differences(
        tiny(), changed(lambda s: s["model"]["vocab"].update({t: i + 1000 for t, i in s["model"]["vocab"].items() if i > 300}))
    )
    assert [int(line.split(" is ")[1].split()[0]) for line in found[:5]] == [301, 302, 303, 304, 305]


def test_the_real_vocabulary_ends_at_the_highest_id():
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7, "</s>": 9}, unk_token="a"))
    backend.normalizer = normalizers.NFC()
    gappy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert (len(gappy), vocab_size(gappy)) == (3, 10)
