"""The formats: from a row to a text and the characters of it that are supervised. One function per format.

`context` is what a reader is told before all the rest: a conversation's system message, or the beginning of a plain text.

Text that people wrote never becomes a control token: in the plain formats all of it is encoded as characters, in chat
(see chat.py) only what the template itself writes is.
"""

from ...config.recipe import Source
from ...errors import UserError
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


def alpaca(row: dict, source: Source, tokenizer, context: str = "") -> list[Text]:
    """instruction, input (may be empty or absent), output: Stanford Alpaca's prompt; the output is supervised, if there is one.

    Through a chat template that same prompt is the user's turn, as in torchtune's recipes.
    """
    prompt = (ALPACA_WITH_INPUT if row.get("input") else ALPACA).format(instruction=row["instruction"], input=row.get("input", ""))
    return _turn(prompt, row["output"], source, tokenizer, context)


def prompt_completion(row: dict, source: Source, tokenizer, context: str = "") -> list[Text]:
    """prompt and completion: one text, of which the completion is supervised; or two lists of messages, one conversation."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        prompt = _told(context, prompt)
        return conversation([*prompt, *completion], tokenizer, row.get("tools"), first=len(prompt))
    return _turn(prompt, completion, source, tokenizer, context)


def text(row: dict, source: Source, tokenizer, context: str = "") -> list[Text]:
    """text: all of it is supervised."""
    return _answered("", row["text"], context)


def chat(row: dict, source: Source, tokenizer, context: str = "") -> list[Text]:
    """messages, and perhaps the tools they may call: the assistant's turns with their end tokens are supervised."""
    return conversation(_told(context, row["messages"]), tokenizer, row.get("tools"))


FORMATS = {"alpaca": alpaca, "chat": chat, "prompt_completion": prompt_completion, "text": text}


def _turn(prompt: str, answer: str, source: Source, tokenizer, context: str) -> list[Text]:
    if not source.chat_template:
        return _answered(prompt, answer, context)
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return conversation(_told(context, said), tokenizer)


def _answered(prompt: str, answer: str, context: str) -> list[Text]:
    prompt = f"{context}\n\n{prompt}" if context else prompt
    return [Text(prompt + answer, [(len(prompt), len(prompt + answer))] if answer.strip() else [])]


def _told(context: str, messages: list[dict]) -> list[dict]:
    """The conversation with the context as its system message, or at the head of the one that it has."""
    if not context:
        return messages
    head, *rest = messages
    if head["role"] in ("system", "developer"):
        return [{**head, "content": paragraphs(context, head["content"])}, *rest]
    return [{"role": "system", "content": context}, *messages]


def paragraphs(*texts: str | None) -> str:
    """Those of the texts that say something, a blank line between them."""
    return "\n\n".join(text for text in texts if text)


def refuse_without_template(source: Source, rows: list[dict], tokenizer, setting: str) -> None:
    """UserError where these rows want a chat template and the tokenizer has none."""
    if tokenizer.chat_template:
        return
    if source.chat_template:
        raise UserError(
            f"{setting}.chat_template: found true, and the tokenizer has no chat template; use one that has, or set it to false"
        )
    lists = source.format == "prompt_completion" and any(isinstance(row["prompt"], list) for row in rows)
    if source.format == "chat" or lists:
        found = "lists of messages" if lists else "chat"
        raise UserError(
            f"{setting}.format: found {found}, and the tokenizer has no chat template; use another format or a tokenizer that has one"
        )


def with_answer(row: dict, format: str, answer: str) -> tuple[dict, str]:
    """A multiple-choice row with one of its choices as the answer, the only thing supervised; and the format it then has."""
    said = [{"role": "assistant", "content": answer}]
    if format == "chat":
        return {"prompt": row["messages"], "completion": said, "tools": row.get("tools")}, "prompt_completion"
    if format == "prompt_completion":
        return {**row, "completion": said if isinstance(row["prompt"], list) else answer}, format
    return {**row, "output": answer}, format
