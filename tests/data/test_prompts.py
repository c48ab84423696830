"""Prompts: of examples what stands before the first target, of files what training would show of such a row up to its answer."""

import json

import pytest

from llmkd.config.recipe import Data, Source
from llmkd.data.prompt_files import read_prompts
from llmkd.data.prompts import TEXT_PROMPT, Prompt, decoded, prompts_of
from llmkd.errors import UserError
from tests.kit.data import END, PLAIN, encode, rows_of, talk, tiny

DATA = Data(max_length=400)
END_ID = tiny().convert_tokens_to_ids(END)
#: Of each format a row, with the columns that make it a question alone.
ROWS = {
    "alpaca": ({"instruction": "Say owl", "input": "at night", "output": "owl"}, {"output"}),
    "chat": (talk("s be brief", "u hello", "a the owl"), set()),
    "prompt_completion": ({"prompt": "Where is the owl? ", "completion": "in the garden"}, {"completion"}),
    "text": ({"text": "the owl flies at night, the wren in the garden"}, set()),
}


@pytest.fixture
def ask(tmp_path):
    """The prompts of a file, as rows of one source or several."""

    def go(rows, *sources: Source, name: str = "p.jsonl", data: Data = DATA, tokenizer=None) -> list[Prompt]:
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts(path, sources, data, tokenizer or tiny())

    return go


def source(format: str, **more) -> Source:
    return Source(path="f.jsonl", format=format, **more)


def shown(prompt: Prompt, tokenizer=None) -> str:
    return decoded(prompt.ids, tokenizer or tiny())


@pytest.mark.parametrize("format", ["alpaca", "chat", "prompt_completion"])
@pytest.mark.parametrize("template", [False, True])
def test_a_row_of_the_data_asks_in_a_file_what_its_example_asks(ask, format, template):
    row, answer = ROWS[format]
    how = {"chat_template": True} if template and format != "chat" else {}
    examples = encode(rows_of(row), format, DATA, tiny(), **how)
    (of_example,) = prompts_of(examples, ["here"], tiny())
    question = {column: value for column, value in row.items() if column not in answer}
    if format == "chat":
        question = {"messages": row["messages"][:-1]}
    given, alone = ask([row, question], source(format, **how))
    assert shown(of_example) == shown(given) == shown(alone) and len(of_example.ids) > 3
    assert of_example.ids.tolist() == examples.example(0)[0][: int(examples.example(0)[1].argmax())].tolist() == alone.ids.tolist()
    assert of_example.reference.strip() == given.reference == {"alpaca": "owl", "chat": "the owl"}.get(format, "in the garden")
    assert alone.reference is None and (of_example.place, given.place, alone.place) == ("here", "p.jsonl:1", "p.jsonl:2")
    assert of_example.ends == given.ends == alone.ends == {END_ID}
    assert (of_example.teacher_ids == of_example.ids).all() and (alone.teacher_ids == alone.ids).all()


def test_a_part_of_a_text_is_its_prompt_and_of_a_file_all_of_it(ask):
    words = " ".join(["owl"] * 90)
    short, long = prompts_of(encode(rows_of(ROWS["text"][0], {"text": words}), "text", DATA, tiny()), ["a", "b"], tiny())
    assert len(long.ids) == TEXT_PROMPT and len(short.ids) < TEXT_PROMPT
    assert shown(short) + short.reference == ROWS["text"][0]["text"] and shown(long) + long.reference == words
    (whole,) = ask([ROWS["text"][0]], source("text"))
    assert shown(whole) == ROWS["text"][0]["text"] and whole.reference is None
    assert whole.ids.tolist() == tiny()(ROWS["text"][0]["text"])["input_ids"]


def test_the_first_answer_of_a_conversation_is_its_reference(ask):
    (prompt,) = prompts_of(encode(rows_of(talk("u hello", "a owl", "u again", "a wren")), "chat", DATA, tiny()), ["here"], tiny())
    assert prompt.reference == "owl" and shown(prompt).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    (in_file,) = ask([talk("u hello", "a owl", "u again", "a wren")], source("chat"))
    assert in_file.reference == "wren" and "owl" in shown(in_file)


def test_prompts_messages_and_instructions_are_rendered_as_rows_of_the_run(ask):
    turn = [{"role": "user", "content": "Say owl"}]
    ways = [{"prompt": "Say owl"}, {"instruction": "Say owl"}, {"messages": turn}, {"prompt": turn}]
    for one in ("alpaca", "chat"):
        expected = ask([{"instruction": "Say owl"} if one == "alpaca" else {"messages": turn}], source(one))[0]
        renamed = source(one, fields={"instruction": "q"} if one == "alpaca" else {"messages": "talk", "role": "from", "content": "value"})
        for found in (*ask(ways, source(one)), *ask(ways, renamed), *ask("Say owl\n", source(one), name="p.txt")):
            assert found.ids.tolist() == expected.ids.tolist()
    assert shown(ask(["x"][:0] or "Say owl\n\n  the owl\r\n", source("text"), name="p.txt")[1]) == "  the owl"
    assert [one.place for one in ask("Say owl\n\n  the owl\n", source("text"), name="p.txt")] == ["p.txt:1", "p.txt:3"]


def test_a_text_is_a_turn_where_the_prompts_of_the_runs_own_rows_are_conversations(ask, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": talk("u a")["messages"], "completion": talk("a b")["messages"]}) + "\n")
    own = Source(path=str(tmp_path / "own.jsonl"), format="prompt_completion")
    for rows in ([{"instruction": "Say owl"}], [talk("u Say owl")], [talk("u Say owl", "a owl")]):
        (found,) = ask(rows, own)
        assert shown(found) == "<|im_start|>user\nSay owl<|im_end|>\n<|im_start|>assistant\n"
    assert found.reference == "owl"
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert shown(ask([{"instruction": "Say owl"}], own)[0]) == "Say owl"
    with pytest.raises(UserError, match="training data cannot be read"):
        ask([{"instruction": "Say owl"}], source("prompt_completion"))


def test_a_row_is_read_as_one_of_the_source_whose_columns_it_has(ask):
    sources = source("alpaca", fields={"instruction": "q", "output": "a"}), source("chat", roles={"user": "human", "assistant": "gpt"})
    asked, said = ask([{"q": "Say owl", "a": "owl"}, {"messages": [{"role": "human", "content": "Say owl"}]}], *sources)
    assert "### Instruction:\nSay owl" in shown(asked) and asked.reference == "owl" and shown(said).startswith("<|im_start|>user\nSay owl")


def test_the_teacher_reads_its_context(ask):
    for one in ("alpaca", "chat", "text"):
        data = Data(max_length=400, teacher_context="Be brief.")
        (found,) = ask([ROWS[one][0] | {"teacher_context": "And kind."}], source(one), data=data)
        assert "Be brief.\n\nAnd kind." in decoded(found.teacher_ids, tiny()) and "brief." not in shown(found)
        assert decoded(found.teacher_ids, tiny()).endswith(shown(found)[-12:])


def test_a_prompt_without_its_answer_has_the_tokens_that_it_has_before_any(ask):
    """A word is not joined with what stands in the answer's place, and white space at the end is left to the answer."""
    rows = [{"prompt": "Where is the"}, {"prompt": "Where is the "}, {"prompt": "Where is the\n"}]
    assert [shown(one) for one in ask(rows, source("prompt_completion"))] == ["Where is the", "Where is the", "Where is the\n"]


def test_template_and_end_are_those_of_training(ask):
    thinks = PLAIN.replace("{% if add_generation", "{% if false %}").replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    (found,) = ask([talk("u hello")], source("chat"), tokenizer=tiny(thinks))
    assert shown(found, tiny(thinks)).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    unended = PLAIN.replace("{{ m.content }}<|im_end|>", "{{ m.content }}{% if m.role != 'assistant' %}<|im_end|>{% endif %}")
    assert ask([talk("u hello")], source("chat"), tokenizer=tiny(unended))[0].ends == set()


@pytest.mark.parametrize(
    "rows, one, problem",
    [
        ([{"question": "a"}], "alpaca", "p.jsonl:1: found the columns question, expected those of the run's data (instruction) or one of prompt, messages, instruction"),
        (["a"], "alpaca", "p.jsonl:1: found text, expected an object"),
        ([{"prompt": 3}], "chat", "p.jsonl:1: prompt is a number, expected text or a list of messages"),
        ([{"messages": "a"}], "alpaca", "p.jsonl:1: messages is text, expected a list of messages"),
        ([talk("u a", "a b", "u c")], "alpaca", "p.jsonl:1: messages is a conversation, and the run's data are of format alpaca; give a text"),
        ([{"instruction": "a", "input": "b"}], "chat", "p.jsonl:1: input is not read where the run's data are of format chat; write it into the instruction"),
        ([talk("s a")], "chat", "p.jsonl:1: nothing is asked: the last turn before the answer is not the user's, nor a tool's"),
        ([talk("u a", "a b", "a c")], "chat", "p.jsonl:1: nothing is asked: the last turn before the answer is not the user's, nor a tool's"),
        ([talk("u a"), {"messages": [{"role": "bird", "content": "a"}]}], "chat", "p.jsonl:2: messages[0].role is 'bird', expected one of system, developer, user, assistant, tool"),
        ([{"text": ""}], "text", "p.jsonl:1: the prompt is empty"),
        ([], "text", "has no prompts; write one a line"),
        ([{"instruction": "a", "history": [["b", "c"]]}], "alpaca", "p.jsonl:1: column 'history' is not read: it may hold earlier turns"),
    ],
)  # fmt: skip
def test_rows_that_ask_nothing_or_more_than_is_read_are_refused(ask, rows, one, problem):
    with pytest.raises(UserError) as found:
        ask(rows, source(one))
    assert problem in found.value.problems[0] and len(found.value.problems) == 1


def test_a_conversation_needs_a_template(ask):
    with pytest.raises(UserError, match="p.jsonl:1: it is a conversation, and the run's tokenizer has no chat template; give a text"):
        ask([{"prompt": talk("u hello")["messages"]}], source("prompt_completion"), tokenizer=tiny(None))


def test_texts_that_were_rendered_already_and_what_a_template_does_not_show_are_named(ask, capsys):
    ask([{"prompt": "<|im_start|>user\nhello<|im_end|>"}], source("chat"))
    assert "warning: --prompts (" in (err := capsys.readouterr().err) and "'<|im_start|>'" in err and "1 of 1 row hold" in err
    ask([talk("u hello") | {"tools": [{"type": "function", "function": {"name": "owl"}}]}, talk("u hello")], source("chat"))
    assert "p.jsonl): not shown by the chat template, with the rows that have it, of 2 rows: tools (1)" in capsys.readouterr().err
    ask([talk("u hello")], source("chat"))
    assert not capsys.readouterr().err


def test_files_that_are_none_are_refused(tmp_path, ask):
    for path, problem in (
        (tmp_path / "no.jsonl", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "p.md", "not a file of a known kind"),
    ):
        (tmp_path / "p.md").write_text("a")
        with pytest.raises(UserError, match=problem):
            read_prompts(path, [source("alpaca")], DATA, tiny())
    (tmp_path / "q.txt").write_bytes(b"owl\n\xff\n")
    with pytest.raises(UserError, match="q.txt:2: not UTF-8"):
        read_prompts(tmp_path / "q.txt", [source("alpaca")], DATA, tiny())
    with pytest.raises(UserError, match="p.txt:1: starts with a byte order mark"):
        ask("\ufeffowl\n", source("alpaca"), name="p.txt")


def test_columns_inside_an_object_ask_too_with_and_without_an_answer(ask):
    inside = source("prompt_completion", fields={"prompt": "translation.en", "completion": "translation.de"})
    rows = [{"translation": {"en": "Where is the owl? ", "de": "in the garden"}}, {"translation": {"en": "Where is the owl? "}}]
    answered, alone = ask(rows, inside)
    assert shown(answered).strip() == shown(alone).strip() == "Where is the owl?" and (answered.reference, alone.reference) == (
        "in the garden",
        None,
    )
