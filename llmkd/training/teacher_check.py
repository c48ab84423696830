"""Teacher check: before training, compare the cross-entropy of teacher and student on training examples."""

from collections.abc import Sequence

from ..config.fields import with_setting_names
from ..config.teacher import Teacher
from ..data.examples import Examples
from ..errors import UserError
from ..model_folder.files import ModelFiles
from ..teachers.resolve import TeacherSource

#: As torchtune's study of the reference case found (https://pytorch.org/blog/llama-into-torchtune/).
ADVICE = "Published advice: tune the teacher on the data first, as the 1_teacher.yaml of a recipe does; with an untuned teacher the KD loss hardly moves."


def message(metrics: list[dict[str, float]], examples: int, teachers: Sequence[TeacherSource], student: ModelFiles | None) -> str:
    """The result of `validate` on the sample in a line, for one student or several; with advice if the teacher seems not to be tuned.

    A teacher that is the student's own base is not expected to be tuned: it has more context, or a wider number format.
    """
    teacher_ce, ce = metrics[0]["teacher_ce"], min(one["ce"] for one in metrics)
    found = f"teacher check: on {examples} training examples the teacher's CE is {teacher_ce:.4f} and the student's {ce:.4f}"
    bare = [one for one in teachers if one.files and not one.tuned]
    others = [one.settings.model for one in bare if not student or one.files.base.resolve() != student.base.resolve()]
    if teacher_ce >= ce:
        own = len(bare) == len(teachers) and not others
        advice = "It is the student's own base: what it is given beyond the student (data.teacher_context, say) does not help it here."
        return f"{found}\nwarning: the teacher knows these rows no better than the student. {advice if own else ADVICE}"
    if not others:
        return found
    return (
        f"{found}\nnote: teacher {others[0]} looks untuned (no adapter, not an output of llmkd). Was it fine-tuned on this data? {ADVICE}"
    )


def refuse_nothing_to_learn(teacher: Teacher | tuple[Teacher, ...] | None, kd_ratio, streaming: bool, train: Examples) -> None:
    """UserError where the teacher is the student's average, begins as it, reads what it reads, and is all that the student learns from: no step
    would change anything. `train`: all examples, or those of a stream's first step."""
    for setting, one in with_setting_names(teacher, "teacher"):
        if one.ema is not None and kd_ratio == 1 and train.one_input and not streaming:
            raise UserError(
                f"{setting}.ema: set with loss.kd_ratio 1 and rows without a teacher_context: the teacher begins as the student and says what the student says, so nothing "
                "is learnt; give rows a teacher_context, or lower loss.kd_ratio"
            )
