"""Faults in groups of tasks: what is recorded of them, their means in comparisons, and the statistics of independent tasks."""

from tests.planted.fault import in_file

GROUPS, HARNESS = "eval/test_groups.py", "eval/test_chat_template.py::"
FAILS, MEAN = f"{HARNESS}test_the_results_of_other_tasks_are_kept_where_one_fails", f"{HARNESS}test_a_groups_mean_is_the_harnesss"
SWEEP = f"{HARNESS}test_results_with_and_without_it_are_never_mixed"

FAULTS = [
    *in_file(
        "eval/comparison/stats.py",
        (
            "strata-divide-by-n",
            "a task's variance divides by n",
            "return n * squares / (n - 1) / len(x) ** 2, n",
            "return squares / len(x) ** 2, n",
            GROUPS,
        ),
        (
            "strata-one-mean",
            "the spread is about the mean of all tasks",
            "np.square(x - (np.bincount(strata, x) / n)[strata])",
            "np.square(x - x.mean())",
            GROUPS,
        ),
        (
            "strata-drawn-together",
            "items are drawn over all tasks",
            "    if strata is None:\n        df, wider, drawn",
            "    if True:\n        df, wider, drawn",
            GROUPS,
        ),
        (
            "strata-same-share",
            "every task is a like share of the bootstrap's mean",
            "(m := strata == t).sum() / n * bootstrap",
            "(m := strata == t).sum() / m.sum() / (strata.max() + 1) * bootstrap",
            GROUPS,
        ),
        (
            "strata-degrees-of-all",
            "an interval has the degrees of freedom of all items",
            "max(1, int(v.sum() ** 2 / (v**2 / (n - 1)).sum()))",
            "int(n.sum()) - len(n)",
            GROUPS,
        ),
        (
            "strata-not-widened",
            "an interval is not made up for the bootstrap's variance",
            "math.sqrt(v.sum() / (v * (n - 1) / n).sum())",
            "1.0",
            GROUPS,
        ),
    ),
    *in_file(
        "eval/comparison/group_results.py",
        (
            "group-always-by-items",
            "tasks that weigh alike weigh by their items",
            'x if weighting == "items" else x * alike',
            "x",
            GROUPS,
        ),
        (
            "group-of-other-tasks",
            "groups of other tasks are compared",
            'for part in ("tasks", "means"):',
            'for part in ("means",):',
            GROUPS,
        ),
        (
            "group-otherwise-weighted",
            "groups that weigh otherwise are compared",
            'for part in ("tasks", "means"):',
            'for part in ("tasks",):',
            GROUPS,
        ),
        (
            "group-without-a-task",
            "a metric that a task lacks has a mean of the others",
            "if lacking:\n",
            "if len(lacking) == len(tasks):\n",
            GROUPS,
        ),
    ),
    *in_file(
        "eval/comparison/compare.py",
        (
            "group-spread-of-one",
            "a group's standard error takes its tasks for one",
            "x[arm].mean(axis=0), w, first.strata)",
            "x[arm].mean(axis=0), w)",
            GROUPS,
        ),
        ("group-difference-of-one", "a group's difference takes its tasks for one", "mean_b, w, strata=strata)", "mean_b, w)", GROUPS),
        ("group-with-lost-tasks", "a group whose task is lost ends the comparison", "if part not in tasks_of(run)),", "if False),", GROUPS),
    ),
    *in_file(
        "eval/harness/groups.py",
        (
            "group-recorded-early",
            "a group is recorded though one of its tasks failed",
            "if names and records.keys() >= set(names):\n            means",
            "if True:\n            means",
            FAILS,
        ),
        (
            "shots-of-the-first",
            "a group has the few-shot examples of its first task",
            '{records[task]["fewshot"] for task in names}',
            '{records[names[0]]["fewshot"]}',
            "eval/test_chat_template.py::test_a_group_whose_tasks_lack_the_metric_has_no_mean",
        ),
        (
            "group-weighting-swapped",
            "the weightings are recorded the other way",
            '"items" if wanted.weight_by_size else "tasks"',
            '"tasks" if wanted.weight_by_size else "items"',
            MEAN,
        ),
    ),
    *in_file(
        "eval/after_sweep.py",
        (
            "group-not-checked",
            "other settings of a group's tasks are found after the training",
            "    for task in tasks:\n",
            "    for task in wanted.tasks:\n",
            SWEEP,
        ),
    ),
]
