"""Text that a vLLM server goes on with from token ids. Written from vLLM's source, and not run against a real one. No torch."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .client import Server
from .logprobs import SLACK, ServedModel, WrongAnswer, one_choice, same_ids


class Continuation(NamedTuple):
    """What a server goes on with: the ids, the end token included; whether it ended by itself; the log-probability of each at temperature 1, where
    they were asked for."""

    ids: list[int]
    finished: bool
    log_p: list[float] | None = None


def complete(
    server: Server,
    model: ServedModel,
    prompt: Sequence[int],
    end_ids: Collection[int],
    seed: int,
    sampling: dict,
    log_probs: bool = False,
) -> Continuation:
    """What follows a prompt.

    end_ids    the text ends with the first of these, or where the served model ends its own
    sampling   temperature, max_tokens, top_p, top_k (-1: all), min_p
    log_probs  also ask for log-probabilities

    WrongAnswer, or what `Server` raises.
    """
    neutral = {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }  # or the model's own generation config would count
    content = {
        "model": model.name,
        "prompt": list(prompt),
        "add_special_tokens": False,
        "return_token_ids": True,
        "stop_token_ids": sorted(end_ids),
        "seed": seed,
        **neutral,
        **sampling,
        **({"logprobs": 1} if log_probs else {}),
    }
    choice = one_choice(server.post("/v1/completions", content), model)
    given, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    if not isinstance(given, list) or not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
        raise WrongAnswer("returns no token ids (return_token_ids), so what it wrote is not known; vLLM does since 0.10.2")
    same_ids(given, prompt)
    log_p = _log_probs(choice, ids) if log_probs else None
    why, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if why == "stop":
        if type(stop) is int and ids[-1:] != [stop]:
            if log_probs:
                raise WrongAnswer(f"leaves the end token {stop} out of the ids that it wrote, so its log-probability is not known")
            ids = [*ids, stop]
        if not ids or not (ids[-1] in end_ids or ids[-1] == stop):
            raise WrongAnswer(
                f"ended a text with token {ids[-1] if ids else 'none'}, which is no end token of the data or of the tokenizer"
            )
    elif why != "length":
        raise WrongAnswer(f"ended a text for the reason {why!r}, and stop or length were expected")
    if len(ids) > sampling["max_tokens"] + (why == "stop"):
        raise WrongAnswer(f"wrote {len(ids)} tokens, and {sampling['max_tokens']} were asked for at most")
    return Continuation(ids, why == "stop", log_p)


def _log_probs(choice: dict, ids: list[int]) -> list[float]:
    """The log-probabilities of the ids that were written."""
    told = choice.get("logprobs")
    found = told.get("token_logprobs") if isinstance(told, dict) else None
    if not isinstance(found, list) or len(found) != len(ids):
        raise WrongAnswer("gives no log-probability of each token that it wrote (logprobs); is nothing before it that leaves them out?")
    if not all(type(one) in (int, float) and -math.inf < one <= SLACK for one in found):
        raise WrongAnswer("gives what are no log-probabilities of what it wrote; start vLLM with --logprobs-mode raw_logprobs")
    return [min(0.0, float(one)) for one in found]
