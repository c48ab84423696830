"""Puts the models of an on-policy run to writing: the student, alone or mixed with its teacher, and the teacher."""

from collections.abc import Sequence

from ..config.on_policy import OnPolicy
from ..data.batch_source import TrainingSource
from ..models.language_model import LanguageModel
from ..rollouts.generate import Mix, stops_of
from ..rollouts.source import OnPolicySource
from ..rollouts.writer import LocalWriter
from .own_text import OwnText
from .prepare import Prepared


def local_writer(model: LanguageModel, prepared: Prepared, batch_size: int, mix: Mix | None = None) -> LocalWriter:
    """A model as a writer: its answers end where those of the data do, and where its own generation would. `mix`: another that has a say in them."""
    return LocalWriter(model, {prepared.tokenizer.eos_token_id, *stops_of(model), *prepared.end_tokens}, batch_size, mix)


def on_policy_source(
    source: TrainingSource, prepared: Prepared, settings: OnPolicy, student: LanguageModel, teachers: Sequence[LanguageModel]
) -> tuple[OnPolicySource, OwnText | None]:
    """The source in which some answers are written, and the answers to held-out prompts, where there are some; these are the student's alone."""
    size, ahead = settings.batch_size, settings.long_horizon
    mix = Mix(teachers[0], ahead.teacher_mix) if ahead and ahead.teacher_mix else None
    by_teacher = local_writer(teachers[0], prepared, size) if settings.teacher_writes else None
    written = OnPolicySource(source, prepared.prompts, local_writer(student, prepared, size, mix), settings, prepared.vocab, by_teacher)
    held_out = prepared.validation_prompts
    if not held_out or not held_out.may.any():
        return written, None
    alone = local_writer(student, prepared, size)
    return written, OwnText.of(prepared.validation, held_out, settings.validation_prompts, alone, written.sampling)
