"""Checks of on-policy distillation: the student's answers follow its own distributions, and they are put into the data correctly."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ..config.on_policy import writes
from ..console import count, printable
from ..data.encoding.control_tokens import controls
from ..data.examples import TokenExamples
from ..rollouts.generate import Completion
from ..rollouts.sampling import Sampling, uniform
from ..rollouts.source import OnPolicySource
from ..training.writing import local_writer
from .check import BUG, Check, Result, failed, not_asked, passed, warned
from .setup import Setup
from .weights import moved

PROMPTS, TOKENS = 4, 24  # answers that are written, and the most tokens of each
_VAGUE = 0.1  # of a probability: if rounding may change it by more, draws are not compared
_NO = "on_policy is not set, so the student writes nothing"


def written_as_said(setup: Setup) -> Result:
    """Each token of the student's answers must follow from a full forward pass over the text so far and the number drawn for that place.

    Shows the answers.
    """
    if not writes(setup.small.on_policy):
        return not_asked(_NO)
    source, chosen = _source(setup), _chosen(setup)
    sampling = dataclasses.replace(source.sampling, max_new_tokens=min(source.sampling.max_new_tokens, TOKENS))
    prompts, keys = source.prompts.ids(source.examples, chosen), list(range(len(chosen)))
    slack = 2 * setup.rounding(setup.student) * max(1.0, setup.largest_logit) / (sampling.temperature or 1.0)
    with moved(setup):  # in a new adapter dropout would not show
        setup.student.train()
        found, mode = source.writer.write(prompts, keys, sampling), setup.student.training
        setup.student.eval()
        said = [_distributions(setup, prompt, one.ids) for prompt, one in zip(prompts, found, strict=True)]
    shown = tuple(_shown(setup, prompt, one) for prompt, one in zip(prompts, found, strict=True))
    if not mode:
        return failed("after it has written, the student is no longer in training mode", BUG, shown)
    if slack > _VAGUE:
        why = "rounding in this dtype may change probabilities by more than a tenth, so what is drawn is not compared; ask again with --student.dtype float32"
        return dataclasses.replace(not_asked(why), shown=shown)
    for key, one, p_TV in zip(keys, found, said, strict=True):
        for place, p_V in enumerate(p_TV):
            if not _may_be(one.ids[place], p_V, sampling, uniform(sampling.seed, key, place), slack):
                return failed(
                    f"token {place + 1} of an answer ({_token(setup, one.ids[place])}) is not what the student says there by a forward pass of its own",
                    BUG,
                    shown,
                )
    tokens, finished = sum(len(one.ids) for one in found), sum(one.finished for one in found)
    said = f"{tokens} tokens of {count(len(found), 'answer')} are what the student says at their places; {finished} ended by themselves within {sampling.max_new_tokens} tokens"
    if tokens and not finished and sampling.max_new_tokens == setup.small.on_policy.max_new_tokens:
        fix = (
            "train the student on the data first, or raise on_policy.max_new_tokens: it does not learn to end from answers that are cut off"
        )
        return warned(said, fix, shown)
    return passed(said, shown)


def answers_in_place(setup: Setup) -> Result:
    """The examples of a step, with the student's answers in place of the data's, against the rows and the answers."""
    if not writes(setup.small.on_policy):
        return not_asked(_NO)
    source, asked = _source(setup), []
    write = source.writer.write

    def noted(prompts, keys, sampling):
        found = write(prompts, keys, dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, TOKENS)))
        asked.extend(zip(map(tuple, prompts), found, strict=True))
        return found

    source.writer.write = noted
    step = next(source.schedule())
    answers: dict[tuple, list[Completion]] = {}
    for prompt, one in asked:
        answers.setdefault(prompt, []).append(one)
    beginnings = {tuple(prompt) for prompt in _prompts(setup, source)}
    for i, place in enumerate(step.places):
        if "written at" not in place:
            continue
        for reader, data in (("student", step.data), ("teacher", step.data.teacher_view or step.data)):
            if problem := _misplaced(data, i, answers, beginnings if reader == "student" else None):
                return failed(f"{place}: for the {reader} {problem}", BUG)
        if step.data.weight("ce")[i] != 0:
            return failed(f"{place}: what the student has written counts in the cross-entropy, as if it were known to be right", BUG)
    ends = source.writer.end_ids
    if lacking := _closing_tokens(setup) - ends:
        return failed(
            f"the data's answers end with {_token(setup, min(lacking))}, at which the student's answers do not end",
            "it writes on after its answers: " + BUG,
        )
    if problem := _does_not_end(setup, source):
        return failed(problem, BUG)
    shown = ", ".join(_token(setup, end) for end in sorted(ends))
    many = sum("written at" in place for place in step.places)
    return passed(
        f"in {count(many, 'example')} the row's prompt is followed by the answer's own tokens, which alone are targets; answers end with {shown}"
    )


def _source(setup: Setup) -> OnPolicySource:
    """The batch source of a run over the few rows in which the student writes every answer."""
    prepared, settings = setup.prepared, setup.small.on_policy
    writer = local_writer(setup.student, prepared, settings.batch_size)
    return OnPolicySource(prepared.source.for_rank(0, 1), prepared.prompts, writer, settings, prepared.vocab)


def _chosen(setup: Setup) -> list[int]:
    """The examples with the shortest prompts that may be answered."""
    may = np.flatnonzero(setup.prepared.prompts.may)
    return may[np.argsort(setup.prepared.prompts.own[may], kind="stable")[:PROMPTS]].tolist()


def _prompts(setup: Setup, source: OnPolicySource) -> Iterator[list[int]]:
    """The prompt of each example by its loss mask: all tokens before the first supervised one, or without a prompt the first tokens."""
    for i in range(len(source.examples)):
        ids, mask = source.examples.example(i)
        first = int(np.flatnonzero(mask)[0])
        yield ids[: first if first > 1 else min(setup.small.on_policy.prompt_tokens or 1, len(ids) - 1)].tolist()


def _misplaced(data: TokenExamples, i: int, answers: dict[tuple, list[Completion]], beginnings: set[tuple] | None) -> str:
    """A description of what is wrong with a written example; empty if nothing is. `beginnings`: all prompts; None not to compare them."""
    ids, mask = data.example(i)
    first = int(np.flatnonzero(mask)[0])
    prompt, answer = tuple(ids[:first].tolist()), tuple(ids[first:].tolist())
    if not mask[first:].all():
        return "some tokens of the answer are no targets"
    if beginnings is not None and prompt not in beginnings:
        return "the targets do not begin where a row's prompt ends"
    known = [one.ids for of, found in answers.items() if beginnings is None or of == prompt for one in found]
    return "" if answer in known else "what follows the prompt is not what the student has written to it"


def _closing_tokens(setup: Setup) -> set[int]:
    """The control tokens that end the supervised part of the few examples."""
    tokenizer, last = setup.prepared.tokenizer, set()
    for i in range(len(setup.few)):
        ids, mask = setup.few.example(i)
        last |= {int(ids[mask][-1])}
    return {token for token in last if controls(tokenizer).any.fullmatch(tokenizer.convert_ids_to_tokens(token))}


def _does_not_end(setup: Setup, source: OnPolicySource) -> str:
    """A description of what is wrong with an answer's end, or "". One of its tokens is declared an end token, and it is written again."""
    sampling, (example, *_) = (
        dataclasses.replace(source.sampling, max_new_tokens=min(source.sampling.max_new_tokens, TOKENS)),
        _chosen(setup),
    )
    prompt = source.prompts.ids(source.examples, [example])
    writer = local_writer(setup.student, setup.prepared, 1)
    (whole,) = writer.write(prompt, [0], sampling)
    end = whole.ids[len(whole.ids) // 2]
    writer.end_ids |= {end}
    (again,) = writer.write(prompt, [0], sampling)
    if again.ids != whole.ids[: whole.ids.index(end) + 1] or not again.finished:
        return f"an answer goes on after its end token: {count(len(again.ids), 'token')}, and {whole.ids.index(end) + 1} were to be written"
    return ""


@torch.no_grad()
def _distributions(setup: Setup, prompt: list[int], answer: tuple[int, ...]) -> np.ndarray:
    """The student's distribution at each token of an answer, at the sampling temperature, by one forward pass: float64 [tokens, V]."""
    ids = torch.tensor([[*prompt, *answer]], device=setup.device)
    student, temperature = setup.student, setup.small.on_policy.temperature or 1.0
    student.set_active_adapter()
    with torch.autocast(setup.device.type, student.autocast, enabled=student.autocast is not None):
        logits_TV = student.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, : setup.prepared.vocab]
    return torch.softmax(logits_TV.double() / temperature, -1).cpu().numpy()


def _may_be(token: int, p_V: np.ndarray, sampling: Sampling, drawn: float, slack: float) -> bool:
    """Whether a token may have been chosen from a distribution, if rounding may have changed its values by the share `slack`."""
    if not sampling.temperature:
        return bool(p_V[token] >= p_V.max() * (1 - slack))
    if sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0:
        return bool(p_V[token] >= _least(p_V, sampling) * (1 - slack))
    before, after = p_V[:token].sum(), p_V[: token + 1].sum()
    return bool(before - slack <= drawn <= after + slack and p_V[token] > 0)


def _least(p_V: np.ndarray, sampling: Sampling) -> float:
    """The probability of the least likely token that top_k, top_p and min_p keep."""
    sorted_V = np.sort(p_V)[::-1][: sampling.top_k]
    passed_V = np.cumsum(sorted_V)
    kept = 1 + int((passed_V[:-1] < sampling.top_p * passed_V[-1]).sum()) if sampling.top_p < 1 else len(sorted_V)
    return max(float(sorted_V[kept - 1]), sampling.min_p * float(p_V.max()))


def _token(setup: Setup, token: int) -> str:
    return f"{printable(str(setup.prepared.tokenizer.convert_ids_to_tokens(token)))!r}"


def _shown(setup: Setup, prompt: list[int], answer: Completion) -> str:
    """A prompt and its answer, the latter marked like a supervised part."""
    before, after = (
        printable(setup.prepared.tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in (prompt[-100:], answer.ids)
    )
    return f"{len(answer.ids)} tokens{'' if answer.finished else ', cut off'}:\n{before}⟦{after}⟧"


CHECKS = (
    Check("the student writes what it says at each token", "On-policy", "models", BUG, written_as_said),
    Check("its answers stand behind the rows' prompts, and end", "On-policy", "models", BUG, answers_in_place),
)
