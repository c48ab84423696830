"""Faults in the filters, scores and selection of `llmkd make`, and in imported log-probabilities."""

from tests.planted.fault import in_file

FILTERS, KEEP, SCORES, STAGE, SELECTION = (f"making/test_{name}.py" for name in ("filters", "keep", "scores", "score_stage", "selection"))
DISTILLKIT, TOLD = "teachers/test_distillkit.py", "teachers/test_told.py"

FAULTS = [
    *in_file(
        "llmkd/teachers/cache/import_logprobs.py",
        ("lists-of-the-token-itself", "a place's list is taken to be about its own token", "places = np.flatnonzero(marks) - 1", "places = np.flatnonzero(marks)", DISTILLKIT),
        ("one-row-for-all", "a row is about every example with its ids", "return self.by_ids[key].pop()", "return self.by_ids[key][-1]", DISTILLKIT),
        ("any-text-will-do", "lists without ids may be about another text", "if self.targets and self.own < self.targets / 2:", "if False:", DISTILLKIT),
    ),
    *in_file(
        "llmkd/teachers/cache/told.py",
        ("logits-are-scaled", "probabilities that add up to any number are scaled to 1", "if 1 + SLACK < total <= _MOST_ROUNDED:", "if 1 + SLACK < total:", TOLD),
        ("just-above-1-unseen", "a sum that is just above 1 is not looked at", "(self._sums_N() <= 1 + SLACK - _NEAR)", "(self._sums_N() <= 1 + 2 * SLACK)", TOLD),
        ("twice-if-side-by-side", "a token told twice is seen where the two are neighbours", "np.diff(np.sort(spaced_NM, 1), axis=1)", "np.diff(spaced_NM, axis=1)", TOLD),
    ),
    *in_file(
        "llmkd/teachers/cache/distillkit_codec.py",
        ("lowest-bit-first", "the lowest bit of a number comes first", "np.uint8), found], -1)", "np.uint8), found[..., ::-1]], -1)", DISTILLKIT),
        ("polynomials-from-0", "places of the older form begin at 0", "np.arange(1, form.k - form.exact_k + 1", "np.arange(0, form.k - form.exact_k", DISTILLKIT),
    ),
    *in_file(
        "llmkd/making/filters/duplicates.py",
        ("short-prefixes", "prefixes lack the last shingle that a pair may share", "math.ceil(share * len(own)) + _common(len(own))]", "math.ceil(share * len(own)) + _common(len(own)) - 1]", FILTERS),
        ("above-the-threshold-alone", "a pair at the threshold itself is no duplicate", "if both >= share * (small + large - both):", "if both > share * (small + large - both):", FILTERS),
        ("dropped-ones-drop", "a row is dropped for one that was dropped", "        else:\n            for shingle in prefix:", "        if True:\n            for shingle in prefix:", FILTERS),
    ),
    *in_file(
        "llmkd/making/filters/repetition.py",
        ("ratio-of-the-whole", "the compression ratio is that of the whole text", "_ratio(text[start : start + _WINDOW])", "_ratio(text)", FILTERS),
        ("overlaps-count-twice", "words in two repeated sequences count twice", "covered += start + n - max(start, end)", "covered += n", FILTERS),
    ),
    *in_file(
        "llmkd/making/filters/balance.py",
        ("share-of-all-rows", "a share is of the rows before trimming", "    while (kept := {", "    if (kept := {", FILTERS),
        ("drawn-by-place", "which rows stay depends on their order", "key=lambda i: (_drawn(seed, texts[i]), i)", "key=lambda i: i", FILTERS),
    ),
    *in_file(
        "llmkd/making/filters/words.py",
        ("marks-end-words", "the vowels of Hindi end a word", "u200c\\u200d{ranges}]", "u200c\\u200d]", FILTERS),
    ),
    *in_file(
        "llmkd/making/filters/consistency.py",
        ("zeros-count", "zeros behind the point make another number", '("." + part.rstrip("0"))', '("." + part)', FILTERS),
        ("ties-agree", "of two final answers that are as frequent the first is taken", "and not any(other == count for _, other in others)", "", FILTERS),
        ("rounding-of-whole-numbers", "a whole result may be half a unit off", "Fraction(1, 2 * 10**digits) * (digits > 0)", "Fraction(1, 2 * 10**digits)", FILTERS),
    ),
    *in_file(
        "llmkd/making/filters/contamination.py",
        ("fourteen-words", "thirteen words in a row are not enough", "NGRAM = 13", "NGRAM = 14", FILTERS),
        ("short-answers-leak", "a short answer in a held-out row is a leak", "self.short.get(tuple(words(question)))", "next(filter(None, (self.short.get(tuple(words(text))) for text in (question, *others))), None)", FILTERS),
    ),
    *in_file(
        "llmkd/making/filters/languages.py",
        ("short-texts-are-judged", "the language of two words is told", "_SHORT = 5", "_SHORT = 1", KEEP),
    ),
    *in_file(
        "llmkd/making/filters/task_files.py",
        ("training-rows-leak", "a task's training rows count as held out", '("test_split", "validation_split")', '("test_split", "validation_split", "training_split")', KEEP),
        ("include-wins", "an included task file wins over the one that includes it", "if isinstance(include, str) and depth < 9 else {}) | found", "if isinstance(include, str) and depth < 9 else {}) | {**found, **(_fields(path.parent / include, setting) if include else {})}", KEEP),
    ),
    *in_file(
        "llmkd/making/stages/keep.py",
        ("shares-before-duplicates", "shares hold before other filters drop rows", "for filter_rows in (*judged, lambda left: self._balanced(left, work)):", "for filter_rows in (lambda left: self._balanced(left, work), *judged):", KEEP),
    ),
    *in_file(
        "llmkd/making/scores/views.py",
        ("first-target-unscored", "alone, the first target is not scored", "masks = [np.arange(len(own)) > 0 for own in ids]", "masks = [np.arange(len(own)) > 1 for own in ids]", SCORES),
        ("ends-though-there-is-a-start", "the end token stands before the targets alone", "tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id", "tokenizer.eos_token_id", SCORES),
        ("numbers-of-the-rest", "scores are of the rows that are left, by their place", "np.array(numbers, np.int64)[examples.row]", "examples.row", SCORES),
    ),
    *in_file(
        "llmkd/making/scores/cross_entropy.py",
        ("ratio-of-losses", "IFD is the ratio of the cross-entropies", "np.exp(ce - ce_alone)", "ce / ce_alone", SCORES),
        ("nan-passes", "a score that is no number passes", "np.flatnonzero(~np.isfinite(values))", "np.flatnonzero(np.isinf(values))", SCORES),
        ("sums-not-means", "scores are sums over the targets", "sums / held_out.targets", "sums", SCORES),
    ),
    *in_file(
        "llmkd/making/stages/score.py",
        ("any-models-scores", "scores of another model are used again", "sorted(self.settings.scores), prompts, models)", "sorted(self.settings.scores), prompts)", STAGE),
        ("inherited-next-to-new", "a row that is scored keeps its parent's other scores as its own", "_without_inherited(row).with_columns", "row.with_columns", STAGE),
        ("inherited-scores", "a row's scores count for the row that is made of it", 'by.get("row", said) == said', "True", STAGE),
    ),
    *in_file(
        "llmkd/making/selection.py",
        ("easier-instruction", "the reflected instruction is taken if IFD falls", "scores[INSTRUCTION][0] > scores[ORIGINAL][0]", "scores[INSTRUCTION][0] < scores[ORIGINAL][0]", SELECTION),
        ("as-hard-is-harder", "an IFD that is as high takes the reflected instruction", "scores[INSTRUCTION][0] > scores[ORIGINAL][0]", "scores[INSTRUCTION][0] >= scores[ORIGINAL][0]", SELECTION),
        ("response-to-the-original", "the reflected response is one to the original instruction", "answered = BOTH if chosen == INSTRUCTION else RESPONSE", "answered = RESPONSE", SELECTION),
        ("against-the-original", "r-IFD is compared with the original's", "scores[answered][1] < scores[chosen][1]", "scores[answered][1] < scores[ORIGINAL][1]", SELECTION),
        ("own-instruction-alone", "a row with its own response stays though originals are dropped", "chosen in (ORIGINAL, INSTRUCTION)", "chosen == ORIGINAL", SELECTION),
        ("limit-included", "a score at the limit stays", "not score < self.below", "not score <= self.below", SELECTION),
    ),
]  # fmt: skip
