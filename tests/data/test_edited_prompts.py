"""Prompts that are edited in every epoch: what is edited, that targets stay, what teachers read, and what is refused."""

import numpy as np
import pytest

from llmkd.config.data import Data, Source
from llmkd.config.media import Augment
from llmkd.config.prompt_edits import PROMPT_EDITS
from llmkd.data.encoding import edited_prompts
from llmkd.data.encoding.edited_prompts import with_edits
from llmkd.data.encoding.formats import ALPACA, ALPACA_WITH_INPUT
from llmkd.data.examples import Draw, concat
from llmkd.data.prompt_edits import EDITS, edited
from tests.kit.data import FORGETS, encode, rows_of, tiny

ASKED = ({"swap": 0.4}, {"delete": 0.2}, {"typo": 0.4})
TALK = [
    {"role": "system", "content": "Be very brief with all of them."},
    {"role": "user", "content": "Which bird flies at night, and where?"},
    {"role": "assistant", "content": "The owl flies there."},
    {"role": "user", "content": "And which of them sings in gardens?"},
    {"role": "assistant", "content": "The wren sings."},
]


def examples(rows: list[dict], format: str, tokenizer, sees: str = "clean", **settings):
    data = Data(augment=Augment(prompt=ASKED, teacher_sees=sees), **settings)
    read = rows_of(*rows)
    return with_edits(encode(read, format, data, tokenizer), read, Source(path="t", format=format), data, tokenizer)


def test_the_users_turns_are_edited_and_the_template_system_and_answers_stay():
    tokenizer = tiny()
    found, clean = examples([{"messages": TALK}], "chat", tokenizer), encode(rows_of({"messages": TALK}), "chat", Data(), tokenizer)
    key, texts = clean.student_hash(0), set()
    for epoch in range(3):
        drawn = found.drawn([0], Draw(7, epoch, 1))
        asked = [edited(TALK[place]["content"], ASKED, 7, epoch, f"{key} {n}") for n, place in ((1, 1), (2, 3))]
        wanted = tokenizer.apply_chat_template(
            [one | {"content": asked[n // 2]} if n in (1, 3) else one for n, one in enumerate(TALK)], tokenize=False
        )
        assert tokenizer.decode(drawn.ids) == wanted and asked[0] != TALK[1]["content"]
        assert np.array_equal(drawn.ids[drawn.loss_mask], clean.ids[clean.loss_mask])
        texts.add(wanted)
    assert len(texts) == 3


def test_where_each_turn_is_an_example_of_its_own_each_is_edited():
    thinks = TALK[2] | {"content": "<think>Which?</think>The owl flies there."}
    found = examples([{"messages": [*TALK[:2], thinks, *TALK[3:]]}], "chat", tiny(FORGETS))
    drawn = found.drawn([0, 1], Draw(7, 0, 1))
    assert len(found) == 2
    for i in (0, 1):
        (ids, mask), (own, own_mask) = drawn.example(i), found.example(i)
        assert not np.array_equal(ids, own) and np.array_equal(ids[mask], own[own_mask])


@pytest.mark.parametrize(
    ("format", "row", "prompt"),
    [
        (
            "alpaca",
            {"instruction": "name a bird of the night", "output": "an owl"},
            lambda f: ALPACA.format(instruction=f("name a bird of the night", 1)),
        ),
        (
            "alpaca",
            {"instruction": "name this fine bird", "input": "it flies at night", "output": "an owl"},
            lambda f: ALPACA_WITH_INPUT.format(instruction=f("name this fine bird", 1), input=f("it flies at night", 2)),
        ),
        ("prompt_completion", {"prompt": "a bird of the night is ", "completion": "an owl"}, lambda f: f("a bird of the night is ", 1)),
    ],
)
def test_of_plain_formats_the_users_texts_are_edited(format, row, prompt):
    tokenizer = tiny(None)
    found = examples([row], format, tokenizer)
    drawn = found.drawn([0], Draw(0, 1, 1))
    wanted = prompt(lambda text, n: edited(text, ASKED, 0, 1, f"{found.student_hash(0)} {n}"))
    assert wanted + "an owl" in tokenizer.decode(drawn.ids) and wanted != prompt(lambda text, n: text)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("sees", ["clean", "same"])
def test_batches_follow_from_seed_epoch_and_content_and_the_teacher_reads_what_it_is_to(sees, packing):
    tokenizer = tiny()
    rows = [{"messages": [{"role": "user", "content": f"{n} is which of the many birds here?"}, TALK[2]]} for n in range(4)]
    found = examples(rows, "chat", tokenizer, sees, packing=packing)
    found = concat([found.take(np.array([3, 1])), found.take(np.array([0, 2]))], [0, 4], {})  # 3, 1, 0, 2
    whole = found.batch([2, 0, 3], Draw(0, 1, 7))
    each = [found.batch([i], Draw(0, 1, 8)) for i in (2, 0, 3)]
    plain = found.batch([2, 0, 3])
    flat = lambda batches, model: [x for one in batches for x in one.view_of(model).inputs["input_ids"].flatten().tolist()]  # noqa: E731
    trim = lambda ids: [i for i in ids if i != tokenizer.eos_token_id]  # noqa: E731
    assert trim(flat([whole], "student")) == trim(flat(each, "student")) != trim(flat([plain], "student"))
    texts = [tokenizer.decode(one.student.inputs["input_ids"][0].tolist()) for one in each]
    for text, place, n in zip(texts, (2, 0, 3), (0, 3, 2), strict=True):
        assert edited(f"{n} is which of the many birds here?", ASKED, 0, 1, f"{found.student_hash(place)} 1") in text
    assert trim(flat([whole], "teacher")) == trim(flat([plain if sees == "clean" else whole], "student"))
    assert found.one_input == (sees == "same") == (whole.teacher is whole.student)
    assert whole.example_N.tolist() == plain.example_N.tolist() and whole.labels_N.tolist() == plain.labels_N.tolist()
    assert [one.content_hash for one in whole.examples] == [found.content_hash(i) for i in (2, 0, 3)]
    assert trim(flat([found.batch([2, 0, 3], Draw(0, 2, 9))], "student")) != trim(flat([whole], "student"))


def test_a_context_is_read_with_the_edited_or_the_clean_prompt():
    tokenizer = tiny()
    for sees in ("same", "clean"):
        found = examples([{"messages": TALK[1:3]}], "chat", tokenizer, sees, teacher_context="Owls hunt.")
        batch = found.batch([0], Draw(0, 0, 1))
        own, theirs = (tokenizer.decode(view.inputs["input_ids"][0].tolist()) for view in (batch.student, batch.teacher))
        asked = edited(TALK[1]["content"], ASKED, 0, 0, f"{found.student_hash(0)} 1")
        assert asked in own and "Owls hunt." not in own and "Owls hunt." in theirs
        assert (asked in theirs) == (sees == "same") and (TALK[1]["content"] in theirs) == (sees == "clean")


@pytest.mark.parametrize("made", [lambda text, *_: text * 40, lambda text, *_: text + "\ue000" + "".join(map(chr, range(0xE000, 0xF900)))])
def test_an_edit_that_cannot_be_is_not_made(monkeypatch, made):
    """One with which the example is too long, and one that no row may have."""
    monkeypatch.setattr(edited_prompts, "edited", made)
    found = examples([{"messages": TALK[1:3]}], "chat", tiny(), max_length=200, too_long="refuse")
    assert np.array_equal(found.drawn([0], Draw(0, 0, 1)).ids, found.ids)


def test_an_edit_that_would_cut_targets_is_not_made(monkeypatch):
    clean = encode(rows_of({"messages": TALK[1:3]}), "chat", Data(), tiny())
    monkeypatch.setattr(edited_prompts, "edited", lambda text, *_: text + " owl owl owl owl owl")
    found = examples([{"messages": TALK[1:3]}], "chat", tiny(), max_length=len(clean.ids) + 2, too_long="truncate")
    assert np.array_equal(found.drawn([0], Draw(0, 0, 1)).ids, clean.ids)
    assert not np.array_equal(examples([{"messages": TALK[1:3]}], "chat", tiny()).drawn([0], Draw(0, 0, 1)).ids, clean.ids)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__augment__prompt": [{"swop": 0.1}]}, "found 'swop', which is no edit; did you mean swap?"),
        ({"data__augment__prompt": [{"typo": 2}]}, "found 2, expected the share of words"),
        ({"data__train__format": "text"}, "set with format: text, which does not say which text is no target"),
        ({"data__train_on_input": True}, "prompts are trained on"),
    ],
)
def test_what_does_not_go_with_edits_is_refused(make_recipe, changes, says):
    from llmkd.errors import UserError

    settings = {"data__augment__prompt": [{"swap": 0.1}], "data__augment__teacher_sees": "clean"} | changes
    with pytest.raises(UserError, match=says):
        make_recipe(**settings)
    assert tuple(EDITS) == PROMPT_EDITS
