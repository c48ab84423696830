"""Faults in a server that writes while the student trains: what is pushed and when, what is compared, and how an older student is corrected."""

from tests.planted.fault import in_file

ENGINE, EXAMPLES = "rollouts/test_engine.py", "data/test_examples.py"
RUN = f"{ENGINE}::test_a_run_is_that_of_the_model_in_this_process_and_leaves_nothing_behind"
BEFORE = f"{ENGINE}::test_another_server_than_the_students_is_refused_before_the_first_step"
WATCH = f"{ENGINE}::test_what_it_says_later_is_watched_too"
WEIGHTS = f"{ENGINE}::test_importance_weights_are_the_ratio_of_the_tokens_before"
OLDER = f"{ENGINE}::test_an_older_student_writes_between_two_pushes_and_is_corrected_where_asked"
RIGHT = f"{ENGINE}::test_the_right_one_is_not_refused_and_the_students_adapter_is_as_it_was"
TARGETS = f"{EXAMPLES}::test_weights_of_single_targets_multiply_those_of_their_examples"

FAULTS = [
    *in_file(
        "llmkd/rollouts/engine.py",
        ("pushed-late", "a step too many passes before a push", "self.staleness >= self.settings", "self.staleness > self.settings", WATCH),
        (
            "never-pushed-again",
            "the adapter is pushed once",
            "if self.pushed is None or self.staleness",
            "if self.pushed is None or 0 > self.staleness",
            RUN,
        ),
        ("any-other-model", "other log-probabilities are taken", "not gap <= self.settings.tolerance", "False", WATCH),
        (
            "adapter-unseen",
            "an adapter that is not applied goes unnoticed",
            "with moved(self.student, texts,",
            "with moved(self.student, texts[:0],",
            BEFORE,
        ),
        (
            "left-moved",
            "the check leaves another adapter behind",
            "    finally:\n        with torch.no_grad():\n            for p, value in held.items():\n                p.copy_(value)",
            "    finally:\n        pass",
            RIGHT,
        ),
        (
            "own-token-too",
            "a target is weighed by its own token's ratio",
            "np.concatenate([[0.0], np.cumsum(log_ratio_T)[:-1]])",
            "np.cumsum(log_ratio_T)",
            WEIGHTS,
        ),
        ("token-by-token", "a target is weighed by the token before it alone", "np.cumsum(log_ratio_T)[:-1]", "log_ratio_T[:-1]", WEIGHTS),
        ("not-cut", "importance weights have no limit", "np.minimum(before_T, np.log(most))", "before_T", WEIGHTS),
        (
            "not-pushed-again",
            "a server that was started anew ends the run",
            "            self.adapter.again()\n",
            "            raise\n",
            RUN,
        ),
    ),
    *in_file(
        "llmkd/rollouts/pushed_adapter.py",
        (
            "older-adapters-stay",
            "adapters heap up at the server",
            "        if before is not None:\n            self._remove(before)\n",
            "",
            RUN,
        ),
        ("one-name", "every push has the same name", "-{self._pushes}", "-1", RUN),
        (
            "killed-ones-stay",
            "adapters of killed runs stay at the server",
            "            if name.startswith(self.prefix):\n",
            "            if False:\n",
            f"{ENGINE}::test_what_a_killed_run_has_left_is_taken_away_and_the_next_goes_on",
        ),
    ),
    *in_file(
        "llmkd/data/examples.py",
        (
            "targets-unweighted",
            "weights of single targets do not count in sums",
            "for name in self.token_weights:",
            "for name in ():",
            TARGETS,
        ),
        (
            "weights-not-taken",
            "weights of single targets are lost with a part of the examples",
            "of_tokens = {name: w_T[tokens] for name, w_T in self.token_weights.items()}",
            "of_tokens = {}",
            TARGETS,
        ),
    ),
    *in_file(
        "llmkd/data/written.py",
        (
            "uncorrected",
            "importance weights do not reach the loss",
            'dict.fromkeys(("kd", "features", "attention"), of_tokens)',
            "{}",
            "rollouts/test_enumerated.py",
        ),
    ),
]
