"""The fault matrix: what can go wrong around a run, what llmkd then does, and the tests that show it.

python -m tests.faults              print the table
python -m tests.faults --run disk   run the tests of the rows in which a word occurs
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One fault.

    fault   what happens
    answer  what llmkd does
    tests   the tests, relative to tests/, as pytest names them, separated by blanks
    """

    fault: str
    answer: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests.split()]


STOPS = [
    Row(
        "kill -9 at a random moment of a run",
        "--resume ends with the same weights, to the bit",
        "training/test_resume.py::test_kill_9_in_the_middle_of_an_accumulation training/test_resume.py::test_resume_at_every_step",
    ),
    Row(
        "kill -9 while a checkpoint is written",
        "the one before is taken",
        "training/test_resume.py::test_a_kill_inside_a_save_leaves_a_whole_checkpoint",
    ),
    Row(
        "kill -9 while a small file or a model's folder is written",
        "the old one or the new one is there, whole",
        "test_files.py::test_a_kill_leaves_the_file_as_it_was_and_a_leftover_that_is_known_as_one test_files.py::test_a_kill_leaves_a_whole_folder_or_none",
    ),
    Row(
        "kill -9 before the first step",
        "the folder is known as an unfinished run's",
        "training/test_run.py::test_a_kill_while_the_folder_was_claimed_can_be_resumed",
    ),
    Row("kill -9 of cache", "the same command goes on to the same bytes", "commands/test_cache.py::test_a_killed_attempt_goes_on"),
    Row("kill -9 of a sweep", "--resume keeps what is finished", "commands/test_sweep_resume.py::test_a_sweep_that_is_killed_goes_on"),
    Row(
        "SIGTERM, SIGINT, SIGUSR1, SIGHUP",
        "the step is finished and saved, exit code 75",
        "training/test_resume.py::test_a_signal_saves_and_stops training/test_run.py::test_a_real_signal_to_the_command",
    ),
    Row(
        "a signal during another command",
        "it ends with a message, exit code 75, and leaves nothing half-written",
        "process/test_machine_errors.py::test_a_signal_ends_a_command_with_a_message eval/test_eval_command.py::test_a_signal_keeps_what_is_finished_and_the_same_command_goes_on",
    ),
    Row("a second signal", "the run ends at once", "training/test_launcher.py::test_a_second_signal_ends_at_once"),
    Row(
        "a signal that the shell ignores",
        "it stays ignored",
        "training/test_launcher.py::test_a_signal_that_was_ignored_stays_ignored",
    ),
    Row(
        "a signal to the launcher, or its death",
        "every process of the run stops with a checkpoint",
        "training/test_launcher.py::test_a_signal_to_the_launcher_reaches_the_run training/test_launcher.py::test_the_end_of_a_parent_is_told_once",
    ),
    Row(
        "one process raises or dies",
        "the others end; its own line is shown, not a lost connection",
        "process/test_machine_errors.py::test_what_one_process_alone_meets_is_its_line_and_not_anothers_lost_connection process/test_machine_errors.py::test_a_process_that_dies_without_a_word_is_missed_once",
    ),
    Row(
        "a launch that starts fewer processes than asked",
        "refused",
        "training/test_run.py::test_a_launch_that_starts_fewer_processes_is_refused",
    ),
]

MACHINE = [
    Row(
        "full or limited disk, too little memory, a vanished folder, a dead peer",
        "one line that says so, exit code 1; never called a bug",
        "process/test_machine_errors.py::test_an_error_of_the_machine_is_one_line_that_says_what_to_do",
    ),
    Row(
        "full disk while a file is written",
        "the old file stays, nothing half-written is left",
        "test_files.py::test_an_error_leaves_the_file_as_it_was_and_no_leftover data/test_token_cache.py::test_a_full_disk_does_not_fail_the_run_and_leaves_nothing_behind",
    ),
    Row(
        "a file that may not grow during train, cache or export",
        "one line, exit code 1; the same command goes on where there is room",
        "faults/test_limited_disk.py::test_a_file_that_may_not_grow_is_said_in_one_line_and_nothing_half_written_stays",
    ),
    Row(
        "a clock that goes back or ahead",
        "hashes of files written after the clock's time are not kept; nothing else goes by it",
        "model_folder/test_weights.py::test_a_clock_that_goes_back_remembers_no_file_of_the_time_that_was",
    ),
    Row(
        "a full disk, whichever of several folders is on it",
        "named with the file that was written",
        "test_files.py::test_a_full_disk_is_named_with_the_file_that_was_written",
    ),
    Row(
        "too little memory for a micro-batch",
        "the step is repeated with half of it",
        "training/test_auto_batch.py::test_memory_that_runs_out_repeats_the_step_with_half training/test_auto_batch.py::test_where_nothing_smaller_can_help_the_error_comes_out",
    ),
    Row(
        "output_dir cannot be written",
        "refused before anything is loaded",
        "output/test_run_folder.py::test_a_folder_that_cannot_be_made_is_refused_at_once_and_one_that_can_leaves_nothing",
    ),
    Row(
        "no home folder (HOME unset, ~nobody)",
        "one line with what to set",
        "process/test_machine_errors.py::test_a_path_that_cannot_be_is_the_users_mistake test_cli.py::test_a_mistake_is_one_line "
        "config/test_paths.py::test_a_home_that_is_not_known_is_refused",
    ),
    Row(
        "too little room for the next checkpoint",
        "known before it is written: one line, exit code 1",
        "training/test_checkpoint.py::test_too_little_room_for_a_checkpoint_is_a_full_disk_and_the_one_before_stays",
    ),
    Row(
        "a file that this user may not read",
        "named with the right that is missing; no advice to delete it",
        "output/test_damaged_files.py::test_a_file_that_this_user_may_not_read_is_not_to_be_deleted_or_made_again",
    ),
    Row(
        "stdin, stdout or stderr closed",
        "nothing is printed there, and no file takes its place",
        "test_console.py::test_streams_that_are_closed_are_opened_before_a_file_takes_their_number",
    ),
    Row(
        "results to a pipe, a device or a link (--json /dev/null)",
        "written to it; it stays what it is",
        "commands/test_outputs.py::test_a_pipe_is_written_to_and_a_link_stays_one "
        "commands/test_outputs.py::test_a_file_that_a_process_has_open_is_not_replaced",
    ),
    Row(
        "two runs in one folder",
        "the second is refused",
        "training/test_run.py::test_two_runs_do_not_share_a_folder test_files.py::test_a_lock_ends_with_its_process",
    ),
    Row(
        "output_dir is a folder of other things",
        "refused, and nothing in it is touched",
        "training/test_run.py::test_a_folder_of_the_users_own_is_never_touched",
    ),
    Row(
        "no network, or one that fails on the way",
        "one line with what to set",
        "data/test_stream.py::test_a_network_that_fails_on_the_way_is_no_bug data/test_folders_and_hub.py::test_offline_a_data_set_of_the_hub_says_what_to_unset",
    ),
    Row(
        "a setting of Accelerate's, torch's or transformers' environment changes the arithmetic",
        "refused or said",
        "training/test_environment.py::test_what_changes_the_arithmetic_is_refused_by_name_with_its_fix training/test_environment.py::test_accelerates_accumulation_is_refused_and_would_divide_nothing",
    ),
]

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
        "training/test_resume.py::test_one_bit_of_any_model_file_is_noticed_by_name",
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
        "training/test_resume.py::test_a_model_file_that_is_rewritten_under_a_run_ends_it_with_all_that_it_has_learnt",
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
        "training/test_parity.py::test_micro_batches_do_not_matter training/test_parity.py::test_two_processes_are_one training/test_run.py::test_each_target_is_trained_exactly_once_an_epoch",
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

DATA = [
    Row(
        "a bad line, row or file",
        "named with its place, twenty at once",
        "data/test_files.py::test_a_bad_line_is_named data/test_files.py::test_the_first_twenty_problems_are_shown_and_the_rest_counted",
    ),
    Row("an empty file", "named", "data/test_files.py::test_a_bad_file_is_named"),
    Row(
        "a token id that is no entry of the vocabulary",
        "refused with file and line",
        "data/test_token_rows.py::test_a_row_that_is_wrong_is_named_with_what_was_found data/test_token_rows.py::test_an_id_between_the_entries_of_a_vocabulary_is_refused",
    ),
    Row(
        "a row of ten megabytes",
        "cut or refused before it is tokenised, in a moment; by split it is tokenised in stretches",
        "data/test_long_texts.py::test_ten_megabytes_take_a_moment data/test_long_texts.py::test_a_long_text_is_tokenised_in_stretches_and_no_further_than_it_fits",
    ),
    Row(
        "a file of another format",
        "the setting that fits is named",
        "data/test_files.py::test_a_file_of_another_format_is_named_once_with_the_setting_that_fits",
    ),
    Row(
        "turns that are not to be trained on",
        "context only, or refused",
        "data/test_turn_marks.py::test_a_turn_marked_as_not_trained_on_is_context_only data/test_turn_marks.py::test_a_mark_that_cannot_be_honoured_is_refused",
    ),
    Row(
        "columns and keys that are not read",
        "listed once; refused where they carry meaning",
        "data/test_unread.py::test_unread_columns_are_listed_once_by_a_run_and_by_data data/test_unread.py::test_a_column_with_a_meaning_is_refused_with_the_lines_that_fix_it",
    ),
    Row(
        "text with the characters of a control token",
        "stays characters",
        "data/test_control_tokens.py::test_the_characters_of_a_control_token_in_chat_stay_characters data/test_control_tokens.py::test_no_key_of_a_message_smuggles_a_control_token_in",
    ),
    Row(
        "a template that fails, or drops what an answer says",
        "refused with the row",
        "data/test_template_tricks.py::test_a_template_that_fails_is_named_with_the_row data/test_template_tricks.py::test_tool_calls_that_the_template_does_not_show_are_refused",
    ),
    Row(
        "a template that leaves out a message, a call or an argument",
        "refused with the row; other keys, reasoning and tools are listed",
        "data/test_what_is_shown.py::test_a_message_that_the_template_does_not_show_is_refused data/test_call_arguments.py::test_arguments_that_do_not_come_out_are_refused "
        "data/test_what_is_shown.py::test_what_a_template_does_not_show_of_a_message_is_counted",
    ),
    Row(
        "tool calls whose arguments are text where the template wants objects, or the reverse",
        "given as the template wants them",
        "data/test_call_arguments.py::test_arguments_are_the_json_that_the_template_means",
    ),
    Row(
        "a template with an endless loop, or that writes gigabytes",
        "ended after 5 s or at 1 GB, one line",
        "data/test_template_process.py::test_a_template_that_takes_long_is_refused_in_one_line data/test_template_process.py::test_a_template_that_takes_much_memory_is_refused_in_one_line",
    ),
    Row(
        "the process of the templates is killed, or its question is interrupted",
        "starts again; no answer of another question",
        "data/test_template_process.py::test_a_process_that_was_ended_by_others_starts_again data/test_template_process.py::test_an_interrupted_question_leaves_no_answer_to_the_next",
    ),
    Row(
        "texts that a chat template has rendered already",
        "warned of where most rows are",
        "data/test_rendered_text.py::test_texts_that_were_rendered_already_are_warned_of_where_most_are",
    ),
    Row(
        "an example longer than max_length",
        "dropped, cut or refused as set, and counted",
        "data/test_encode.py::test_what_is_too_long_is_dropped_or_cut_and_counted data/test_encode.py::test_what_is_too_long_can_be_refused_with_its_place",
    ),
    Row(
        "data that changes between stop and --resume",
        "refused",
        "training/test_resume.py::test_resume_refuses_what_has_changed data/test_stream.py::test_a_resumed_run_notices_rows_that_are_gone",
    ),
]

SETTINGS = [
    Row(
        "an unknown or misspelt setting",
        "named with its line and the nearest name",
        "config/test_settings.py::test_a_bad_setting_is_named_where_it_stands",
    ),
    Row(
        "values that contradict each other",
        "all of them are named at once",
        "config/test_settings.py::test_settings_that_contradict_each_other_are_named config/test_settings.py::test_all_problems_are_found_at_once",
    ),
    Row(
        "YAML tags, or anchors that grow without end",
        "refused",
        "config/test_recipe_files.py::test_tags_are_refused_and_nothing_is_built config/test_recipe_files.py::test_an_anchors_bomb_is_refused",
    ),
    Row(
        "characters of a terminal, or line breaks, in a name that a message quotes",
        "shown as \\x1b and \\n, on one line",
        "config/test_help.py::test_a_name_with_characters_of_a_terminal_stays_one_line_that_shows_them",
    ),
    Row(
        "a name of a file, or an argument, that is not UTF-8",
        "refused with its setting, in any locale",
        "config/test_settings.py::test_a_file_name_that_is_not_utf8_is_refused_in_one_line",
    ),
    Row(
        "a link that leads nowhere, or to itself",
        "called so",
        "config/test_paths.py::test_a_link_that_leads_nowhere_is_called_so",
    ),
    Row(
        "a number that no library can hold",
        "refused with its setting",
        "config/test_settings.py::test_a_bad_setting_is_named",
    ),
    Row(
        "another setting on --resume",
        "taken where it changes nothing that is learnt, else refused",
        "training/test_resume_settings.py::test_a_resumed_run_takes_or_refuses_another_value",
    ),
    Row(
        "a mistake of any kind",
        "found before torch is loaded, where it can be",
        "config/test_help.py::test_a_recipe_is_checked_before_anything_heavy_is_imported test_cli.py::test_help_mistakes_and_listing_load_no_torch",
    ),
]

WRITERS = [
    Row(
        "a teacher's server that is restarted, stays away, or answers wrongly",
        "waited for; one line, and the steps so far are saved; nothing wrong is kept",
        "teachers/test_served.py::test_a_restart_of_the_server_in_the_middle_is_survived teachers/test_served.py::test_a_server_that_stays_away_ends_the_run_with_one_line "
        "teachers/test_served.py::test_a_wrong_answer_ends_the_run_and_is_not_kept training/test_served_run.py::test_a_run_that_a_server_ends_goes_on_where_it_was",
    ),
    Row(
        "a server that writes while the student trains is started anew, stays away, or is another one than it was",
        "the adapter is pushed again; one line, and --resume goes on; the run stops with what it has learnt saved",
        "rollouts/test_engine.py::test_a_run_is_that_of_the_model_in_this_process_and_leaves_nothing_behind "
        "rollouts/test_engine.py::test_what_a_killed_run_has_left_is_taken_away_and_the_next_goes_on "
        "rollouts/test_engine.py::test_what_it_says_later_is_watched_too",
    ),
    Row(
        "such a server with other weights, without the adapter that was pushed, or that loads none",
        "refused before the first step",
        "rollouts/test_engine.py::test_another_server_than_the_students_is_refused_before_the_first_step "
        "rollouts/test_engine.py::test_a_server_that_cannot_do_it_is_refused_before_a_model_is_loaded",
    ),
    Row(
        "a server with another tokenizer, another model or too short a context",
        "refused before training",
        "teachers/test_served.py::test_a_server_with_another_tokenizer teachers/test_served.py::test_other_weights_under_the_same_name "
        "teachers/test_served.py::test_a_server_that_is_too_short_and_one_that_gives_too_few_tokens",
    ),
    Row(
        "kill -9 of roll, at any byte",
        "the same command writes the same file, no answer twice",
        "commands/test_roll.py::test_after_a_kill_at_any_byte_the_same_command_writes_the_same_file_and_no_answer_twice",
    ),
    Row(
        "a kill while the student writes",
        "--resume ends with the same weights, to the bit",
        "rollouts/test_source.py::test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not",
    ),
    Row(
        "one rank that cannot write",
        "all end",
        "rollouts/test_source.py::test_a_rank_that_cannot_write_ends_all",
    ),
]

TABLE = {
    "Stops": STOPS,
    "The machine": MACHINE,
    "Files": FILES,
    "Numbers": NUMBERS,
    "Models": MODELS,
    "Data": DATA,
    "Settings": SETTINGS,
    "Writers and servers": WRITERS,
}
