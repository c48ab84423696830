"""Faults in rows of token ids, in the divergence of a source, and in what `llmkd roll` writes."""

from tests.planted.fault import in_file

ROWS = "data/test_token_rows.py"
DIVERGENCE, RUNS = "losses/test_by_source.py", "training/test_divergence_by_source.py"
ROLL, STAGE, FILE, WRITERS = (
    "commands/test_roll.py",
    "commands/test_sweep_rolled.py",
    "rollouts/test_answer_file.py",
    "training/test_rolled_data.py",
)

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
    *in_file(
        "llmkd/data/encoding/encode.py",
        (
            "pad-is-not-the-end",
            "batches are padded with token 0",
            "return Collator(tokenizer.eos_token_id,",
            "return Collator(0,",
            "training/test_by_hand.py",
            "nothing attends to padding on its right, and no target is there",
        ),
    ),
    *in_file(
        "llmkd/commands/roll_stage.py",
        (
            "stage-of-the-other-writer",
            "a stage's student writes where its teacher is to",
            'writer = "teacher" if says.teacher_writes else',
            'writer = "student" if says.teacher_writes else',
            STAGE,
        ),
        (
            "stage-of-another-seed",
            "a stage draws by no seed of its recipe",
            "says.max_new_tokens, recipe.seed,",
            "says.max_new_tokens, 0,",
            STAGE,
        ),
        ("stage-of-one-sample", "a stage writes one answer to each prompt", "says.samples, batch_size", "1, batch_size", STAGE),
        (
            "stage-of-both-writers",
            "a stage of which no writer is named runs",
            "not in ((1, 0), (0, 1))",
            "not in ((1, 0), (0, 1), (0.5, 0))",
            STAGE,
        ),
        (
            "stage-of-a-mixture",
            "a stage forgets that the teacher was to mix in",
            "if says.long_horizon and says.long_horizon.teacher_mix:",
            "if False:",
            STAGE,
        ),
    ),
    *in_file(
        "llmkd/commands/roll.py",
        (
            "stage-without-its-teacher",
            "what the recipe's student learnt from is not recorded",
            'run if (run / "recipe.yaml").exists() else None',
            "None",
            STAGE,
        ),
        (
            "draws-by-the-batch",
            "what is drawn depends on the place in the batch",
            "[int(one.key, 16) for one in batch]",
            "[i for i, _ in enumerate(batch)]",
            f"{ROLL}::test_an_answer_depends_neither_on_its_batch_nor_on_the_order_of_the_rows",
        ),
        (
            "written-twice",
            "answers that are there are written again",
            " if one.key not in file.written]",
            "]",
            f"{ROLL}::test_after_a_kill_at_any_byte_the_same_command_writes_the_same_file_and_no_answer_twice",
        ),
        (
            "batch-without-what-is-there",
            "after a kill a batch is computed without the answers that are there",
            "if any(one.key not in file.written for one in batch)",
            "if all(one.key not in file.written for one in batch)",
            f"{ROLL}::test_after_a_kill_at_any_byte_the_same_command_writes_the_same_file_and_no_answer_twice",
        ),
        (
            "alike-prompts-alike-answers",
            "prompts that are alike get one answer",
            'same + b"|%d" % number',
            'same + b"|%d" % 0',
            f"{ROLL}::test_prompts_that_are_alike_have_answers_of_their_own",
        ),
        (
            "end-is-no-target",
            "the last token of an answer is no target",
            "[1] * len(own)",
            "[1] * (len(own) - 1) + [0]",
            f"{ROLL}::test_rows_are_prompts_with_the_ids_that_the_model_goes_on_with",
        ),
        (
            "teacher-without-context",
            "a teacher that writes does not read its context",
            "prompt.teacher_ids if by_teacher",
            "prompt.ids if by_teacher",
            f"{ROLL}::test_the_teacher_reads_its_context_and_the_row_has_the_students_prompt",
        ),
        (
            "held-out-asked",
            "held-out rows are asked too",
            'hold_out(join("train", parts), data.validation_fraction)',
            'hold_out(join("train", parts), 0.0)',
            f"{ROLL}::test_held_out_rows_are_not_asked",
        ),
    ),
    *in_file(
        "llmkd/rollouts/append_only.py",
        ("part-of-a-line-stays", "a part of a last line stays in the file", "if whole < len(raw):", "if whole > len(raw):", FILE),
    ),
    *in_file(
        "llmkd/rollouts/answer_file.py",
        (
            "other-settings-go-on",
            "a file of other settings is gone on with",
            "if known.get(name) != value]",
            "if known.get(name) is value]",
            FILE,
        ),
        (
            "unasked-answers-stay",
            "a file with answers that are not asked for is gone on with",
            "self.written.keys() - asked",
            "asked - asked",
            FILE,
        ),
    ),
    *in_file(
        "llmkd/training/rolled_data.py",
        (
            "any-teacher-will-do",
            "another teacher is not named",
            'one["weights"] == teacher.weights',
            'one["weights"].keys() == teacher.weights.keys()',
            WRITERS,
        ),
        (
            "data-of-the-run-unread",
            "who wrote a run's data is not known",
            "for _, source in with_setting_names(recipe.data.train",
            "for _, source in with_setting_names(recipe.data.choices",
            WRITERS,
        ),
    ),
    *in_file(
        "llmkd/losses/rows.py",
        (
            "rows-of-the-part",
            "targets of another divergence are counted from the part's beginning",
            "rows = own + part.rows.start if",
            "rows = own if",
            DIVERGENCE,
        ),
        (
            "weights-unparted",
            "the first weights are used for every divergence",
            "{name: w_n[own] for name",
            "{name: w_n[: len(w_n[own])] for name",
            DIVERGENCE,
        ),
        (
            "one-divergence",
            "a part of one divergence has the objective's",
            "divergence=self.found[kinds[0]])",
            "divergence=None)",
            DIVERGENCE,
        ),
    ),
    *in_file(
        "llmkd/losses/terms.py",
        (
            "source-numbers-shifted",
            "the divergence of another source",
            "enumerate(self.by_source, 1)",
            "enumerate(self.by_source, 2)",
            DIVERGENCE,
        ),
        (
            "targets-not-counted",
            "each example has one target",
            ".repeat_interleave(counts))",
            ".repeat_interleave(counts.clamp(max=1)))",
            DIVERGENCE,
        ),
    ),
    *in_file(
        "llmkd/training/build_student.py",
        (
            "sources-numbered-with-the-loss",
            "sources are numbered from the loss on",
            "enumerate(divergences[1:])",
            "enumerate(divergences)",
            f"{RUNS}::test_the_divergences_of_a_recipe_have_all_their_options",
        ),
    ),
    *in_file(
        "llmkd/data/collate.py",
        (
            "source-not-told",
            "a batch does not know the sources of its examples",
            "int(data.source[i]))",
            "0)",
            f"{RUNS}::test_micro_batches_packing_and_prefixes_do_not_matter",
        ),
    ),
]
