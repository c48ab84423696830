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

    gamma: float = fixed(0.95, gt=0, le=1, description="Discount: of the divergence so many tokens later this to that power counts.")
    length_normalized: bool = fixed(
        True,
        description="Divide by the number of later tokens, so that long answers are not preferred to short ones. false with gamma 1: the loss then has the "
        "gradient of the reverse KL of whole answers.",
    )
    rewards: Literal["sampled", "exact"] = fixed(
        "sampled",
        description="What a later token brings. sampled: the teacher's log-probability of it minus the student's (MiniLLM), for reverse_kl at temperature 1. exact: minus the "
        "divergence at its position, whole, as it stands in the loss: less variance, and any divergence, temperature and weight.",
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
        le=1e6,
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
        1.0, ge=0, le=1000, description="Temperature of sampling; loss.temperature is another. 0: always the most likely token."
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
