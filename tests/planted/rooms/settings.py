"""Faults in settings: ranges, contradictions, and how recipes are read."""

from tests.planted.fault import in_file

TABLE = "training/test_resume_settings.py"
SETTINGS = "config/test_settings.py"
RECIPE_FILES = "config/test_recipe_files.py"

FAULTS = [
    *in_file(
        "llmkd/config/schema.py",
        (
            "every-setting-may-change",
            "every setting may change on resume",
            "        if metadata(kind, key).changeable:\n",
            "        if metadata(kind, key).changeable is not None:\n",
            TABLE,
        ),
        (
            "items-may-not-change",
            "a setting of one of several teachers may never change",
            "        if key.isdigit():  # an item of a list of sources or teachers\n            continue\n",
            "",
            "config/test_fields.py",
            "`section_of` gives a key that is no field of a section that section itself, so an index leads nowhere else",
        ),
    ),
    *in_file(
        "llmkd/config/recipe.py",
        (
            "rate-may-change",
            "a resumed run may have another learning rate",
            "    lr: float = fixed(2e-4",
            "    lr: float = changeable(2e-4",
            TABLE,
        ),
        ("seed-may-change", "a resumed run may have another seed", "    seed: Seed = fixed(0", "    seed: Seed = changeable(0", TABLE),
        (
            "chunk-may-not-change",
            "a resumed run may not have another chunk size",
            "    chunk_size: Count | None = changeable(",
            "    chunk_size: Count | None = fixed(",
            TABLE,
        ),
    ),
    *in_file(
        "llmkd/config/divergences.py",
        (
            "options-out-of-range",
            "options of a divergence have no bounds",
            "elif not known[option][0] <= value <= known[option][1]:",
            "elif False:",
            SETTINGS,
        ),
    ),
    *in_file(
        "llmkd/config/contradictions.py",
        (
            "two-lengths",
            "epochs and max_steps may be given together",
            "if train.epochs is not None and train.max_steps is not None:",
            "if False:",
            SETTINGS,
        ),
        (
            "warm-up-longer-than-the-run",
            "the warm-up may be longer than the run",
            "if train.max_steps and optim.warmup_steps and optim.warmup_steps > train.max_steps:",
            "if False:",
            SETTINGS,
        ),
    ),
    *in_file(
        "llmkd/config/media.py",
        (
            "layers-of-other-columns",
            "layers are not compared with a teacher of another column where clips are clean",
            "and not all(one.reads for one in asked)",
            "and True",
            "tasks/test_views.py",
        ),
        (
            "layers-of-any-teacher",
            "layers are compared with a teacher that reads other clips than the student",
            'one.name == getattr(recipe.loss.features, "teacher", None)',
            "one.reads",
            "tasks/test_views.py",
        ),
    ),
    *in_file(
        "llmkd/config/make_sounds.py",
        (
            "transcripts-of-transcripts",
            "sounds may be transcribed twice",
            'if one.do == "transcribe" and transcribed:',
            "if False:",
            "making/test_transcribe.py",
        ),
        (
            "rates-of-texts",
            "a word error rate of rows that are no sounds is accepted",
            'elif one.do == "keep" and one.settings.wer_below is not None:',
            "elif False:",
            "making/test_transcribe.py",
        ),
    ),
    *in_file(
        "llmkd/config/data.py",
        (
            "held-out-rows-may-change",
            "a resumed run may hold out another share of the rows",
            "    validation_fraction: float = fixed(",
            "    validation_fraction: float = changeable(",
            f"{TABLE} config/test_fields.py",
        ),
        (
            "length-without-cache",
            "the token cache does not depend on max_length",
            '= fixed(512, shapes=("tokens", "teacher")',
            '= fixed(512, shapes=("teacher",)',
            "config/test_fields.py data/test_token_cache.py",
        ),
    ),
    *in_file(
        "llmkd/config/loader.py",
        (
            "ratio-without-a-teacher",
            "kd_ratio is 0.5 without a teacher too",
            "kd_ratio=0.5 if as_tuple(recipe.teacher) else 0.0",
            "kd_ratio=0.5",
            RECIPE_FILES,
        ),
        (
            "defaults-not-written",
            "a run's recipe leaves its defaults to the version",
            "        train = dataclasses.replace(train, epochs=1)\n",
            "        pass\n",
            RECIPE_FILES,
        ),
        (
            "given-twice",
            "of a setting that is given twice the last counts",
            "        if path in out:\n",
            "        if False:\n",
            "config/test_overrides.py",
        ),
        (
            "paths-as-they-are-written",
            "one folder under two names is a change",
            "            mapping[key] = os.path.abspath(mapping[key])\n",
            "            pass\n",
            "config/test_paths.py training/test_resume.py training/test_resume_settings.py::test_one_folder_under_two_names_is_no_change",
        ),
    ),
    *in_file(
        "llmkd/config/yaml_loader.py",
        (
            "keys-twice",
            "of a key that stands twice the last counts",
            "                if key in out:\n",
            "                if False:\n",
            SETTINGS,
        ),
        ("exponents-are-text", "1e-4 is a text", r"|[-+]?[0-9]+[eE][-+]?[0-9]+|", "|", RECIPE_FILES),
    ),
]
