"""What can be wrong with the files that a run has left."""

from tests.faults.row import Row

FILES = [
    Row(
        "a truncated or flipped checkpoint",
        "passed over by name; the next older whole one is taken",
        "training/test_resume.py::test_a_damaged_checkpoint_is_passed_over_by_name",
    ),
    Row(
        "a checkpoint of another run, renamed, beyond the last step, or with an empty manifest",
        "passed over by name",
        "training/test_checkpoint.py::test_a_checkpoint_that_cannot_be_used_is_passed_over_by_name training/test_checkpoint.py::test_one_beyond_the_last_step_is_passed_over "
        "output/test_damaged_files.py::test_a_checkpoint_of_another_run_or_step_is_passed_over_by_a_whole_run",
    ),
    Row(
        "a damaged recipe, identity, summary, metrics, held_out, manifest, sweep or adapter file of a run",
        "named in one line with what to do, or without effect",
        "output/test_damaged_files.py::test_a_damaged_file_is_named_in_one_line_or_harmless",
    ),
    Row(
        "the summary of another run, or the list of another sweep",
        "refused or named",
        "output/test_damaged_files.py::test_the_summary_of_another_run_is_not_taken_for_this_ones "
        "output/test_damaged_files.py::test_the_list_of_another_sweep_is_not_taken_for_this_ones",
    ),
    Row(
        "a lost identity.json, recipe.yaml or sweep.json",
        "made anew from what is left",
        "output/test_damaged_files.py::test_one_of_the_two_files_that_say_which_run_it_is_may_be_lost "
        "output/test_damaged_files.py::test_a_lost_list_of_a_sweep_is_made_anew_from_its_runs",
    ),
    Row("no whole checkpoint is left", "refused with their names", "training/test_resume.py::test_no_whole_checkpoint_left_is_refused"),
    Row(
        "one bit of a base, an adapter or a teacher changed between stop and --resume",
        "refused with the file's name",
        "training/test_model_watch.py::test_one_bit_of_any_model_file_is_noticed_by_name",
    ),
    Row(
        "one bit of a finished student changed",
        "refused by training, teacher, export and evaluation",
        "models/test_adapters.py::test_an_adapter_that_was_changed_since_it_was_trained_is_refused_by_all model_folder/test_weights.py::test_what_llmkd_wrote_is_refused_when_any_file_of_it_has_changed",
    ),
    Row(
        "one bit of a byte of any small file of a run, a sweep, a cache or an evaluation flipped",
        "named in one line, or nothing that is read differs (python -m tests.faults.flips flips bits of all files that commands read)",
        "output/test_damaged_files.py::test_one_bit_of_a_byte_of_a_small_file",
    ),
    Row(
        "an error in the middle of a run: memory runs out, a bug",
        "one line says from which step --resume goes on",
        "training/test_run.py::test_an_error_in_the_middle_says_what_is_saved",
    ),
    Row(
        "a model file rewritten while a run uses it",
        "the run saves a checkpoint, names the file and ends",
        "training/test_model_watch.py::test_a_model_file_that_is_rewritten_under_a_run_ends_it_with_all_that_it_has_learnt",
    ),
    Row(
        "a mapped file cut short while it is read",
        "one line, exit code 1",
        "process/test_bus_error.py::test_a_mapped_file_that_is_cut_short_is_named_and_the_exit_code_is_1",
    ),
    Row(
        "a pipe or a device under the name of a file that is read",
        "named; nothing waits for it",
        "output/test_damaged_files.py::test_a_damaged_file_of_a_teacher_cache_is_named output/test_damaged_files.py::test_a_damaged_file_of_an_evaluation_is_named "
        "data/test_files.py::test_a_missing_file_is_named_with_its_setting",
    ),
    Row(
        "an index that leads out of its folder",
        "refused",
        "model_folder/test_weights.py::test_an_index_that_leads_out_of_its_folder_is_refused",
    ),
    Row(
        "a flipped byte in the token cache",
        "noticed, said, and made again",
        "data/test_token_cache.py::test_a_flipped_byte_is_noticed_reported_and_made_again",
    ),
    Row(
        "a token cache of other data with the same time and size",
        "not taken: its key is the content",
        "data/test_token_cache.py::test_content_is_the_key_and_not_the_time_or_size_of_the_file",
    ),
    Row(
        "a damaged shard of a teacher cache",
        "named, before and while it is in use",
        "teachers/test_cache.py::test_one_bit_that_flipped_is_noticed_and_its_file_named teachers/test_cache.py::test_a_shard_that_is_changed_while_it_is_in_use_is_named",
    ),
    Row(
        "a teacher cache of another run, tokenizer or template",
        "refused with what differs",
        "commands/test_cache_refused.py::test_another_run_than_the_cache_was_made_for_is_refused_with_what_differs commands/test_cache_refused.py::test_another_tokenizer_or_chat_template_is_refused",
    ),
    Row(
        "damaged or edited results of an evaluation",
        "named with the line, never compared",
        "eval/test_compared_files.py::test_a_damaged_file_is_named_with_its_line eval/test_compared_files.py::test_edited_items_are_refused",
    ),
    Row(
        "a row of answers that has changed since `llmkd roll` wrote it",
        "refused with its line, by roll and by every run",
        "data/test_token_rows.py::test_a_row_that_changed_since_it_was_rolled_is_refused_until_that_is_said_to_be_meant "
        "rollouts/test_answer_file.py::test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_is",
    ),
    Row(
        "a file of answers with other rows than were written, or with the record of another file",
        "named",
        "training/test_rolled_data.py::test_a_file_with_other_rows_than_were_written_is_named",
    ),
    Row(
        "a torn last line of metrics",
        "left out; what is before stays",
        "test_files.py::test_a_line_that_a_kill_cut_short_is_left_out",
    ),
]
