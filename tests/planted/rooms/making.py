"""Faults in `llmkd make`: answers and their keys, counts, limits, writers and stages."""

from tests.planted.fault import in_file

PIPELINE, WRITERS, STAGES = "making/test_pipeline.py", "making/test_writers.py", "making/test_stages.py"
MARKS, TRANSCRIBE = "making/test_marks.py", "making/test_transcribe.py"

FAULTS = [
    *in_file(
        "llmkd/config/make.py",
        ("scores-of-parents", "scores are looked for only when all is paid", "if column not in scored:", "if False:", PIPELINE),
        ("nested-secret", "a key inside of a field is written into files", "any(_holds_secret(value, str(name))", "any(False", PIPELINE),
    ),
    *in_file(
        "llmkd/servers/client.py",
        ("endless-answer", "an answer without an end fills the memory", "if size > _LARGEST:", "if False:", "servers/test_client.py"),
        (
            "pages-of-html",
            "a page of HTML is asked for until patience is over",
            "if kind in _OTHER and",
            "if False and",
            "servers/test_client.py",
        ),
        ("half-a-key", "half of a key stays where a message is cut", "self._without_key(text).split())", "text.split())", WRITERS),
    ),
    *in_file(
        "llmkd/making/asks.py",
        (
            "key-without-sampling",
            "the key leaves out the sampling",
            '"sampling": dataclasses.asdict(canonical(sampling))',
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
            "+ 8 for one in ask.messages) + ask.sampling.max_new_tokens",
            "+ 8 for one in ask.messages) + 0",
            PIPELINE,
        ),
        ("failures-are-kept", "an ask that failed is not asked again", "if said.problem is None:", "if True:", PIPELINE),
        ("edited-data-are-lost", "data that were changed are written over", "sha256_file(folder / name) != digest", "False", PIPELINE),
    ),
    *in_file(
        "llmkd/making/progress.py",
        (
            "all-the-time-is-left",
            "what is done counts as left",
            "spent / done * (total - done)",
            "spent / done * total",
            "making/test_progress.py",
        ),
        ("batches-are-one", "a batch counts as one row", "done += size(item)", "done += 1", "making/test_progress.py"),
    ),
    *in_file(
        "llmkd/making/writers/api.py",
        ("key-in-an-answer", "an answer that holds the key is kept", 'self.server.holds_key(f"{text}\\n{finish}")', "False", WRITERS),
        ("no-end-of-asking", "a stop is not followed", "and not end.asked", "and True", WRITERS),
        (
            "cut-while-it-reasoned",
            "an answer that was cut off in its reasoning is paid again by every run",
            "if text is None and reasoning:",
            "if False:",
            WRITERS,
        ),
        (
            "reasoning-is-not-said",
            "reasoning is left out without a word",
            "reasoning=reasoning and len(reasoning)",
            "reasoning=None",
            WRITERS,
        ),
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
    *in_file(
        "llmkd/making/stages/expand.py",
        ("same-seed-again", "seeds that are shown again are asked about with the same seed", "before[same] += 1", "pass", STAGES),
    ),
    *in_file(
        "llmkd/making/writers/speech.py",
        (
            "another-sound",
            "a file that was changed is transcribed under the old one's key",
            "if clip.content_hash != ask",
            "if False and ask",
            TRANSCRIBE,
        ),
        ("cut-transcripts-end", "a transcript that was cut off is not marked", "len(ids) < most", "len(ids) <= most", TRANSCRIBE),
        (
            "past-the-positions",
            "a transcript may be longer than the decoder's positions",
            "- len(self.frame.given) + 1  # nothing",
            "- len(self.frame.given) + 2  # nothing",
            TRANSCRIBE,
        ),
        (
            "known-again",
            "answers that are known are given a second time",
            "for ask, answer in self._batch(batch) if ask.key not in known)",
            "for ask, answer in self._batch(batch))",
            TRANSCRIBE,
        ),
        (
            "key-without-the-extractor",
            "transcripts by another feature extractor are taken for the same",
            '{"targets": [*self.frame], "extractor": settings_of(self.extractor)}',
            '{"targets": [*self.frame]}',
            TRANSCRIBE,
        ),
        (
            "begins-anywhere",
            "a transcript begins without its control tokens",
            "inputs, self.frame.given,",
            "inputs, self.frame.given[:1],",
            TRANSCRIBE,
        ),
        (
            "ends-of-long-sounds",
            "of a long sound the beginning is transcribed",
            "if limit is not None and len(clip.samples) > limit:",
            "if False:",
            TRANSCRIBE,
        ),
    ),
    *in_file(
        "llmkd/making/filters/transcripts.py",
        ("errors-at-the-limit", "a transcript at the limit stays", "found.rate < self.below", "found.rate <= self.below", TRANSCRIBE),
        ("silence", "where nothing was said nothing may be written", " or not (found.length or found.insertions):", ":", TRANSCRIBE),
        ("errors-of-all", "the rate of those that stay is that of all", "self.kept += found", "self.kept = self.every", TRANSCRIBE),
    ),
    *in_file(
        "llmkd/making/seeds.py",
        ("prompts-of-sounds", "a sound's prompt is lost", "said = _SAID_OF_SOUNDS if sounds else _SAID", "said = _SAID", TRANSCRIBE),
    ),
    *in_file(
        "llmkd/making/stages/transcribe.py",
        ("no-reference", "a row's own transcript is lost", "{} if row.answer is None else", "{} if True else", TRANSCRIBE),
    ),
    *in_file(
        "llmkd/making/marks.py",
        (
            "echo-of-the-prompt",
            "what the prompt has between its marks is an answer",
            "if text in (between.strip() for between",
            "if text == (between.strip() for between",
            MARKS,
        ),
        (
            "lists-in-code",
            "numbers in a block of code are items",
            "code = [], [found.span() for found in _FENCE.finditer(text)]",
            "code = [], []",
            MARKS,
        ),
        ("marks-anywhere", "marks may stand in any order", "if start < at or stop < start:", "if stop < start:", MARKS),
        (
            "first-of-several-marks",
            "of repeated marks the first are read",
            "if text.count(opening) != 1 or text.count(closing) != 1:",
            "if not text.count(opening) or not text.count(closing):",
            MARKS,
        ),
        (
            "any-number-begins-an-item",
            "every number at the beginning of a line begins an item",
            "if int(found[2]) == len(places) + 1 and",
            "if",
            MARKS,
        ),
    ),
    *in_file(
        "llmkd/making/prompts/__init__.py",
        (
            "places-filled-twice",
            "what is put into a place is looked at again",
            'return re.sub(rf"\\{{({pattern})\\}}", lambda found: places[found[1]], self.sections[section])',
            'out = self.sections[section]\n        for name, value in places.items():\n            out = out.replace(f"{{{name}}}", value)\n        return out',
            STAGES,
        ),
    ),
    *in_file(
        "llmkd/making/stages/evolve.py",
        ("no-gain-passes", "a change that adds nothing is kept", 'elif found[1].lower() == "equal":', "elif False:", STAGES),
        (
            "no-verdict-passes",
            "a judge that says neither lets pass",
            'outcome.rejected.append(Rejected(new, "no_verdict", answer=answer.text))',
            "out.append((old, new))",
            STAGES,
        ),
        ("refusals-pass", "questions that are declined are kept", 'if "sorry" in words and len(words) < 80:', "if False:", STAGES),
        (
            "rounds-begin-anew",
            "every round changes the first questions",
            "now = [after.get(row.id, row) for row in now]",
            "now = list(rows)",
            STAGES,
        ),
    ),
    *in_file(
        "llmkd/making/stages/questions.py",
        (
            "cut-question-passes",
            "a question that was cut off is kept",
            "if last and answer.finish == CUT:",
            "if False:",
            STAGES,
        ),
        (
            "trailing-text-passes",
            "what follows a list is a part of its last question",
            "elif last and place and _has_paragraphs(text)",
            "elif False and _has_paragraphs(text)",
            STAGES,
        ),
    ),
    *in_file(
        "llmkd/making/stages/reworded.py",
        ("cut-in-other-words", "a paraphrase's answer is no longer known to be cut off", 'if name == "finish"', 'if name == ""', STAGES),
    ),
    *in_file(
        "llmkd/making/writers/recorded.py",
        (
            "last-of-two-writers",
            "of two recorded answers to one ask one is taken",
            "elif self.by_ask.setdefault(asked, answer).text != text:",
            "elif self.by_ask.setdefault(asked, answer).text == 0:",
            WRITERS,
        ),
    ),
    *in_file(
        "llmkd/making/stages/reflect.py",
        (
            "old-answer-as-reflected",
            "a reflected question keeps the old answer",
            '{"role": "assistant", "content": found[-1]}',
            '{"role": "assistant", "content": row.answer}',
            STAGES,
        ),
    ),
    *in_file(
        "llmkd/making/stages/explain.py",
        (
            "one-system-message",
            "all samples of a row have one system message",
            "order[n % len(order)], n // len(order), n",
            "order[0], n, n",
            STAGES,
        ),
    ),
    *in_file(
        "llmkd/making/stages/expand.py",
        ("new-ones-are-not-shown", "new questions are in no context", "min(len(made), self.settings.made_in_context)", "0", STAGES),
    ),
    *in_file(
        "llmkd/config/make_changes.py",
        (
            "stages-of-a-study-as-they-are",
            "paths of stages in a study's changes are relative to the file of make",
            "return placed(one, _kind(one)) if isinstance(one, dict) else one",
            "return one",
            "commands/test_make.py",
        ),
    ),
    *in_file(
        "llmkd/config/make.py",
        (
            "asking-without-a-writer",
            "a stage that asks passes without a writer",
            "elif asking := next((stage for stage in stages if stage.asks), None):",
            "elif asking := None:",
            PIPELINE,
        ),
    ),
]
