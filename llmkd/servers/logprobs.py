"""Log-probabilities from vLLM and SGLang: for token ids, each token's log-probability and the most likely tokens at its place.

Written from the source of both servers (vLLM's /v1/completions with `prompt_logprobs`, SGLang's /generate with `logprob_start_len`), and
not tested against real ones. No torch.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import UserError
from .client import Refused, Server

LIST_SECONDS = 20.0  # time-out of the list of models: the first request to a server, which may accept connections and never answer
SLACK = 1e-3  # by how much rounding may make a log-probability exceed 0, or a sum of probabilities 1


@dataclass(frozen=True)
class ServedModel:
    """A model in a server's list. `parent`: for an adapter, the name of its base. `positions`: the longest text in tokens, if the server says."""

    name: str
    parent: str | None = None
    positions: int | None = None


@dataclass(frozen=True)
class Listed:
    """The log-probabilities that a server lists at N targets.

    ids_NM          int64 ids of at most M tokens; -1: no token
    log_p_NM        float64, their log-probabilities; -inf: no token
    label_log_p_N   float64, the log-probability of the target's own token
    strings         the server's own text of targets' tokens, by id, if it gives one
    """

    ids_NM: np.ndarray
    log_p_NM: np.ndarray
    label_log_p_N: np.ndarray
    strings: dict[int, str] = field(default_factory=dict)


class WrongAnswer(Exception):
    """An answer that does not fit the request. Its text continues a sentence that begins with the server's address."""


class LogProbs(Protocol):
    """A server's interface for log-probabilities. Constructed from a `Server` and the size of the student's vocabulary."""

    server: Server

    def models(self, patience: float | None = None) -> list[ServedModel]:
        """The models that the server lists. `patience` as in `Server`."""

    def ask(self, model: ServedModel, ids: Sequence[int], places: Sequence[int], k: int, strings: bool = False) -> Listed:
        """The log-probabilities at the tokens ids[places], each given all tokens before it: of the k most likely tokens, and of its own. WrongAnswer,
        Refused, or an error of `Server`."""


class VLLM:
    """vLLM, and servers with its interface."""

    def __init__(self, server: Server, vocab: int):
        self.server, self.vocab = server, vocab

    def models(self, patience: float | None = None) -> list[ServedModel]:
        return served_models(self.server, patience)

    def ask(self, model: ServedModel, ids: Sequence[int], places: Sequence[int], k: int, strings: bool = False) -> Listed:
        content = {
            "model": model.name,
            "prompt": list(ids),
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        choice = one_choice(self.server.post("/v1/completions", content), model)
        given, told = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
        if told is None:
            raise WrongAnswer("gives no prompt_logprobs; is it a vLLM server, and is nothing before it that leaves them out?")
        if not isinstance(told, list) or (given is not None and not isinstance(given, list)):
            raise WrongAnswer("gives no lists as prompt_logprobs and prompt_token_ids")
        if given is not None:
            same_ids(given, ids)
        if len(told) != len(ids):
            raise WrongAnswer(f"tells of {len(told)} tokens, and {len(ids)} were asked; it cuts texts, or adds tokens")
        try:
            own = [
                (t, told[t][str(ids[t])]) for t in (range(1, len(ids)) if given is None else places)
            ]  # each place lists its own token too
        except (KeyError, TypeError):
            raise WrongAnswer(
                "does not list the text's own token at each of its places: it read other ids, or lacks places of the text"
            ) from None
        try:
            label = [told[t][str(ids[t])]["logprob"] for t in places]
            entries = [([int(token) for token in told[t]], [one["logprob"] for one in told[t].values()]) for t in places]
            names = {ids[t]: one["decoded_token"] for t, one in own if one.get("decoded_token")} if strings else {}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise WrongAnswer('has other entries in prompt_logprobs than {"id": {"logprob": x}}') from None
        return _listed(entries, label, k, names)


class SGLang:
    """SGLang's own interface."""

    def __init__(self, server: Server, vocab: int):
        self.server, self.vocab = server, vocab

    def models(self, patience: float | None = None) -> list[ServedModel]:
        return served_models(self.server, patience)

    def ask(self, model: ServedModel, ids: Sequence[int], places: Sequence[int], k: int, strings: bool = False) -> Listed:
        start = min(places) - 1  # SGLang gives no log-probabilities of the first token
        content = {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": k,
            "return_text_in_logprobs": strings,
        }
        if model.parent:
            content["lora_path"] = model.name
        answer = self.server.post("/generate", content)
        about = answer.get("meta_info") if isinstance(answer, dict) else None
        own, top = (about.get(name) for name in ("input_token_logprobs", "input_top_logprobs")) if isinstance(about, dict) else (None, None)
        if not isinstance(own, list) or not isinstance(top, list) or len(own) != len(top):
            raise WrongAnswer("gives no lists of one length as input_token_logprobs and input_top_logprobs; is it an SGLang server?")
        if about.get("prompt_tokens", len(ids)) != len(ids):
            raise WrongAnswer(f"read {about['prompt_tokens']} tokens, and {len(ids)} were asked; it cuts texts, or adds tokens")
        first = len(ids) - len(own)  # older servers tell of the whole text
        if not 0 <= first <= start:
            raise WrongAnswer(f"tells of {len(own)} tokens, and {len(ids) - start} were asked; it cuts texts, or adds tokens")
        try:
            # Oddity: SGLang says 0 for the last id of its model's vocabulary.
            told = [here if one[1] == 0 and here == self.vocab - 1 else one[1] for one, here in zip(own, ids[first:], strict=True)]
            same_ids(told, ids[first:], first)
            label = [own[t - first][0] for t in places]
            entries = [([one[1] for one in top[t - first]], [one[0] for one in top[t - first]]) for t in places]
            names = {ids[t]: own[t - first][2] for t in places if own[t - first][2]} if strings else {}
        except (IndexError, TypeError):
            raise WrongAnswer("lacks log-probabilities of some of the places that were asked") from None
        return _listed(entries, label, k, names)


INTERFACES: dict[str, type[LogProbs]] = {"vllm": VLLM, "sglang": SGLang}


def served_models(server: Server, patience: float | None = None) -> list[ServedModel]:
    """The models that a server lists; both kinds use OpenAI's form. WrongAnswer, or an error of `Server`."""
    answer = server.get("/v1/models", patience, LIST_SECONDS)
    try:
        return [ServedModel(one["id"], one.get("parent"), one.get("max_model_len")) for one in answer["data"]]
    except (AttributeError, KeyError, TypeError):
        raise WrongAnswer("gives no list of models at /v1/models; is it a vLLM or an SGLang server?") from None


def explain(error: Refused, setting: str, k: int = 0, longest: int = 0) -> UserError:
    """A server's refusal of a request for k tokens at each place of a text of `longest` tokens, as a UserError with the fix."""
    if found := re.search(r"logprobs of -?\d+.{0,40}?greater than max allowed: *(\d+)|max_logprobs\D{0,40}(\d+)", error.text):
        most = found[1] or found[2]
        return UserError(
            f"{setting}.top_k: found {k}, and the server gives at most {most} tokens; start it with --max-logprobs {k}, or lower top_k"
        )
    if re.search(r"context length|max(imum)?_model_len|max model len|longer than the maximum|max_total_tokens|too long", error.text, re.I):
        return UserError(
            f"{setting}.server: refuses a text of {longest} tokens ({error.text}); start it with a larger --max-model-len (SGLang: "
            "--context-length), or lower data.max_length"
        )
    if error.status in (401, 403):
        return UserError(f"{setting}.server: {error}; name the environment variable that holds the key as {setting}.api_key_env")
    return UserError(f"{setting}.server: {error}")


def one_choice(answer, model: ServedModel) -> dict:
    """The only choice in an answer of OpenAI's form. WrongAnswer if there are others, or it is another model's."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise WrongAnswer("gives no choices; is it a vLLM server?")
    if answer.get("model", model.name) != model.name:
        raise WrongAnswer(f"answers as {answer['model']!r}, and {model.name!r} was asked")
    return choices[0]


def same_ids(given: list, wanted: Sequence[int], first: int = 0) -> None:
    for n, (a, b) in enumerate(zip(given, wanted, strict=False), first):
        if a != b:
            raise WrongAnswer(f"read the token {a!r} at place {n + 1}, and {b} was asked; it encodes texts anew, or has another tokenizer")
    if len(given) != len(wanted):
        raise WrongAnswer(f"read {first + len(given)} tokens, and {first + len(wanted)} were asked; it cuts texts, or adds tokens")


def _listed(entries: list[tuple[list, list]], label: list, k: int, strings: dict[int, str]) -> Listed:
    """Check the entries and return them as arrays. WrongAnswer if they are not k or more log-probabilities of one distribution."""
    longest = max(len(ids) for ids, _ in entries)
    ids_NM, log_p_NM = np.full((len(entries), longest), -1, np.int64), np.full((len(entries), longest), -math.inf)
    try:
        for n, (ids, values) in enumerate(entries):
            ids_NM[n, : len(ids)], log_p_NM[n, : len(ids)] = ids, values
        label_N = np.array(label, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise WrongAnswer("has something else than a number as an id or a log-probability") from None
    here_NM = np.arange(longest) < np.array([[len(ids)] for ids, _ in entries])
    if (ids_NM[here_NM] < 0).any() or np.isnan(log_p_NM).any() or np.isnan(label_N).any():
        raise WrongAnswer("has an id below 0 or a log-probability that is no number")
    ordered_NM = np.sort(ids_NM, 1)
    if (fewest := int(here_NM.sum(1).min())) < k:
        raise WrongAnswer(f"lists {fewest} tokens at a place, and {k} were asked")
    if ((ordered_NM[:, 1:] == ordered_NM[:, :-1]) & (ordered_NM[:, 1:] >= 0)).any():
        raise WrongAnswer("lists a token twice at one place")
    sums_N = np.exp(np.minimum(log_p_NM, 1)).sum(1)
    if max(log_p_NM.max(), label_N.max()) > SLACK or sums_N.max() > 1 + SLACK:
        raise WrongAnswer(
            f"gives what are no log-probabilities of one distribution (the probabilities sum to {sums_N.max():.4g}); start vLLM with "
            "--logprobs-mode raw_logprobs"
        )
    return Listed(ids_NM, log_p_NM, np.minimum(label_N, 0), strings)
