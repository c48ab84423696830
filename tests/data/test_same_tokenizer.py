"""Tokenizers of one vocabulary that name other start and end tokens go together where no text gets such a token, and only there."""

import copy
import json
import shutil

import pytest

from llmkd.config.recipe import Source
from llmkd.data.encoding.same_tokenizer import refuse_other_ends, refuse_other_tokens, report_chosen
from llmkd.data.encoding.tokenizer import tokenizer_differences
from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from tests.kit.data import END, PLAIN, rows_of, talk, tiny

CHAT = ("data.train", Source(path="f", format="chat"), rows_of(talk("u q", "a b")))
LISTS = {"prompt": talk("u q")["messages"], "completion": talk("a b")["messages"]}


def named(template: str = PLAIN, **tokens):
    """The tiny tokenizer with other names for its tokens."""
    tokens = {"eos_token": END, "pad_token": "<|pad|>"} | tokens
    return type(tiny())(tokenizer_object=copy.deepcopy(tiny().backend_tokenizer), chat_template=template, **tokens)


def source(format: str, *rows: dict, setting: str = "data.train", **settings):
    return setting, Source(path="f", format=format, **settings), rows_of(*rows) if rows else None


BASE = named(eos_token="<|pad|>")
ALPACA = {"instruction": "a", "output": "b"}


def check(ours, theirs, *sources):
    refuse_other_tokens(ours, theirs, "teacher.model", "ours", "theirs")
    refuse_other_ends(ours, theirs, "teacher.model", "T", sources)


@pytest.mark.parametrize(
    ("sources", "ours", "theirs"),
    [
        ([CHAT], BASE, named()),
        ([CHAT], named(), BASE),
        ([CHAT], named(eos_token="<|pad|>", bos_token="<|pad|>"), named(bos_token="<|im_start|>", pad_token=END)),
        ([CHAT, source("alpaca", ALPACA, chat_template=True), source("prompt_completion", LISTS)], BASE, named()),
        ([source("alpaca", ALPACA)], named(bos_token="<|pad|>"), named()),
        ([source("alpaca", ALPACA)], named("{{ bos_token }}", bos_token="<|pad|>"), named()),
        ([source("alpaca", ALPACA)], named(unk_token="<|pad|>"), named()),
        ([source("chat")], BASE, named()),
    ],
)
def test_a_pair_that_differs_where_no_text_does_is_taken(sources, ours, theirs):
    check(ours, theirs, *sources)


ENDS = "the end-of-text token of the student's tokenizer is '<|pad|>' (0), that of T is '<|im_end|>' (2), and "
FIX = "which this teacher does not expect there; set student.tokenizer: T"


@pytest.mark.parametrize(
    ("sources", "template", "end"),
    [
        ([CHAT, source("alpaca", ALPACA)], PLAIN, f"texts of data.train (format: alpaca) end with it, {FIX}, or chat_template: true"),
        (
            [CHAT, source("text", {"text": "a"}, setting="data.validation")],
            PLAIN,
            f"texts of data.validation (format: text) end with it, {FIX}",
        ),
        (
            [source("prompt_completion", LISTS, {"prompt": "a", "completion": "b"})],
            PLAIN,
            f"texts of data.train (format: prompt_completion) end with it, {FIX}, or chat_template: true",
        ),
        (
            [source("prompt_completion")],
            PLAIN,
            f"texts of data.train (format: prompt_completion) end with it, {FIX}, or chat_template: true",
        ),
        ([CHAT], PLAIN + "{{ eos_token }}", f"the student's chat template writes eos_token, {FIX}"),
        ([CHAT], {"default": PLAIN + "{{ eos_token }}"}, f"the student's chat template writes eos_token, {FIX}"),
    ],
)
def test_one_whose_texts_end_otherwise_is_refused_with_the_way_on(sources, template, end):
    with pytest.raises(UserError) as info:
        check(named(template, eos_token="<|pad|>"), named(), *sources)
    assert info.value.problems == (f"teacher.model: {ENDS}{end}",)


def test_a_template_that_writes_another_start_is_refused():
    with pytest.raises(UserError, match="start-of-text token .* is '<|pad|>' .*chat template writes bos_token"):
        check(named("{{ bos_token }}" + PLAIN, bos_token="<|pad|>"), named(), CHAT)


def test_what_is_taken_is_said(capsys):
    check(BASE, named(), CHAT)
    report_chosen(named(), BASE, "B")
    report_chosen(named(unk_token="<|pad|>"), named(), "B")
    assert capsys.readouterr().err.splitlines() == [
        "teacher.model: its tokenizer's end-of-text token is '<|im_end|>' (2) (the student's: '<|pad|>' (0)); nothing depends on it, since the chat "
        "template writes every conversation without it",
        "student.tokenizer: its end-of-text token is '<|im_end|>' (2), which is used, and that of B's own tokenizer is '<|pad|>' (0)",
    ]


def test_a_padding_token_that_only_one_has_is_no_difference_and_any_other_entry_is():
    padded, other = copy.deepcopy(tiny()), copy.deepcopy(tiny())
    padded.add_special_tokens({"pad_token": "[PAD]"})
    other.add_tokens(["<extra>"])
    assert tokenizer_differences(padded, tiny()) == [] == tokenizer_differences(tiny(), padded)
    assert tokenizer_differences(padded, other)[0].startswith("'<extra>' is absent here and ")
    ends = copy.deepcopy(tiny())
    ends.add_special_tokens({"pad_token": "[PAD]", "eos_token": "[PAD]"})
    assert any(line.startswith("'[PAD]' is absent here and ") for line in tokenizer_differences(tiny(), ends))


@pytest.fixture
def ends_otherwise(world, tmp_path) -> str:
    """The small world's teacher, whose tokenizer ends texts with the padding token."""
    shutil.copytree(world / "teacher", tmp_path / "instruct")
    config = json.loads((tmp_path / "instruct/tokenizer_config.json").read_text())
    (tmp_path / "instruct/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": config["pad_token"]}))
    return str(tmp_path / "instruct")


def test_a_run_takes_such_a_teacher_for_chats_or_by_its_own_tokenizer(make_recipe, ends_otherwise, capsys):
    chats = {"data__train__chat_template": True}
    found = prepare(make_recipe(teacher__model=ends_otherwise, **chats))
    assert found.tokenizer.convert_ids_to_tokens(sorted(found.end_tokens)) == ["<|end|>"]
    with pytest.raises(UserError, match=r"^teacher.model: the end-of-text token .* texts of data.train \(format: alpaca\) end with it"):
        prepare(make_recipe(teacher__model=ends_otherwise))
    found = prepare(make_recipe(teacher__model=ends_otherwise, student__tokenizer=ends_otherwise))
    assert found.end_tokens == {found.tokenizer.pad_token_id}
    assert "student.tokenizer: its end-of-text token is " in capsys.readouterr().err
