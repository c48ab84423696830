"""Settings of on-policy distillation: the student writes answers itself, and learns from the teacher there. A part of `recipe.py`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .engine import LocalOrEngine
from .fields import Count, changeable, config_dataclass, fixed
from .schedule import value_at

MAX_NEW_TOKENS = 128


@config_dataclass
class LongHorizon:
    """MiniLLM's second part: a token answers for the divergence that it leads to."""

    gamma: float = fixed(
        0.95,
        gt=0,
        le=1,
        description="Discount of later rewards: for token t, the reward of a later token s counts gamma^(s - t - 1), so the next one counts "
        "fully.",
    )
    length_normalized: bool = fixed(
        True,
        description="Divide by the number of later tokens, so that long answers are not preferred to short ones. With false and gamma 1 the loss "
        "has the gradient of the reverse KL of whole answers.",
    )
    rewards: Literal["sampled", "exact"] = fixed(
        "sampled",
        description="Reward of a later token. sampled: the teacher's log-probability of it minus the student's (MiniLLM), for reverse_kl at "
        "temperature 1. exact: minus the divergence at its position, as in the loss, with less variance and for any divergence, "
        "temperature and weight.",
    )
    teacher_mix: float = fixed(
        0.0,
        ge=0,
        lt=1,
        description="Share of the teacher in sampling: each token is drawn from this share of the teacher's distribution and the rest of the "
        "student's, which keeps weak students from meaningless text (MiniLLM: 0.2). Importance weights correct for it.",
    )
    mix_weights: Literal["token", "product"] = fixed(
        "token",
        description="Importance weights with teacher_mix. token: of each token alone (MiniLLM); prefixes and later tokens are still those of the "
        "mixed distribution. product: of all tokens up to it, in both parts; the expected gradient is that without teacher_mix, but "
        "its variance grows with the length of the answers.",
    )


@config_dataclass
class Adaptive:
    """DistiLLM's rule: the student writes more when held-out rows say that it gets worse."""

    start: float = fixed(0.0, ge=0, le=1, description="The share until the first rise.")
    step: float = fixed(0.1, gt=0, le=1, description="Increase at each rise, up to a share of 1.")
    tolerance: float = fixed(
        0.1,
        ge=0,
        le=1e6,
        description="The share rises at a validation whose cross-entropy exceeds that at the last rise by this or more (at first, that of the "
        "validation before training).",
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

    capacity: Count = fixed(1000, description="Number of answers in the buffer, the newest ones. Until it is full, every answer is fresh.")
    ratio: FreshShare = fixed(
        "decreasing",
        description="Share of fresh answers once the buffer is full. They enter the buffer; the others are drawn from it. A number, a schedule as"
        " for loss.kd_ratio, or decreasing, which is {from: 1, to: 0}.",
    )


@config_dataclass
class OnPolicy:
    """The answers of some examples are replaced by what the student writes at that moment; they have no cross-entropy."""

    share: Share = fixed(
        0.5,
        description="Share of the examples of a step whose answers the student writes itself (GKD's lambda), drawn by seed, step and example. 0: "
        "none, as without on_policy. Or a schedule, as for loss.kd_ratio; or {adaptive: {}}, which rises when validation gets worse.",
    )
    teacher_writes: float = fixed(
        0.0,
        ge=0,
        le=1,
        description="Share of the examples of a step whose answers the teacher writes at that moment (sequence-level distillation), in addition "
        "to share, which the student writes. These answers have no cross-entropy either: the divergence on the teacher's own text is "
        "its expectation.",
    )
    max_new_tokens: Count = fixed(
        MAX_NEW_TOKENS,
        description="Longest written answer, in tokens. An example whose prompt leaves less room than that within data.max_length keeps the "
        "data's answer.",
    )
    temperature: float = fixed(
        1.0, ge=0, le=1000, description="Sampling temperature (independent of loss.temperature). 0: always the most likely token."
    )
    top_p: float = fixed(
        1.0,
        gt=0,
        le=1,
        description="Sample from the fewest tokens that have this share of the probability. Below 1 the text is not a sample of the student.",
    )
    top_k: Count | None = fixed(None, description="Sample from the k most likely tokens, before top_p; null: from all.")
    min_p: float = fixed(
        0.0,
        ge=0,
        le=1,
        description="Sample from tokens that are at least min_p times as likely as the most likely one, after top_k and top_p.",
    )
    samples: Count = fixed(1, description="Answers per prompt; each counts as an example.")
    prompt_tokens: Count | None = fixed(
        None,
        description="For rows that are supervised from their beginning, such as format text: number of first tokens that are the prompt. Of a "
        "shorter text all but the last token.",
    )
    long_horizon: LongHorizon | None = fixed(
        None,
        description="A policy gradient (MiniLLM), a term in addition to the divergence: each token of a written answer is made more or less "
        "likely according to the teacher's and the student's log-probabilities of the later tokens. Its weight is loss.kd_ratio; "
        "null: none.",
    )
    replay: Replay | None = fixed(
        None,
        description="Draw some answers from a buffer of earlier steps, which is in the checkpoints (DistiLLM); null: always fresh.",
    )
    validation_prompts: Annotated[int, Field(ge=0)] = changeable(
        64,
        description="Number of held-out prompts that the student answers at every validation, with the same random numbers each time, to measure "
        "the divergence from the teacher on its own text, the mean length and the share that ended by itself. 0: none. It does not "
        "change the training.",
    )
    record: Annotated[int, Field(ge=0)] = changeable(
        2,
        description="Number of written answers that samples.jsonl keeps of each of 20 steps, evenly over the run. 0: none.",
    )
    engine: LocalOrEngine = fixed(
        "local",
        description="What writes. local: the model in this process. Or a server with the student's base, {server: http://host:port}, to which the"
        " student's adapter is pushed during training.",
    )
    batch_size: Count = changeable(
        32,
        description="Answers that one process writes at a time. It changes speed and memory, and the text only by rounding. Running out of memory"
        " halves it.",
    )


def most_at(share: "float | dict[str, Any] | AdaptiveShare", step: int, total_steps: int) -> float:
    """The share in a step, or its upper bound there."""
    return 1.0 if isinstance(share, AdaptiveShare) else value_at(share, step, total_steps)


def writes(settings: OnPolicy | None) -> bool:
    """Whether student or teacher write anything in a run."""
    return settings is not None and bool(settings.share != 0 or settings.teacher_writes)
