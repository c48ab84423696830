"""Texts of classifiers and encoders that are edited in every epoch: what a batch reads of them, and that it is a function of seed, epoch and texts."""

import hashlib

import numpy as np
import pytest
import transformers

from llmkd.config.data import Data, Source
from llmkd.config.media import Augment
from llmkd.data.encoding import edited_texts
from llmkd.data.examples import Draw
from llmkd.data.labelled import LabelledExamples
from llmkd.data.prompt_edits import edited
from llmkd.tasks.text_reader import TextReader

ASKED = ({"swap": 0.4}, {"delete": 0.2})
ROWS = [
    {"text": "the owl flies over the dark garden at night", "text_pair": "a wren sings in the old oak"},
    {"text": "one robin sits on a branch and sings"},
    {"text": "at night the wren sleeps", "text_pair": None},
    {"text": "a wren sings in the old oak", "text_pair": "the owl flies"},
]
WORDS = sorted({word for row in ROWS for text in row.values() if text for word in text.split()})


def reader(backwards: bool = False) -> transformers.BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(WORDS[::-1] if backwards else WORDS)]
    return transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def texts(tokenizer, max_length: int = 64):
    """Of ROWS, which stand after one that is too long."""
    rows = [{"text": "owl " * 99}, *ROWS]
    data = Data(train=Source(path="t", format="labelled"), max_length=max_length, augment=Augment(prompt=ASKED))
    found, used, longer = TextReader("text", tokenizer, 0).inputs(rows, [f"t:{i}" for i in range(5)], data, "data.train")
    assert used.tolist() == [1, 2, 3, 4] and longer.tolist() == [0] and found.edits.tokenizer is not tokenizer
    return found


def by_hand(row: dict, epoch: int) -> list[str]:
    both = [text for text in row.values() if text is not None]
    key = hashlib.blake2b("|".join(both).encode(), digest_size=8).hexdigest()
    return [edited(text, ASKED, 7, epoch, f"{key} {n}") for n, text in enumerate(both, 1)]


def read(batch, i: int) -> tuple[list[int], list[int]]:
    there = batch["attention_mask"][i].bool()
    return batch["input_ids"][i][there].tolist(), batch["token_type_ids"][i][there].tolist()


def test_a_batch_has_the_edited_texts_of_each_whatever_else_is_in_it():
    tokenizer = reader()
    found, other = texts(tokenizer), texts(reader(backwards=True))
    found = found.joined([found.take(np.array([3, 1])), found.take(np.array([0, 2]))])  # 3, 1, 0, 2
    changed = 0
    for epoch in (0, 1):
        whole = found.batch([0, 2, 1, 3], Draw(7, epoch, 5))
        for place, (i, n) in enumerate(((0, 3), (2, 0), (1, 1), (3, 2))):
            wanted = tokenizer(*by_hand(ROWS[n], epoch))
            assert read(whole, place) == read(found.batch([i], Draw(7, epoch, 6)), 0) == (wanted["input_ids"], wanted["token_type_ids"])
            said = other.edits.tokenizer.decode(read(other.batch([n], Draw(7, epoch, 5)), 0)[0])
            assert said == tokenizer.decode(wanted["input_ids"])  # another tokenizer's model reads the same words
            changed += by_hand(ROWS[n], epoch) != [text for text in ROWS[n].values() if text]
    assert changed >= 7 and by_hand(ROWS[0], 0) != by_hand(ROWS[0], 1)
    plain = texts(tokenizer).batch([1], None)
    assert read(plain, 0)[0] == tokenizer(ROWS[1]["text"])["input_ids"] and found.content(1) == texts(tokenizer).content(1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_that_has_become_longer_is_cut(monkeypatch, side):
    tokenizer = reader()
    tokenizer.padding_side = side
    found = texts(tokenizer, 20)
    monkeypatch.setattr(edited_texts, "edited", lambda text, *_: text + " owl" * 40)
    batch = found.batch([1, 2], Draw(0, 0, 1))
    assert batch["input_ids"].shape == (2, 20) and batch["input_ids"][:, -1].tolist() == [3, 3]
    monkeypatch.setattr(edited_texts, "edited", lambda text, *_: "owl" if text == ROWS[1]["text"] else text)
    padded = found.batch([1, 2], Draw(0, 0, 1))["attention_mask"][0].tolist()
    assert padded == ([1, 1, 1, 0, 0, 0, 0] if side == "right" else [0, 0, 0, 0, 1, 1, 1])


def test_dropout_follows_the_positions_of_the_text_as_it_is_in_an_epoch(monkeypatch):
    """The first text has one word, whose positions have the same keys in a batch with longer ones as alone."""
    monkeypatch.setattr(edited_texts, "edited", lambda text, *_: "owl" if text == ROWS[1]["text"] else text)
    found = LabelledExamples(texts(reader()), np.array([0, 1, 0, 1]), np.arange(4), ("a", "b"))
    alone, among = (found.batch(some, Draw(0, 0, 1)).student for some in ([1], [1, 2]))
    assert alone.keys.shape == alone.inputs["input_ids"].shape == (1, 3) and among.keys.shape == among.inputs["input_ids"].shape
    assert among.keys[0, :3].tolist() == alone.keys[0].tolist()
