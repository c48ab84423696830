"""Contents in parts: templates that take parts get them, others get the text."""

import json

import pytest

from llmkd.config.recipe import Data
from llmkd.data.encoding.template_process import rendered
from llmkd.errors import UserError
from tests.kit.data import END, PLAIN, PROMPT, encode, kept, made, rows_of, shown, talk

PARTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
MIXED = PARTS.replace("{% for p in m.content", "{% if m.role == 'assistant' %}{{ m.content + '' }}{% else %}{% for p in m.content").replace(
    "{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>"
)
BOTH = PARTS.replace("{% for p in m.content", "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content").replace(
    "{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>"
)


ALL_BUT_SYSTEM = PARTS.replace(
    "{% for p in m.content", "{% if m.role == 'system' %}{{ m.content + '' }}{% else %}{% for p in m.content"
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")


@pytest.mark.parametrize(
    "template", [ALL_BUT_SYSTEM, PARTS, PARTS + PROMPT, PARTS.replace("p.text", "p['text'] | trim"), MIXED, MIXED + PROMPT, BOTH, PLAIN]
)
def test_templates_of_parts_get_parts_and_others_text(template):
    tokenizer, row = made(template), talk("s be", "u q", "a one", "u r", "a two")
    for _ in "once", "with what was learned of the template":
        encoded = encode(rows_of(row), "chat", Data(), tokenizer)
        assert "".join(kept(encoded, tokenizer)) == f"one{END}two{END}" and all(
            part in shown(encoded, tokenizer)[-1] for part in ("be", "q", "r")
        )


def test_prompts_alone_are_shown_too():
    messages = talk("s be", "u q", "a one", "u r")["messages"]
    for template in (PARTS, PLAIN, "{% if messages[0].content is string %}{{ raise_exception('') }}{% endif %}" + PARTS):
        text = rendered(template + PROMPT, {}, messages)
        assert [line for line in text.replace("<", "\n").split("\n") if line in ("be", "q", "one", "r")] == ["be", "q", "one", "r"]
    assert "be" not in rendered(PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"), {}, messages)
    with pytest.raises(ValueError, match="the chat template rejects this conversation: no$"):
        rendered("{{ raise_exception('no' if messages[0].content is string else 'yes') }}", {}, messages)


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def test_rows_with_parts_are_the_rows_with_their_text(read):
    talks = [
        {
            "messages": [
                {"role": "user", "content": [part("q "), part("r") | {"image": None}]},
                {"role": "assistant", "content": [part("one")]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": ["q ", {"text": "r"}]},
                {"role": "assistant", "content": [part("one") | {"cache_control": {}}]},
            ]
        },
    ]
    rows = read("\n".join(map(json.dumps, talks)), format="chat")
    assert rows.rows == [talk("u q r", "a one")] * 2 and rows.unread == {"messages[].content[].cache_control": 1}
    for template in (PARTS, PLAIN):
        assert kept(encode(rows, "chat", Data(), made(template)), made(template)) == [f"one{END}"] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [part("q"), {"type": "image", "image": "x"}],
            "messages[0].content[1] is a part of type 'image', expected {type: text, text: ...}; llmkd reads",
        ),
        ([{"functionCall": {}}], "messages[0].content[0] is a part with 'functionCall', expected {type: text, text: ...}"),
        ([{"type": "text"}], "messages[0].content[0] is a part of type 'text', expected {type: text, text: ...}"),
        ([3], "messages[0].content[0] is a number"),
        ([part("q"), part("r")], "messages[0].content is 2 texts without white space between them"),
    ],
)
def test_parts_that_are_no_text_are_refused(read, content, words):
    with pytest.raises(UserError) as caught:
        read(json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}), format="chat")
    assert caught.value.problems[0].partition(":1: ")[2].startswith(words)
