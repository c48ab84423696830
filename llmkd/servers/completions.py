"""Text that a vLLM server goes on with from token ids. Written from vLLM's source, and not run against a real one. No torch."""

from collections.abc import Collection, Sequence

from .client import Server
from .logprobs import ServedModel, WrongAnswer, one_choice, same_ids


def complete(
    server: Server, model: ServedModel, prompt: Sequence[int], end_ids: Collection[int], seed: int, sampling: dict
) -> tuple[list[int], bool]:
    """The ids that follow a prompt, its end token included, and whether it ended by itself.

    end_ids    the text ends with the first of these, or where the served model ends its own
    sampling   temperature, max_tokens, top_p, top_k (-1: all), min_p

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
    }
    choice = one_choice(server.post("/v1/completions", content), model)
    given, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    if not isinstance(given, list) or not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
        raise WrongAnswer("returns no token ids (return_token_ids), so what it wrote is not known; vLLM does since 0.10.2")
    same_ids(given, prompt)
    why, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if why == "stop":
        if type(stop) is int and ids[-1:] != [stop]:
            ids = [*ids, stop]
        if not ids or not (ids[-1] in end_ids or ids[-1] == stop):
            raise WrongAnswer(
                f"ended a text with token {ids[-1] if ids else 'none'}, which is no end token of the data or of the tokenizer"
            )
    elif why != "length":
        raise WrongAnswer(f"ended a text for the reason {why!r}, and stop or length were expected")
    if len(ids) > sampling["max_tokens"] + (why == "stop"):
        raise WrongAnswer(f"wrote {len(ids)} tokens, and {sampling['max_tokens']} were asked for at most")
    return ids, why == "stop"
