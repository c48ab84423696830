"""Opens the teachers on servers, and checks before the first step that each server has the right model."""

import functools
import math
import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..console import info, warn
from ..data.examples import Examples, concat
from ..errors import UserError
from ..servers.logprobs import INTERFACES, Listed, ServedModel
from .resolve import TeacherSource, examples_of
from .served import ServedTeacher, texts_of
from .served_models import chosen_model, server_of
from .sparse import NEGLIGIBLE

PROBED = 8  # examples that a server is asked for before training
_KEPT = 2  # examples with stored answers that are asked for again and compared
_OTHER_WEIGHTS = 0.1  # nats: a larger mean difference of the labels' log-probabilities is not due to rounding or batching
_OTHER_TOKENS = 0.1  # share of tokens whose texts may differ, since servers decode single bytes differently


def open_served(
    sources: Sequence[TeacherSource], device, vocab: int, stop_asked: Callable[[], bool] = lambda: False
) -> dict[str, ServedTeacher]:
    """The teachers on servers, by setting. Sends no request yet."""
    found = {}
    for number, source in enumerate(sources):
        if source.asks_server:
            one, setting = source.settings, source.setting
            interface = INTERFACES[one.of_server("api")](server_of(one, setting), vocab)
            choose = functools.partial(chosen_model, interface, setting, one.model)
            found[setting] = ServedTeacher(
                interface, source.answers, setting, number, choose, device, one.of_server("requests"), stop_asked
            )
    return found


def check_served(teacher: ServedTeacher, train: Examples, validation: Examples | None, tokenizer) -> None:
    """Ask a server for some examples, unless all answers are stored already. UserError if it does not serve the right model.

    These are compared: token ids, the texts of tokens, the labels' log-probabilities with those of the adapter's base and with the stored
    ones, and the length of the longest example with the server's limit.
    """
    parts = [part for part in (train, validation) if part is not None]
    whole = concat(parts, [0] * len(parts), {})
    needed = whole.take(examples_of(whole, teacher.number))
    hashes = [needed.content_hash(i) for i in range(len(needed))]
    lacking = teacher.answers.missing(hashes)
    if not lacking:
        info(f"{teacher.setting}: all {len(hashes):,} answers are in {teacher.answers.folder}; the server is not asked")
        return
    model, setting = teacher.connect(patience=0), teacher.setting
    _refuse_long(teacher, model, (needed.teacher_view or needed))
    rng = random.Random("server")
    new = rng.sample(lacking, min(PROBED, len(lacking)))
    kept = sorted({*range(len(hashes))} - {*lacking})
    old = rng.sample(kept, min(_KEPT, len(kept)))
    texts = _texts(needed, [*new, *old])
    told = teacher.at_once([functools.partial(teacher.ask, *text, strings=True) for text in texts])
    _refuse_other_tokens(teacher, told, tokenizer)
    _refuse_its_base(teacher, model, *texts[0], told[0])
    _refuse_other_weights(teacher, [hashes[i] for i in old], told[len(new) :])
    for i, one in zip(new, told, strict=False):
        teacher.answers.put(hashes[i], teacher.records(one))
    ce = -float(np.concatenate([one.label_log_p_N for one in told]).mean())
    server = teacher.interface.server
    already = f", which has {len(kept):,} of {len(hashes):,}" if kept else ""
    info(
        f"{setting}: {server.address} serves {model.name}, with a CE of {ce:.4f} on {len(told)} examples; answers go to {teacher.answers.folder}{already}"
    )
    if ce > math.log(teacher.format.vocab):
        warn(
            f"warning: {setting}.server: {model.name} knows these examples no better than a guess among all tokens (CE {math.log(teacher.format.vocab):.4f}); "
            "is it the model that was meant, with the student's tokenizer and chat template?"
        )


def _texts(examples: Examples, chosen: list[int]) -> list[tuple[list[int], list[int]]]:
    return [text for i in chosen for text in texts_of(examples.batch([i]))]


def _refuse_long(teacher: ServedTeacher, model: ServedModel, read: Examples) -> None:
    """UserError if an example up to its last target, plus the one token that vLLM always generates, exceeds the model's positions."""
    if not model.positions:
        return
    last = np.flatnonzero(read.loss_mask)
    longest = int((last[np.searchsorted(last, read.offsets[1:]) - 1] - read.offsets[:-1] + 1).max())
    if longest + 1 > model.positions:
        raise UserError(
            f"{teacher.setting}.server: {teacher.interface.server.address} serves {model.name} for {model.positions} tokens, and the longest example has "
            f"{longest} and needs one more; start it with a larger --max-model-len (SGLang: --context-length), or lower data.max_length"
        )


def _refuse_other_tokens(teacher: ServedTeacher, told: list[Listed], tokenizer) -> None:
    """UserError if the server's tokens have other texts than the student's. Only ASCII letters and digits are compared."""

    def plain(text: str) -> str:
        return re.sub(r"[^0-9A-Za-z]", "", text)

    theirs = {token: text for one in told for token, text in one.strings.items() if token < teacher.format.vocab}
    ours = {token: tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in theirs}
    compared = [token for token in theirs if plain(theirs[token]) and plain(ours[token])]
    other = [token for token in compared if plain(theirs[token]) != plain(ours[token])]
    if len(other) > _OTHER_TOKENS * len(compared):
        token = other[0]
        raise UserError(
            f"{teacher.setting}.server: {teacher.interface.server.address} has another tokenizer: token {token} is {theirs[token]!r} there and "
            f"{ours[token]!r} to the student ({len(other)} of {len(compared)} differ); serve a teacher of the student's tokenizer"
        )


def _refuse_its_base(teacher: ServedTeacher, model: ServedModel, ids: list[int], places: list[int], told: Listed) -> None:
    """UserError where an adapter's answers are those of its base: it is named, and not applied."""
    if not model.parent:
        return
    base = teacher.ask(ids, places, model=ServedModel(model.parent))
    if np.abs(base.label_log_p_N - told.label_log_p_N).max() < 1e-6:
        raise UserError(
            f"{teacher.setting}.server: {teacher.interface.server.address} answers for {model.name} as for its base {model.parent}, so the adapter changes "
            "nothing; is it untrained, or served under a wrong name?"
        )


def _refuse_other_weights(teacher: ServedTeacher, hashes: list[str], told: list[Listed]) -> None:
    """UserError where the server says of some examples something else than what is kept."""
    if not hashes:
        return
    kept = teacher.format.signal(torch.from_numpy(teacher.answers.read(hashes, [len(one.label_log_p_N) for one in told])), "cpu")
    then_N, now_N = kept.label_log_p_N.double().numpy(), np.concatenate([one.label_log_p_N for one in told])
    apart = np.abs(np.maximum(then_N, NEGLIGIBLE) - np.maximum(now_N, NEGLIGIBLE)).mean()
    if not apart <= _OTHER_WEIGHTS:
        raise UserError(
            f"{teacher.setting}.server: {teacher.interface.server.address} serves other weights under this name than those that answered before: the labels' "
            f"log-probabilities differ by {apart:.2f} nats from what {teacher.answers.folder} holds; serve the same model, or name another folder as "
            f"{teacher.setting}.cache.path"
        )
