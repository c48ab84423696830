"""Faults in on-policy distillation: which examples are written, what becomes of them, and what is said of them."""

from tests.planted.fault import in_file

SOURCE, ENUMERATED, STATISTICS = "rollouts/test_source.py", "rollouts/test_enumerated.py", "rollouts/test_statistics.py"
IDS = f"{SOURCE}::test_an_answer_is_the_students_own_ids_and_every_one_a_target_without_cross_entropy"
DRAWN = f"{SOURCE}::test_which_are_written_depends_on_seed_step_and_example_alone"
RANKS = f"{SOURCE}::test_ranks_write_a_part_each_and_train_on_the_same_step"
PROMPTS = f"{SOURCE}::test_prompts_of_texts_and_those_that_are_too_long"
STEP = f"{ENUMERATED}::test_a_step_divides_by_what_was_written_and_mixes_cross_entropy_on_the_data_alone"

LONG = f"{ENUMERATED}::test_the_long_horizon_part_is_of_written_answers_alone_discounted_and_divided"

REPLAY = "rollouts/test_replay.py"

AVERAGE = "training/test_average_teacher.py"

FAULTS = [
    *in_file(
        "llmkd/teachers/timed.py",
        (
            "teacher-timed-again",
            "the teacher's seconds add up from record to record",
            "calls, self.calls = self.calls, []",
            "calls = self.calls",
            "teachers/test_timed.py::test_the_seconds_of_the_calls_since_the_last_time",
        ),
    ),
    *in_file(
        "llmkd/data/written.py",
        (
            "teachers-text-rewarded",
            "what the teacher writes has a long-horizon part",
            "if by_student and WRITTEN in",
            "if WRITTEN in",
            f"{ENUMERATED}::test_what_the_teacher_writes_has_the_divergence_alone",
        ),
    ),
    *in_file(
        "eval/report/own_text.py",
        (
            "teacher-counted-twice",
            "the teacher's seconds stand in the student's, too",
            'one["training"] - one["teacher"]',
            'one["training"]',
            "eval/test_report_own_text.py::test_a_run_alone_has_the_same_section_between_its_curves_and_its_held_out_metrics",
        ),
    ),
    *in_file(
        "llmkd/models/average.py",
        (
            "updated-when-skipped",
            "a step that is skipped moves the average",
            "((1 - self.decay) * (1 - found_inf.double()))",
            "((1 - self.decay) * found_inf.double().add(1).clamp(max=1))",
            f"{AVERAGE}::test_a_step_that_is_skipped_changes_nothing",
        ),
        (
            "decay-the-other-way",
            "the average is nearly the student",
            "new = 1 - self.decay if",
            "new = self.decay if",
            f"{AVERAGE}::test_a_step_that_is_skipped_changes_nothing",
        ),
    ),
    *in_file(
        "llmkd/training/build.py",
        (
            "average-not-kept",
            "a resumed run begins with another teacher",
            'students[0].state.more = {f"teacher.{name}": weight for name, weight in average.weights.items()}',
            "pass",
            f"{AVERAGE}::test_it_is_the_average_of_the_checkpoints_and_is_resumed_bit_for_bit",
        ),
    ),
    *in_file(
        "llmkd/rollouts/draw.py",
        (
            "not-mixed",
            "answers are the student's alone",
            "(share * p_BV + (1 - share) * q_BV).log()",
            "q_BV.log()",
            f"{ENUMERATED}::test_products_of_importance_weights_make_up_for_a_mixture_exactly",
        ),
    ),
    *in_file(
        "llmkd/rollouts/draw.py",
        (
            "ensemble-of-logits",
            "teachers are mixed by the means of their probabilities where those of the logarithms are meant",
            "    if geometric:",
            "    if not weights:",
            f"{ENUMERATED}::test_several_teachers_write_from_the_distribution_that_the_loss_compares_with",
        ),
    ),
    *in_file(
        "llmkd/rollouts/share.py",
        (
            "compared-with-the-first",
            "every later validation that is worse than the first is a rise",
            "self.rises, self.before = self.rises + 1, ce",
            "self.rises += 1",
            "rollouts/test_share.py",
        ),
    ),
    *in_file(
        "llmkd/rollouts/replay.py",
        (
            "replayed-before-it-is-full",
            "a few first answers are drawn over and over",
            "if len(self.answers) < self.capacity:",
            "if not self.answers:",
            f"{REPLAY}::test_fresh_until_it_is_full_then_by_the_ratio_each_of_the_newest_alike",
        ),
        (
            "last-in-first-out",
            "the oldest answers stay",
            "return answers[max(0, len(answers) - self.capacity) :]",
            "return answers[: self.capacity]",
            f"{REPLAY}::test_fresh_until_it_is_full_then_by_the_ratio_each_of_the_newest_alike",
        ),
        (
            "a-step-too-far",
            "a checkpoint of the step before has answers of the next",
            "for one in self.answers if one.step <= step]",
            "for one in self.answers]",
            f"{REPLAY}::test_a_run_goes_on_from_a_checkpoint_with_the_same_answers",
        ),
        (
            "any-example",
            "a buffer of other data is taken",
            "or examples.content_hash(example).encode() != known",
            "",
            f"{REPLAY}::test_a_buffer_that_is_not_of_this_run_is_refused",
        ),
    ),
    *in_file(
        "llmkd/losses/long_horizon.py",
        (
            "its-own-token-too",
            "a token answers for its own divergence",
            "after = rewards[t + 1] + gamma * after",
            "after = rewards[t] + gamma * after",
            LONG,
        ),
        (
            "weighted-twice",
            "the costs of a row that counts otherwise have its weight twice",
            "(given != 0).to(given.dtype)",
            "given",
            f"{ENUMERATED}::test_costs_have_the_weight_of_their_example_once",
        ),
        (
            "costs-without-the-products",
            "exact rewards forget that the text was drawn from a mixture",
            "self.costs(student, signal, batch.keeping(written))",
            "self.costs(student, signal, replace(batch.keeping(written), weights={}))",
            f"{ENUMERATED}::test_exact_rewards_make_the_gradient_of_any_weighted_divergence_of_whole_answers",
        ),
        (
            "scaled-by-itself",
            "the part is divided by the sum of its own weights, not of the divergence's",
            'self.scaled_as = "kd"',
            "pass",
            f"{ENUMERATED}::test_the_long_horizon_part_follows_the_divergences_weight_and_what_it_is_divided_by",
        ),
        (
            "at-the-first-temperature",
            "costs do not follow the step",
            "self.costs.start_step(step, scale)",
            "pass",
            f"{ENUMERATED}::test_costs_are_those_of_the_step",
        ),
        ("undiscounted", "later tokens are not discounted", "+ gamma * after", "+ after", LONG),
        ("divided-by-one-more", "the sum is divided by one token too many", "(len(rewards) - t - 1) if", "(len(rewards) - t) if", LONG),
        (
            "reward-the-other-way",
            "the student is drawn away from the teacher",
            "labels_N[rows]) - log_q_n).double()",
            "labels_N[rows]) + log_q_n).double()",
            LONG,
        ),
        (
            "weight-of-the-token-itself",
            "the divergence at a token has the token's own weight",
            "for w in one[:-1]]",
            "for w in one[1:]]",
            LONG,
        ),
        (
            "later-tokens-unweighted",
            "later rewards are those of the mixture",
            "[r * w if w else 0.0 for",
            "[r for",
            f"{ENUMERATED}::test_products_of_importance_weights_make_up_for_a_mixture_exactly",
        ),
        (
            "student-for-teacher",
            "the shares of the mixture are exchanged in the weights",
            "1 / (self.teacher_mix * sampled_N.exp() + (1 - self.teacher_mix))",
            "1 / ((1 - self.teacher_mix) * sampled_N.exp() + self.teacher_mix)",
            LONG,
        ),
        (
            "across-examples",
            "rewards go on into the next example",
            "for own in _slices(batch) for after",
            "for own in [slice(0, None)] for after",
            LONG,
        ),
        ("full-weight", "the part has weight 1 whatever kd_ratio is", "return Loss(self.factor * total,", "return Loss(1.0 * total,", LONG),
    ),
    *in_file(
        "llmkd/data/written.py",
        (
            "labels-of-ones-own",
            "what was written has cross-entropy",
            '{"ce": np.zeros(len(chosen), np.float32)}',
            '{"ce": np.ones(len(chosen), np.float32)}',
            STEP,
        ),
        (
            "data-in-the-long-run",
            "the data's answers have a long-horizon part",
            "{WRITTEN: np.zeros(len(examples), np.float32)}",
            "{WRITTEN: np.ones(len(examples), np.float32)}",
            f"{ENUMERATED}::test_a_step_in_which_nothing_is_written_has_no_long_horizon_part",
        ),
        ("prompt-is-a-target", "the prompt of a written answer is a target too", "np.repeat([False, True]", "np.repeat([True, True]", IDS),
        (
            "prompt-with-an-answer",
            "a prompt ends with the first token of the answer",
            "[0][: self.own[i]].tolist()",
            "[0][: self.own[i] + 1].tolist()",
            IDS,
        ),
        (
            "teacher-cut-short",
            "the teacher's prompt is cut where the student's ends",
            "_appended(examples.teacher_view, prompts.theirs,",
            "_appended(examples.teacher_view, prompts.own,",
            f"{SOURCE}::test_the_teacher_reads_its_context_before_the_same_answer",
        ),
        ("one-token-too-long", "an answer may be longer than data.max_length", "+ room <= max_length", "+ room <= max_length + 1", PROMPTS),
        (
            "whole-text-as-prompt",
            "a short text is a prompt with nothing after it",
            "examples.lengths - 1, 1,",
            "examples.lengths, 1,",
            PROMPTS,
        ),
        (
            "written-where-nothing-is-learnt",
            "rows in which the teacher has no say are written",
            'fits & (examples.weight("kd") != 0)',
            "fits",
            f"{SOURCE}::test_rows_that_the_teacher_has_no_say_in_are_not_written",
        ),
    ),
    *in_file(
        "llmkd/rollouts/source.py",
        ("always-written", "every example is written", "if draw < share:", "if share > 0:", IDS),
        (
            "teacher-by-the-share",
            "which examples the teacher writes depends on what the student writes",
            "draw >= 1 - self.settings.teacher_writes",
            "draw < share + self.settings.teacher_writes",
            f"{SOURCE}::test_the_teacher_writes_other_examples_after_its_own_prompt",
        ),
        (
            "teacher-without-its-context",
            "the teacher writes after the student's prompt",
            "self._ask(writer, self.prompts.teachers(",
            "self._ask(writer, self.prompts.ids(",
            f"{SOURCE}::test_the_teacher_writes_other_examples_after_its_own_prompt",
        ),
        ("planned-count", "a step is divided by the targets of the data", "int(data.num_targets.sum())", "planned.num_targets", STEP),
        (
            "same-text-in-every-step",
            "a prompt has one text in all steps",
            "names.append((step, one, before[one]))",
            "names.append((0, one, before[one]))",
            DRAWN,
        ),
        (
            "same-text-for-both",
            "an example that is in a step twice has one text",
            "names.append((step, one, before[one]))",
            "names.append((step, one, 0))",
            f"{SOURCE}::test_one_example_twice_in_a_step_has_two_texts",
        ),
        (
            "nothing-as-an-example",
            "an answer without a token is an example",
            "whole := [one for one in answers if one.ids]",
            "whole := answers",
            f"{SOURCE}::test_an_answer_without_a_token_is_left_out_and_counted",
        ),
        (
            "short-ones-measured",
            "memory is measured with the data's answers",
            "np.where(prompts.may, np.maximum(prompts.own, prompts.theirs) + room, 0)",
            "np.where(prompts.may, np.maximum(prompts.own, prompts.theirs), 0)",
            f"{SOURCE}::test_the_longest_answers_are_what_memory_is_measured_with",
        ),
    ),
    *in_file(
        "llmkd/rollouts/writer.py",
        ("every-rank-writes-the-same", "all ranks write the first rank's part", "order[rank::ranks], []", "order[0::ranks], []", RANKS),
        (
            "alone-with-its-error",
            "a rank that cannot write does not tell the others",
            "        if ranks == 1:\n            raise\n",
            "        raise\n",
            f"{SOURCE}::test_a_rank_that_cannot_write_ends_all",
        ),
    ),
    *in_file(
        "llmkd/rollouts/statistics.py",
        (
            "never-reset",
            "answers are counted again in every record",
            "self.answers, self.seconds, self.counts = [], 0.0, Counter()",
            "self.seconds, self.counts = 0.0, Counter()",
            STATISTICS,
        ),
        (
            "mean-of-means",
            "the entropy is a mean over answers",
            "sum(x * n for x, n in each) / max(1, sum(n for _, n in each))",
            "sum(x for x, n in each) / len(each)",
            STATISTICS,
        ),
        (
            "random-at-any-time",
            "a student is said to know nothing later too",
            "if self.first is None and known and",
            "if known and",
            STATISTICS,
        ),
        (
            "ends-alone",
            "a student that ends every answer at once is taken for one that knows the task",
            "one.finished and len(one.ids) > 1 for",
            "one.finished for",
            f"{STATISTICS}::test_an_untuned_student_is_warned_of_and_a_tuned_one_is_not",
        ),
        (
            "behind-by-nothing",
            "any student that is behind its teacher and does not end is said to know nothing",
            "self.behind > UNKNOWN and",
            "self.behind > 0 and",
            f"{STATISTICS}::test_an_untuned_student_is_warned_of_and_a_tuned_one_is_not",
        ),
        ("said-again", "a warning is repeated", "self.said |= seen.keys()", "pass", STATISTICS),
        ("drift-by-a-token", "a token more is a drift", "abs(length - self.first) >= LEAST and", "", STATISTICS),
    ),
    *in_file(
        "llmkd/training/writing.py",
        (
            "writer-of-the-teachers-part",
            "the student writes the teacher's part",
            "{k: local_writer(model, prepared, size) for",
            "{k: local_writer(student, prepared, size) for",
            "training/test_writing.py",
        ),
        (
            "weights-of-the-teachers",
            "of several teachers that write each counts alike",
            "[w / sum(weights) for w in weights]",
            "[1 / len(weights) for w in weights]",
            "training/test_writing.py",
        ),
        (
            "validated-as-mixed",
            "the teacher is mixed into the text of a validation",
            "    alone = local_writer(student, prepared, size)",
            "    alone = written.writer",
            "training/test_writing.py",
        ),
        (
            "mixed-with-itself",
            "the student is mixed with itself",
            "Mix(tuple(teachers), functools",
            "Mix((student,), functools",
            "training/test_writing.py",
        ),
    ),
]
