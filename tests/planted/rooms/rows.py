"""Faults in what rows say: end tokens, control tokens that differ, formats that are recognised, long rows."""

from tests.planted.fault import in_file

ENDS, STOPS, SAME = "data/test_end_tokens.py", "models/test_generation.py", "data/test_same_tokenizer.py"
SHAPES, LONG, MARKS = "data/test_recognise.py", "data/test_long_texts.py", "data/test_turn_marks.py"

FAULTS = [
    *in_file(
        "llmkd/data/encoding/end_tokens.py",
        ("ends-of-cut-examples", "a token at which an example was cut is an end", 'in ("truncate", "split")', 'in ("split",)', ENDS),
        ("ends-inside", "a token between thought and answer ends a turn", "return found - inside or found", "return found", ENDS),
        ("ends-of-words", "any token that closes an answer is an end", " & control\n", "\n", ENDS),
        (
            "ends-before-spaces",
            "a line break behind the end token hides it",
            "places = np.where(at_blank, places - 1, places)",
            "break",
            ENDS,
        ),
    ),
    *in_file(
        "llmkd/model_folder/generation.py",
        ("first-stop", "new end tokens take the place of the old ones", "eos = known + new", "eos = new", STOPS),
        ("config-again", "transformers takes the ids of config.json again", 'if key != "_from_model_config"', "if True", STOPS),
        ("base-first", "an adapter's generation config is not read", "for folder in folders:", "for folder in reversed(folders):", STOPS),
    ),
    *in_file(
        "llmkd/models/adapters.py",
        (
            "adapter-stops-as-base",
            "an adapter stops where its base does",
            "if (files.adapter / generation.NAME).is_file():",
            "if False:",
            STOPS,
        ),
    ),
    *in_file(
        "llmkd/data/stream.py",
        (
            "stream-never-stops",
            "end tokens of a stream are not collected",
            "self.end_tokens |= end_tokens(examples, self.data, self.tokenizer)",
            "pass",
            STOPS,
        ),
    ),
    *in_file(
        "llmkd/data/encoding/same_tokenizer.py",
        ("ends-taken", "a plain text may end as its teacher never ends one", 'elif plain and name == "eos_token":', "elif False:", SAME),
        (
            "template-not-read",
            "a template may write an end that the teacher does not know",
            "if template and re.search",
            "if False and re.search",
            SAME,
        ),
        ("plain-start", "a start token that no text gets is refused", 'elif plain and name == "eos_token":', "elif plain:", SAME),
        ("first-row-only", "a text among lists of messages is not seen", "any(isinstance(row", "all(isinstance(row", SAME),
        ("stream-taken", "an unread stream is taken for conversations", "return rows is None or", "return rows is not None and", SAME),
    ),
    *in_file(
        "llmkd/data/encoding/tokenizer.py",
        (
            "padding-ends",
            "an end token that only one has is no difference",
            "if token is None or token in others or",
            "if token is None or",
            SAME,
        ),
    ),
    *in_file(
        "llmkd/data/reading/recognise.py",
        ("first-proposal", "a proposal that does not read the row wins", "len(problems.found) < best[0]", "False", SHAPES),
        (
            "own-format-last",
            "the format that the recipe names is tried last",
            "name not in own, name != source.format",
            "name not in own, False",
            SHAPES,
        ),
        (
            "proposes-a-part",
            "another format's own columns are not seen",
            "(name not in own, name != source.format)",
            "name != source.format",
            SHAPES,
        ),
        ("unquoted-names", "a name that is no plain YAML is not quoted", "and yaml.safe_load(name) == name", "", SHAPES),
        (
            "unseen-role",
            "ShareGPT's answers are not expected where the first row has none",
            'return found | {"assistant": "gpt"} if',
            "return found if",
            SHAPES,
        ),
        (
            "one-half",
            "of a pair of answers the rejected one stays",
            "ignore = tuple(dict.fromkeys((",
            "ignore = tuple(dict.fromkeys(()and(",
            SHAPES,
        ),
    ),
    *in_file(
        "llmkd/data/reading/json_shapes.py",
        ("messages-are-rows", "a conversation in one object is taken for its rows", "and not _is_talk(inner)", "", SHAPES),
        (
            "broken-line",
            "a broken line is taken for an object over several lines",
            'if value is None and start not in ("{", "["):',
            "if False:",
            SHAPES,
        ),
    ),
    *in_file(
        "llmkd/data/encoding/long_texts.py",
        (
            "shrinks-forgotten",
            "a normaliser that composes characters is left out of the bound",
            "return Cover(shrinks * max(",
            "return Cover(max(",
            LONG,
        ),
        (
            "unknown-runs",
            "runs of unknown characters count",
            "counted = None\n",
            "return Cover(max(map(len, entries)), None, True)\n",
            LONG,
        ),
        (
            "cut-in-words",
            "a text is cut inside a word",
            'at = text.find(" ", first, first + _SEARCHED)\n    while',
            "at = first\n    while False and",
            LONG,
        ),
        ("cut-at-once", "a text is cut at the first space", "end = cut and _space(text.text, cut + 1)", "end = cut", LONG),
        (
            "crossing-spaces",
            "entries that go over a space are not seen",
            "return Cover(shrinks * max(map(len, entries)), counted, not crosses)",
            "return Cover(shrinks * max(map(len, entries)), counted, True)",
            LONG,
        ),
        (
            "spans-uncut",
            "what is supervised goes on behind the cut",
            "(begin, min(stop, end)) for begin, stop in",
            "(begin, stop) for begin, stop in",
            LONG,
        ),
        (
            "pieces-uncut",
            "control tokens of the text behind a cut stay",
            "for begin, stop, token in text.pieces if begin < end",
            "for begin, stop, token in text.pieces",
            LONG,
        ),
        ("bound-off", "a text of just the bound is taken for longer", "len(text) <= (least", "len(text) < (least", LONG),
    ),
    *in_file(
        "llmkd/data/encoding/encode.py",
        (
            "too-long-uncounted",
            "rows that are dropped unseen are not counted",
            'counts["too_long"] += 1\n            if data.too_long == "refuse":',
            'if data.too_long == "refuse":',
            LONG,
        ),
        (
            "teacher-cut",
            "a text with a context for the teacher is cut before it is aligned",
            'if data.too_long == "truncate" and not text.teacher:',
            'if data.too_long == "truncate":',
            LONG,
        ),
    ),
    *in_file(
        "llmkd/data/reading/turn_marks.py",
        (
            "inside-unread",
            "marks inside a turn's metadata are not seen",
            "    return _inside(key, value)\n\n\n@functools",
            "    return None\n\n\n@functools",
            MARKS,
        ),
        (
            "inside-row-unread",
            "marks inside a row's metadata are not seen",
            "    return _inside(key, value)\n\n\ndef _inside",
            "    return None\n\n\ndef _inside",
            MARKS,
        ),
        (
            "trained-refused",
            "a turn that is marked as trained on inside metadata is refused",
            "known in TRAINED and not inner",
            "known in TRAINED",
            MARKS,
        ),
        ("arguments-are-marks", "a tool's arguments are taken for marks", "or key in _ELSEWHERE:", "or False:", MARKS),
        (
            "counts-are-marks",
            "a number that counts is taken for a mark",
            "(_is_flag(value) and not _COUNTS.intersection(words))",
            "_is_flag(value)",
            MARKS,
        ),
        ("kept-rows", "a row that is to be used is refused", "(_LEFT_OUT if value else _KEPT)", "(_LEFT_OUT | _KEPT)", MARKS),
        ("labels-are-masks", "labels of a text are taken for a mask", "all(type(one) is int for one in value)", "True", MARKS),
    ),
]
