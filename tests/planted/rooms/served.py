"""Faults in teachers and writers on servers: requests, how answers are read and kept, and what is noticed before the first step."""

from tests.planted.fault import in_file

CLIENT, LOGPROBS, WRITES = "servers/test_client.py", "servers/test_logprobs.py", "rollouts/test_server_writer.py"
LISTED, ANSWERS, SERVED, RUNS = (
    "teachers/test_listed.py",
    "teachers/test_answers.py",
    "teachers/test_served.py",
    "training/test_served_run.py",
)

EARLY = "test_cli.py::test_what_is_missing_or_cannot_be_written_to_is_said_before_torch_is_loaded"

FAULTS = [
    *in_file(
        "llmkd/servers/client.py",
        ("never-again", "a server that is busy is not asked again", "if status in _AGAIN:", "if False:", CLIENT),
        ("again-for-ever", "a refusal is repeated", "raise Refused(status, text)", "raise _Passing(text)", CLIENT),
        ("key-in-messages", "a server's message shows the key", 'text.replace(self._secret, "(the key)")', "text", CLIENT),
        (
            "impatient-server",
            "the wait that a server names is not kept",
            "raise _Passing(said, fix, wait=wait,",
            "raise _Passing(said, fix, wait=None,",
            CLIENT,
        ),
        ("waits-on", "requests that wait are not let go", "self._ended.set()", "pass", CLIENT),
    ),
    *in_file(
        "llmkd/servers/connections.py",
        ("drips", "an answer may come for ever", "duplicate.shutdown(socket.SHUT_RDWR)", "pass", CLIENT),
        (
            "drips-after-sending",
            "so it may after a request that was sent slowly",
            "if over.is_set():  # before",
            "if False:  # before",
            CLIENT,
        ),
        ("nameless-proxy", "a proxy is not told its password", "if named else None", "if False else None", CLIENT),
    ),
    *in_file(
        "llmkd/servers/logprobs.py",
        ("other-ids", "other ids than asked are taken", "        if a != b:\n", "        if False:\n", LOGPROBS),
        ("cut-texts", "a text that was cut is taken", "    if len(given) != len(wanted):\n", "    if False:\n", LOGPROBS),
        ("any-model", "another model's answer is taken", 'if answer.get("model", model.name) != model.name:', "if False:", LOGPROBS),
        (
            "fewer-tokens",
            "fewer tokens than asked are taken",
            "if (fewest := int(here_NM.sum(1).min())) < k:",
            "if (fewest := int(here_NM.sum(1).min())) < 0:",
            LOGPROBS,
        ),
        ("no-distribution", "what sums to more than 1 is taken", "or sums_N.max() > 1 + SLACK:", "or False:", LOGPROBS),
        ("start-too-late", "SGLang says nothing of the first target", "start = min(places) - 1", "start = min(places)", LOGPROBS),
        ("adapter-not-asked", "SGLang is asked for the base", 'content["lora_path"] = model.name', "pass", LOGPROBS),
    ),
    *in_file(
        "llmkd/servers/completions.py",
        ("end-left-out", "an end token that the answer lacks is not put back", "ids = [*ids, stop]", "pass", WRITES),
        ("own-sampling", "the model's own penalties count", "        **neutral,\n", "", WRITES),
        ("any-prompt", "an answer to other ids is taken", "    same_ids(given, prompt)\n", "", WRITES),
    ),
    *in_file(
        "llmkd/rollouts/server_writer.py",
        ("one-seed", "all texts have one seed", "seed = (key ^ sampling.seed) % 2**63", "seed = sampling.seed", WRITES),
        (
            "past-the-positions",
            "a text may pass the model's positions",
            "if self.model.positions is None else min(",
            "if True else min(",
            WRITES,
        ),
    ),
    *in_file(
        "llmkd/teachers/listed.py",
        (
            "tail-forgotten",
            "the tail has no mass",
            "rest_N = np.array([1 - math.fsum(row)",
            "rest_N = np.array([0 * math.fsum(row)",
            LISTED,
        ),
        ("padding-entries-kept", "entries beyond the vocabulary are kept", "(ids_NM >= 0) & (ids_NM < vocab)", "(ids_NM >= 0)", LISTED),
        (
            "label-of-the-tail",
            "the target's own log-probability is not used",
            "np.where(np.isnan(label_log_p_N), evenly_N, label_log_p_N)",
            "evenly_N",
            LISTED,
        ),
        ("unsorted", "ids are not in order", "order_NK = np.argsort(ids_NK, axis=1)", "order_NK = np.argsort(-log_p_NK, axis=1)", LISTED),
    ),
    *in_file(
        "llmkd/teachers/answers.py",
        ("no-crc", "damaged answers are read", "if crc != _crc(", "if False and crc != _crc(", ANSWERS),
        ("half-answers", "a piece of an answer is read", "                if end > size:\n                    break\n", "", ANSWERS),
        ("behind-a-piece", "an answer is written behind a piece of one", "os.ftruncate(file, end)", "pass", ANSWERS),
        (
            "any-teacher",
            "a folder of another teacher is used",
            "if changed := differences(found, self.header):",
            "if changed := []:",
            ANSWERS,
        ),
        ("only-once-read", "what others add is not read", "self._read_up_to[path] = at", "self._damaged.add(path)", ANSWERS),
    ),
    *in_file(
        "llmkd/teachers/served.py",
        ("one-place-early", "a target is looked for where it is predicted", "[place + 1 for place in places]", "places", SERVED),
        (
            "asked-twice",
            "what is under way is looked at again",
            "if one not in self._pending",
            "if True",
            SERVED,
            "expect looks once more under the lock before it asks: nothing is asked twice, and only the texts are made in vain",
        ),
        ("prefix-left-out", "a shared prefix is not sent", "*flat[span.prefix : span.prefix + span.shared].tolist(), ", "", SERVED),
        (
            "waits-after-a-signal",
            "a run that is asked to stop waits for the server",
            "                if self.stop_asked():\n",
            "                if False:\n",
            SERVED,
        ),
    ),
    *in_file(
        "llmkd/teachers/served_models.py",
        (
            "answers-forgotten",
            "a server is needed though all answers are kept",
            "return any(_model_of(folder",
            "return False and any(_model_of(folder",
            "training/test_served_run.py::test_each_example_is_asked_once_over_epochs_validation_resume_and_runs",
        ),
    ),
    *in_file(
        "llmkd/training/prepare.py",
        (
            "server-late",
            "a missing server is said after the data are read",
            "refuse_absent(used_teachers(recipe), recipe.data)",
            "pass",
            EARLY,
        ),
    ),
    *in_file(
        "llmkd/teachers/connect.py",
        ("any-tokenizer", "another tokenizer is not noticed", "if len(other) > _OTHER_TOKENS * len(compared):", "if False:", SERVED),
        ("base-for-adapter", "an adapter that is not applied is not noticed", ".max() < 1e-6:", ".max() < -1:", SERVED),
        ("any-weights", "other weights under the same name are not noticed", "if not apart <= _OTHER_WEIGHTS:", "if False:", SERVED),
        (
            "too-long",
            "texts that the server cannot take are found out while training",
            "if longest + 1 > model.positions:",
            "if False:",
            SERVED,
        ),
    ),
    *in_file(
        "llmkd/training/build.py",
        (
            "not-ahead",
            "the next step is not asked ahead",
            "functools.partial(expect_of, tuple(served.values())), True",
            "lambda batches: None, True",
            RUNS,
        ),
    ),
    *in_file(
        "llmkd/config/paths.py",
        (
            "served-name-as-path",
            "the name of a served model is taken for a folder",
            'if what == "model" and any(',
            "if False and any(",
            RUNS,
        ),
    ),
]
