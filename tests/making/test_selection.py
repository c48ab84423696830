"""Selection by scores, worked by hand, and every case of reflection's rule."""

import random

import pytest

from llmkd.making.selection import ByScore, reflection


def stay(rule: ByScore, scores, clusters=None, keys=None) -> list[int]:
    reasons = rule.choose(scores, keys or [f"{i:03}" for i in range(len(scores))], clusters)
    return [i for i, reason in enumerate(reasons) if reason is None]


def test_limits_are_not_included_and_the_reason_has_the_score():
    assert stay(ByScore(above=0.5, below=1), [0.5, 0.6, 1.0, 0.9, 2]) == [1, 3]
    assert ByScore(below=1).choose([1.0], ["a"]) == [("not_below", "1, not below 1")]
    assert ByScore(above=1).choose([0.25], ["a"]) == [("not_above", "0.25, not above 1")]


def test_the_top_share_is_of_the_rows_within_the_limits_and_at_least_one():
    scores = [0.1, 0.9, 0.5, 0.7, 1.5]
    assert stay(ByScore(below=1, top=0.5), scores) == [1, 3]
    assert stay(ByScore(top=0.01), scores) == [4]
    assert stay(ByScore(top=0.5), [0, 1, 0, 1, 0, 3], [7, 7, 7, 8, 8, 8]) == [1, 2, 3, 5]  # two of three in each; equal scores by key
    assert ByScore(top=0.07).choose(list(range(100)), [""] * 100).count(None) == 7


def test_the_middle_of_each_cluster_and_so_many_of_it():
    scores = [8, 1, 7, 2, 6, 3, 5, 4]
    assert stay(ByScore(middle=(0.25, 0.75)), scores) == [4, 5, 6, 7]  # 3 to 6
    assert stay(ByScore(middle=(0.25, 0.75)), scores, [0, 0, 0, 0, 1, 1, 1, 1]) == [2, 3, 6, 7]
    assert stay(ByScore(per_cluster=2), scores) == [2, 5]  # the third and the seventh of eight: 3 and 7
    assert stay(ByScore(per_cluster=9), scores) == list(range(8))
    assert ByScore(middle=(0.25, 0.75), per_cluster=1).choose([1, 2, 3, 4], list("abcd")) == [
        ("outside_the_middle", ""),
        ("enough_of_its_cluster", ""),
        None,
        ("outside_the_middle", ""),
    ]


def test_the_order_of_the_rows_does_not_matter_even_between_equal_scores():
    draw = random.Random(0)
    rows = [(draw.choice([1.0, 2.0, 3.0]), f"{i}", draw.randrange(3)) for i in range(40)]
    rule, found = ByScore(above=0, top=0.9, middle=(0.1, 0.8), per_cluster=5), set()
    for _ in range(3):
        draw.shuffle(rows)
        found.add(frozenset(rows[i][1] for i in stay(rule, [row[0] for row in rows], [row[2] for row in rows], [row[1] for row in rows])))
    assert len(found) == 1 and len(next(iter(found))) == 15


#: IFD rises; r-IFD falls; the IFD of the chosen pair is below 1; its r-IFD is: the version, whether it stays, and whether without originals.
CASES = {
    "1111": ("both", True, True),
    "1110": ("both", False, False),
    "1101": ("both", False, False),
    "1100": ("both", False, False),
    "1011": ("instruction", True, False),
    "1010": ("instruction", False, False),
    "1001": ("instruction", False, False),
    "1000": ("instruction", False, False),
    "0111": ("response", True, True),
    "0110": ("response", False, False),
    "0101": ("response", False, False),
    "0100": ("response", False, False),
    "0011": ("original", True, False),
    "0010": ("original", False, False),
    "0001": ("original", False, False),
    "0000": ("original", False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_all_cases_of_the_rule_of_reflection(case):
    rises, falls, ifd_below, r_ifd_below = (mark == "1" for mark in case)
    chosen, stays, stays_without = CASES[case]
    good, bad = 0.6, 1.3
    ifd = dict.fromkeys(("original", "instruction", "response", "both"), 0.0)
    ifd["original"], ifd["instruction"] = (0.4, 0.5) if rises else (0.5, 0.5)  # as high is not higher
    r_ifd = {"original": 0.8, "instruction": 0.8, "response": 0.7 if falls else 0.8, "both": 0.7 if falls else 0.8}
    ifd[chosen] = (good if ifd_below else bad) if chosen in ("both", "response") else ifd[chosen] + (0 if ifd_below else 1)
    if chosen == "original" and not ifd_below:
        ifd["instruction"] += 1
    if not r_ifd_below:
        r_ifd = {version: value + 1 for version, value in r_ifd.items()}
    scores = {version: (ifd[version], r_ifd[version]) for version in ifd}
    found, reason = reflection(scores, originals=True)
    assert (found, reason is None) == (chosen, stays)
    if not stays:
        assert reason[0] == ("rifd_not_below_1" if ifd_below else "ifd_not_below_1")
    assert (reflection(scores, originals=False)[1] is None) is stays_without


def test_a_version_that_could_not_be_made_is_not_taken():
    assert reflection({"original": (0.5, 0.5)}, True) == ("original", None)
    assert reflection({"original": (0.5, 0.5), "both": (0.9, 0.1)}, True) == ("original", None)
    assert reflection({"original": (0.5, 0.5), "instruction": (0.6, 0.5)}, False) == (
        "instruction",
        ("own_response", "no reflected response is better"),
    )


def test_the_reflected_response_is_compared_with_the_response_to_the_chosen_instruction():
    scores = {"original": (0.4, 0.9), "instruction": (0.5, 0.7), "response": (0.4, 0.1), "both": (0.6, 0.8)}
    assert reflection(scores, True) == ("instruction", None)


def test_limits_themselves_do_not_pass_the_rule():
    assert reflection({"original": (1.0, 0.5)}, True)[1] == ("ifd_not_below_1", "1")
    assert reflection({"original": (0.5, 1.0)}, True)[1] == ("rifd_not_below_1", "1")
    assert reflection({"original": (float("nan"), 0.5)}, True)[1] is not None
