"""Faults in what is refused before anything slow: ranges of numbers, headers of weights, devices, files of log-probabilities, servers."""

from tests.planted.fault import in_file

EARLY, RANGES = "training/test_early_checks.py", "config/test_ranges.py"

FAULTS = [
    *in_file(
        "llmkd/config/validation.py",
        (
            "fractions-too-small",
            "numbers that are 0 in float32 are taken",
            "elif 0 < abs(value) < SMALLEST_FRACTION:",
            "elif False:",
            RANGES,
        ),
        (
            "rows-in-range-too",
            "numbers that are compared with the user's rows have the range of settings",
            ' or "where" in path:',
            ":",
            RANGES,
        ),
        (
            "out-of-range-said-twice",
            "a number out of its range is said again by what it contradicts",
            "        broken.append(path)\n    together",
            "    together",
            RANGES,
        ),
    ),
    *in_file(
        "llmkd/config/divergences.py",
        (
            "mixed-by-nothing",
            "a mixture may hold less of a distribution than float32 tells from none",
            "elif name in _MIXING and 0 < min(value, 1 - value) < LEAST_MIXED:",
            "elif False:",
            RANGES,
        ),
    ),
    *in_file(
        "llmkd/config/teacher.py",
        (
            "wrong-average-is-no-teacher",
            "a wrong ema is said to be no teacher too",
            ', f"{path}.server", f"{path}.ema"),\n',
            "),\n",
            RANGES,
        ),
    ),
    *in_file(
        "llmkd/model_folder/modules.py",
        ("renamed-modules", "modules that files name otherwise are refused", "source and not re.search", "not re.search", EARLY),
        ("names-as-expression", "names are taken for a regular expression", "    if known & set(names):\n", "    if False:\n", EARLY),
    ),
    *in_file(
        "llmkd/training/launch_variables.py",
        (
            "rank-beyond",
            "a rank beyond the processes is taken, and says nothing",
            ">= count:",
            "> 10 + count:",
            "training/test_environment.py",
        ),
    ),
    *in_file(
        "llmkd/data/encoding/tokenizer.py",
        (
            "compared-late",
            "a tokenizer is made of files that have changed",
            "    verify_small_files(folder, setting)\n",
            "",
            "data/test_tokenizer.py",
        ),
    ),
    *in_file(
        "llmkd/process/devices.py",
        ("hidden-gpus", "GPUs that are hidden from the process are counted", "number < min(counts)", "number < max(counts)", EARLY),
    ),
    *in_file(
        "llmkd/training/early_checks.py",
        ("average-in-16-bit", "an average of bfloat16 weights is refused late", "if averages and dtype in NARROW:", "if False:", EARLY),
        ("layers-late", "layers are compared with the models late", "    if loss.features:\n", "    if False:\n", EARLY),
    ),
    *in_file(
        "llmkd/teachers/cache/import_lines.py",
        ("positive-logs-late", "what is no log-probability is found after the data are read", "not value <= SLACK:", "False:", EARLY),
    ),
    *in_file(
        "llmkd/servers/client.py",
        (
            "first-question-without-limit",
            "a server that accepts and never answers is waited for as long as for an answer",
            "self.timeout if within is None else min(self.timeout, within)",
            "self.timeout",
            "servers/test_client.py",
        ),
    ),
    *in_file(
        "llmkd/errors.py",
        (
            "saved-unsaid",
            "an error in the middle of a run does not say what is saved",
            "error.saved = step()",
            "error.saved = None",
            "training/test_run.py",
        ),
    ),
]
