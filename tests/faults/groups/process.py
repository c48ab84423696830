"""What stops a run, and what the machine does to it."""

from tests.faults.row import Row

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
