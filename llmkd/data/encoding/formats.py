"""The formats: they turn a row into texts with the spans of characters that are supervised.

A format has two entries: its columns in `config.formats.FORMATS`, against which settings and rows are checked, and its functions in `FORMATS`
here.

`context` is put before everything else, as a conversation's system message or at the beginning of a plain text.

User text never becomes a control token: in the plain formats all of it is encoded as characters; in chat (see chat.py) only the
template writes control tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ...config import formats as config
from ...config.recipe import Source
from ...errors import UserError
from .bound import Bound
from .chat import conversation
from .control_tokens import Text

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca(row: dict, source: Source, tokenizer, context: str = "", bound: Bound | None = None) -> list[Text]:
    """instruction, input (may be empty or absent), output: the prompt of Stanford Alpaca. The output is supervised.

    With a chat template the prompt is the user's turn, as in torchtune's recipes.
    """
    prompt = (ALPACA_WITH_INPUT if row.get("input") else ALPACA).format(instruction=row["instruction"], input=row.get("input", ""))
    return _prompt_and_answer(row, prompt, row["output"], source, tokenizer, context)


def prompt_completion(row: dict, source: Source, tokenizer, context: str = "", bound: Bound | None = None) -> list[Text]:
    """prompt and completion: one text, or two lists of messages that are one conversation. The completion is supervised."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        prompt = _with_context(context, _with_system(row, prompt))
        return conversation(
            [*prompt, *completion], tokenizer, row.get("tools"), len(prompt), source.answers == "last", source.call_values, bound
        )
    return _prompt_and_answer(row, prompt, completion, source, tokenizer, context)


def text(row: dict, source: Source, tokenizer, context: str = "", bound: Bound | None = None) -> list[Text]:
    """text: all of it is supervised."""
    return _plain_text("", row["text"], context)


def chat(row: dict, source: Source, tokenizer, context: str = "", bound: Bound | None = None) -> list[Text]:
    """messages, and optionally tools that they may call. The assistant's turns with their end tokens are supervised, except those marked `train: False`."""
    messages = _with_context(context, _with_system(row, row["messages"]))
    return conversation(
        messages, tokenizer, row.get("tools"), last_only=source.answers == "last", call_values=source.call_values, bound=bound
    )


def alpaca_answer(row: dict, answer: str) -> tuple[dict, str]:
    return {**row, "output": answer}, "alpaca"


def prompt_completion_answer(row: dict, answer: str) -> tuple[dict, str]:
    completion = _assistant(answer) if isinstance(row["prompt"], list) else answer
    return {**row, "completion": completion}, "prompt_completion"


def chat_answer(row: dict, answer: str) -> tuple[dict, str]:
    """A row of prompt and completion, so that the assistant's turns in the question are not supervised."""
    question = {"prompt": row["messages"], "completion": _assistant(answer), "tools": row.get("tools"), "system": row.get("system")}
    return question, "prompt_completion"


@dataclass(frozen=True)
class Format:
    """The functions of a format. Its columns are in `config.formats.FORMATS`."""

    #: (row, source, tokenizer, context="", bound=None) -> its texts; those that exceed the bound may be left out.
    #: None if rows are not text (`token_rows.py`).
    render: Callable[[dict, Source, object, str, Bound | None], list[Text]] | None
    #: (a multiple-choice row, a choice) -> a row in which that choice is the answer, and its format. None if rows have no answer.
    with_answer: Callable[[dict, str], tuple[dict, str]] | None = None


FORMATS = {
    "alpaca": Format(alpaca, alpaca_answer),
    "chat": Format(chat, chat_answer),
    "prompt_completion": Format(prompt_completion, prompt_completion_answer),
    "text": Format(text),
    "tokens": Format(None),
}


def _prompt_and_answer(row: dict, prompt: str, answer: str, source: Source, tokenizer, context: str) -> list[Text]:
    if not source.chat_template:
        return _plain_text(prompt, answer, context)
    messages = _with_system(row, [{"role": "user", "content": prompt}, *_assistant(answer)])
    return conversation(_with_context(context, messages), tokenizer, row.get("tools"))


def _assistant(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]


def _plain_text(prompt: str, answer: str, context: str) -> list[Text]:
    prompt = f"{context}\n\n{prompt}" if context else prompt
    return [Text(prompt + answer, [(len(prompt), len(prompt + answer))] if answer.strip() else [])]


def _with_system(row: dict, messages: list[dict]) -> list[dict]:
    """The conversation with the row's system message in front, unless it has one (`row_checks` refuses two that differ)."""
    system = row.get("system") or ""
    if not system.strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _with_context(context: str, messages: list[dict]) -> list[dict]:
    """The conversation with the context as its system message, or at the beginning of its own."""
    if not context:
        return messages
    head, *rest = messages
    if head["role"] in ("system", "developer"):
        return [{**head, "content": paragraphs(context, head["content"])}, *rest]
    return [{"role": "system", "content": context}, *messages]


def paragraphs(*texts: str | None) -> str:
    """The texts that are not empty, with a blank line between them."""
    return "\n\n".join(text for text in texts if text)


def refuse_without_template(source: Source, rows: list[dict], tokenizer, setting: str) -> None:
    """UserError if these rows need a chat template and the tokenizer has none."""
    if tokenizer.chat_template:
        return
    if source.chat_template:
        raise UserError(
            f"{setting}.chat_template: found true, and the tokenizer has no chat template; set student.tokenizer to one that has it, such as the teacher's, or set it to false"
        )
    row_format = config.FORMATS[source.format]
    lists = any(
        isinstance(row.get(name), list) for name, column in row_format.row.items() if column.kind == "text or messages" for row in rows
    )
    if row_format.template == "always" or lists:
        found = "lists of messages" if lists else source.format
        raise UserError(
            f"{setting}.format: found {found}, and the tokenizer has no chat template; set student.tokenizer to one that has it, such as the teacher's, or use another format"
        )
