"""Contradictions of on-policy distillation, in the form of `contradictions.contradictions`."""

from collections.abc import Iterator

from .data import Data
from .fields import as_tuple, with_setting_names
from .on_policy import MAX_NEW_TOKENS, AdaptiveShare, LongHorizon, OnPolicy, writes
from .schedule import schedule_contradictions
from .target_weights import BEFORE_THE_TARGET
from .teacher import Mixture, Teacher

#: The problem of a part that needs the student to write.
_NOTHING_WRITTEN = "set, but on_policy.share is 0, so the student writes nothing; leave it out"
Teachers = Teacher | tuple[Teacher, ...] | None
Found = Iterator[tuple[tuple[str, ...], str]]


def on_policy_contradictions(
    settings: OnPolicy,
    kd_ratio,
    reads_inside: bool,
    teacher: Teachers,
    mixture: Mixture,
    data: Data,
    max_steps: int | None,
    validation_every: int | None,
) -> Found:
    """Contradictions of `on_policy`, in the form of `contradictions.contradictions`.

    kd_ratio       the resolved value, or a schedule
    reads_inside   whether the loss reads hidden states or attention, from which a student learns without kd_ratio too
    """
    yield from _share_contradictions(settings, max_steps, validation_every)
    yield from _sampling_contradictions(settings)
    yield from _replay_contradictions(settings, max_steps)
    if settings.engine != "local" and settings.share == 0 and not settings.teacher_writes:
        yield ("on_policy.engine", "on_policy.share"), _NOTHING_WRITTEN
    if writes(settings):
        yield from _teacher_writes_contradictions(settings, teacher, mixture)
        yield from _use_contradictions(settings, kd_ratio, reads_inside, teacher, data)
        yield from _prompt_contradictions(settings, data)


def _share_contradictions(settings: OnPolicy, max_steps: int | None, validation_every: int | None) -> Found:
    share = settings.share
    yield from schedule_contradictions(share, "on_policy.share", 0.0, 1.0, max_steps)
    if not isinstance(share, AdaptiveShare):
        return
    if validation_every is None:
        yield (
            ("on_policy.share.adaptive", "validation.every"),
            "set without validation.every, and it rises at validations; give validation.every and held-out rows, or a number or schedule as share",
        )
    if max(share.adaptive.start, settings.teacher_writes) == 1:
        yield (
            ("on_policy.share.adaptive", "on_policy.teacher_writes"),
            "set with nothing left to rise to: start or teacher_writes is 1; lower it, or give a number as share",
        )


def _replay_contradictions(settings: OnPolicy, max_steps: int | None) -> Found:
    here = "on_policy.replay"
    if not settings.replay:
        return
    if settings.replay.ratio == 1:
        yield (f"{here}.ratio",), "found 1, at which no answer is drawn from the buffer; lower it, or leave replay out"
    yield from schedule_contradictions(settings.replay.ratio, f"{here}.ratio", 0.0, 1.0, max_steps)
    if settings.share == 0:
        yield (here, "on_policy.share"), _NOTHING_WRITTEN


def _use_contradictions(settings: OnPolicy, kd_ratio, reads_inside: bool, teacher: Teachers, data: Data) -> Found:
    """Settings that make written answers useless, or hide where their prompts end."""
    named, who = ("share", "student") if settings.share != 0 else ("teacher_writes", "teacher")
    share, is_to = (f"on_policy.{named}", "on_policy"), f"the {who} is to write, but"
    sources = with_setting_names(data.train, "data.train")
    if not as_tuple(teacher):
        yield (*share, "teacher"), f"{is_to} there is no teacher for what is written; give teacher.model, or set {named}: 0"
    elif kd_ratio == 0 and not reads_inside:
        yield (
            (*share, "loss.kd_ratio"),
            f"{is_to} with loss.kd_ratio 0 the student learns nothing from that; raise kd_ratio, or set {named}: 0",
        )
    elif sources and not reads_inside and not any(source.loss.kd for _, source in sources):
        yield (*share, f"{sources[0][0]}.loss.kd"), f"{is_to} loss.kd of every source is 0, so the teacher has no say there"
    for path, one in with_setting_names(teacher, "teacher"):
        if one.cache:
            yield (
                (*share, f"{path}.cache"),
                f"{is_to} {path} is a cache, which knows the data's answers alone; leave {path}.cache out, or set {named}: 0",
            )
    if data.streaming:
        yield (*share, "data.streaming"), f"{is_to} data.streaming is true, and prompts are taken from data in memory only"
    if data.train_on_input:
        yield (
            (*share, "data.train_on_input"),
            f"{is_to} with data.train_on_input prompts are not known from answers; set it to false, or {named}: 0",
        )


def _prompt_contradictions(settings: OnPolicy, data: Data) -> Found:
    here = "on_policy"
    if settings.max_new_tokens >= data.max_length:
        yield (
            (f"{here}.max_new_tokens", "data.max_length"),
            f"{'not given, and the default is' if settings.max_new_tokens == MAX_NEW_TOKENS else 'found'} {settings.max_new_tokens}, which leaves no room for a "
            f"prompt within data.max_length ({data.max_length}); set it to {max(1, data.max_length // 2)}, say, or raise data.max_length",
        )
    sources = with_setting_names(data.train, "data.train")
    texts = [path for path, source in sources if source.format == "text"]
    if texts and settings.prompt_tokens is None:
        yield (
            (f"{here}.prompt_tokens", f"{texts[0]}.format"),
            f"not given, but {texts[0]} has format text, whose rows have no prompt; say how many of their first tokens are one, such as 32",
        )
    every = [*sources, *with_setting_names(data.validation, "data.validation")]
    if settings.prompt_tokens is not None and not any(source.format in ("text", "tokens") for _, source in every):
        yield (
            (f"{here}.prompt_tokens", "data.train"),
            f"found {settings.prompt_tokens}, but no source has format text or tokens; rows of other formats have prompts, so leave it out",
        )


def _teacher_writes_contradictions(settings: OnPolicy, teacher: Teachers, mixture: Mixture) -> Found:
    here = "on_policy.teacher_writes"
    if not settings.teacher_writes:
        return
    share = settings.share.adaptive.start if isinstance(settings.share, AdaptiveShare) else settings.share
    most = max(share.get("from", 0), share.get("to", 0)) if isinstance(share, dict) else share
    if isinstance(most, int | float) and most + settings.teacher_writes > 1 + 1e-9:
        yield (
            (here, "on_policy.share"),
            f"found {settings.teacher_writes:g} with a share of {most:g}, and together they are more than all examples; lower one of them",
        )
    if mixture.weights == "confidence":
        yield (
            (here, "mixture.weights"),
            "set with confidence, which weighs the teachers by the token that is yet to be written; use fixed, or leave one of them out",
        )
    for path, one in with_setting_names(teacher, "teacher"):
        if one.server:
            yield (
                (here, f"{path}.server"),
                f"set with {path}.server; a teacher in memory writes while the student trains: write with llmkd roll teacher beforehand",
            )


def long_horizon_contradictions(settings: OnPolicy, loss, teacher: Teachers, data: Data, mixture: Mixture) -> Found:
    """Contradictions of on_policy.long_horizon. `loss`, `mixture`: those of the recipe."""
    here, ahead = "on_policy.long_horizon", settings.long_horizon
    if ahead is None:
        return
    if settings.share == 0:
        yield (here, "on_policy.share"), _NOTHING_WRITTEN
    if settings.replay:
        yield (
            (here, "on_policy.replay"),
            "set with on_policy.replay; it is defined at what the student writes with its present weights: leave one of them out",
        )
    if ahead.mix_weights != "token" and not ahead.teacher_mix:
        yield (
            (f"{here}.mix_weights", f"{here}.teacher_mix"),
            f"found {ahead.mix_weights} without teacher_mix; leave it out, or give teacher_mix",
        )
    if ahead.mix_weights == "product" and loss.normalize == "weights":
        yield (
            (f"{here}.mix_weights", "loss.normalize"),
            "found product with loss.normalize weights, which would divide by the sum of importance weights; use targets",
        )
    cut = settings.temperature != 1 or settings.top_p != 1 or settings.top_k is not None or settings.min_p != 0
    if cut:
        yield (
            (here, "on_policy.temperature"),
            "set with another sampling than from the student itself; leave temperature, top_p, top_k and min_p of on_policy out",
        )
    if loss.keep not in (None, 1):
        yield (
            (here, "loss.keep"),
            "set with loss.keep, which chooses targets by the whole answer: what a token leads to would no longer be the tokens after it; leave one of them out",
        )
    rule = loss.target_weights
    if rule and "kd" in rule.terms and rule.by not in BEFORE_THE_TARGET:
        yield (
            (here, "loss.target_weights.by"),
            f"set with {rule.by}, which may read the token that was written; use one of {', '.join(sorted(BEFORE_THE_TARGET))}, or leave one of them out",
        )
    if mixture.weights == "confidence":
        yield (
            (here, "mixture.weights"),
            "set with confidence, which weighs the teachers by the token that was written; use fixed, or leave one of them out",
        )
    if ahead.rewards == "sampled":
        yield from _sampled_contradictions(loss, data, mixture)
    yield from _long_horizon_teachers(ahead, teacher)


def _sampled_contradictions(loss, data: Data, mixture: Mixture) -> Found:
    """The expected reward of the written tokens is the reverse KL at temperature 1; other divergences are refused."""
    here, exact = "on_policy.long_horizon", "set on_policy.long_horizon.rewards: exact"
    if loss.divergence != "reverse_kl":
        yield (
            (here, "loss.divergence"),
            f"set with {loss.divergence}, and its sampled rewards are those of the reverse KL: use reverse_kl, or {exact}",
        )
    for path, source in with_setting_names(data.train, "data.train"):
        if source.divergence not in (None, "reverse_kl"):
            yield (
                (here, f"{path}.divergence"),
                f"set with {source.divergence} in {path}, and its sampled rewards are those of the reverse KL: use reverse_kl, or {exact}",
            )
    if loss.temperature != 1:
        yield (
            (here, "loss.temperature"),
            f"set with another loss.temperature than 1, and its sampled rewards are those of temperature 1: use 1, or {exact}",
        )
    if loss.target_weights and "kd" in loss.target_weights.terms:
        yield (
            (here, "loss.target_weights"),
            f"set with loss.target_weights, which its sampled rewards do not have; leave them out, or {exact}",
        )
    if mixture.combine == "divergences":
        yield (
            (here, "mixture.combine"),
            f"set with a sum of divergences, and its sampled rewards are those of the mean of the distributions: use probabilities, or {exact}",
        )


def _long_horizon_teachers(ahead: LongHorizon, teacher: Teachers) -> Found:
    here = "on_policy.long_horizon"
    named = [path for path, one in with_setting_names(teacher, "teacher") if one.name and len(as_tuple(teacher)) > 1]
    if ahead.teacher_mix and named:
        yield (
            (f"{here}.teacher_mix", f"{named[0]}.name"),
            f"set with {named[0]}.name, and tokens are drawn from one mixture for all sources; leave the name out, or teacher_mix",
        )
    for path, one in with_setting_names(teacher, "teacher"):
        if one.server and ahead.rewards == "sampled":
            yield (
                (here, f"{path}.server"),
                f"set with {path}.server, which lists the most likely tokens alone, and its sampled rewards need the probability of every token: set "
                f"{here}.rewards: exact, or use a teacher in memory",
            )
        elif one.server and ahead.teacher_mix:
            yield (
                (f"{here}.teacher_mix", f"{path}.server"),
                f"set with {path}.server, and tokens are drawn from a mixture with a teacher in memory; leave it out",
            )


def _sampling_contradictions(settings: OnPolicy) -> Found:
    if 0 < settings.temperature < 1e-3:
        yield (
            ("on_policy.temperature",),
            f"found {settings.temperature:g}, expected 0 (always the most likely token), or a number from 0.001 to 1000",
        )
    if settings.temperature != 0:
        return
    given = {"top_p": settings.top_p != 1, "top_k": settings.top_k is not None, "min_p": settings.min_p != 0}
    for name in (name for name, found in given.items() if found):
        yield (
            (f"on_policy.{name}", "on_policy.temperature"),
            "set with temperature 0, where the most likely token is always taken; leave it out",
        )
    if settings.samples > 1:
        yield (
            ("on_policy.samples", "on_policy.temperature"),
            f"found {settings.samples} with temperature 0, where all answers to a prompt are the same; set it to 1, or raise temperature",
        )
