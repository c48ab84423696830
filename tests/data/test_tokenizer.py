"""Two tokenizers are equal only if every id, control token and encoding is; errors name the first differences."""

import copy
import json
import shutil

import pytest
from tokenizers import Tokenizer, normalizers

from llmkd.data.encoding.tokenizer import load_tokenizer, save_tokenizer, tokenizer_differences, vocab_size
from llmkd.errors import UserError
from llmkd.model_folder.identity import write_record
from tests.kit.data import END, tiny


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


def setting(part, **values):
    return lambda state: state[part].update(values)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (setting("model", ignore_merges=True), "model.ignore_merges is null here and true there"),
        (setting("model", byte_fallback=True), "model.byte_fallback is null here and true there"),
        (setting("model", dropout=0.01), "model.dropout is null here and 0.01 there"),
        (
            lambda state: state.update(normalizer={"type": "Replace", "pattern": {"String": "washing"}, "content": "wash ing"}),
            'normalizer is null here and {"type": "Replace", "pattern": {"String": "washing"}, "content": "wash ing"} there',
        ),
        (lambda state: state["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer.add_prefix_space is false here and true there"),
        (lambda state: state["added_tokens"][1].update(rstrip=True), "'<|im_start|>'.rstrip is false here and true there"),
    ],
)
def test_rules_that_no_probe_text_meets_are_compared(change, line):
    assert line in tokenizer_differences(tiny(), changed(change))


def test_rules_that_change_nothing_may_be_written_differently():
    def wordy(state):
        state["normalizer"] = {"type": "Sequence", "normalizers": []}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [state["pre_tokenizer"] | {"trim_offsets": False}]}
        state["model"] |= {"continuing_subword_prefix": "", "unk_token": "a", "dropout": 0.0}

    assert tokenizer_differences(tiny(), changed(wordy)) == [] == tokenizer_differences(changed(wordy), tiny())


def test_what_is_put_round_a_text_is_compared():
    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tiny())
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    found = tokenizer_differences(tiny(), other)
    assert len(found) == 1 and "'Hello, world!" in found[0] and "encoded differently (from token 0: " in found[0]


def fast(model, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>", unk_token="<unk>", **special)


def test_scores_and_limits_are_compared():
    from tokenizers import models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("i", -8.0), ("n", -8.0), ("g", -8.0), ("in", -4.0), ("ing", -4.5)]
    one, two = (fast(models.Unigram([(t, score if t == "ing" else s) for t, s in pieces], unk_id=0)) for score in (-4.5, -20.0))
    assert tokenizer_differences(one, two) == ["'ing' has score -4.5 here and -20 there"]
    words = {"<unk>": 0, "</s>": 1, "a": 2}
    one, two = (fast(models.WordPiece(words, unk_token="<unk>", max_input_chars_per_word=n)) for n in (100, 20))
    assert tokenizer_differences(one, two) == ["model.max_input_chars_per_word is 100 here and 20 there"]


def test_how_ordinary_added_tokens_are_found_is_compared():
    from tokenizers import AddedToken

    one, two = copy.deepcopy(tiny()), copy.deepcopy(tiny())
    one.add_tokens([AddedToken("<think>", normalized=False)])
    two.add_tokens([AddedToken("<think>", single_word=True, normalized=False)])
    assert tokenizer_differences(one, two) == ["'<think>'.single_word is false here and true there"]


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


def test_a_tokenizer_is_read_back_as_it_was(tmp_path, capsys):
    """transformers does not save `legacy`, with which Mistral's tokenizer puts a space before every piece of a text, not only the first."""
    from transformers import LlamaTokenizer

    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "\u2581", "a", "b"])}
    mistral = LlamaTokenizer(vocab=vocab, merges=[], legacy=True)
    mistral.save_pretrained(tmp_path / "lost")
    assert any("prepend_scheme" in line for line in tokenizer_differences(mistral, load_tokenizer(str(tmp_path / "lost"), "x")))
    for name, tokenizer in (("mistral", mistral), ("tiny", tiny())):
        save_tokenizer(tokenizer, tmp_path / name)
        again = load_tokenizer(str(tmp_path / name), "x")
        assert tokenizer_differences(tokenizer, again) == [] and again.chat_template == tokenizer.chat_template
        assert again.special_tokens_map == tokenizer.special_tokens_map
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "null", "tokenizer.json holds NoneType, expected an object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer.json", "out of vocabulary", "could be loaded from .*/tokenizer.json .*out of vocabulary"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_named(world, tmp_path, name, content, said):
    for path in (world / "student").glob("*.json*"):
        shutil.copy(path, tmp_path)
    if content == "out of vocabulary":
        known = json.loads((tmp_path / name).read_text())
        known["model"]["merges"][0] = ["nowhere", "there"]
        content = json.dumps(known)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^student.model: .*{said}.*; ") as refused:
        load_tokenizer(str(tmp_path), "student.model")
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_files_that_llmkd_wrote_are_compared_before_a_tokenizer_is_made_of_them(world, tmp_path, name):
    """Else a token that is spelled otherwise is looked for in the data, and a damaged file is called no tokenizer."""
    shutil.copytree(world / "student", tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages }}")
    write_record(tmp_path / "m", "m", student="merged")
    load_tokenizer(str(tmp_path / "m"), "student.model")
    text = (tmp_path / "m" / name).read_bytes()
    (tmp_path / "m" / name).write_bytes(
        text.replace(b"<|end|>", b"<|end|.").replace(b"messages", b"messages\xbe").replace(b"num_a", b"nem_a")
    )
    with pytest.raises(UserError, match=f"student.model: .*{name} has changed since llmkd wrote it; copy it again"):
        load_tokenizer(str(tmp_path / "m"), "student.model")


def test_a_chat_template_that_is_no_text_is_named(world, tmp_path):
    shutil.copytree(world / "student", tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_bytes(b"{{ messages }}\xbe")
    with pytest.raises(UserError, match="student.model: .*chat_template.jinja cannot be read .*; copy it again"):
        load_tokenizer(str(tmp_path / "m"), "student.model")
