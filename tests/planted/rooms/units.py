"""Faults in what formats, files, units and commands have of their own."""

from tests.planted.fault import in_file

FAULTS = [
    *in_file(
        "llmkd/output/metrics.py",
        (
            "kilobytes",
            "the peak of memory is in kilobytes",
            'ru_maxrss * (1 if sys.platform == "darwin" else 1024)',
            "ru_maxrss",
            "output/test_progress.py",
        ),
    ),
    *in_file(
        "llmkd/files.py",
        (
            "misspelt-checksum",
            "a sealed file whose key checksum has lost a bit counts as one of an earlier version",
            'if "checksum" not in found and found.get(last)',
            "if False and found.get(last)",
            "output/test_damaged_files.py",
        ),
        (
            "file-for-a-pipe",
            "a new file takes the place of a pipe or a device",
            "    if os.path.lexists(path) and not (path.is_symlink() or path.is_file() or path.is_dir()):\n",
            "    if False:\n",
            "commands/test_outputs.py",
        ),
    ),
    *in_file(
        "llmkd/commands/outputs.py",
        ("link-replaced", "results take the place of a link", "    file = file.resolve()\n", "", "commands/test_outputs.py"),
        (
            "pipe-not-written",
            "results are not written to a pipe",
            "    if is_stream(file):\n        file.write",
            "    if False:\n        file.write",
            "commands/test_outputs.py",
        ),
    ),
    *in_file(
        "llmkd/errors.py",
        (
            "delete-what-is-forbidden",
            "a file that may not be read is to be made again",
            "if isinstance(error, PermissionError) else otherwise",
            "if False else otherwise",
            "output/test_damaged_files.py",
        ),
        (
            "lines-in-a-problem",
            "a line break in a name makes two lines of one problem",
            'tuple("\\\\n".join(problem.splitlines()) for problem in problems)',
            "problems",
            "config/test_settings.py",
        ),
    ),
    *in_file(
        "llmkd/config/validation.py",
        (
            "numbers-without-bound",
            "numbers that no library holds are taken",
            "abs(value) > LARGEST:",
            "abs(value) > LARGEST**9:",
            "config/test_settings.py",
        ),
    ),
    *in_file(
        "llmkd/data/reading/files.py",
        (
            "no-page-checksums",
            "the checksums of a parquet file are not looked at",
            ", page_checksum_verification=True",
            "",
            "data/test_sources.py",
        ),
    ),
    *in_file(
        "llmkd/cli.py",
        ("closed-streams", "closed streams stay closed", "    console.open_streams()\n", "", "test_console.py"),
    ),
]
