"""Before anything is trained: whether a teacher knows the rows that it is to teach."""

import random
from collections.abc import Sequence

import numpy as np

from .data.collate import collate
from .data.encode import Encoded
from .data.stream import Stream
from .model_files import ModelFiles
from .order import deal
from .signals import Batch
from .taught import TeacherFiles, mine_of

#: On how many it is measured what became of a teacher that is not used as it was loaded.
TARGETS = 1024
#: As torchtune's study of the reference case found (https://pytorch.org/blog/llama-into-torchtune/).
ADVICE = "Published advice: tune the teacher on the data first, as the 1_teacher.yaml of a recipe does; from a teacher that is not, the KD loss hardly moves."


def some_of(train: Encoded | Stream, count: int) -> Encoded:
    """So many training examples, the same ones for every run; of a stream, those of its first step."""
    known = _known(train)
    chosen = random.Random("gate").sample(range(len(known)), min(count, len(known)))
    return known.take(np.array(sorted(chosen), np.int64))


def some_asked(train: Encoded | Stream, teacher: int, size: int, pad: int, device) -> list[Batch]:
    """Batches of at most `size` examples that teacher number `teacher` is asked, the same ones for every run: as many as hold TARGETS."""
    known = _known(train)
    mine = mine_of(known, teacher).tolist()
    chosen = np.array(random.Random("asked").sample(mine, min(len(mine), TARGETS)), np.int64)
    if not len(chosen):
        return []
    fit = max(1, int(np.searchsorted(known.targets[chosen].cumsum(), TARGETS, side="right")))
    few = known.take(np.sort(chosen[:fit]))
    return [collate(few, examples, pad).to(device) for examples in deal(list(range(len(few))), few.lengths, size)]


def _known(train: Encoded | Stream) -> Encoded:
    return train.window if isinstance(train, Stream) else train


def verdict(figures: list[dict[str, float]], examples: int, teachers: Sequence[TeacherFiles], student: ModelFiles | None) -> str:
    """What `validate` found on the sample, for one student or several, in a line; with advice where the teacher seems not to be tuned.

    The student's own base is no teacher that anybody would tune: it has a context, or a wider number format.
    """
    teacher_ce, ce = figures[0]["teacher_ce"], min(one["ce"] for one in figures)
    found = f"gate: on {examples} training examples the teacher's CE is {teacher_ce:.4f} and the student's {ce:.4f}"
    bare = [one for one in teachers if one.files and not one.tuned]
    others = [one.settings.model for one in bare if not student or one.files.base.resolve() != student.base.resolve()]
    if teacher_ce >= ce:
        own = len(bare) == len(teachers) and not others
        advice = "It is the student's own base: what it is given beyond the student (data.teacher_context, say) does not help it here."
        return f"{found}\nwarning: the teacher knows these rows no better than the student. {advice if own else ADVICE}"
    if not others:
        return found
    return f"{found}\nnote: {others[0]} is neither an adapter nor where a run of llmkd left it; was it tuned on these rows? {ADVICE}"
