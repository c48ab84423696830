"""Faults in rows of token ids, in the divergence of a source, and in what `llmkd roll` writes."""

from tests.planted.fault import in_file

ROWS = "data/test_token_rows.py"

FAULTS = [
    *in_file(
        "llmkd/data/reading/token_columns.py",
        ("no-target-counts", "labels of -100 are targets too", "mask = labels != IGNORED", "mask = labels == labels", ROWS),
        ("masks-need-not-agree", "the first of several masks wins", "np.flatnonzero(mask != also)", "np.flatnonzero(mask != mask)", ROWS),
        ("padding-read", "padding is read as tokens", "first, stop = int(real[0]), int(real[-1]) + 1", "first, stop = 0, len(mask)", ROWS),
        (
            "padding-may-be-a-target",
            "targets in padding are left out without a word",
            "padding[first:stop] = False",
            "padding[:] = False",
            f"{ROWS}::test_a_row_that_is_wrong_is_named_with_what_was_found",
        ),
        ("last-token-lost", "the last token before padding is left out", "int(real[-1]) + 1", "int(real[-1])", ROWS),
        (
            "lengths-may-differ",
            "a mask may be shorter than the tokens",
            "len(arrays[column]) != len(ids)",
            "len(arrays[column]) > len(ids)",
            ROWS,
        ),
        (
            "boundaries-need-not-agree",
            "the first of several boundaries wins",
            "also != begins",
            "False",
            f"{ROWS}::test_a_row_that_is_wrong_is_named_with_what_was_found",
        ),
        (
            "restart-one-late",
            "an example of a packed row begins one token late",
            "np.cumsum(lengths)[:-1]",
            "(np.cumsum(lengths)[:-1] + 1)",
            ROWS,
        ),
    ),
    *in_file(
        "llmkd/data/encoding/token_rows.py",
        ("first-token-is-a-target", "an example's first token is a target", "own[:1] = False", "own[:0] = False", ROWS),
        ("other-tokenizer", "rows of another tokenizer are read", "and named != own", "and not own", ROWS),
        ("gap-in-the-vocabulary", "ids that no token has are read", "np.flatnonzero(~known[ids])", "np.flatnonzero(ids < 0)", ROWS),
        (
            "all-is-trained-on",
            "rows without a mask are trained on as a whole",
            "if loss_mask is None and not whole:",
            "if loss_mask is None and whole is None:",
            ROWS,
        ),
    ),
]
