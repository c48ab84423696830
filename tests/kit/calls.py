"""Templates that write calls, rows with calls, and what an example of such a row shows."""

from llmkd.config.recipe import Data
from llmkd.data.notes import example_notes
from tests.kit.data import PROMPT, encode, kept, made, rows_of, talk

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
TAIL = "{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
CALLS = {
    "tojson": '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}',
    "verbatim": '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}',
    "joined": """{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments + '}' }}""",
    "either": '{"name": "{{ c.function.name }}", "arguments": {% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}}',
    "whole": "{{ c.function | tojson }}",
    "escaped": '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson(ensure_ascii=True) }}}',
}
XML = "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v if v is string else v | tojson }}</{{ k }}>{% endfor %}"


def calling(*given, content: str = "", **more) -> dict:
    calls = [{"type": "function", "function": {"name": "mul", "arguments": one}} for one in given]
    turn = {"role": "assistant", "content": content, "tool_calls": calls} | more
    tool = {"role": "tool", "content": "54 {'a': 3}"}  # an echo of a call, as Python writes it
    return {"messages": [*talk("u q")["messages"], turn, tool, *talk("a one")["messages"]]}


def said(row: dict, template: str, **settings) -> list[str]:
    tokenizer = made(template)
    return kept(encode(rows_of(row), "chat", Data(max_length=4096), tokenizer, **settings), tokenizer)


def notes(row: dict, template: str, format: str = "chat", **source) -> list[str]:
    return example_notes(encode(rows_of(row), format, Data(max_length=4096), made(template), **source).counts)
