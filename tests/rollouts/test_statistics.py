"""Numbers of what a student has written, and the warnings where it is of little use."""

import math

import pytest

from llmkd.rollouts.generate import Completion
from llmkd.rollouts.statistics import WINDOW, Statistics, Watch, loops

END = 9


def answers(*lengths: int, finished: bool = True, entropy: float | None = 0.5) -> list[Completion]:
    return [Completion((*range(10, 9 + n), END) if finished else tuple(range(10, 10 + n)), finished, entropy) for n in lengths]


def test_the_numbers_of_the_answers_since_the_last_time():
    found = Statistics()
    assert found.read() == {}
    found.add([*answers(1, 4), *answers(3, finished=False, entropy=2.0), Completion((), False)], 2.0)
    found.add(answers(2, entropy=None), 0.5)
    assert found.read() == {
        "written": 5,
        "written_cut_off": 2,
        "written_empty": 2,  # the end alone, and nothing
        "written_finished": 3 / 5,
        "written_length": 10 / 5,
        "written_entropy": pytest.approx((1 * 0.5 + 4 * 0.5 + 3 * 2.0) / 8),
        "written_tokens_per_s": 4.0,
        "written_seconds": 2.5,
    }
    assert found.read() == {}
    found.add(answers(2, entropy=None), 0.5)
    assert "written_entropy" not in found.read()
    by_server = {"apart": (0.2, 0.5, None), "weights": ((1.0, 3.0), (1.0,), None), "staleness": (1, 2, 2)}
    found.add([Completion((7,) * n, False, **{name: own[i] for name, own in by_server.items()}) for i, n in enumerate((2, 1, 5))], 1.0)
    told = found.read()
    assert (told["written_apart"], told["written_weight"], told["written_staleness"]) == pytest.approx(((2 * 0.2 + 0.5) / 3, 5 / 3, 5 / 3))


def said(watch: Watch, *windows: list[Completion]) -> list[list[str]]:
    return [[text.split(": ")[2].split(",")[0] for text in watch.add(window)] for window in windows]


def test_a_student_that_knows_nothing_is_warned_of_at_the_start_alone():
    at_random = answers(*[5] * WINDOW, entropy=0.8 * math.log(100))
    assert said(Watch(50, 100), at_random, at_random) == [
        ["at the start the student writes almost at random (entropy 3.68 of at most 4.61 nats per token)"],
        [],
    ]
    assert said(Watch(50, 100), answers(*[5] * WINDOW), at_random) == [[], []]
    assert said(Watch(50, 100), answers(*[5] * WINDOW, entropy=None), answers(*[5] * (WINDOW - 1), entropy=9.0)) == [[], []]


def test_an_untuned_student_is_warned_of_and_a_tuned_one_is_not():
    """Figures of the quickstart's models: the base as it comes, after 6 steps of fine-tuning, and after 96."""
    rambling = [*answers(*[7] * 8), *answers(*[24] * 56, finished=False)]
    for behind, wrote, known in ((1.09, rambling, False), (0.39, answers(*[7] * WINDOW), True), (0.28, answers(*[6] * WINDOW), True)):
        watch = Watch(24, 300)
        watch.checked(0.5 + behind, 0.5)
        first, second = said(watch, wrote, rambling)
        assert (first == []) == known and not any("does not know" in text for text in second), "at the start alone"
    assert said(Watch(24, 300), rambling) == [[]], "without a teacher check nothing is known"
    watch = Watch(24, 300)
    watch.checked(0.9, 0.5)  # it knows the data's answers nearly as well, and writes longer ones: it reasons first, say
    assert said(watch, rambling) == [[]]
    watch = Watch(24, 300, 0.2)  # the data's answers are too long themselves
    watch.checked(2.0, 0.5)
    assert said(watch, rambling) == [[]]
    watch = Watch(24, 300)
    watch.checked(2.0, 0.5)
    assert said(watch, answers(*[1] * WINDOW))[0][0].startswith("at the start the student does not know the task"), "ends at once"
    watch = Watch(24, 300)
    watch.checked(2.0, 0.5)
    assert len(said(watch, answers(*[24] * WINDOW, finished=False))[0]) == 1, "that none ends is a part of it"


def test_text_that_the_teacher_finds_as_unlikely_as_random_tokens_is_warned_of():
    sure, unlikely, likely = 0.3 * math.log(100), {"own_reverse_kl": 0.5 * math.log(100)}, {"own_reverse_kl": 0.4 * math.log(100)}
    watch = Watch(50, 100)
    assert watch.validated({"ce": 1.0}) == watch.validated({"own_entropy": sure} | likely) == []
    (text,) = watch.validated({"own_entropy": sure} | unlikely)
    assert "the student's text is almost as unlikely to the teacher as random tokens (3.68 nats per token; random ones have 4.61)" in text
    assert watch.validated({"own_entropy": sure} | unlikely) == [], "once"
    watch = Watch(50, 100)
    watch.add(answers(5))
    assert watch.validated({"own_entropy": sure} | unlikely) == [], "at the start alone"


def test_answers_that_never_end_are_warned_of_once():
    never = answers(*[7] * WINDOW, finished=False)
    one = [*never[1:], *answers(7)]
    assert said(Watch(7, 100), one, never, never) == [[], ["none of the last 64 answers ended within on_policy.max_new_tokens (7)"], []]


def test_lengths_that_drift_are_warned_of():
    ten, fifteen, twenty, four = (answers(*[n] * WINDOW) for n in (10, 15, 21, 4))
    assert said(Watch(50, 100), ten, fifteen, twenty) == [[], [], ["the answers have become longer"]]
    assert said(Watch(50, 100), ten, four) == [[], ["the answers have become shorter"]]
    assert said(Watch(50, 100), answers(*[2] * WINDOW), answers(*[5] * WINDOW)) == [[], []], "three tokens are no drift"


def test_answers_that_repeat_themselves_are_warned_of():
    assert loops([5] * 24) and loops([1, 2, 3] * 9) and loops([9, 9, 7, *[1, 2, 3, 4, 5, 6, 7, 8] * 3])
    assert not loops([5] * 23) and not loops([1, 2, 3, 4, 5, 6, 7, 8, 9] * 4) and not loops([*[5] * 24, 6]) and not loops(range(60))
    half = [Completion((5,) * 30, False)] * (WINDOW // 2)
    assert said(Watch(50, 100), [*half, *answers(*[30] * (WINDOW // 2))]) == [[]]
    assert said(Watch(50, 100), [*half, Completion((5,) * 30, False), *answers(*[30] * (WINDOW // 2 - 1))]) == [
        ["most of the last 64 answers repeat themselves to their end; train on the data first"]
    ]
