"""The formats: from a row to a text and the characters of it that are supervised. One function per format.

Text that people wrote never becomes a control token: in the plain formats all of it is encoded as characters, in chat
(see chat.py) only what the template itself writes is.
"""

from ..errors import UserError
from ..recipe import Source
from .chat import conversation
from .control import Text

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca(row: dict, source: Source, tokenizer) -> list[Text]:
    """instruction, input (may be empty or absent), output: Stanford Alpaca's prompt; the output is supervised, if there is one.

    Through a chat template that same prompt is the user's turn, as in torchtune's recipes.
    """
    prompt = (ALPACA_WITH_INPUT if row.get("input") else ALPACA).format(instruction=row["instruction"], input=row.get("input", ""))
    return _asked(prompt, row["output"], tokenizer) if source.chat_template else _answered(prompt, row["output"])


def prompt_completion(row: dict, source: Source, tokenizer) -> list[Text]:
    """prompt and completion: one text, of which the completion is supervised; or two lists of messages, one conversation."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        return conversation([*prompt, *completion], tokenizer, row.get("tools"), first=len(prompt))
    return _asked(prompt, completion, tokenizer) if source.chat_template else _answered(prompt, completion)


def text(row: dict, source: Source, tokenizer) -> list[Text]:
    """text: all of it is supervised."""
    return _answered("", row["text"])


def chat(row: dict, source: Source, tokenizer) -> list[Text]:
    """messages, and perhaps the tools they may call: the assistant's turns with their end tokens are supervised."""
    return conversation(row["messages"], tokenizer, row.get("tools"))


FORMATS = {"alpaca": alpaca, "chat": chat, "prompt_completion": prompt_completion, "text": text}


def _answered(prompt: str, answer: str) -> list[Text]:
    return [Text(prompt + answer, [(len(prompt), len(prompt + answer))] if answer.strip() else [])]


def _asked(prompt: str, answer: str, tokenizer) -> list[Text]:
    return conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenizer)


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
