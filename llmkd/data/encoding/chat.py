"""Renders conversations by the tokenizer's chat template, and finds the assistant's characters in the text.

The template runs in a process of its own (`template_process.py`), which also finds the assistant's turns in its text (`locate.py`).
"""

import dataclasses

from .bound import Bound
from .control_tokens import Text, controls, insert_guards, private_use_chars, refuse_unmarked, remove_guards
from .template_process import conversation as located


def conversation(
    messages: list[dict],
    tokenizer,
    tools: list[dict] | None = None,
    first: int = 0,
    last_only: bool = False,
    call_values: str = "refuse",
    bound: Bound | None = None,
) -> list[Text]:
    """The conversation as text.

    The assistant's turns from message `first` on are supervised with their end tokens, except those with `train: False`; with `last_only`
    none but the last of them. `call_values`: see `config.data.Source`. Texts that exceed the bound are left out.

    If a template shows earlier turns differently once later ones follow (without their thinking, say), there is one text for each assistant
    turn, as the model sees it when it generates that turn. ValueError if the template raises, if it does not show a message, or if the answer
    cannot be located in its text; UserError if it takes too much time or memory.
    """
    answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    answers = [i for i in answers if messages[i]["content"].strip() or messages[i].get("tool_calls")]
    turns = [i for i in (answers[-1:] if last_only else answers) if messages[i].get("train") is not False]
    messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    control = controls(tokenizer)
    refuse_unmarked([messages, tools], control)
    guard, marker = private_use_chars(messages, tools, tokenizer.chat_template)
    guarded = insert_guards(messages, control.any, guard), insert_guards(tools, control.any, guard)
    plain = (messages, tools) if guarded != (messages, tools) else None
    job = {"messages": guarded[0], "tools": guarded[1], "plain": plain, "guard": guard, "marker": marker, "turns": turns}
    job |= {
        "bound": bound and dataclasses.asdict(bound),
        "call_values": call_values,
        "template": tokenizer.get_chat_template(tools=tools),
        "tokens": tokenizer.special_tokens_map,
    }
    answer = located(job | {"control": control.any.pattern, "end": tokenizer.eos_token})
    unshown = tuple(answer["unshown"])
    texts = [
        Text("", [], False, unshown=unshown, left_out=text)
        if isinstance(text, int)
        else Text(text, [tuple(span) for span in spans], False, ends, unshown=unshown)
        for text, spans, ends in answer["texts"]
    ]
    return [text if text.left_out or not plain else remove_guards(text, guard, control.any, tokenizer) for text in texts]
