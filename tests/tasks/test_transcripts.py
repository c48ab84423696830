"""Error rates of transcripts against edit distances by hand."""

import math
import random

import pytest

from llmkd.tasks.metrics.transcripts import Errors, character_errors, word_errors

pytest.importorskip("jiwer")


def distance(a, b) -> int:
    """Levenshtein's, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_rates_are_edit_distances_over_the_references_length():
    draw, words = random.Random(0), "owl wren crow robin".split()
    pairs = [tuple(" ".join(draw.choices(words, k=draw.randint(k, 7))) for k in (0, 0)) for _ in range(50)]
    references, transcripts = zip(*pairs, strict=True)
    assert not all(references) and not all(transcripts)  # empty ones among them
    for errors, parts in ((word_errors, str.split), (character_errors, list)):
        found = errors(references, transcripts, "none")
        edits = sum(distance(parts(a), parts(b)) for a, b in pairs)
        assert found.rate == edits / sum(len(parts(a)) for a in references)
        halves = errors(references[:9], transcripts[:9], "none") + errors(references[9:], transcripts[9:], "none")
        assert halves == found


@pytest.mark.parametrize(("normaliser", "edits", "words"), [("none", 4, 4), ("basic", 2, 4), ("english", 0, 4)])
def test_the_normaliser_is_named_since_it_decides_the_rate(normaliser, edits, words):
    """[noise] goes, It's is `it s` and then `it is`, twenty is 20."""
    found = word_errors(["[noise] It's twenty Owls."], ["it is 20 owls"], normaliser)
    assert (found.substitutions + found.insertions + found.deletions, found.length) == (edits, words)


def test_deletions_and_insertions_are_told_apart():
    assert word_errors(["a b c"], ["a"], "none") == Errors(0, 2, 0, 3) and word_errors(["a"], ["b a c"], "none") == Errors(0, 0, 2, 1)


def test_no_reference_has_no_rate():
    assert word_errors([""], ["a b"], "none") == Errors(0, 0, 2, 0)
    assert math.isnan(word_errors([], [], "none").rate) and math.isnan(word_errors([""], ["a b"], "none").rate)
