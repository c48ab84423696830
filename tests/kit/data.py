"""Shared by the tests of data: a small tokenizer, rows, and examples as text."""

import copy
import functools
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmkd.config.recipe import Data, Source
from llmkd.data.collate import collate
from llmkd.data.encoding.encode import encode as encode_source
from llmkd.data.encoding.formats import ALPACA
from llmkd.data.examples import TokenExamples
from llmkd.data.reading import skills
from llmkd.data.reading.sources import Rows

REAL = Path(__file__).parents[3] / "shared/data/tokenizers"
GOOD = '{"instruction": "a", "output": "b"}'
END = "<|im_end|>"

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m.name or m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT
)
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)


@functools.cache
def tiny(template: str | None = PLAIN, pad: str = "<|pad|>", seen: str = ""):
    """A byte-level BPE tokenizer with a few words and pairs of line ends as tokens."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", END]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([ALPACA, "the owl flies at night, the wren in the garden", seen, "\n\n\n" * 9] * 3, trainer)
    named = {"eos_token": END, "pad_token": pad, "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **named)


def made(template: str, end: str = END, special=(), plain=(), bos: str = "<s>"):
    """The tiny tokenizer with a template and control tokens, some of which are not marked special."""
    tokenizer = copy.deepcopy(tiny())
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, end, template
    return tokenizer


skills_tokenizer = skills.tokenizer


def real(name: str):
    if not (REAL / name).exists():
        pytest.skip(f"no {REAL / name}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REAL / name)


def rows_of(*rows: dict) -> Rows:
    return Rows(list(rows), [f"f.jsonl:{i + 1}" for i in range(len(rows))], "content")


def encode(rows: Rows, format: str, data: Data, tokenizer, **source) -> TokenExamples:
    return encode_source(rows, Source(path="f.jsonl", format=format, **source), data, tokenizer)


def talk(*turns: str) -> dict:
    """A conversation: 'u hello' is a user's message with the text hello; likewise a and s."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def kept(encoded: TokenExamples, tokenizer) -> list[str]:
    """Each example's labels as text, from the collator."""
    return [tokenizer.decode(collate(encoded, [i], 0).labels_N) for i in range(len(encoded))]


def shown(encoded: TokenExamples, tokenizer) -> list[str]:
    return [tokenizer.decode(encoded.example(i)[0]) for i in range(len(encoded))]


def same(a: TokenExamples, b: TokenExamples) -> bool:
    arrays = [(getattr(a, name), getattr(b, name)) for name in ("ids", "loss_mask", "offsets", "row")]
    return a.counts == b.counts and all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays)
