"""Teacher check: before training, compare the cross-entropy of teacher and student on training examples."""

from collections.abc import Sequence

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
