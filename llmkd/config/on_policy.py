"""Settings of on-policy distillation: the student writes answers itself, and learns from the teacher there. A part of `recipe.py`."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .data import Data
from .engine import LocalOrEngine
from .fields import Count, as_tuple, changeable, config_dataclass, fixed, with_setting_names
from .schedule import schedule_contradictions, value_at
from .teacher import Teacher

MAX_NEW_TOKENS = 128


@config_dataclass
class LongHorizon:
    """MiniLLM's second part: a token answers for the divergence that it leads to."""

    gamma: float = fixed(0.95, gt=0, le=1, description="Discount: of the divergence so many tokens later this to that power counts.")
    length_normalized: bool = fixed(
        True,
        description="Divide by the number of later tokens, so that long answers are not preferred to short ones. false with gamma 1: the loss then has the "
        "gradient of the reverse KL of whole answers.",
    )
    teacher_mix: float = fixed(
        0.0,
        ge=0,
        lt=1,
        description="Share of the teacher while sampling: each token is drawn from this much of the teacher's distribution and the rest of the student's, which keeps weak "
        "students from rubbish (MiniLLM: 0.2). Importance weights make up for it.",
    )
    mix_weights: Literal["token", "product"] = fixed(
        "token",
        description="Importance weights with teacher_mix. token: of each token alone (MiniLLM); prefixes and later tokens stay those of the mixture. product: of all tokens up "
        "to it, in both parts: the gradient is on average that without a mixture, but varies the more the longer the answers.",
    )


@config_dataclass
class Adaptive:
    """DistiLLM's rule: the student writes more when held-out rows say that it gets worse."""

    start: float = fixed(0.0, ge=0, le=1, description="The share until the first rise.")
    step: float = fixed(0.1, gt=0, le=1, description="What is added at a rise, up to a share of 1.")
    tolerance: float = fixed(
        0.1,
        ge=0,
        description="It rises at a validation whose cross-entropy is that of the last rise, or first of the validation before training, plus this or more.",
    )


@config_dataclass
class AdaptiveShare:
    adaptive: Adaptive = Field(default_factory=Adaptive)


#: A share, a schedule, or one that adapts. The tags make pydantic report the errors of the given form alone.
Share = Annotated[
    Annotated[Annotated[float, Field(ge=0, le=1)], Tag("value")]
    | Annotated[dict[str, Any], Tag("schedule")]
    | Annotated[AdaptiveShare, Tag("settings")],
    Discriminator(
        lambda value: (
            "settings"
            if isinstance(value, AdaptiveShare) or isinstance(value, dict) and "adaptive" in value
            else "schedule"
            if isinstance(value, dict)
            else "value"
        )
    ),
]
#: "decreasing", a share, or a schedule. The tags make pydantic report the errors of the given form alone.
FreshShare = Annotated[
    Annotated[Literal["decreasing"], Tag("name")]
    | Annotated[Annotated[float, Field(ge=0, le=1)], Tag("value")]
    | Annotated[dict[str, Any], Tag("schedule")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "schedule" if isinstance(value, dict) else "value"),
]


@config_dataclass
class Replay:
    """DistiLLM's buffer of earlier answers: writing takes most of the time of a step, and an answer of some steps ago is nearly one of now."""

    capacity: Count = fixed(1000, description="Answers that the buffer holds, the newest ones. Until it is full every answer is fresh.")
    ratio: FreshShare = fixed(
        "decreasing",
        description="Once it is full, the share of answers that are fresh, and enter it; the others are drawn from it. A number, a schedule as for loss.kd_ratio, or "
        "decreasing, which is {from: 1, to: 0}.",
    )


@config_dataclass
class OnPolicy:
    """The answers of some examples are replaced by what the student writes at that moment; they have no cross-entropy."""

    share: Share = fixed(
        0.5,
        description="Share of the examples of a step whose answers the student writes itself (GKD's lambda): each is drawn by seed, step and example. 0: "
        "none, and the run is that without on_policy. Or a schedule, as for loss.kd_ratio; or {adaptive: {}}, which rises where validation gets worse.",
    )
    teacher_writes: float = fixed(
        0.0,
        ge=0,
        le=1,
        description="Share of the examples of a step whose answers the teacher writes at that moment (sequence-level distillation); the student then writes the others that "
        "share says. Such an answer has no cross-entropy either: the divergence at the teacher's own text is its expectation.",
    )
    max_new_tokens: Count = fixed(
        MAX_NEW_TOKENS,
        description="Longest of these answers, in tokens. An example whose prompt leaves less room than that within data.max_length keeps the data's answer.",
    )
    temperature: float = fixed(
        1.0, ge=0, description="Temperature of sampling; loss.temperature is another. 0: always the most likely token."
    )
    top_p: float = fixed(
        1.0,
        gt=0,
        le=1,
        description="Sample from the fewest tokens that have this share of the probability. Below 1 what is written is not a sample of the student.",
    )
    top_k: Count | None = fixed(None, description="Sample from the k most likely tokens, before top_p; null: from all.")
    min_p: float = fixed(
        0.0,
        ge=0,
        le=1,
        description="Sample from tokens that are at least min_p times as likely as the most likely one, after top_k and top_p.",
    )
    samples: Count = fixed(1, description="Answers that are written to each prompt; each counts as an example.")
    prompt_tokens: Count | None = fixed(
        None,
        description="Of rows that are supervised from their beginning, such as those of format text: so many first tokens are the prompt, or all but the "
        "last of a shorter text.",
    )
    long_horizon: LongHorizon | None = fixed(
        None,
        description="A policy gradient (MiniLLM), as a term in addition to the divergence: each token of a written answer is made more or less likely by the teacher's and "
        "the student's log-probabilities of those after it. It has the weight of loss.kd_ratio; null: none.",
    )
    replay: Replay | None = fixed(
        None,
        description="Some answers are those of earlier steps, drawn from a buffer, which is kept in checkpoints (DistiLLM); null: always fresh.",
    )
    validation_prompts: Annotated[int, Field(ge=0)] = changeable(
        64,
        description="Held-out prompts that the student answers at every validation, drawn by the same numbers each time: the divergence from the teacher on "
        "its own text, the mean length and the share that ended by itself. 0: none. The training is the same with and without.",
    )
    record: Annotated[int, Field(ge=0)] = changeable(
        2,
        description="Answers written in training that are kept in samples.jsonl, to be read: so many of each of 20 steps, evenly over the run. 0: none.",
    )
    engine: LocalOrEngine = fixed(
        "local",
        description="What writes: local, the model in this process, or a server with the student's base, {server: http://host:port}, to which the student's "
        "adapter is pushed while it trains.",
    )
    batch_size: Count = changeable(
        32,
        description="Answers that one process writes at a time. It changes speed and memory, and the text by rounding alone; out of memory halves it.",
    )


def most_at(share: "float | dict[str, Any] | AdaptiveShare", step: int, total_steps: int) -> float:
    """The share in a step, or the most that it may be there."""
    return 1.0 if isinstance(share, AdaptiveShare) else value_at(share, step, total_steps)


def writes(settings: OnPolicy | None) -> bool:
    """Whether anything is written in a run, by student or teacher."""
    return settings is not None and bool(settings.share != 0 or settings.teacher_writes)


def on_policy_contradictions(
    settings: OnPolicy,
    kd_ratio,
    teacher: Teacher | tuple[Teacher, ...] | None,
    data: Data,
    max_steps: int | None,
    validation_every: int | None,
) -> Iterator[tuple[tuple[str, ...], str]]:
    """In the form of `contradictions.contradictions`. `kd_ratio`: as it will be, or a schedule."""
    here = "on_policy"
    yield from schedule_contradictions(settings.share, f"{here}.share", 0.0, 1.0, max_steps)
    if isinstance(settings.share, AdaptiveShare) and validation_every is None:
        yield (
            (f"{here}.share.adaptive", "validation.every"),
            "set without validation.every, and it rises at validations; give validation.every and held-out rows, or a number or schedule as share",
        )
    yield from _sampling_contradictions(settings)
    if settings.replay:
        yield from schedule_contradictions(settings.replay.ratio, f"{here}.replay.ratio", 0.0, 1.0, max_steps)
    if settings.replay and settings.share == 0:
        yield (f"{here}.replay", f"{here}.share"), "set, but on_policy.share is 0, so the student writes nothing; leave it out"
    if not writes(settings):
        return
    yield from _teacher_writes_contradictions(settings, teacher)
    named, who = ("share", "student") if settings.share != 0 else ("teacher_writes", "teacher")
    share, is_to = (f"{here}.{named}", here), f"the {who} is to write, but"
    if not as_tuple(teacher):
        yield (
            (*share, "teacher"),
            f"{is_to} there is no teacher for what is written; give teacher.model, or set {named}: 0",
        )
    elif kd_ratio == 0:
        yield (
            (*share, "loss.kd_ratio"),
            f"{is_to} with loss.kd_ratio 0 the student learns nothing from that; raise kd_ratio, or set {named}: 0",
        )
    for path, one in with_setting_names(teacher, "teacher"):
        if one.cache:
            yield (
                (*share, f"{path}.cache"),
                f"{is_to} {path} is a cache, which knows the data's answers alone; leave {path}.cache out, or set {named}: 0",
            )
    if data.streaming:
        yield (
            (*share, "data.streaming"),
            f"{is_to} data.streaming is true, and prompts are taken from data in memory only",
        )
    if data.train_on_input:
        yield (
            (*share, "data.train_on_input"),
            f"{is_to} with data.train_on_input prompts are not known from answers; set it to false, or {named}: 0",
        )
    if settings.max_new_tokens >= data.max_length:
        yield (
            (f"{here}.max_new_tokens", "data.max_length"),
            f"{'not given, and the default is' if settings.max_new_tokens == MAX_NEW_TOKENS else 'found'} {settings.max_new_tokens}, which leaves no room for a "
            f"prompt within data.max_length ({data.max_length}); set it to {max(1, data.max_length // 2)}, say, or raise data.max_length",
        )
    sources = with_setting_names(data.train, "data.train")
    if sources and not any(source.loss.kd for _, source in sources):
        yield (
            (*share, f"{sources[0][0]}.loss.kd"),
            f"{is_to} loss.kd of every source is 0, so the teacher has no say there",
        )
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


def _teacher_writes_contradictions(
    settings: OnPolicy, teacher: Teacher | tuple[Teacher, ...] | None
) -> Iterator[tuple[tuple[str, ...], str]]:
    here = "on_policy.teacher_writes"
    if not settings.teacher_writes:
        return
    share = settings.share
    most = max(share.get("from", 0), share.get("to", 0)) if isinstance(share, dict) else share
    if isinstance(most, int | float) and most + settings.teacher_writes > 1 + 1e-9:
        yield (
            (here, "on_policy.share"),
            f"found {settings.teacher_writes:g} with a share of {most:g}, and together they are more than all examples; lower one of them",
        )
    if len(as_tuple(teacher)) > 1:
        yield (here, "teacher"), "set with several teachers, and one writes; name one teacher, or write with llmkd roll beforehand"
    for path, one in with_setting_names(teacher, "teacher"):
        if one.server:
            yield (
                (here, f"{path}.server"),
                f"set with {path}.server; a teacher in memory writes while the student trains: write with llmkd roll teacher beforehand",
            )


def long_horizon_contradictions(
    settings: OnPolicy, loss, teacher: Teacher | tuple[Teacher, ...] | None, data: Data
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What cannot be together with on_policy.long_horizon. `loss`: the recipe's."""
    here = "on_policy.long_horizon"
    if settings.long_horizon is None:
        return
    if settings.share == 0:
        yield (here, "on_policy.share"), "set, but on_policy.share is 0, so the student writes nothing; leave it out"
    if settings.replay:
        yield (
            (here, "on_policy.replay"),
            "set with on_policy.replay; it is defined at what the student writes with its present weights: leave one of them out",
        )
    if settings.teacher_writes:
        yield (
            (here, "on_policy.teacher_writes"),
            "set with on_policy.teacher_writes, whose answers are no samples of the student; leave one of them out",
        )
    ahead = settings.long_horizon
    if ahead.teacher_mix and len(as_tuple(teacher)) > 1:
        yield (
            (f"{here}.teacher_mix", "teacher"),
            "set with several teachers, and tokens are drawn from a mixture with one; leave it out, or name one teacher",
        )
    if ahead.mix_weights != "token" and not ahead.teacher_mix:
        yield (
            (f"{here}.mix_weights", f"{here}.teacher_mix"),
            f"found {ahead.mix_weights} without teacher_mix; leave it out, or give teacher_mix",
        )
    if loss.divergence != "reverse_kl":
        yield (here, "loss.divergence"), f"set with {loss.divergence}; it is a part of the gradient of the reverse KL: use reverse_kl"
    for path, source in with_setting_names(data.train, "data.train"):
        if source.divergence not in (None, "reverse_kl"):
            yield (
                (here, f"{path}.divergence"),
                f"set with {source.divergence} in {path}; it is a part of the gradient of the reverse KL: use reverse_kl",
            )
    if loss.temperature != 1:
        yield (here, "loss.temperature"), "set with another loss.temperature than 1, at which it is not defined; use 1"
    cut = settings.temperature != 1 or settings.top_p != 1 or settings.top_k is not None or settings.min_p != 0
    if cut:
        yield (
            (here, "on_policy.temperature"),
            "set with another sampling than from the student itself; leave temperature, top_p, top_k and min_p of on_policy out",
        )
    for path, one in with_setting_names(teacher, "teacher"):
        if one.server:
            yield (
                (here, f"{path}.server"),
                f"set with {path}.server, which lists the most likely tokens alone; it needs the teacher's probability of every token: use a teacher in memory",
            )
    if isinstance(loss.kd_ratio, dict):
        yield (here, "loss.kd_ratio"), "set with a schedule of loss.kd_ratio, which is its weight too; give a number"
    if loss.normalize == "weights":
        yield (here, "loss.normalize"), "set with loss.normalize weights, which divides the divergence otherwise than it; use targets"
    for name, given in (("target_weights", loss.target_weights is not None), ("keep", loss.keep not in (None, 1))):
        if given:
            yield (here, f"loss.{name}"), f"set with loss.{name}, which weighs the divergence alone; leave one of them out"


def _sampling_contradictions(settings: OnPolicy) -> Iterator[tuple[tuple[str, ...], str]]:
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
