"""Writers of an on-policy run: the student, alone or mixed with its teachers, and the teachers themselves."""

import functools
from collections.abc import Sequence

from ..config.on_policy import OnPolicy
from ..config.teacher import Mixture
from ..data.batch_source import TrainingSource
from ..data.examples import ALL_TEACHERS
from ..models.language_model import LanguageModel
from ..rollouts import draw
from ..rollouts.generate import Mix, stops_of
from ..rollouts.source import OnPolicySource
from ..rollouts.writer import LocalWriter
from .own_text import OwnText
from .prepare import Prepared


def local_writer(model: LanguageModel, prepared: Prepared, batch_size: int, mix: Mix | None = None) -> LocalWriter:
    """A model as a writer, whose answers end at the end tokens of the data and of its own generation settings.

    mix   other models with which it writes together
    """
    return LocalWriter(model, {prepared.tokenizer.eos_token_id, *stops_of(model), *prepared.end_tokens}, batch_size, mix)


def on_policy_source(
    source: TrainingSource,
    prepared: Prepared,
    settings: OnPolicy,
    mixture: Mixture,
    student: LanguageModel,
    teachers: Sequence[LanguageModel],
) -> tuple[OnPolicySource, OwnText | None]:
    """`source` with some answers written anew, and the student's own answers to held-out prompts for validation; None without such prompts.

    teachers  those in memory, in the order of the recipe
    """
    size, ahead = settings.batch_size, settings.long_horizon
    weights = [one.settings.weight for one in prepared.teachers]
    combined = {"weights": [w / sum(weights) for w in weights], "geometric": mixture.combine == "log_probabilities"}
    mix, by_teachers = None, {}
    if ahead and ahead.teacher_mix:
        mix = Mix(tuple(teachers), functools.partial(draw.with_share, share=ahead.teacher_mix, **combined))
    if settings.teacher_writes:
        by_teachers = {k: local_writer(model, prepared, size) for k, model in enumerate(teachers)}
        whole = Mix(tuple(teachers[1:]), functools.partial(draw.together, **combined), whole=True)
        by_teachers[ALL_TEACHERS] = local_writer(teachers[0], prepared, size, whole) if len(teachers) > 1 else by_teachers[0]
    written = OnPolicySource(source, prepared.prompts, local_writer(student, prepared, size, mix), settings, prepared.vocab, by_teachers)
    held_out = prepared.validation_prompts
    if not held_out or not held_out.may.any():
        return written, None
    alone = local_writer(student, prepared, size)
    return written, OwnText.of(prepared.validation, held_out, settings.validation_prompts, alone, written.sampling)
