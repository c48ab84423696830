"""Context distillation: a context for the teacher alone does not change the student's input, and both predict the same tokens."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
import torch

from llmkd.config.loader import dump, load_recipe
from llmkd.config.recipe import Data, Source
from llmkd.data.batching import Batching
from llmkd.data.collate import collate
from llmkd.data.dataset import Dataset, refuse_unknown_tokens
from llmkd.data.encoding.encode import encode as encode_rows
from llmkd.data.encoding.token_cache import load_or_encode
from llmkd.data.examples import merge
from llmkd.data.stream import StreamSource
from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from tests.kit.data import FORGETS, MARKED, encode, kept, real, rows_of, same, shown, skills_tokenizer, talk, tiny
from tests.kit.sources import write

TOLD = "Think of the owl, who flies at night."
CONTEXT = Data(teacher_context=TOLD)
ROWS = {
    "alpaca": {"instruction": "q", "input": "i", "output": "one"},
    "chat": talk("u q", "a one", "u r", "a two"),
    "prompt_completion": {"prompt": "q:", "completion": " one"},
    "text": {"text": "the owl flies"},
}


def theirs(encoded, tokenizer) -> list[str]:
    return shown(encoded.teacher_view, tokenizer)


def problem(*args, **source) -> str:
    with pytest.raises(UserError) as info:
        encode(*args, **source)
    (only,) = info.value.problems
    return only


# ---- what the two read


@pytest.mark.parametrize("template", [None, MARKED, FORGETS])
@pytest.mark.parametrize(
    ("turns", "system"),
    [
        (("u q", "a one", "u r", "a two"), f"s {TOLD}"),
        (("s be kind", "u q", "a one"), f"s {TOLD}\n\nbe kind"),
        (("s ", "u q", "a one"), f"s {TOLD}"),
    ],
)
def test_a_chats_context_is_a_system_message_or_the_beginning_of_its_own(template, turns, system):
    tokenizer = tiny(template) if template else skills_tokenizer()
    encoded = encode(rows_of(talk(*turns)), "chat", CONTEXT, tokenizer)
    written = encode(rows_of(talk(system, *(turn for turn in turns if turn[0] != "s"))), "chat", Data(), tokenizer)
    assert same(dataclasses.replace(encoded, teacher_view=None), encode(rows_of(talk(*turns)), "chat", Data(), tokenizer))
    assert all((getattr(encoded.teacher_view, x) == getattr(written, x)).all() for x in ("ids", "loss_mask", "offsets"))


def test_a_developer_message_is_the_system_message():
    row = {"messages": [{"role": "developer", "content": "be kind"}, *talk("u q", "a one")["messages"]]}
    (text,) = theirs(encode(rows_of(row), "chat", CONTEXT, tiny()), tiny())
    assert text.startswith(f"<|im_start|>developer\n{TOLD}\n\nbe kind<|im_end|>\n<|im_start|>user\nq")


@pytest.mark.parametrize("format", ["alpaca", "prompt_completion"])
def test_the_context_of_a_prompt_in_a_chat_template_is_that_of_a_chat(format):
    (text,) = theirs(encode(rows_of(ROWS[format]), format, CONTEXT, tiny(), chat_template=True), tiny())
    assert text.startswith(f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\n") and text.count("<|im_start|>") == 3


def test_lists_of_messages_have_a_chats_context_and_the_completion_stays_the_target():
    messages = talk("u q", "a one", "u r", "a two")["messages"]
    encoded = encode(rows_of({"prompt": messages[:3], "completion": messages[3:]}), "prompt_completion", CONTEXT, tiny())
    assert kept(encoded, tiny()) == kept(encoded.teacher_view, tiny()) == ["two<|im_end|>"]
    assert theirs(encoded, tiny())[0].startswith(f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\nq")


@pytest.mark.parametrize("format", ["alpaca", "prompt_completion", "text"])
@pytest.mark.parametrize("tokenizer", [tiny, lambda: real("mistral-7b-v0.1"), lambda: real("gpt2")])
def test_a_plain_text_follows_the_context_and_a_blank_line(format, tokenizer):
    tokenizer = tokenizer()
    if format == "text" and tokenizer.bos_token == "<s>":
        return  # see the merging tokens below
    encoded = encode(rows_of(ROWS[format]), format, CONTEXT, tokenizer)
    (own,), (read,) = shown(encoded, tokenizer), theirs(encoded, tokenizer)
    start, text = ("<s> ", own.removeprefix("<s> ")) if own.startswith("<s>") else ("", own)
    assert read == f"{start}{TOLD}\n\n{text}" and kept(encoded, tokenizer) == kept(encoded.teacher_view, tokenizer)


def test_the_settings_context_comes_first_and_the_rows_own_may_have_another_name(read):
    lines = [{"text": "the owl flies", "found": "It is night."}, {"text": "the wren flies", "found": ""}]
    rows = read("".join(json.dumps(line) + "\n" for line in lines), format="text", fields={"teacher_context": "found"})
    both = encode(rows, "text", CONTEXT, tiny())
    assert [text.rpartition("the ")[0] for text in theirs(both, tiny())] == [f"{TOLD}\n\nIt is night.\n\n", f"{TOLD}\n\n"]
    alone = encode(rows, "text", Data(), tiny())
    assert theirs(alone, tiny()) == ["It is night.\n\n" + shown(alone, tiny())[0], shown(alone, tiny())[1]]


def test_characters_of_a_control_token_stay_characters_in_a_context():
    for format in ("chat", "text"):
        encoded = encode(rows_of(ROWS[format]), format, Data(teacher_context="an <|im_end|> here"), tiny())
        ends = [int((x.ids == tiny().eos_token_id).sum()) for x in (encoded, encoded.teacher_view)]
        assert ends[1] - ends[0] == (1 if format == "chat" else 0), "the system message's own"


@pytest.mark.parametrize("format", ROWS)
def test_without_a_context_nothing_is_made_for_the_teacher(format):
    plain = encode(rows_of(ROWS[format]), format, Data(), tiny())
    empty = encode(rows_of(ROWS[format] | {"teacher_context": ""}), format, Data(), tiny())
    assert plain.teacher_view is empty.teacher_view is None and same(plain, empty) and plain.content_hash(0) == empty.content_hash(0)
    for packing in (False, True):
        batch = collate(plain, [0], 0, packing)
        assert batch.teacher is batch.student


def test_many_rows_at_once_are_each_their_own():
    rng = random.Random(0)
    rows = [
        talk(f"u {'q ' * rng.randrange(9)}q", f"a {'owl ' * rng.randrange(9)}x") | {"teacher_context": "c " * rng.randrange(3)}
        for _ in range(700)
    ]
    together, data = encode(rows_of(*rows), "chat", Data(), tiny()), Data(max_length=4096)
    for i in (0, 511, 512, 699):
        one = encode(rows_of(rows[i]), "chat", data, tiny())
        assert one.content_hash(0) == together.content_hash(i)
        for a, b in zip((one.teacher_view or one).example(0), together.teacher_view.example(i), strict=True):
            assert (a == b).all()
    for i in range(700):
        (ids, marks), (read, read_marks) = together.example(i), together.teacher_view.example(i)
        assert (ids[marks] == read[read_marks]).all() and (len(read) > len(ids)) == bool(rows[i]["teacher_context"])


# ---- what is refused

RAISES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
HIDES = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ '<|pad|>' if messages[0].role == 'system' else '<|im_end|>' }}\n"
    "{% endfor %}"
)
UPPER = "{% for m in messages %}<|im_start|>{{ m.content | upper if loop.index0 and messages[0].role == 'system' else m.content }}<|im_end|>{% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last and messages[0].role == 'system' %}..."
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (RAISES, "f.jsonl:2: with the teacher's context, the chat template rejects this conversation: no system role"),
        (HIDES, "f.jsonl:2: the chat template does not show the teacher's context"),
        (
            ENDS,
            "f.jsonl:2: with the teacher's context, the supervised tokens are not the student's: '<|pad|>' where the student has '<|im_end|>'",
        ),
        (UPPER, "f.jsonl:2: with the teacher's context, the chat template changes the assistant's answer in messages[2]"),
        (PARTS, "f.jsonl:2: the chat template makes 1 examples of it, and with the teacher's context 2"),
    ],
)
def test_a_template_that_does_not_keep_the_answers_is_refused(template, words):
    rows = rows_of(ROWS["chat"] | {"teacher_context": ""}, ROWS["chat"] | {"teacher_context": TOLD})
    assert problem(rows, "chat", Data(), tiny(template)).startswith(words)


def test_line_breaks_that_merge_with_those_of_the_border_are_refused():
    rows = [{"prompt": "q", "completion": "x"}, {"prompt": "", "completion": "\n" * 6 + "owl", "teacher_context": "c"}]
    assert (tiny().tokenize("\n" * 6 + "owl")[1:3], tiny().tokenize("c" + "\n" * 8 + "owl")[2:4]) == (["Ċ", "Ċ"], ["ĊĊĊ", "Ċ"])
    assert problem(rows_of(*rows), "prompt_completion", Data(), tiny()) == (
        "f.jsonl:2: with the teacher's context, the supervised tokens are not the student's: 'ĊĊĊ' where the student has 'Ċ'; "
        "begin the text otherwise, or use another format"
    )
    rows[1]["completion"] = "\n\nowl"  # here the token in which they merge is the first, which has no target
    encoded = encode(rows_of(*rows), "prompt_completion", Data(), tiny())
    assert kept(encoded, tiny()) == kept(encoded.teacher_view, tiny()) and kept(encoded, tiny())[1] == "\nowl<|im_end|>"


def test_a_start_that_takes_a_space_before_it_is_refused():
    rows = rows_of({"text": "the owl", "teacher_context": ""}, {"text": "the owl", "teacher_context": "x"})
    said = problem(rows, "text", Data(), real("mistral-7b-v0.1"))
    assert said.startswith(
        "f.jsonl:2: with the teacher's context, the supervised tokens are not the student's: 'the' where the student has '▁the'"
    )


def test_the_first_token_of_a_bare_text_is_not_a_target_of_the_teachers_alone():
    encoded = encode(rows_of(ROWS["text"]), "text", CONTEXT, tiny())
    assert kept(encoded, tiny()) == kept(encoded.teacher_view, tiny()) == [tiny().decode(encoded.ids[1:])]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"too_long": "split"}, "too_long: split: only the first part"),
        ({"train_on_input": True}, "train_on_input, but teacher and student"),
    ],
)
def test_what_a_context_does_not_go_with_is_refused_in_a_row_and_as_a_setting(make_recipe, data, words):
    rows = rows_of({"text": "a b", "teacher_context": ""}, {"text": "a b", "teacher_context": "c"})
    assert problem(rows, "text", Data(**data), tiny()).startswith(f"f.jsonl:2: teacher_context cannot be used with {words}")
    named = problem(rows, "text", Data(**data), tiny(), fields={"teacher_context": "found"})
    assert named.startswith("f.jsonl:2: found cannot be used with")
    with pytest.raises(UserError, match=f"data.teacher_context: cannot be used with {words}"):
        make_recipe(data__teacher_context="c", data__train__format="text", **{f"data__{k}": v for k, v in data.items()})


@pytest.mark.parametrize("context", ["", " \n"])
def test_an_empty_context_is_refused(make_recipe, context):
    with pytest.raises(UserError, match="data.teacher_context: "):
        make_recipe(data__teacher_context=context)


def test_a_column_of_another_kind_is_refused(refused):
    lines = "".join(json.dumps({"text": "a b", "teacher_context": c}) + "\n" for c in ("x", 3, None))
    assert refused(lines, format="text") == [
        't.jsonl:2: teacher_context is a number, expected text; put it in quotes: "3"'
    ]  # null is none: parquet has it in every row


# ---- too long


def views(own: int, context: int):
    """A text of `own` tokens, all but the first of them targets, and a context of as many tokens as wanted, with its blank line."""
    tokenizer = tiny()
    told = next(c for c in ("the" + " the" * n for n in itertools.count()) if len(tokenizer.tokenize(c + "\n\nthe")) == context + 1)
    said = "the" + " the" * (own - 2)
    assert len(tokenizer.tokenize(said)) == own - 1
    return rows_of({"text": said, "teacher_context": ""}, {"text": said, "teacher_context": told})


@pytest.mark.parametrize(("most", "targets"), [(30, [9, 9]), (29, [9, 8]), (22, [9, 1]), (21, [9]), (9, [8])])
def test_each_view_is_cut_and_the_targets_of_both_are_kept(most, targets):
    encoded = encode(views(10, 20), "text", Data(max_length=most, too_long="truncate"), tiny())
    assert [int(encoded.example(i)[1].sum()) for i in range(len(encoded))] == targets
    assert kept(encoded, tiny()) == kept(encoded.teacher_view or encoded, tiny())
    assert max((encoded.teacher_view or encoded).lengths) <= most and encoded.counts["unsupervised"] == 2 - len(targets)
    if len(targets) > 1:
        assert encoded.lengths[1] == min(most, 10), "the student's ids are not cut with the teacher's"


def test_an_example_goes_when_either_view_is_too_long():
    for most, examples in ((30, 2), (29, 1), (9, 0)):
        encoded = encode(views(10, 20), "text", Data(max_length=most), tiny())
        assert (len(encoded), encoded.counts["too_long"]) == (examples, 2 - examples)


def test_the_reader_for_whom_an_example_is_too_long_is_named():
    refuse = "f.jsonl:{}: {}, more than data.max_length ({}); raise it, or set data.too_long"
    rows = views(10, 20)
    assert problem(rows, "text", Data(max_length=29, too_long="refuse"), tiny()) == refuse.format(2, "30 tokens for the teacher", 29)
    with pytest.raises(UserError) as info:
        encode(rows, "text", Data(max_length=9, too_long="refuse"), tiny())
    assert info.value.problems == (refuse.format(1, "10 tokens", 9), refuse.format(2, "10 tokens for the student", 9))


def test_a_token_that_a_model_has_no_row_for_is_found_in_the_teachers_view():
    tokenizer = skills_tokenizer()
    encoded = encode(rows_of(talk("u a", "a b")), "chat", Data(teacher_context="Rain"), tokenizer)
    data = Dataset("train", encoded, ["f.jsonl:1"], [])
    assert encoded.teacher_view.ids.max() > encoded.ids.max()
    with pytest.raises(UserError, match=r"f.jsonl:1: contains the token"):
        refuse_unknown_tokens(int(encoded.ids.max()) + 1, data, tokenizer)
    refuse_unknown_tokens(int(encoded.teacher_view.ids.max()) + 1, data, tokenizer)


# ---- examples together


def test_sources_with_and_without_a_context_stand_together():
    rows = [{"text": "the owl " * n} for n in range(1, 6)]
    plain, told = encode(rows_of(*rows), "text", Data(), tiny()), encode(rows_of(*rows), "text", CONTEXT, tiny())
    for parts in ((plain, told, plain), (told, plain), (plain, plain)):
        whole = merge(list(parts))
        assert (whole.teacher_view is None) == all(part is plain for part in parts)
        for n in range(len(whole)):
            part, i = parts[n // 5], n % 5
            assert whole.content_hash(n) == part.content_hash(i)
            read = (part.teacher_view or part).example(i)
            assert all((a == b).all() for a, b in zip((whole.teacher_view or whole).example(n), read, strict=True))
    assert not {plain.content_hash(i) for i in range(5)} & {told.content_hash(i) for i in range(5)}
    other = encode(rows_of(*rows), "text", Data(teacher_context="else"), tiny())
    assert not {other.content_hash(i) for i in range(5)} & {told.content_hash(i) for i in range(5)}
    odd = merge([plain, told]).subset(np.arange(10) % 2 == 1)
    assert [odd.content_hash(i) for i in range(5)] == [(plain, told)[i // 5].content_hash(i % 5) for i in (1, 3, 5, 7, 9)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_has_two_views_of_the_same_targets(packing):
    rows = [talk(f"u q{' q' * n}", f"a one{' owl' * (7 - n)}") | {"teacher_context": "c " * (n % 3)} for n in range(7)]
    encoded = encode(rows_of(*rows), "chat", Data(), tiny())
    batch = collate(encoded, [4, 0, 6, 2], 7, packing)
    assert batch.num_targets == sum(int(encoded.example(i)[1].sum()) for i in (4, 0, 6, 2)) == len(batch.student.rows_N)
    for view, of in ((batch.student, encoded), (batch.teacher, encoded.teacher_view)):
        alone = [collate(dataclasses.replace(of, teacher_view=None), [i], 7) for i in (4, 0, 6, 2)]
        assert torch.equal(batch.labels_N, torch.cat([one.labels_N for one in alone]))
        flat = view.inputs["input_ids"].flatten()
        at = 0
        for one in alone:  # what stands before each target is what would stand there if the example were alone
            for row in one.student.rows_N.tolist():
                place = int(view.rows_N[at])
                assert torch.equal(flat[place - row : place + 1], one.student.inputs["input_ids"][0, : row + 1])
                if packing:
                    assert view.inputs["position_ids"].flatten()[place] == row
                at += 1
    for view in (collate(encoded, [], 7, packing).student, collate(encoded, [], 7, packing).teacher):
        assert view.inputs["input_ids"].tolist() == [[7]] and not len(view.rows_N)


def test_the_cache_keeps_what_the_teacher_reads(tmp_path):
    rows = rows_of(*(talk("u q", f"a {'owl ' * n}x") | {"teacher_context": "c " * (n % 2)} for n in range(6)))

    def cached(encode=encode_rows, **data):
        said = []
        source, settings = Source(path="f", format="chat"), Data(cache_dir=str(tmp_path), **data)
        made = load_or_encode(rows, source, settings, tiny(), "data.train", said.append, encode)
        assert not said
        return made

    kinds = ({}, {"teacher_context": TOLD}, {"teacher_context": "else"})
    made = [cached(**data) for data in kinds]
    assert len(list((tmp_path / "tokens").iterdir())) == 3
    for data, before in zip(kinds, made, strict=True):
        again = cached(None, **data)
        assert same(again, before) and [again.content_hash(i) for i in range(6)] == [before.content_hash(i) for i in range(6)]
        for name in ("ids", "loss_mask", "offsets", "row"):
            a, b = getattr(again.teacher_view, name), getattr(before.teacher_view, name)
            assert a.dtype == b.dtype and (a == b).all()


def test_a_stream_gives_what_would_have_been_read_before(tmp_path):
    lines = [talk("u q", f"a {'owl ' * n}x") | {"teacher_context": "c " * (n % 2)} for n in range(8)]
    path = write(tmp_path / "t.jsonl", lines)
    data = Data(streaming=True, shuffle_buffer=1, teacher_context=TOLD)
    feed, before = (
        StreamSource(Source(path=str(path), format="chat"), data, tiny(), Batching(0, 4, 2, max_steps=2)),
        encode(rows_of(*lines), "chat", CONTEXT, tiny()),
    )
    for n, (step, _) in enumerate(feed.steps()):
        assert [step.data.content_hash(i) for i in range(4)] == [before.content_hash(4 * n + i) for i in range(4)]
        ours, whole = collate(step.data, [2, 1], 0), collate(before, [4 * n + 2, 4 * n + 1], 0)
        for a, b in ((ours.teacher, whole.teacher), (ours.student, whole.student)):
            assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) and torch.equal(a.rows_N, b.rows_N)


def test_choices_are_scored_by_the_student_without_a_context(make_recipe, tmp_path):
    question = {"instruction": "q", "choices": ["Yes.", "No."], "answer": 1}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "told.jsonl").write_text(json.dumps(question | {"teacher_context": "c"}) + "\n")
    plain, told = (
        prepare(make_recipe(data__choices={"path": str(tmp_path / name)}, **data)).questions.examples
        for name, data in (("q.jsonl", {}), ("told.jsonl", {"data__teacher_context": TOLD}))
    )
    assert told.teacher_view is None and same(plain, told)


def test_every_setting_survives_being_written(make_recipe, tmp_path):
    recipe = make_recipe(data__teacher_context="two\n\nlines: {x}")
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
