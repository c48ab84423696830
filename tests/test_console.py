"""Messages by the logger llmkd: shown on stderr by the command line, routed or silenced by a program; tables and durations."""

import logging
import subprocess
import sys

import pytest
from tqdm import tqdm

from llmkd import console
from llmkd.console import in_columns, text_width, wrap


def test_texts_are_wrapped_by_the_columns_that_they_take():
    assert wrap("one two  three", 8) == ["one two", "three"] and wrap("a\n\n  b", 9) == ["a", "", "  b"]
    assert wrap("abcdefgh ij", 3) == ["abc", "def", "gh", "ij"] and wrap("", 5) == [""]
    assert wrap("\u4f60\u597d\u4f60\u597d", 5) == ["\u4f60\u597d", "\u4f60\u597d"] and text_width("e\u0301\u4f60") == 3
    assert wrap("\x1b[2J\tx", 20) == ["\\x1b[2J x"], "what moves a terminal's cursor is text"
    assert wrap("e\u0301" * 7, 3) == ["e\u0301" * 3, "e\u0301" * 3, "e\u0301"]
    assert len(wrap("x" * 200_000, 80)) == 2500
    assert in_columns(["\u4f60", "b\nc"], 11) == ["\u4f60     b", "       c"]


def test_messages_are_plain_lines_on_what_stderr_is_now(capsys):
    console.show_messages()
    console.show_messages()  # once is enough
    console.info("a line, 100 % as given")
    console.warn("note: b")
    assert capsys.readouterr() == ("", "a line, 100 % as given\nnote: b\n")
    assert sum(isinstance(handler, console._Stderr) for handler in console.logger.handlers) == 1


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.info("a")
    console.warn("b")
    assert capsys.readouterr() == ("", "")


def test_streams_that_are_closed_are_opened_before_a_file_takes_their_number(tmp_path):
    """As `llmkd recipes >&- 2>&- <&-` starts it."""
    (tmp_path / "a.py").write_text(
        "import sys; from llmkd import cli\ncode = cli.main(sys.argv[1:])\nsys.exit(code * 100 + open(__file__).fileno())"
    )
    words = ["sh", "-c", f"exec {sys.executable} {tmp_path}/a.py recipes --json - <&- >&- 2>&-"]
    assert 2 < subprocess.run(words).returncode < 100


def test_a_line_goes_above_a_bar(capsys):
    with tqdm(total=3, file=sys.stderr) as bar:
        bar.update()
        capsys.readouterr()
        console.info("a line")
    err = capsys.readouterr().err
    assert err.startswith("\r") and "\na line" not in err.split("a line\n")[0] and "1/3" in err.split("a line\n")[1]


@pytest.mark.parametrize(
    ("setup", "out", "err"),
    [
        ("", [], ["note: b"]),  # as of any library: warnings alone
        (
            "logging.basicConfig(level='INFO', format='%(name)s %(levelname)s %(message)s', stream=sys.stdout)",
            ["llmkd INFO a", "llmkd WARNING note: b"],
            [],
        ),
        ("logging.getLogger('llmkd').setLevel('ERROR')", [], []),
        ("console.show_messages()", [], ["a", "note: b"]),
        ("console.show_messages(); logging.getLogger('llmkd').setLevel('WARNING')", [], ["note: b"]),
        ("console.show_messages(); logging.basicConfig(level='INFO')", [], ["a", "note: b"]),  # not twice
    ],
)
def test_a_program_routes_or_silences_them(setup, out, err):
    code = f"import logging, sys\nfrom llmkd import console\n{setup}\nconsole.info('a')\nconsole.warn('note: b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.splitlines(), done.stderr.splitlines()) == (out, err)


def test_the_logger_has_no_handler_of_its_own_when_imported():
    code = "import logging, llmkd.cli; print(logging.getLogger('llmkd').handlers, logging.getLogger('llmkd').level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"[] {logging.NOTSET}\n"


def test_table():
    rows = [{"": "kd", "ce": 1.25, "n": 10, "x": None}, {"": "sft_student", "ce": 10.0, "n": 3, "x": "y"}]
    assert console.table(rows).splitlines() == [
        "                  ce   n  x",
        "---------------------------",
        "kd            1.2500  10   ",
        "sft_student  10.0000   3  y",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "a second"), (2, "2 seconds"), (89, "89 seconds"), (150, "2.5 minutes"), (36000, "10 hours"), (4e5, "4.6 days")],
)
def test_duration(seconds, words):
    assert console.duration(seconds) == words


def test_columns_of_a_table_are_aligned_left_or_right():
    lines = [["name", "n", "remark"], ["a", "10", "x"]]
    assert console.align(lines) == ["name   n  remark", "a     10       x"]
    assert console.align(lines, left=(0, 2)) == ["name   n  remark", "a     10  x     "]


def test_columns_are_aligned_by_the_width_that_a_terminal_gives_to_characters():
    """Two columns for each Chinese character, none for an accent that is put on a letter."""
    lines = console.align([["数据.jsonl", "1"], ["cafe\u0301", "20"]])
    assert lines == ["数据.jsonl   1", "cafe\u0301" + " " * 8 + "20"]
    assert console.table([{"文": 1, "b": None}]).splitlines()[1] == "-" * 5
