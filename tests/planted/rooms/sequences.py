"""Faults in what encoder-decoder models read, predict and keep."""

from tests.planted.fault import in_file

STEP, RUN, TARGETS = "models/test_encoder_decoder.py", "tasks/test_sequences_run.py", "data/test_targets.py"
VIEWS = "tasks/test_target_views.py"

FAULTS = [
    *in_file(
        "llmkd/tasks/target_views.py",
        (
            "decoder-begins-as-the-students",
            "the decoder of a teacher that reads another column is given the student's tokens",
            "one = one._replace(given=frame.given)",
            "one = one._replace(given=None)",
            f"{VIEWS}::test_a_student_of_speech_with_teachers_that_read_a_prompt",
        ),
        (
            "other-targets",
            "a teacher may predict other tokens than the student",
            "if not np.array_equal(own, other):",
            "if False:",
            f"{VIEWS}::test_targets_that_are_not_the_students_are_refused_by_row",
        ),
    ),
    *in_file(
        "llmkd/tasks/target_views.py",
        (
            "cut-for-the-student-alone",
            "where a target is cut, the teacher's whole one is taken for another",
            "[ids[mask][: len(own)] for",
            "[ids[mask] for",
            VIEWS,
        ),
        (
            "prompts-cut",
            "a causal teacher's prompt and target are cut, and not left out",
            'too_long="refuse" if data.too_long == "refuse" else "drop"',
            "too_long=data.too_long",
            VIEWS,
        ),
    ),
    *in_file(
        "llmkd/tasks/sequences.py",
        (
            "counted-twice",
            "a row whose source and target are cut counts as two",
            'counts["too_long"] = len({*longer',
            'counts["too_long"] += len({*longer',
            f"{RUN}::test_targets_that_are_long_or_empty_and_the_teacher_of_a_source",
        ),
        (
            "frame-of-the-student",
            "a cache does not depend on how the teachers' targets begin",
            "if self.others else [*self.frame]",
            "if False else [*self.frame]",
            VIEWS,
        ),
        (
            "tokenizer-of-the-targets",
            "a cache does not depend on the tokenizers that read a text",
            '*(one.identity for one in self.readers.every if one.kind == "text"),',
            "",
            VIEWS,
        ),
        (
            "longest-decoder",
            "targets are as long as the longest decoder's positions",
            "longest = min(longest, decoder_positions(its_config)",
            "longest = max(longest, decoder_positions(its_config)",
            VIEWS,
        ),
        (
            "fewer-tokens",
            "a teacher of the same column may have other tokens past the student's last one",
            "min(vocab_size(reader), vocab_size(theirs)) if apart else None",
            "min(vocab_size(reader), vocab_size(theirs))",
            VIEWS,
        ),
        (
            "language-model-as-encoder-decoder",
            "a causal language model is loaded as an encoder-decoder model",
            "if isinstance(processor.readers.of(setting), PromptReader):",
            "if False:",
            f"{VIEWS}::test_a_student_of_speech_with_teachers_that_read_a_prompt",
        ),
    ),
    *in_file(
        "llmkd/data/sequences.py",
        (
            "labels-not-shifted",
            "a decoder reads the token that it is to predict",
            "        ids, mask = self.example(i)\n        return ids[1:][mask[1:]]",
            "        ids, mask = self.example(i)\n        return ids[:-1][mask[1:]]",
            STEP,
        ),
        (
            "rows-one-too-late",
            "a target is predicted by the position that reads it",
            "rows.append(np.flatnonzero(mask[1:]))",
            "rows.append(np.flatnonzero(mask[:-1]))",
            STEP,
        ),
        (
            "targets-not-in-the-hash",
            "two transcripts of one clip are taken for one example",
            'return self.inputs.content(i) + b"|" + ids.tobytes() + mask.tobytes()',
            "return self.inputs.content(i)",
            STEP,
        ),
    ),
    *in_file(
        "llmkd/data/encoding/targets.py",
        (
            "beginning-twice",
            "where a prefix is named, targets begin with the tokenizer's own one too",
            "(own_beginning(tokenizer, frame.start), list(frame.prefix))",
            "([*frame.given], list(frame.prefix))",
            TARGETS,
        ),
        (
            "two-ends",
            "a target ends twice",
            "[] if ids and ids[-1] == frame.end else [frame.end]",
            "[frame.end]",
            TARGETS,
        ),
        (
            "start-of-the-configuration",
            "the start that the generation config names is not read",
            'generation.get("decoder_start_token_id"), config',
            'config.get("decoder_start_token_id"), config',
            TARGETS,
        ),
    ),
    *in_file(
        "llmkd/models/families.py",
        (
            "t5-without-its-scale",
            "T5's logits are not divided",
            "scale *= config.d_model**-0.5",
            "scale *= 1.0",
            f"{STEP}::test_a_step_is_the_models_own_loss_and_a_divergence_by_hand",
        ),
        ("encoder-not-frozen", "an encoder that is to be frozen is trained", "    encoder.requires_grad_(False)\n", "", RUN),
    ),
    *in_file(
        "llmkd/models/encoder_decoder.py",
        (
            "encoder-without-a-cast",
            "states that are kept depend on the pass that has computed them",
            "with self._casting(), torch.set_grad_enabled",
            "with torch.set_grad_enabled",
            STEP,
        ),
        ("looking-ahead-unseen", "a decoder that sees later tokens is used", "other_BT[:, -1] + 1", "other_BT[:, -1] + 0", STEP),
        ("frozen-encoder-drops", "a frozen encoder is in training mode", "self.base_model.get_encoder().eval()", "pass", STEP),
        (
            "encoder-mask-lost",
            "the decoder attends to the padding of a source",
            '"encoder_attention_mask": source.mask}',
            '"encoder_attention_mask": None}',
            STEP,
        ),
    ),
    *in_file(
        "llmkd/models/encoder_states.py",
        (
            "states-of-the-first-clip",
            "all clips of a batch have the first one's states",
            "inputs[name][b : b + 1]",
            "inputs[name][:1]",
            STEP,
        ),
        (
            "states-of-any-encoder",
            "a teacher with another encoder has the student's states",
            "storage_bytes(a) == storage_bytes(b) and",
            "",
            STEP,
        ),
    ),
    *in_file(
        "llmkd/models/greedy.py",
        (
            "goes-on-after-the-end",
            "text goes on after the end token",
            "going[b] = going[b] and token != end",
            "going[b] = token != end",
            STEP,
        ),
        ("suppressed-tokens-chosen", "suppressed tokens are chosen", "logits_BV[:, known] = -torch.inf", "pass", STEP),
    ),
    *in_file(
        "llmkd/models/depth_parts.py",
        ("layers-unlike", "a layer without T5's position biases becomes the first", "if a != b:", "if False:", STEP),
    ),
    *in_file(
        "llmkd/models/dropout.py",
        (
            "dropout-of-the-first-example",
            "all examples of an encoder-decoder batch have the first one's masks",
            "return _mix_(keys_B[:, None] ^ _mix_(numbers * _GOLDEN)).flatten()",
            "return _mix_(keys_B[:1, None].expand(len(keys_B), -1) ^ _mix_(numbers * _GOLDEN)).flatten()",
            STEP,
        ),
    ),
]
