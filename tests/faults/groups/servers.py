"""Writers and servers."""

from tests.faults.row import Row

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
