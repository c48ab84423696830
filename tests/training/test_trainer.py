"""What the trainer does before, after and between steps, with parts that record their calls."""

from types import SimpleNamespace

import pytest

from llmkd.config.recipe import Checkpoint, Train, Validation
from llmkd.errors import NonFinite
from llmkd.training.loop import Progress
from llmkd.training.trainer import Trainer, TrainerSettings

TOTAL = 4


def trainer(
    done: int = 0, read: bool = True, alone: tuple[bool, ...] = (True,), failed: bool = False, stop: bool = False
) -> SimpleNamespace:
    """Everything that these methods use; `asked` lists what they asked for, in order."""
    asked = []
    folder = SimpleNamespace(path=SimpleNamespace(name="out"))
    students = [SimpleNamespace(state=SimpleNamespace(strategy=SimpleNamespace(alone=one)), failure="", folder=folder) for one in alone]
    settings = TrainerSettings(Train(), Validation(), Checkpoint(every=1))
    return SimpleNamespace(
        asked=asked,
        settings=settings,
        students=students,
        done=done,
        step=2,
        main=False,
        active=[] if failed else students,
        source=SimpleNamespace(total_steps=TOTAL),
        stop=SimpleNamespace(any_rank=lambda accelerator: stop),
        accelerator=None,
        is_read=lambda step: read,
        fail=lambda student, error: asked.append("fail"),
        check_teacher=lambda: asked.append("teacher check"),
        show=lambda progress, last: asked.append("show"),
        validate=lambda step: asked.append(f"validate {step}"),
        save=lambda step: asked.append(f"save {step}"),
        write_checkpoint=lambda step: asked.append(f"write {step}"),
        stopped=lambda step: RuntimeError(f"stopped {step}"),
    )


@pytest.mark.parametrize(("done", "asked"), [(0, ["teacher check", "validate 0"]), (2, []), (TOTAL, [f"validate {TOTAL}"])])
def test_a_run_that_has_its_last_checkpoint_alone_is_still_validated(done, asked):
    one = trainer(done)
    Trainer.begin(one)
    assert one.asked == asked


def test_a_step_after_which_no_student_is_left_is_neither_saved_nor_a_stop():
    progress = Progress(step=2, epoch=0, num_targets=3, stop=True, failures={0: NonFinite(2, "loss", [])})
    one = trainer(failed=True)
    Trainer.after_step(one, progress)
    assert one.asked == ["fail", "show"]
    one = trainer()
    with pytest.raises(RuntimeError, match="stopped 2"):
        Trainer.after_step(one, progress)
    assert one.asked == ["fail", "show", "save 2"]


@pytest.mark.parametrize(
    ("read", "alone", "written"), [(True, (True, True), ["write 2"]), (False, (True, True), []), (True, (True, False), [])]
)
def test_after_an_error_the_last_step_is_saved_if_it_is_known_to_be_finite_and_each_process_can_save_alone(read, alone, written):
    one = trainer(read=read, alone=alone)
    Trainer.save_after_error(one)
    assert one.asked == written
