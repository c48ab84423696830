"""Settings of the rules that weight or choose targets by the models' outputs there. A part of `recipe.py`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from .data import Data
from .fields import as_tuple, config_dataclass, fixed, with_setting_names
from .teacher import Teacher

#: {rule: whether it reads the teacher's distribution}. `losses/target_weights.py` has the functions, and is where to add rules.
RULES: dict[str, bool] = {"teacher_entropy": True, "student_entropy": False, "divergence": True, "confidence": False, "position": False}
#: The rules that do not read a target's token, so that its score is known before the token is.
BEFORE_THE_TARGET = frozenset(RULES) - {"confidence"}
#: {kind of cache: the rules that read the teacher and have their scores in it}; None for all of them. An imported cache of kind topk has none.
IN_CACHES: dict[str, tuple[str, ...] | None] = {"hidden": None, "topk": ("teacher_entropy",), "sampled": ("teacher_entropy",)}


@config_dataclass
class TargetWeights:
    """A weight w in [0, 1] of every target, from a score s in [0, 1]: w = s^power, or (1 - s)^power with `invert`."""

    by: str = fixed(
        description="The score of a target, 0 to 1, always at temperature 1. teacher_entropy, student_entropy: the entropy of that model's "
        "distribution, divided by the logarithm of the vocabulary's size; divergence: the Hellinger distance of the two distributions; confidence: 1 "
        "minus the student's probability of the target; position: 1 at the first target of an example, halved every half_life targets. Or a rule "
        "registered from Python."
    )
    power: float = fixed(1.0, ge=0.01, le=100, description="The weight is the score to this power.")
    invert: bool = fixed(False, description="Use 1 - score, so that targets with low scores count most.")
    half_life: float | None = fixed(None, ge=0.01, le=1e6, description="position: number of targets after which the score is halved (64).")
    terms: Annotated[tuple[Literal["ce", "kd"], ...], Field(min_length=1)] = fixed(
        ("kd",), description="Terms to which the weights apply: kd, ce, or both."
    )


@config_dataclass
class Keep:
    """Of the n targets of every example, the ceil(share n) with the highest scores; of equal scores the earlier ones."""

    share: float = fixed(gt=0, le=1, description="Share of an example's targets that are kept, rounded up.")
    by: str | None = fixed(
        None, description="The score, as for target_weights. null: that of target_weights, or student_entropy without one."
    )
    invert: bool | None = fixed(
        None, description="Keep the targets with the lowest scores. null: the value in target_weights if its score is used, else false."
    )


#: A share, or settings. The tags make pydantic report the errors of the given form alone.
KeepOrShare = Annotated[
    Annotated[float, Field(gt=0, le=1), Tag("share")] | Annotated[Keep, Tag("settings")],
    Discriminator(lambda value: "settings" if isinstance(value, dict | Keep) else "share"),
]


def chosen_by(keep: float | Keep, weights: TargetWeights | None) -> Keep:
    """`loss.keep` with every setting given, as it is with `loss.target_weights`."""
    keep = keep if isinstance(keep, Keep) else Keep(share=keep)
    own = keep.by is not None or weights is None
    by, invert = (keep.by or "student_entropy", False) if own else (weights.by, weights.invert)
    return Keep(share=keep.share, by=by, invert=invert if keep.invert is None else keep.invert)


def rules_in_use(keep: float | Keep, weights: TargetWeights | None) -> list[tuple[str, str]]:
    """(setting, rule) of every rule that a run uses."""
    chosen = chosen_by(keep, weights)
    found = [("loss.target_weights.by", weights.by)] if weights else []
    if chosen.share < 1 and (isinstance(keep, Keep) and keep.by is not None or weights is None):
        found.append(("loss.keep.by" if isinstance(keep, Keep) else "loss.keep", chosen.by))
    return found


def unusable_cache(setting: str, by: str, kind: str, entropy: bool = True) -> str:
    """Why a rule, named by `setting`, cannot be used with a cache of that kind; "" if it can. `entropy`: whether the cache has entropies."""
    if not RULES.get(by):
        return ""
    held = IN_CACHES[kind]
    if held is None or (entropy and by in held):
        return ""
    which = f"kind {kind}" if entropy else f"kind {kind} that was imported"
    return (
        f"{setting}: found {by}, which needs the teacher's whole distribution, and a cache of {which} holds a part of it; "
        "use a cache of kind hidden, a teacher without a cache, or a rule that reads the student alone"
    )


def keep_contradictions(
    settings: float | Keep,
    weights: TargetWeights | None,
    kd_ratio,
    teacher: Teacher | tuple[Teacher, ...] | None,
    data: Data,
) -> Iterator[tuple[tuple[str, ...], str]]:
    """In the form of `contradictions.contradictions`. `kd_ratio`: as it will be, or a schedule."""
    here, chosen = "loss.keep", chosen_by(settings, weights)
    if chosen.by not in RULES:
        if isinstance(settings, Keep) and settings.by is not None:
            yield (f"{here}.by",), f"found {chosen.by!r}, expected one of: {', '.join(RULES)}"
        return
    if chosen.share == 1:
        return
    if RULES[chosen.by]:
        named = f"{here}.by" if isinstance(settings, Keep) else here
        if (named, chosen.by) in rules_in_use(settings, weights):  # else target_weights reports it
            yield from _teacher_contradictions(named, chosen.by, kd_ratio, teacher)
        for path, source in with_setting_names(data.train, "data.train"):
            if not source.loss.kd:
                yield (
                    (named, f"{path}.loss.kd"),
                    f"found {chosen.by}, but {path}.loss.kd is 0, so that no teacher is asked there; use a rule that reads the student",
                )


def target_weight_contradictions(
    settings: TargetWeights, kd_ratio, teacher: Teacher | tuple[Teacher, ...] | None, data: Data
) -> Iterator[tuple[tuple[str, ...], str]]:
    """In the form of `contradictions.contradictions`. `kd_ratio`: as it will be, or a schedule."""
    here = "loss.target_weights"
    if settings.by not in RULES:
        yield (f"{here}.by",), f"found {settings.by!r}, expected one of: {', '.join(RULES)}"
        return
    if settings.half_life is not None and settings.by != "position":
        yield (f"{here}.half_life", f"{here}.by"), f"belongs to by: position, but by is {settings.by}; leave it out"
    if len(set(settings.terms)) < len(settings.terms):
        yield (f"{here}.terms",), f"found {list(settings.terms)}, expected each term once"
    for term, without in (("kd", 0), ("ce", 1)):
        if term in settings.terms and kd_ratio == without:
            fix = f"leave {term} out of terms" if len(settings.terms) > 1 else f"name {'ce' if term == 'kd' else 'kd'} in terms"
            yield (
                (f"{here}.terms", "loss.kd_ratio"),
                f"found {term}, and with loss.kd_ratio {without} the loss has no such term; {fix}, or set another kd_ratio",
            )
    if RULES[settings.by]:
        yield from _teacher_contradictions(f"{here}.by", settings.by, kd_ratio, teacher)
        if as_tuple(teacher) and kd_ratio != 0:
            for path, source in with_setting_names(data.train, "data.train"):
                if "ce" in settings.terms and not source.loss.kd:
                    yield (
                        (f"{here}.by", f"{path}.loss.kd", f"{here}.terms"),
                        f"found {settings.by} for ce, but {path}.loss.kd is 0, so that no teacher is asked there; leave ce out of terms",
                    )


def _teacher_contradictions(setting: str, by: str, kd_ratio, teacher) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of a rule that reads the teacher, named by that setting."""
    if not as_tuple(teacher) or kd_ratio == 0:
        found = "loss.kd_ratio 0" if as_tuple(teacher) else "no teacher"
        yield (
            (setting, "loss.kd_ratio", "teacher"),
            f"found {by}, which reads the teacher, with {found}; use a rule that reads the student",
        )
        return
    for path, one in with_setting_names(teacher, "teacher"):
        if one.server:
            yield (
                (setting, f"{path}.server"),
                f"found {by}, which needs the teacher's whole distribution, and a server gives its most likely tokens only; name the teacher as "
                "model, or use a rule that reads the student alone",
            )
        elif one.cache and one.cache.kind != "hidden" and len(as_tuple(teacher)) > 1:
            yield (
                (setting, f"{path}.cache.kind"),
                f"found {by}, which needs the distribution of several teachers together, with {path}.cache; set {path}.cache.kind: hidden, "
                "or use a rule that reads the student",
            )
        elif one.cache and one.cache.kind and (problem := unusable_cache(setting, by, one.cache.kind)):
            yield (setting, f"{path}.cache.kind"), problem.removeprefix(f"{setting}: ")
