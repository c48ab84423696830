"""Numbers that are not finite, counts, and models that are not what they are taken for."""

from tests.faults.row import Row

NUMBERS = [
    Row(
        "a loss or gradient that is not finite",
        "no weight moves, on no rank; exit code 3 and nonfinite.json",
        "training/test_step_result.py::test_a_nan_stops_the_run_before_the_weights training/test_step_result.py::test_a_nan_on_one_rank_stops_them_all",
    ),
    Row(
        "a teacher's output that is not finite",
        "the teacher is named; it is not cached",
        "teachers/test_cache.py::test_an_answer_that_is_not_a_number_is_not_kept models/test_teacher_transforms.py::test_answers_that_are_not_finite_are_refused",
    ),
    Row(
        "a teacher that rules tokens out (-inf)",
        "forward KL is exact",
        "teachers/test_sparse.py::test_tokens_that_the_teacher_rules_out_belong_to_the_rest losses/test_divergences.py",
    ),
    Row(
        "a micro-batch without a target",
        "adds nothing, and stops nobody",
        "data/test_encode.py::test_a_micro_batch_without_examples_has_one_padding_token_and_no_target data/test_stream.py::test_a_step_without_examples_is_no_failure",
    ),
    Row(
        "data without a single target",
        "refused with counts",
        "data/test_token_cache.py::test_rows_with_nothing_to_train_on_are_refused_with_counts",
    ),
    Row(
        "micro-batches, ranks or the last window of uneven size",
        "every target counts once",
        "training/test_parity.py::test_micro_batches_do_not_matter training/test_four_processes.py::test_four_processes_are_one training/test_run.py::test_each_target_is_trained_exactly_once_an_epoch",
    ),
    Row(
        "a family whose packed rows leak, or whose head is not a product",
        "found at the start, and refused or computed by its own forward",
        "models/test_packing.py::test_a_run_whose_model_leaks_is_refused_before_it_writes models/test_families.py::test_an_unknown_head_falls_back_to_the_models_own_forward",
    ),
]

MODELS = [
    Row(
        "tokenizers that differ",
        "refused with the first entry that differs",
        "data/test_tokenizer.py::test_the_first_entries_that_differ_are_named training/test_refused.py::test_a_teacher_that_does_not_fit_is_refused",
    ),
    Row(
        "vocabularies that are padded differently",
        "cut to the tokenizer's entries; the student keeps its shape",
        "training/test_run.py::test_padded_vocabularies_are_cut_and_the_student_keeps_its_shape",
    ),
    Row(
        "a model with fewer rows than the tokenizer has entries",
        "refused",
        "models/test_students.py::test_a_model_with_too_few_rows_is_refused",
    ),
    Row(
        "a folder without the weights, or with other tensors",
        "refused with what it holds",
        "model_folder/test_weights.py::test_a_folder_without_the_file_that_is_loaded_says_what_it_holds models/test_adapters.py::test_a_folder_that_does_not_hold_what_was_saved_is_refused",
    ),
    Row(
        "an adapter of another base, or with other names",
        "refused, or read where the names are certain",
        "models/test_adapters.py::test_names_that_fit_no_layer_are_shown_from_both_sides models/test_adapters.py::test_an_adapter_whose_tensors_have_other_names_is_read_where_these_are_certain",
    ),
    Row(
        "code or kernels from the hub in a model's configuration",
        "refused",
        "models/test_students.py::test_attention_that_would_be_fetched_from_the_hub_is_refused_before_anything_is_loaded",
    ),
    Row(
        "task files that run Python (!function)",
        "refused without --allow_task_code",
        "eval/test_chat_template.py::test_task_files_that_run_code_need_a_flag eval/test_chat_template.py::test_the_flag_lets_it_run_and_nothing_runs_without_it",
    ),
    Row(
        "max_length beyond the model's positions",
        "refused with their number",
        "training/test_refused.py::test_mistakes_are_one_line_and_leave_nothing",
    ),
    Row(
        "a padding token that is the end token, or another one than the teacher's",
        "padding is masked by place, never by its id",
        "data/test_tokenizer.py::test_the_padding_token_and_the_template_may_differ rollouts/test_enumerated.py",
    ),
    Row("a mistyped path", "never sent to the network", "data/test_folders_and_hub.py::test_a_mistyped_path_never_goes_to_the_network"),
]
