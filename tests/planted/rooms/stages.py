"""Faults in which rows are used, in the noise of the generated corpus, and in students of some of their base's layers."""

from tests.planted.fault import in_file

WHERE, DEPTH, SWEEP = "data/test_where.py", "models/test_depth.py", "commands/test_sweep_arms.py"
BY_HAND = f"{DEPTH}::test_a_cut_model_is_the_one_built_by_hand_and_plain_transformers_load_it"
UNLIKE = f"{DEPTH}::test_families_whose_layers_are_not_alike_are_refused"
INFLUENCE = f"{DEPTH}::test_block_influence_is_that_of_float64_loops_over_hidden_states"
RESUMED = f"{DEPTH}::test_layers_by_influence_are_measured_once_recorded_and_resumed"

FAULTS = [
    *in_file(
        "llmkd/data/reading/where.py",
        (
            "one-condition",
            "a row that fulfils one of several conditions is kept",
            "return all([self._one(",
            "return any([self._one(",
            WHERE,
        ),
        (
            "at-least-is-above",
            "at_least leaves the limit out",
            '"at_least": lambda value, limit: value >= limit',
            '"at_least": lambda value, limit: value > limit',
            WHERE,
        ),
        ("not-is-in", "not keeps what it names", '!= (name == "not")', '== (name == "no")', WHERE),
        ("true-is-one", "true is equal to 1", "kind(value) == kind(one) and value == one", "value == one", WHERE),
        ("csv-is-true", "every boolean of a csv file is true", 'return text.lower() == "true"', "return True", WHERE),
        ("csv-empty", "an empty field of a csv file is no null", '    if text == "":\n        return None\n', "", WHERE),
        ("nan-is-a-number", "NaN is no null", "isinstance(value, float) and math.isnan(value)", "False", WHERE),
        (
            "bad-row-left-out",
            "a row that cannot be parsed is left out",
            "                yield place, get\n                continue\n",
            "                continue\n",
            WHERE,
        ),
    ),
    *in_file(
        "llmkd/data/reading/sources.py",
        (
            "where-not-in-identity",
            "other rows of one file are the same data",
            '[{"where": source.where}] if source.where else []',
            "[]",
            WHERE,
        ),
    ),
    *in_file(
        "llmkd/data/dataset.py",
        (
            "parts-are-shared",
            "two parts of one file are warned of as the same data",
            "same = not _texts(one).isdisjoint(_texts(others))",
            "same = True",
            WHERE,
        ),
    ),
    *in_file(
        "llmkd/data/reading/skills.py",
        ("half-the-noise", "half of the share is replaced", "round(noise * len(questions))", "round(noise * len(questions) / 2)", WHERE),
        ("all-marked-clean", "a wrong answer is marked as a right one", '{"clean": i not in wrong}', '{"clean": True}', WHERE),
    ),
    *in_file(
        "llmkd/config/paths.py",
        (
            "default-wins",
            "a variable that is set does not count where there is a default",
            "os.environ.get(name) or default",
            "default",
            "config/test_paths.py",
        ),
    ),
    *in_file(
        "llmkd/training/prepare.py",
        (
            "rows-of-nobody",
            "a cache lacks training rows of an arm that does not learn from it",
            '{"data.train": (data.train, data.places)} if distils(recipe) else {}',
            '{"data.train": (data.train, data.places)}',
            "commands/test_sweep_caches.py",
        ),
    ),
    *in_file(
        "llmkd/commands/sweep.py",
        (
            "arms-before-seeds",
            "all seeds of an arm come before the next arm",
            "key=lambda group: seeds.index(recipes[group.arms[0]].seed)",
            "key=lambda group: 0",
            SWEEP,
        ),
    ),
    *in_file(
        "llmkd/config/sweep.py",
        (
            "one-seed",
            "every arm has the path of the first seed",
            'replaced(changes, "{seed}", seed)',
            'replaced(changes, "{seed}", seeds[0])',
            SWEEP,
        ),
        (
            "seed-as-text",
            "a number that is the seed is a text",
            'replaced(changes, "{seed}", seed)',
            'replaced(changes, "{seed}", str(seed))',
            SWEEP,
        ),
    ),
    *in_file(
        "llmkd/model_folder/layers.py",
        ("first-kinds", "the kinds of the first layers are kept", "[values[i] for i in kept]", "values[: len(kept)]", BY_HAND),
        (
            "first-layers",
            "the first layers are kept",
            'int(at[2]) in (numbers := new[at[1] or ""])',
            'int(at[2]) < len(numbers := new[at[1] or ""])',
            DEPTH,
        ),
    ),
    *in_file(
        "llmkd/models/depth.py",
        ("rounded-down", "even numbers are rounded down", "(2 * i * (layers - 1) + (count - 1)) //", "(2 * i * (layers - 1)) //", DEPTH),
        ("one-beyond", "a layer one beyond the model is accepted", "if number >= count]", "if number > count]", DEPTH),
        (
            "unlike-layers",
            "layers of other kinds are left out too",
            "(own := shape_of(layer)) != first",
            "not (own := shape_of(layer))",
            UNLIKE,
        ),
        ("by-place", "layers that compute by their place are left out too", "        if config.get(name):\n", "        if False:\n", DEPTH),
        (
            "damaged-base",
            "a damaged smaller model is used",
            "        verify(folder, None, SETTING)\n",
            "",
            f"{DEPTH}::test_a_damaged_smaller_model_is_made_again",
        ),
    ),
    *in_file(
        "llmkd/models/block_influence.py",
        ("similarity", "the layers that change least are kept", "1 - total / tokens", "total / tokens", INFLUENCE),
        ("mean-of-means", "an example counts once however long it is", "tokens += len(ids_T)", "tokens += 1", INFLUENCE),
        ("least-influence", "the least influential layers are kept", "(-influence[i], i)", "(influence[i], i)", DEPTH),
    ),
    *in_file(
        "llmkd/training/prepare.py",
        (
            "measured-again",
            "a resumed run chooses its layers anew",
            "kept = known or depth.choose_layers(",
            "kept = depth.choose_layers(",
            RESUMED,
        ),
    ),
    *in_file(
        "llmkd/training/student_run.py",
        (
            "base-in-the-cache",
            "an adapter names a base that is in the cache alone",
            'if files and in_cache(files.base) and summary["output"] == "adapter":',
            "if False:",
            DEPTH,
        ),
    ),
]
