"""Faults in `llmkd make`: answers and their keys, counts, limits, writers and stages."""

from tests.planted.fault import in_file

PIPELINE, WRITERS = "making/test_pipeline.py", "making/test_writers.py"

FAULTS = [
    *in_file(
        "llmkd/making/asks.py",
        (
            "key-without-sampling",
            "the key leaves out the sampling",
            '"sampling": dataclasses.asdict(plain(sampling))',
            '"sampling": 0',
            PIPELINE,
        ),
        (
            "greedy-by-seed",
            "greedy answers depend on the seed",
            "return Sampling(0.0, sampling.max_new_tokens) if sampling.temperature == 0 else sampling",
            "return sampling",
            "making/test_pipeline.py",
        ),
    ),
    *in_file(
        "llmkd/making/answers.py",
        (
            "damaged-answers-pass",
            "an answer whose checksum is wrong is taken",
            'if row["checksum"] != _checksum(row):',
            'if "checksum" not in row:',
            PIPELINE,
        ),
        ("torn-line-stays", "a part of a last line stays in the file", "            self.file.remove_unfinished()\n", "", PIPELINE),
    ),
    *in_file(
        "llmkd/making/pipeline.py",
        (
            "limit-is-passed",
            "the answers' length does not count toward the limit",
            "for one in ask.messages)) + ask.sampling.max_new_tokens",
            "for one in ask.messages)) + 0",
            PIPELINE,
        ),
        ("failures-are-kept", "an ask that failed is not asked again", "if said.problem is None:", "if True:", PIPELINE),
        ("edited-data-are-lost", "data that were changed are written over", "sha256_file(folder / name) != digest", "False", PIPELINE),
    ),
    *in_file(
        "llmkd/making/writers/api.py",
        ("key-in-an-answer", "an answer that holds the key is kept", "self.server.holds_key(text)", "False", WRITERS),
        ("no-end-of-asking", "a stop is not followed", "and not end.asked", "and True", WRITERS),
        ("cut-is-not-said", "how an answer ended is not kept", "Answer(text, finish[:40], tokens", 'Answer(text, "stop", tokens', WRITERS),
    ),
    *in_file(
        "llmkd/making/writers/local.py",
        (
            "whatever-is-known",
            "answers that are there are written again",
            "for ask, answer in self._batch(batch) if ask.key not in known",
            "for ask, answer in self._batch(batch)",
            WRITERS,
        ),
    ),
]
