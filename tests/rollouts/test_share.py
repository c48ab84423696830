"""The share that the student writes where it adapts to validation, by DistiLLM's rule."""

import pytest

from llmkd.config.on_policy import Adaptive, AdaptiveShare
from llmkd.rollouts.share import Share

SETTING = AdaptiveShare(Adaptive(start=0.25, step=0.3, tolerance=0.1))


def test_it_rises_where_validation_is_as_much_worse_than_at_the_last_rise():
    share, found = Share(SETTING, 100), []
    for ce in (3.0, 3.05, 2.0, 3.0999, 3.1, 3.15, 2.5, 3.25, 3.34, 9.0, 10.0):
        share.validated(ce)
        found.append(share.at(7))
    rises = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4]  # above 3.0, then 3.1, then 3.25, then 9.0
    assert found == [min(1.0, 0.25 + 0.3 * n) for n in rises] and found[-1] == 1 and share.at(0) == share.at(100)
    share.validated(float("nan"))
    assert share.rises == 4


def test_a_checkpoint_has_it_and_another_one_is_refused():
    share, other = Share(SETTING, 100), Share(SETTING, 100)
    for ce in (1.0, 2.0):
        share.validated(ce)
    other.restore({"step": 3, **share.state()})
    for one in (share, other):
        one.validated(2.09)
        assert one.at(1) == 0.25 + 0.3
        one.validated(2.1)
        assert one.at(1) == 0.25 + 0.6
    for state in ({}, {"share": None}, {"share": {"rises": "a"}}):
        with pytest.raises(ValueError, match="it does not say how large the adaptive on_policy.share was"):
            other.restore(state)


def test_a_number_and_a_schedule_do_not_adapt():
    for setting, at in ((0.5, 0.5), ({"from": 0.0, "to": 1.0}, 0.2)):
        share = Share(setting, 101)
        share.validated(1.0)
        share.validated(9.0)
        assert share.at(21) == pytest.approx(at) and share.state() == {} and share.changes == (setting != 0.5)
