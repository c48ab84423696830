"""Refuses marks of turns and rows as trained on or not, as `reading/turn_marks.py` reads them, if the encoding cannot honour them."""

from ...config.recipe import Data


def has_marks(row: dict) -> bool:
    """Whether an answer of the row is marked as not trained on."""
    messages = [message for name in ("messages", "completion") if isinstance(row.get(name), list) for message in row[name]]
    return any(message["role"] == "assistant" and message.get("train") is False for message in messages)


def refuse_unhonoured_marks(row: dict, data: Data) -> None:
    """ValueError if a turn is marked as trained on and would not be, or the reverse."""
    for name in ("messages", "prompt", "completion"):
        for i, message in enumerate(row[name]) if isinstance(row.get(name), list) else ():
            trained, role = message.get("train"), message["role"]
            if trained is False and data.train_on_input:
                raise ValueError(f"{name}[{i}] is marked as not trained on, and data.train_on_input trains on everything; set it to false")
            if trained and not data.train_on_input and (role != "assistant" or name == "prompt"):
                why = (
                    "turns of a prompt are not supervised"
                    if name == "prompt"
                    else f"only the assistant's turns are supervised, not the {role}'s"
                )
                raise ValueError(f"{name}[{i}] is marked as trained on, and {why}; remove the mark, or list its key under ignore")
    if row.get("train") is False and data.train_on_input:
        raise ValueError("the row is marked as not trained on, and data.train_on_input trains on everything; remove the row")
