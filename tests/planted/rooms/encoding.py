"""Faults in encoding and masks: from a row to tokens, and which of them are supervised."""

from tests.planted.fault import in_file

ENCODE = "data/test_encode.py"
CONTEXT = "data/test_teacher_context.py"
SHOWN = "data/test_what_is_shown.py"
PROCESS = "data/test_template_process.py"
PARTS = "data/test_parts.py"
RENDERED = "data/test_rendered_text.py"
ANSWERS = "data/test_many_answers.py"

FAULTS = [
    *in_file(
        "llmkd/data/encoding/encode.py",
        ("factor-of-all", "all examples count as the last of their row", "if text.last else 0", "if True else 0", ANSWERS),
        (
            "unshown-of-each-example",
            "a row that is taken apart is counted for each example",
            "for text in texts if text.last for key",
            "for text in texts for key",
            ANSWERS,
        ),
        (
            "limits-without-a-place",
            "a row at which a template takes long is not named",
            'raise UserError(f"{rows.places[i]}: {error}") from None',
            "raise",
            PROCESS,
        ),
        (
            "end-token-not-supervised",
            "the end token is not trained",
            "np.full(len(end), bool(text.spans))",
            "np.zeros(len(end), bool)",
            "data/test_masks.py",
        ),
        (
            "no-end-token",
            "texts end without their end token",
            "return ([bos] if starts else []), [tokenizer.eos_token_id]",
            "return ([bos] if starts else []), []",
            "data/test_masks.py",
        ),
        (
            "first-token-supervised",
            "the first token is a target",
            "loss_mask[:1] = False  # nothing",
            "loss_mask[:0] = False  # nothing",
            "data/test_masks.py data/test_encode.py",
        ),
        (
            "border-token",
            "a token across the border of prompt and answer is not supervised",
            "(first < stop) & (last > begin)",
            "(first >= begin) & (last <= stop)",
            "data/test_template_tricks.py data/test_encode.py data/test_templates.py",
        ),
        (
            "split-loses-a-token",
            "pieces of a split text share no token",
            "range(0, len(ids) - 1, most - 1)",
            "range(0, len(ids) - 1, most)",
            f"{ENCODE}::test_split_trains_every_token_exactly_once",
        ),
        (
            "too-long-by-one",
            "an example of just max_length is dropped",
            "if len(ids) > data.max_length:",
            "if len(ids) >= data.max_length:",
            ENCODE,
        ),
        (
            "truncated-by-one",
            "a truncated example is a token shorter",
            "[(ids[:most], loss_mask[:most])]",
            "[(ids[: most - 1], loss_mask[: most - 1])]",
            ENCODE,
        ),
        ("prompt-supervised", "train_on_input is always on", "if whole and text.spans:", "if text.spans:", "data/test_masks.py"),
    ),
    *in_file(
        "llmkd/data/encoding/formats.py",
        (
            "tools-of-a-text-prompt",
            "tools with a prompt of text are left out",
            'conversation(_with_context(context, messages), tokenizer, row.get("tools"))',
            "conversation(_with_context(context, messages), tokenizer)",
            SHOWN,
        ),
        (
            "input-forgotten",
            "alpaca's input is left out",
            'if row.get("input") else ALPACA)',
            "if False else ALPACA)",
            "data/test_masks.py data/test_formats.py",
        ),
        (
            "prompt-in-the-span",
            "the prompt is supervised in plain formats",
            "[(len(prompt), len(prompt + answer))]",
            "[(0, len(prompt + answer))]",
            "data/test_masks.py",
        ),
    ),
    *in_file(
        "llmkd/data/encoding/teacher_context.py",
        (
            "first-targets",
            "the teacher's targets are its first",
            "places[-len(targets) :] if len(targets)",
            "places[: len(targets)] if len(targets)",
            CONTEXT,
        ),
        (
            "cut-to-the-longer",
            "after a cut the views have unequal targets",
            "kept = min(int(",
            "kept = max(int(",
            f"{CONTEXT}::test_each_view_is_cut_and_the_targets_of_both_are_kept",
        ),
        (
            "targets-not-compared",
            "a context may change the targets",
            "if not np.array_equal(ids[places], targets):",
            "if len(places) != len(targets):",
            CONTEXT,
        ),
    ),
    *in_file(
        "llmkd/data/encoding/control_tokens.py",
        (
            "role-tokens-in-texts",
            "a text may hold a role token",
            '    if found:\n        raise ValueError(\n            f"the text has',
            '    if None:\n        raise ValueError(\n            f"the text has',
            "data/test_templates.py",
        ),
        (
            "thoughts-of-tags",
            "any tag is taken for markup that an assistant writes",
            'return bool(name) and {f"<{name[1]}>", f"</{name[1]}>"} <= every',
            "return bool(name)",
            "data/test_templates.py data/test_template_tricks.py",
        ),
    ),
    *in_file(
        "llmkd/data/encoding/chat.py",
        ("every-answer", "answers: last is not heeded", "answers[-1:] if last_only else answers", "answers", ANSWERS),
        (
            "not-the-last-answer",
            "with answers: last an earlier turn is supervised where the last is not to be trained on",
            'turns = [i for i in (answers[-1:] if last_only else answers) if messages[i].get("train") is not False]',
            'turns = [i for i in answers if messages[i].get("train") is not False][-1 if last_only else 0 :]',
            ANSWERS,
        ),
    ),
    *in_file(
        "llmkd/data/encoding/encode.py",
        ("words-in-every-format", "a prompt may not hold the words of a turn", 'if format == "text":', "if True:", RENDERED),
        (
            "marks-unnamed",
            "rows whose answers are all marked count as rows without an answer",
            "has_marks(rows.rows[text.row]) and not text.student.spans",
            "False",
            "data/test_token_cache.py",
        ),
    ),
    *in_file(
        "llmkd/data/reading/conversations.py",
        ("glued-parts", "parts are joined where no white space is between them", "if glued is not None:", "if False:", PARTS),
        ("keys-of-parts", "keys of parts are left out in silence", "left_out |= {f", "left_out | {f", PARTS),
        ("any-part", "an image is read as its text", 'if part_kind not in ("text", "input_text", "output_text") or', "if", PARTS),
    ),
    *in_file(
        "llmkd/data/reading/row_checks.py",
        (
            "tools-in-plain-texts",
            "tools with a prompt that has no template are left out",
            'row.get("tools") and "a list of tools"',
            "False",
            SHOWN,
        ),
        (
            "completion-as-a-users-turn",
            "a text that completes a conversation is a user's turn",
            '{"role": "assistant", "content": found["completion"]}',
            '{"role": "user", "content": found["completion"]}',
            "data/test_sources.py::test_a_text_that_completes_a_conversation_is_its_answer",
        ),
    ),
]
