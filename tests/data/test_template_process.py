"""Chat templates run in a process that is limited in time and memory, in the environment that transformers gives them."""

import io
import os
import signal
import time

import psutil
import pytest

from llmkd.config.recipe import Data
from llmkd.data.encoding import template, template_process
from llmkd.data.encoding.template_process import close
from llmkd.errors import UserError
from llmkd.training.prepare import prepare
from tests.data.test_templates import FAMILIES
from tests.kit.data import END, PLAIN, encode, kept, rows_of, talk, tiny

ROW = talk("u q", "a one")
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.fixture
def small_limits():
    """Templates have 0.3 s, 0.2 s for a row and 1,000 characters: that is set in the process itself, which starts anew."""
    before = template_process._START
    close()
    small = "from llmkd.data.encoding import template; template.SECONDS, template.ROW_SECONDS, template._LONGEST = 0.3, 0.2, 1000; "
    template_process._START = before.replace("main()", small + "main()")
    yield
    template_process._START = before
    close()


def named(template: str):
    tokenizer = tiny(template)
    tokenizer.name_or_path = "owls"
    return tokenizer


@pytest.mark.parametrize(
    "code",
    [
        "{{ 'a' * 9999999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ [[1]] | tojson(indent=9999999999) }}",
        DOUBLED.replace("START", "[1]"),
    ],
)
def test_a_template_that_takes_much_memory_is_refused_in_one_line(code):
    before = psutil.Process().memory_info().rss
    with pytest.raises(
        UserError, match="^owls: the tokenizer's chat template takes more than 1 GB of memory for one conversation; "
    ) as caught:
        encode(rows_of(ROW), "chat", Data(), named(code + PLAIN))
    assert "\n" not in str(caught.value) and psutil.Process().memory_info().rss - before < 100 << 20
    assert kept(encode(rows_of(ROW), "chat", Data(), tiny()), tiny()) == [f"one{END}"]  # the next template has a new process


def test_a_template_that_takes_long_is_refused_in_one_line(small_limits, monkeypatch):
    start, starts, begin = time.process_time(), [], template_process.subprocess.Popen
    monkeypatch.setattr(template_process.subprocess, "Popen", lambda *given, **more: starts.append(1) or begin(*given, **more))
    with pytest.raises(
        UserError, match="^owls: the tokenizer's chat template takes more than 5 s for one conversation; it may have an endless loop"
    ):
        encode(rows_of(ROW), "chat", Data(), named(LOOP + PLAIN))
    assert time.process_time() - start < 3 and len(starts) == 1


def test_a_row_at_which_a_template_takes_long_is_named(small_limits):
    late = "{% if messages[0].content == 'now' %}" + LOOP + "{% endif %}" + PLAIN
    with pytest.raises(UserError, match="^f.jsonl:2: the tokenizer's chat template takes more than 5 s"):
        encode(rows_of(ROW, talk("u now", "a one")), "chat", Data(), tiny(late))


def test_a_row_of_many_answers_that_takes_long_as_a_whole_is_named(small_limits):
    slow = "{% if messages | length > 9 %}" + "{% for i in range(99999) %}{% endfor %}" * 12 + "{% endif %}" + PLAIN
    with pytest.raises(
        UserError,
        match="^f.jsonl:2: the tokenizer's chat template takes more than 60 s for one row: it renders each answer of a row with all",
    ):
        encode(rows_of(ROW, talk(*["u q", "a one"] * 14)), "chat", Data(), tiny(slow))
    assert len(encode(rows_of(ROW), "chat", Data(), tiny(PLAIN))) == 1  # the next has all the time


def test_a_text_of_many_characters_is_refused(small_limits):
    with pytest.raises(
        UserError, match="^f.jsonl:1: the chat template rejects this conversation: it writes 1,0.. characters, and 1,000 are"
    ):
        encode(rows_of(ROW), "chat", Data(), tiny("{{ 'a' * 1000 }}" + PLAIN))


def test_a_process_that_was_ended_by_others_starts_again():
    assert len(encode(rows_of(ROW), "chat", Data(), tiny())) == 1
    process = template_process._PROCESS._process
    os.kill(process.pid, signal.SIGINT)  # a terminal sends it to all processes
    os.kill(process.pid, signal.SIGTERM)
    assert len(encode(rows_of(ROW), "chat", Data(), tiny())) == 1 and template_process._PROCESS._process is process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(encode(rows_of(ROW), "chat", Data(), tiny())) == 1 and template_process._PROCESS._process.pid != process.pid
    close()
    assert not psutil.pid_exists(process.pid)


def test_a_message_whose_writer_was_killed_is_the_end_and_no_row_to_refuse():
    file = io.BytesIO()
    template_process.template_worker.write(file, {"result": "text"})
    whole = file.getvalue()
    assert template_process.template_worker.read(io.BytesIO(whole)) == {"result": "text"}
    for length in (0, 5, 8, len(whole) - 1):
        assert template_process.template_worker.read(io.BytesIO(whole[:length])) is None


def test_an_interrupted_question_leaves_no_answer_to_the_next(monkeypatch):
    def interrupted(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(template_process.template_worker, "read", interrupted)
        template_process.rendered("first", {}, [])
    assert template_process.rendered("second", {}, []) == "second"


def test_a_child_of_a_fork_asks_a_process_of_its_own():
    assert template_process.rendered("{{ 1 }}", {}, []) == "1"
    ours, reading, writing = template_process._PROCESS._process.pid, *os.pipe()
    child = os.fork()
    if not child:
        text = template_process.rendered("{{ 2 }}", {}, [])
        os.write(writing, f"{text} {template_process._PROCESS._process.pid != ours}".encode())
        close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 99) == b"2 True" and template_process.rendered("{{ 3 }}", {}, []) == "3"


# ---- as transformers does

FEATURES = [
    "{{ messages | tojson }} {{ tools }} {{ documents }} {{ bos_token }} {{ [1, {'a': 'é<'}] | tojson(indent=2, sort_keys=True) }}",
    "{% set ns = namespace(a=1) %}{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n  {{- m.role }}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}{{ dict(a=1) }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}{{ messages[1].reasoning_content }}{{ messages[1].thinking }}",
    "{{ dict.fromkeys('ab', 1) }}{{ undefined_name }}{{ messages[-1]['content'][::-1] }}{% break %}",
    "{{ raise_exception('no') }}",
    "{% set ns = namespace(_a=1) %}",
    "{{ namespace.__init__ }}",
]


@pytest.mark.parametrize(
    "code", [*FEATURES, *(FAMILIES[name][0] for name in ("Llama 3", "Qwen3", "Gemma", "Mistral v3", "DeepSeek V3", "gpt-oss"))]
)
def test_a_template_is_rendered_as_transformers_does_it(code):
    tokenizer = tiny(code.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'"))
    messages = talk("s be", "u qé<", "a one")["messages"]
    messages[2]["thinking"] = "hm"

    def outcome(render):
        try:
            return render()
        except Exception:
            return "raised"

    ours = outcome(lambda: template_process.rendered(tokenizer.chat_template, tokenizer.special_tokens_map, messages))
    assert ours == outcome(lambda: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_the_environment_lacks_nothing_of_transformers():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs, ours = _compile_jinja_template("x").environment, template.environment()
    for kind in ("globals", "filters", "tests"):
        assert getattr(theirs, kind).keys() == getattr(ours, kind).keys()
    assert len(theirs.extensions) == len(ours.extensions)
    assert {(e.trim_blocks, e.lstrip_blocks, e.keep_trailing_newline, e.autoescape) for e in (theirs, ours)} == {(True, True, False, False)}


def test_data_that_are_read_leave_no_process(make_recipe, monkeypatch):
    ended = []
    monkeypatch.setattr(template_process, "close", lambda: ended.append(True))
    prepare(make_recipe())
    assert ended == [True]
