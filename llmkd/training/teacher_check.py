"""Teacher check: before training, the cross-entropy of teacher and student on training examples is compared."""

from collections.abc import Sequence

from ..config.fields import with_setting_names
from ..config.teacher import Teacher
from ..data.examples import Examples
from ..errors import UserError
from ..model_folder.files import ModelFiles
from ..teachers.resolve import TeacherSource

#: A finding of torchtune's study (https://pytorch.org/blog/llama-into-torchtune/).
ADVICE = "Published advice: tune the teacher on the data first, as the 1_teacher.yaml of a recipe does; with an untuned teacher the KD loss hardly moves."


def message(metrics: list[dict[str, float]], examples: int, teachers: Sequence[TeacherSource], student: ModelFiles | None) -> str:
    """The result of the check in a line, with advice if the teacher seems untuned or is no better than the student.

    A teacher that is the student's own base need not be tuned: it has more context, or a wider number format.

    metrics   those of each student on the sample
    examples  the size of the sample
    """
    teacher_ce, ce = metrics[0]["teacher_ce"], min(one["ce"] for one in metrics)
    found = f"teacher check: on {examples} training examples the teacher's CE is {teacher_ce:.4f} and the student's {ce:.4f}"
    bare = [one for one in teachers if one.files and not one.tuned]
    others = [one.settings.model for one in bare if not student or one.files.base.resolve() != student.base.resolve()]
    if teacher_ce >= ce:
        own = len(bare) == len(teachers) and not others
        advice = "It is the student's own base: what it has beyond the student (such as data.teacher_context) does not help it here."
        return f"{found}\nwarning: the teacher predicts these rows no better than the student. {advice if own else ADVICE}"
    if not others:
        return found
    return (
        f"{found}\nnote: teacher {others[0]} looks untuned (no adapter, not an output of llmkd). Was it fine-tuned on this data? {ADVICE}"
    )


def refuse_nothing_to_learn(teacher: Teacher | tuple[Teacher, ...] | None, kd_ratio, streaming: bool, train: Examples) -> None:
    """UserError if the student learns only from its own moving average with the same inputs: both start equal, so no step would change anything.

    train   all examples, or those of a stream's first step
    """
    for setting, one in with_setting_names(teacher, "teacher"):
        if one.ema is not None and kd_ratio == 1 and train.one_input and not streaming:
            raise UserError(
                f"{setting}.ema: set with loss.kd_ratio 1 and rows without a teacher_context: the teacher starts as a copy of the student and reads the "
                "same, so nothing is learnt; give rows a teacher_context, or lower loss.kd_ratio"
            )
