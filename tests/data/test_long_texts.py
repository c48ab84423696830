"""A text that is known to be too long is not tokenised whole, and what comes of it is what tokenising all of it gives."""

import copy
import json
import random
import string
import time
import tracemalloc

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkd.config.recipe import Data
from llmkd.data.encoding import long_texts, stretches, template_process
from llmkd.data.encoding.control_tokens import Text, ends_of_pieces, one_encoder
from llmkd.data.encoding.encode import Rendered, batches_of
from llmkd.data.encoding.long_texts import Cover, beginning, bound_of, cover_of, is_longer
from llmkd.errors import UserError
from tests.kit.data import END, PLAIN, encode, kept, real, rows_of, same, skills_tokenizer, talk, tiny

WORDS = [
    "the",
    "owl",
    "flies",
    "at",
    "night,",
    "naïve",
    "cafe\u0301",
    "你好",
    "\U0001f600",
    "x1234",
    "\n\n\n",
    "  ",
    "\t",
    "\u00a0",
    "-->",
    END,
    "a.b.c",
]


def normalised(normalizer):
    other = copy.deepcopy(tiny())
    other.backend_tokenizer.normalizer = normalizer
    return other


def sentencepiece(byte_fallback: bool, **settings):
    """A BPE on characters, with spaces written as in sentencepiece: Llama 2's way."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256 * byte_fallback)),
        *"▁abcdefghijklmnopqrstuvwxyz.,-<>|_",
        "th",
        "the",
        "▁t",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "t"), ("▁", "the")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=tiny().chat_template.replace(END, "</s>"), **settings
    )


TOKENIZERS = {
    "byte level": tiny,
    "NFC": lambda: normalised(normalizers.NFC()),
    "digits": skills_tokenizer,
    "bytes for what is unknown": lambda: sentencepiece(True),
    "one token for what is unknown": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_what_is_not_tokenised_changes_nothing(monkeypatch, name, too_long):
    monkeypatch.setattr(long_texts, "_FEW", 1)
    draw, tokenizer, data = random.Random(0), TOKENIZERS[name](), Data(max_length=9, too_long=too_long)
    texts = [" ".join(draw.choices(WORDS, k=n)) for n in (1, 3, 20, 60, 200, 400, 400, 900)]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(long_texts, "cover_of", lambda tokenizer: seen.append(cover_of(tokenizer)) or seen[-1])
        short = {format: encode(rows, format, data, tokenizer) for format, rows in of(texts).items()}
    assert seen and None not in seen
    monkeypatch.setattr(long_texts, "cover_of", lambda tokenizer: None)
    for format, rows in of(texts).items():
        assert same(short[format], encode(rows, format, data, tokenizer)) and short[format].counts["too_long"] >= 4


def of(texts: list[str]) -> dict:
    texts = [text.replace("</s>", "").replace("|", "") for text in texts]
    return {
        "text": rows_of(*({"text": text} for text in texts)),
        "prompt_completion": rows_of(*({"prompt": text[:5], "completion": text[5:]} for text in texts)),
        "chat": rows_of(*(talk("u q", f"a {text}", "u r", f"a {text}") for text in texts)),
    }


@pytest.mark.parametrize(("name", "most"), [("gpt2", 128), ("mistral-7b-v0.1", 16), ("minimind-6400", 21)])
def test_real_tokenizers_are_read(name, most):
    assert cover_of(real(name)) == Cover(most, None, True)


def test_ten_megabytes_take_a_moment(monkeypatch):
    big = "the owl flies at night " * 430_000
    rows, seen = {"chat": rows_of(talk("u q", f"a {big}")), "text": rows_of({"text": big})}, []
    monkeypatch.setattr("llmkd.data.encoding.encode._MOST_CHARACTERS", 1 << 20)
    whole = type(tiny()).__call__
    monkeypatch.setattr(
        type(tiny()), "__call__", lambda self, text, *args, **kw: seen.append(len(str(text))) or whole(self, text, *args, **kw)
    )
    encode(rows_of({"text": "the owl"}), "text", Data(max_length=512), tiny())  # what is made once
    for format, one in rows.items():
        for too_long, lengths in (("drop", []), ("truncate", [512])):
            start = time.process_time()
            assert encode(one, format, Data(max_length=512, too_long=too_long), tiny()).lengths.tolist() == lengths
            assert time.process_time() - start < 1
    assert max(seen) < 10_000
    tracemalloc.start()
    encode(rows["text"], "text", Data(max_length=512, too_long="truncate"), tiny())
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


FORGETS = PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")


@pytest.mark.parametrize("template", [FORGETS, PLAIN])
@pytest.mark.parametrize("context", [None, "the owl flies"])
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_answers_in_texts_that_are_too_long_are_not_looked_for(monkeypatch, template, context, too_long):
    """The first text fits, of the second the answer begins behind the cut or before it, those of the others begin behind it."""
    tokenizer, data = tiny(template), Data(max_length=90, too_long=too_long, teacher_context=context)
    turns = [*talk("u q", "a one", "u r", "a two", "u s", f"a {END} " + "the owl " * 300, f"u {END}", "a four")["messages"]]
    rows = rows_of({"messages": turns}, {"messages": turns[2:]}, {"messages": turns[:2] + turns[4:6]}, talk("u q", "a z"))
    looked, span = [], "llmkd.data.encoding.encode.bound_of"
    with monkeypatch.context() as patch:
        patch.setattr(long_texts, "_FEW", 1)
        patch.setattr(span, lambda *given: looked.append(bound_of(*given)) or looked[-1])
        bounded = encode(rows, "chat", data, tokenizer)
    for module in ("encode", "teacher_context"):
        monkeypatch.setattr(f"llmkd.data.encoding.{module}.bound_of", lambda *given: None)
    whole = encode(rows, "chat", data, tokenizer)
    assert looked[0].most == 16 * 90 and kept(bounded, tokenizer) and bounded.counts["too_long"] >= 2
    counts = dict(bounded.counts), dict(whole.counts)
    for one in counts:  # of the texts that are there
        for name in ("apart_tokens", "apart_last", "as_characters"):
            one.pop(name, None)
    assert counts[0] == counts[1] and kept(bounded, tokenizer) == kept(whole, tokenizer)


def test_long_answers_of_a_row_that_is_taken_apart_are_refused_by_their_characters():
    with pytest.raises(UserError) as info:
        encode(rows_of(talk("u q", "a one", "u r", "a " + "the owl " * 300)), "chat", Data(max_length=60, too_long="refuse"), tiny(FORGETS))
    (problem,) = info.value.problems
    assert problem.startswith("f.jsonl:1: 2,5") and problem.endswith(
        " characters, more than data.max_length (60 tokens); raise it, or set data.too_long"
    )


def test_a_long_talk_that_is_taken_apart_takes_a_moment():
    turns, tokenizer = [text for i in range(60) for text in ("u q", f"a {i} " + "the owl flies at night " * 2000)], tiny(FORGETS)
    encode(rows_of(talk("u q", "a one")), "chat", Data(), tokenizer)
    before = psutil.Process(template_process._PROCESS._process.pid).cpu_times()
    assert len(encode(rows_of(talk(*turns)), "chat", Data(max_length=40), tokenizer)) == 0
    after = psutil.Process(template_process._PROCESS._process.pid).cpu_times()
    assert after.user - before.user < 0.4  # 1 s where every answer is looked for


def test_a_refusal_counts_characters():
    with pytest.raises(UserError) as info:
        encode(rows_of({"text": "the owl " * 100}), "text", Data(max_length=9, too_long="refuse"), tiny())
    assert info.value.problems == ("f.jsonl:1: 800 characters, more than data.max_length (9 tokens); raise it, or set data.too_long",)


def test_the_bound_is_exact_and_counts_what_a_normaliser_composes():
    composing = TOKENIZERS["NFC"]()
    assert (cover_of(tiny()).most, cover_of(composing).most) == (16, 64)
    assert not is_longer(Text("x" * 64 * 9, []), 9, composing) and is_longer(Text("x" * (64 * 9 + 1), []), 9, composing)


def test_a_text_with_a_context_for_the_teacher_is_cut_where_the_teachers_is(monkeypatch):
    monkeypatch.setattr(long_texts, "_FEW", 1)
    draw, data, tokenizer = random.Random(1), Data(max_length=60, too_long="truncate", teacher_context="owls"), tiny()
    texts, tokenised = [" ".join(draw.choices(WORDS, k=n)) for n in (3, 200, 400, 900)], []
    whole = type(tokenizer).__call__
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", lambda self, text, *a, **kw: tokenised.extend(text) or whole(self, text, *a, **kw))
        short = {format: encode(rows, format, data, tokenizer) for format, rows in of(texts).items()}
    assert max(map(len, tokenised)) < 60 * 16 + 500 < max(map(len, texts))
    monkeypatch.setattr(long_texts, "cover_of", lambda tokenizer: None)
    for format, rows in of(texts).items():
        one, other = short[format], encode(rows, format, data, tokenizer)
        assert same(one, other) and (one.teacher_view.ids == other.teacher_view.ids).all() and one.counts["too_long"] >= 3
        assert (one.teacher_view.loss_mask == other.teacher_view.loss_mask).all()


def test_a_text_that_goes_on_otherwise_for_the_teacher_is_not_cut():
    text = Text("the owl " * 100, [(3, 800)])
    cut = long_texts.beginnings(text, Text("be " + text.text, [(6, 803)], pieces=((0, 803, None),)), 9, tiny())
    assert cut[0] == beginning(text, 9, tiny()) and cut[1].text == "be " + cut[0].text
    assert (cut[0].spans, cut[1].spans, cut[1].pieces) == ([(3, 151)], [(6, 154)], ((0, 154, None),))
    for other in ("be " + text.text + "!", "be " + text.text.replace("owl", "OWL"), "o" + text.text[700:]):
        assert long_texts.beginnings(text, Text(other, []), 9, tiny()) == (text, Text(other, []))


def test_a_cut_stands_at_the_second_space_behind_the_bound():
    text = Text("x" * 300 + " ab cd\u00a0 ef", [(10, 400)])
    assert beginning(text, 9, tiny()).text == "x" * 300 + " ab"
    assert beginning(text, 9, tiny()).spans == [(10, 303)]
    assert beginning(Text("x" * 300, []), 30, tiny()).text == "x" * 300
    pieces = ((0, 200, None), (200, 301, 1), (301, 305, 2), (305, 307, None))
    assert beginning(Text(text.text, [], pieces=pieces), 9, tiny()).pieces == ((0, 200, None), (200, 301, 1), (301, 303, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        lambda state: state.update(normalizer={"type": "Replace", "pattern": {"Regex": "a+"}, "content": "a"}),
        lambda state: state.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "StripAccents"}]}),
        lambda state: state.update(pre_tokenizer={"type": "WhitespaceSplit"}),
        lambda state: state.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}],
            }
        ),
        lambda state: state["model"].update(type="WordPiece"),
        lambda state: state["model"].update(continuing_subword_prefix="##"),
    ],
)
def test_a_tokenizer_that_may_leave_characters_out_is_not_relied_on(change):
    state = json.loads(tiny().backend_tokenizer.to_str())
    change(state)
    assert long_texts.cover_of_state(state) is None


def test_characters_that_may_be_unknown_are_not_counted():
    tokenizer = sentencepiece(False)
    assert cover_of(tokenizer).counted.startswith("eaot") and "A" not in cover_of(tokenizer).counted
    assert not is_longer(Text("你好 " * 1000, []), 9, tokenizer) and is_longer(Text("the " * 1000, []), 9, tokenizer)
    crossing = json.loads(tiny().backend_tokenizer.to_str())
    crossing["model"]["vocab"]["aĠ"] = 999
    assert not long_texts.cover_of_state(crossing).cut_at_space


def test_batches_are_small_in_characters_and_in_order():
    texts = [Rendered(i, Text("x" * n, []), None) for i, n in enumerate([1 << 19, 1 << 20, 5, 5, 1 << 21, 7])]
    assert [[text.row for text in part] for part in batches_of(texts)] == [[0, 1], [2, 3, 4], [5]]


def test_control_tokens_in_a_long_text_are_compared_at_the_ends_of_its_pieces():
    text = "ab" * 40_000
    pieces = [(0, 70_000, None), (70_000, 70_005, 1), (70_005, 80_000, None)]
    short = ends_of_pieces(text, pieces)
    assert [(stop - begin, token) for begin, stop, token in short.pieces] == [(2 << 14, None), (5, 1), (9_995, None)]
    assert short.text == text[: 1 << 14] + text[70_000 - (1 << 14) :]
    big = "the owl flies at night " * 100_000
    data = Data(max_length=512, too_long="truncate")
    found = encode(rows_of(talk("u q", f"a {END} {big} {END}")), "chat", data, tiny())
    assert found.lengths.tolist() == [512] and found.counts["as_characters"] == 1


def in_small_stretches(monkeypatch, at_once: int, stretch: int = 200, overlap: int = 60) -> None:
    for name, value in {"_AT_ONCE": at_once, "_STRETCH": stretch, "_OVERLAP": overlap, "_ALIKE": 3}.items():
        monkeypatch.setattr(stretches, name, value)


def words(model, *pre_tokenizer) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(pre_tokenizer))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


UNIGRAM = [
    ("<unk>", -9.0),
    ("</s>", -9.0),
    *((c, -4.0) for c in "▁abcdefghijklmnopqrstuvwxyz.,-"),
    ("▁the", -3.0),
    ("▁owl", -3.5),
    ("ght", -4.0),
]
WORD_PIECES = ["<unk>", "</s>", "the", "owl", *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase)]
OTHERS = {
    "Unigram": lambda: words(models.Unigram(UNIGRAM, unk_id=0), pre_tokenizers.Metaspace()),
    "WordPiece": lambda: words(
        models.WordPiece({p: i for i, p in enumerate(WORD_PIECES)}, unk_token="<unk>"), pre_tokenizers.BertPreTokenizer()
    ),
}


@pytest.mark.parametrize("name", [*TOKENIZERS, *OTHERS])
def test_a_text_in_stretches_has_the_tokens_of_the_whole(monkeypatch, name):
    draw, tokenizer = random.Random(1), (TOKENIZERS | OTHERS)[name]()
    texts = [" ".join(draw.choices(WORDS, k=400)), "\n".join(draw.choices(WORDS, k=400)), "-".join(draw.choices(WORDS[:8], k=400))]
    encode_it = one_encoder(tokenizer, True)
    whole = [encode_it(text) for text in texts]
    in_small_stretches(monkeypatch, 100)
    for text, (ids, places) in zip(texts, whole, strict=True):
        seen = []
        found = stretches.tokens(text, lambda part, seen=seen: seen.append(len(part)) or encode_it(part))
        assert (found[0].tolist(), [tuple(place) for place in found[1].tolist()]) == (ids, places)
        assert len(seen) > 8 and max(seen) <= 200


def test_what_is_one_token_however_long_it_is_is_cut(monkeypatch):
    """A run of what is unknown is one token, of which no two stretches agree on the length."""
    in_small_stretches(monkeypatch, 100)
    for text in ("你" * 1000, "a " + "你" * 1000 + " b"):
        ids, places = stretches.tokens(text, one_encoder(sentencepiece(False), True))
        assert set(ids.tolist()) <= {*range(40)} and places[0, 0] == 0 and places[-1, 1] == len(text)
        assert (places[1:, 0] <= places[:-1, 1]).all() and (np.diff(places[:, 1]) >= 0).all() and len(ids) < 20


@pytest.mark.parametrize("name", ["byte level", "one token for what is unknown", "Unigram"])
@pytest.mark.parametrize("too_long", ["drop", "truncate", "refuse", "split"])
def test_a_long_text_is_tokenised_in_stretches_and_no_further_than_it_fits(monkeypatch, name, too_long):
    """With the result that all of it at once has. The last text fits."""
    tokenizer, data = (TOKENIZERS | OTHERS)[name](), Data(max_length=450, too_long=too_long)
    draw = random.Random(2)
    texts = [" ".join(draw.choices(WORDS[:5], k=n)) for n in (2000, 30)]
    made = {format: rows for format, rows in of(texts).items() if format == "text" or (tokenizer.chat_template and too_long != "split")}

    def result(format: str, rows):
        try:
            return encode(rows, format, data, tokenizer)
        except UserError as error:
            return [problem.split(":")[:2] for problem in error.problems]

    whole = {format: result(format, rows) for format, rows in made.items()}
    in_small_stretches(monkeypatch, 100)
    own, seen = type(tokenizer).__call__, []

    def call(self, text, *args, **settings):
        seen.append(sum(map(len, text)) if isinstance(text, list) else len(text))
        return own(self, text, *args, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    for format, rows in made.items():
        seen.clear()
        found = result(format, rows)
        assert found == whole[format] if isinstance(found, list) else same(found, whole[format])
        assert max(seen) <= 200 and (too_long in ("split", "truncate") or sum(seen) < 6000 < len(texts[0]))
    assert too_long != "refuse" or all(lines == [["f.jsonl", "1"]] for lines in whole.values())
