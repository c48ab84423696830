"""Faults in how files, folders, columns and rolled data are read, and what a recipe says of them."""

from tests.planted.fault import in_file

FILES = "data/test_files.py data/test_sources.py"
SOURCES = "data/test_sources.py"
FOLDERS = "data/test_folders_and_hub.py"
AUTO = "training/test_auto_batch.py"
UNREAD = "data/test_unread.py"

FAULTS = [
    *in_file(
        "llmkd/data/reading/token_columns.py",
        (
            "changed-row",
            "an answer that has changed since it was written is read",
            "if known and row[ROW_CHECKSUM] != row_checksum(row):",
            "if False:",
            "data/test_token_rows.py rollouts/test_answer_file.py",
        ),
        (
            "mask-unsealed",
            "the targets of an answer may change",
            '"input_ids", "loss_mask", "tokenizer"',
            '"input_ids", "tokenizer"',
            "data/test_token_rows.py",
        ),
    ),
    *in_file(
        "llmkd/training/rolled_data.py",
        ("rows-uncounted", "rows that were removed are not seen", 'about.get("rows", there)', "there", "training/test_rolled_data.py"),
    ),
    *in_file(
        "llmkd/config/validation.py",
        (
            "not-utf8",
            "a name that is not UTF-8 ends in pydantic's words",
            'if text != text.encode(errors="ignore").decode()',
            "if False",
            "config/test_settings.py::test_a_file_name_that_is_not_utf8_is_refused_in_one_line",
        ),
    ),
    *in_file(
        "llmkd/data/batch_source.py",
        (
            "kept-rounded-down",
            "of a share of the targets fewer are counted than are kept",
            "sum(part_of(share, n) for n in",
            "sum(int(share * n) for n in",
            "training/test_keep.py",
        ),
        (
            "shortest-measured",
            "memory is measured with the shortest examples",
            "np.argsort(-self.examples.max_lengths",
            "np.argsort(self.examples.max_lengths",
            AUTO,
        ),
        (
            "resplit-of-the-students-lengths",
            "a step that is repeated is split by what the student reads alone",
            "self.split(step.examples, self.max_lengths(step)))",
            "self.split(step.examples, step.data.lengths))",
            "data/test_batching.py::test_a_step_that_is_split_again_is_split_by_what_the_teacher_reads_too",
        ),
    ),
    *in_file(
        "llmkd/data/reading/files.py",
        (
            "fields-too-few",
            "a row of a csv file may have too few fields",
            "if len(row) != len(header):",
            "if len(row) > len(header):",
            FILES,
        ),
        ("stream-cut", "an Arrow stream that was cut between two batches is read", "if file.read() != _STREAM_END:", "if False:", FILES),
        (
            "nulls-inside",
            "fields that a columnar file fills with null are given",
            "with_names({name: without_nulls(value) for name, value in columns.items()}, names)",
            "with_names(dict(columns), names)",
            FILES,
        ),
        (
            "line-of-a-list",
            "a row of a JSON list is named by the line where the one before it ends",
            "        start, at = at, _SPACE.match(text, at).end()\n        line += text.count",
            "        start, at = at, _SPACE.match(text, at).end()\n        line += 0 * text.count",
            FILES,
        ),
        (
            "lists-commas",
            "a JSON list may end with a comma",
            'if text[at : at + 1] == "]" and not expect_value:',
            'if text[at : at + 1] == "]":',
            FILES,
        ),
    ),
    *in_file(
        "llmkd/data/reading/sources.py",
        (
            "sample-unsorted",
            "drawn rows are in the order in which they were drawn",
            "for i in sorted(chosen)]",
            "for i in chosen]",
            SOURCES,
        ),
        ("sample-without-seed", "every seed draws the same rows", 'random.Random(f"sample {seed}")', 'random.Random("sample")', SOURCES),
        (
            "names-unhashed",
            "rows whose classes have other names are taken from the token cache",
            "json.dumps(names, sort_keys=True).encode() if names else",
            "",
            "data/test_class_names.py",
        ),
        (
            "content-of-the-first",
            "files that a limit leaves unread may change unnoticed",
            "            if name not in self.hashes:\n                self._bytes(name, path)",
            "            if not self.hashes:\n                self._bytes(name, path)",
            FOLDERS,
        ),
    ),
    *in_file(
        "llmkd/data/reading/folders.py",
        (
            "first-part-missing",
            "the first of a set of numbered files may be missing",
            "for n in range(int(count))",
            "for n in range(1, int(count))",
            FOLDERS,
        ),
        ("hidden-files", "files whose names begin with _ are data", 'part.startswith((".", "_"))', 'part.startswith(".")', FOLDERS),
        (
            "split-of-the-folder",
            "a split in a folder's name is not seen",
            "for part in (*path.parts[:-1], name)",
            "for part in (name,)",
            FOLDERS,
        ),
    ),
    *in_file(
        "llmkd/data/reading/unread.py",
        ("ignored-refused", "a column that is to be ignored is refused", "or name in source.ignore or", "or", UNREAD),
    ),
]
