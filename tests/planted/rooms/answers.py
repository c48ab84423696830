"""Faults in generation, prompts, `llmkd sample`, chat templates and groups of evaluations, code in task files, and `--json`."""

from tests.planted.fault import in_file

GENERATE, PROMPTS, SAMPLE = "rollouts/test_generate.py", "data/test_prompts.py", "commands/test_sample.py"
CHAT, OUTPUTS = "eval/test_chat_template.py", "commands/test_outputs.py"
SAMPLES = "training/test_validation_samples.py"
SAMPLING, WRITER = "rollouts/test_sampling.py", "rollouts/test_writer.py"

FAULTS = [
    *in_file(
        "llmkd/rollouts/generate.py",
        ("draws-of-the-row", "what is drawn depends on the row of the batch", "[keys[i] for i in batch], sampling,", "[*range(len(batch))], sampling,", WRITER),
        ("keys-forgotten", "the keys of the texts are not used", "range(len(prompts)) if keys is None else keys", "range(len(prompts))", WRITER),
        ("entropy-of-the-padding", "the entropy goes on when an answer has ended", "                entropies[i] += spread\n", "            entropies[i] += spread\n", WRITER),
        ("one-end-token", "only the least end token ends an answer", "sampling, frozenset(end_ids))", "sampling, frozenset(sorted(end_ids)[:1]))", GENERATE),
        ("goes-on-after-its-end", "an answer that has ended goes on", "            if i in going:\n", "            if True:\n", GENERATE),
        ("one-too-many", "an answer may be one token longer", "if len(written[i]) < room[i] and", "if len(written[i]) <= room[i] and", GENERATE),
        ("past-the-last-position", "an answer goes on past the model's last position", "min(sampling.max_new_tokens, most - len(ids))", "sampling.max_new_tokens", GENERATE),
        ("stays-in-eval", "the model is left in eval mode", "    finally:\n        model.train(training)", "    finally:\n        pass", GENERATE),
        ("writes-with-dropout", "text is written in training mode", "    training = model.training\n    model.eval()", "    training = model.training", GENERATE),
        ("in-the-order-of-the-batches", "answers come back in the order of their lengths", "return [found[i] for i in range(len(prompts))]", "return list(found.values())", GENERATE),
    ),
    *in_file(
        "llmkd/rollouts/draw.py",
        ("cold-draws", "the temperature is not used", "logits_BV.double() / sampling.temperature", "logits_BV.double()", SAMPLING),
        ("one-too-many-kept", "top_k keeps one more", "sampling.top_k or sorted_BV.shape[1] :] = 0", "(sampling.top_k or sorted_BV.shape[1]) + 1 :] = 0", SAMPLING),
        ("share-of-everything", "top_p is a share of what top_k has cut off too", "sampling.top_p * passed_BV[:, -1:]", "sampling.top_p", SAMPLING),
        ("share-with-itself", "top_p counts a token's own probability", "keep_BV[:, 1:] &= passed_BV[:, :-1] <", "keep_BV[:, 1:] &= passed_BV[:, 1:] <", SAMPLING),
        ("absolute-min-p", "min_p is no share of the likeliest", "sampling.min_p * p_BV.amax(-1, keepdim=True)", "sampling.min_p", SAMPLING),
        ("draws-the-impossible", "a draw may be a token before which nothing has passed", "uniform_B[:, None] * total_B1, right=True", "uniform_B[:, None] * total_B1", SAMPLING),
        ("draws-past-the-end", "a draw may be past the last possible token", "torch.minimum(found_B1, torch.searchsorted(passed_BV, total_B1))", "found_B1.clamp(max=p_BV.shape[1] - 1)", SAMPLING),
    ),
    *in_file(
        "llmkd/rollouts/sampling.py",
        ("one-draw-for-all-positions", "what is drawn is the same at every position", "np.array([0, position, 0, 0], np.uint64)", "np.array([0, 0, 0, 0], np.uint64)", SAMPLING),
        ("draws-without-the-seed", "what is drawn does not depend on the seed", "key=np.array([seed, key], np.uint64)", "key=np.array([0, key], np.uint64)", SAMPLING),
    ),
    *in_file(
        "llmkd/rollouts/way.py",
        ("padded-on-the-right", "prompts are padded on the right", "ids_BT[row, longest - len(prompt) :]", "ids_BT[row, : len(prompt)]", GENERATE),
        (
            "positions-of-the-padding",
            "positions count the padding",
            "(mask_BT.cumsum(-1) - 1).clamp(min=0)",
            "(torch.ones_like(mask_BT).cumsum(-1) - 1)",
            GENERATE,
        ),
        ("positions-stand-still", "every new token has one position", "self.position_BT[:, -1:] + 1).clamp", "self.position_BT[:, -1:] + 0).clamp", GENERATE),
        ("mask-stands-still", "new tokens are masked", "torch.ones_like(token_B[:, None])", "torch.zeros_like(token_B[:, None])", GENERATE),
        ("padding-untried", "prompts are padded whatever the model makes of it", "way == _WAYS[-1] or _is_right(", "True or _is_right(", GENERATE),
        ("slowest-way", "no model keeps its keys and values", "_WAYS = (Way(True, True), Way(False, True), ", "_WAYS = (", GENERATE),
    ),
    *in_file(
        "llmkd/models/language_model.py",
        ("logits-of-the-first", "the next token is chosen by the first position", "self.head.logits(out[0][:, -1])", "self.head.logits(out[0][:, 0])", GENERATE),
        ("cache-thrown-away", "the cache is not given back", '{} if cache is None else {"past_key_values": cache}', "{}", GENERATE),
    ),
    *in_file(
        "llmkd/data/prompts.py",
        ("prompt-with-its-answer", "a prompt ends with the first token of the answer", "return Prompt(place, ids[: first + more],", "return Prompt(place, ids[: first + more + 1],", PROMPTS),
        ("reference-of-every-turn", "the reference goes on after the first answer", "stop = gap if gap > first else len(ids)", "stop = len(ids)", PROMPTS),
        ("teachers-context-lost", "the teacher reads the student's prompt", "theirs[0][: int(theirs[1].argmax()) + more]", "ids[: first + more]", PROMPTS),
        ("no-end-known", "the end token of training is not known", "frozenset(answer[close : close + 1].tolist())", "frozenset()", PROMPTS),
    ),
    *in_file(
        "llmkd/data/prompt_files.py",
        ("answer-left-in-the-conversation", "the reference stays in the conversation", "            *messages, last = messages\n", "            last = messages[-1]\n", PROMPTS),
        ("end-after-the-prompt", "an end token stands behind a plain prompt", "return ids[: len(ids) - len(edges(tokenizer)[1])]", "return ids", PROMPTS),
        ("answer-joined-to-the-prompt", "the last word of a prompt is joined with the placeholder", "    if reference:\n", "    if has_answer:\n", PROMPTS),
        ("made-up-reference", "the placeholder is a reference", "elif answer and answered:", "elif answer:", PROMPTS),
        ("text-where-turns-are-meant", "a text is no turn where the run's prompts are", "and has_turns())", "and False)", PROMPTS),
        ("context-lost-in-files", "a row's context is lost", '    question |= {"teacher_context": row.get("teacher_context")}\n', "", PROMPTS),
    ),
    *in_file(
        "llmkd/commands/sample.py",
        (
            "teacher-without-its-context",
            "the teacher is asked what the student is asked",
            'prompt.ids if name in ("before", "after") else prompt.teacher_ids',
            "prompt.ids",
            SAMPLE,
        ),
        ("before-is-after", "before shows the trained student", 'yield "before", ("student.model", untrained(own))', 'yield "before", ("student.model", trained(student, own.attention))', SAMPLE),
        ("end-token-shown", "the end token is a part of the answer", "decoded(one.ids[: len(one.ids) - one.finished], tokenizer)", "decoded(one.ids, tokenizer)", SAMPLE),
        ("models-pile-up", "a model stays in memory", "    del model\n    gc.collect()\n", "    sampling.__dict__.setdefault('kept', []).append(model)\n", SAMPLE),
        ("count-forgotten", "every prompt of a file is asked", "data, tokenizer)[:count] if prompts", "data, tokenizer) if prompts", SAMPLE),
    ),
    *in_file(
        "llmkd/commands/outputs.py",
        ("table-on-stdout", "the table stands beside the JSON", 'with contextlib.redirect_stdout(sys.stderr) if to == "-" else', 'with contextlib.redirect_stdout(sys.stderr) if to == "" else', OUTPUTS),
        ("refused-too-late", "a place that cannot be written is met at the end", '        check_file(to, "--json")', "        pass", OUTPUTS),
    ),
    *in_file(
        "llmkd/training/validation_samples.py",
        ("sampled-at-validation", "answers are drawn", "Sampling(max_new_tokens=settings.sample_tokens)", "Sampling(1.0, settings.sample_tokens)", SAMPLES),
        ("longer-answers", "sample_tokens is not read", "Sampling(max_new_tokens=settings.sample_tokens)", "Sampling()", SAMPLES),
        ("no-learnt-end", "the end tokens of the data do not end an answer", ", *prepared.end_tokens}", "}", SAMPLES),
        ("end-token-written", "the end token is a part of the text", "decoded(answer.ids[: len(answer.ids) - answer.finished], tokenizer)", "decoded(answer.ids, tokenizer)", SAMPLES),
    ),
    *in_file(
        "llmkd/output/samples.py",
        ("doubled-steps", "a resumed run writes a step twice", 'if one["step"] < step or', 'if one["step"] <= step or', SAMPLES),
        ("training-lost", "a validation takes away what was written in its step", "and in_training(one) and not own", "and False", SAMPLES),
        ("training-as-validation", "answers of training are shown as those of the last validation", "if not in_training(record)]", "]", SAMPLES),
    ),
    *in_file(
        "llmkd/config/contradictions.py",
        ("samples-of-whole-rows", "samples are taken where prompts are supervised", "if recipe.validation.samples and data.train_on_input:", "if False:", SAMPLES),
    ),
    *in_file(
        "eval/report/sweep_samples.py",
        ("unescaped-control-characters", "control characters of an answer reach the page", 'Span(printable(text), "text")', 'Span(text, "text")', "eval/test_report_samples.py"),
    ),
    *in_file(
        "eval/harness/evaluate.py",
        ("template-not-applied", "prompts are plain", "apply_chat_template=options.chat_template,", "apply_chat_template=False,", CHAT),
        ("shots-in-one-turn", "few-shot examples are one turn", "fewshot_as_multiturn=options.chat_template,", "fewshot_as_multiturn=False,", CHAT),
        ("template-not-recorded", "a record does not say that a template was applied", '"chat_template": options.chat_template or None,', '"chat_template": None,', CHAT),
    ),
    *in_file(
        "eval/harness/record_files.py",
        ("another-template", "results of another template are kept", '"model.quantization", "model.chat_template")', '"model.quantization")', CHAT),
    ),
    *in_file(
        "eval/harness/groups.py",
        ("group-without-a-task", "a mean leaves out the tasks that lack the metric", "if not all(key in measured[task] for task in names):", "if not any(key in measured[task] for task in names):", CHAT),
        ("groups-of-one-size", "all tasks of a group have one size", '{"sample_len": record["n"]}', '{"sample_len": 1}', CHAT),
    ),
    *in_file(
        "eval/harness/task_code.py",
        ("included-code", "files that are included are not looked at", "                    yield from _code_in(path.parent / text, harness, seen)\n", "                    pass\n", CHAT),
        ("templates-out-of-the-box", "templates reach Python", "        utils.env = boxed\n", "        pass\n", CHAT),
    ),
]  # fmt: skip
