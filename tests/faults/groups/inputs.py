"""Data and settings as people give them."""

from tests.faults.row import Row

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
