"""Runs chat templates in the environment that transformers gives them. Only for the process of `template_worker.py`.

A template is foreign code: it runs in Jinja's sandbox, in a process with limited time and memory.
"""

import datetime
import functools
import json
import signal
import time
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

#: CPU seconds for one rendering. Templates in use take milliseconds.
SECONDS = 5
#: CPU seconds for all renderings of one conversation: there are several for each answer.
ROW_SECONDS = 60
_LONGEST = 64_000_000  # characters of a text
#: The date that templates get as today's, so that a run can be repeated: the default of Llama 3.1's template.
_TODAY = datetime.datetime(2024, 7, 26)
REASONING = ("reasoning_content", "thinking", "reasoning")


class OutOfTime(Exception):
    """A conversation has taken more than ROW_SECONDS."""


class _Clock:
    started = 0.0


def begin_row() -> None:
    """Start the clock of a conversation."""
    _Clock.started = time.process_time()


def render(template: str, tokens: dict[str, str], messages: list[dict], tools: list[dict] | None, prompt: bool) -> str:
    """The rendered conversation. ValueError if the template raises; the process ends if it takes longer than SECONDS."""
    if time.process_time() - _Clock.started > ROW_SECONDS:
        raise OutOfTime
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        shown = [_with_all_names_of_reasoning(message) for message in messages]
        text = _compiled(template).render(messages=shown, tools=tools, documents=None, add_generation_prompt=prompt, **tokens)
        if len(text) > _LONGEST:
            raise ValueError(f"it writes {len(text):,} characters, and {_LONGEST:,} are the most")
        return text
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template rejects this conversation: {reason}") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _with_all_names_of_reasoning(message: dict) -> dict:
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


# ---- the environment, as in transformers/utils/chat_template_utils.py


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


@functools.cache
def environment() -> jinja2.Environment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise, "strftime_now": _TODAY.strftime, "dict": _Dict(), "namespace": _Namespace}
    return env


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an answer. The marks are not used: the text inside is written as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


class _Dict:
    """`dict` without the other attributes of the type."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args, **kwargs) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no names with an underscore in front, found {name!r}")
