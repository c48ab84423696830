"""Faults in what ranks, several students, steps and checkpoints have of their own."""

from tests.planted.fault import in_file

HAND = "training/test_by_hand.py"
PASSES = "training/test_accumulation.py"
RESUME = "training/test_resume.py"
BEST = "training/test_best.py"
VALIDATE = "training/test_validate.py"
HEARTBEAT = "process/test_heartbeat.py"
RESULT = "training/test_step_result.py"

FAULTS = [
    *in_file(
        "llmkd/process/heartbeat.py",
        (
            "first-is-named",
            "of processes that stand still the first is named, not the one that is behind",
            "if one.place.number == least]",
            "if rank == 0]",
            HEARTBEAT,
        ),
        (
            "loading-is-a-hang",
            "a process that loads for as long as a micro-batch may take ends the run",
            "(PATIENT if one.place.patient else _timeout)",
            "_timeout",
            HEARTBEAT,
        ),
        (
            "finished-is-missed",
            "a process that has ended well is waited for",
            "enumerate(seen) if one.beat != _LEFT}",
            "enumerate(seen)}",
            HEARTBEAT,
        ),
    ),
    *in_file(
        "llmkd/process/rank_messages.py",
        (
            "suspended-is-a-hang",
            "the time for which a process was itself stopped counts as the others' silence",
            "yield min(last - before, 5 * _LOOKS)",
            "yield last - before",
            HEARTBEAT,
        ),
        (
            "ends-without-a-word",
            "a process that ends well does not tell the others",
            "            heartbeats.leave(server)\n",
            "",
            HEARTBEAT,
        ),
        (
            "old-answer-stays",
            "a launcher that has answered once is never missed",
            "        answered.clear()\n",
            "",
            HEARTBEAT,
        ),
        (
            "own-launcher-is-watched",
            "a process ends where its own machine's launcher is slow to answer",
            "_looks(closed) if elsewhere else ()",
            "_looks(closed)",
            HEARTBEAT,
        ),
    ),
    *in_file(
        "llmkd/training/launch.py",
        (
            "torch-ends-first",
            "torch's limit, which names nobody, comes before that of what takes long",
            "(heartbeat.PATIENT if rank_messages.watched else 0)",
            "0",
            HEARTBEAT,
        ),
    ),
    *in_file(
        "llmkd/commands/cache.py",
        (
            "batches-are-no-signs",
            "a cache that takes two hours ends by itself",
            "                heartbeat.going_on()\n",
            "",
            HEARTBEAT,
        ),
    ),
    *in_file(
        "llmkd/training/loop.py",
        (
            "scale-of-the-first-rank",
            "the first rank's gradients alone are multiplied by the number of ranks",
            "scale * ranks / num_targets",
            "scale * (ranks if rank == 0 else 1) / num_targets",
            PASSES,
        ),
        (
            "last-micro-batch-uncounted",
            "micro-batches are taken for equally large",
            "sum(micro.num_targets for micro in micro_batches)",
            "micro_batches[0].num_targets * len(micro_batches)",
            PASSES,
        ),
        (
            "norm-of-half",
            "the norm leaves out the last parameter",
            "torch.nn.utils.get_total_norm(grads)",
            "torch.nn.utils.get_total_norm(grads[:-1])",
            HAND,
        ),
        (
            "failed-student-steps",
            "one student's NaN stops every student's step",
            "optimizer_step(student, step.number, norms[k], nonfinite[k])",
            "optimizer_step(student, step.number, norms[k], sum(nonfinite.values()))",
            "commands/test_sweep_failures.py",
        ),
    ),
    *in_file(
        "llmkd/training/optim.py",
        (
            "eps-inside",
            "eps is that of the corrected moments",
            '"eps": optim.eps}',
            '"eps": optim.eps * (1 - optim.betas[1]) ** 0.5}',
            HAND,
        ),
        (
            "vectors-decay-half",
            "the second group of parameters has another beta",
            'groups = [{"params": ps, "weight_decay": decay} for ps, decay',
            'groups = [{"params": ps, "weight_decay": decay, "betas": (optim.betas[0], 0.999)} for ps, decay',
            HAND,
        ),
    ),
    *in_file(
        "llmkd/training/checkpoint.py",
        (
            "steps-counted-anew",
            "a resumed optimizer's bias correction begins anew",
            "value.item() if value.dtype == torch.int64 else sharded_like(value, p)",
            'value.item() if value.dtype == torch.int64 else sharded_like(value, p) * (key != "step")',
            RESUME,
        ),
        (
            "moments-exchanged",
            "two parameters of one shape get each other's moments",
            'parameter, _, key = name.rpartition("/")',
            'parameter, _, key = name.rpartition("/")\n            parameter = parameter.replace("q_proj", "#").replace("k_proj", "q_proj").replace("#", "k_proj")',
            RESUME,
        ),
        (
            "weights-in-half",
            "weights are saved in bfloat16's precision",
            "weights = {name: value.cpu().contiguous() for name, value in learnt.weights.items()}",
            "weights = {name: value.cpu().bfloat16().to(value.dtype).contiguous() for name, value in learnt.weights.items()}",
            RESUME,
        ),
        (
            "newest-of-any",
            "of several students each resumes from its own newest checkpoint",
            "set.intersection(*({step for step, _ in _steps(folder)} for folder in folders))",
            "set.union(*({step for step, _ in _steps(folder)} for folder in folders))",
            "training/test_checkpoint.py",
        ),
    ),
    *in_file(
        "llmkd/training/validate.py",
        (
            "other-students-with-dropout",
            "all but the first student are validated in training mode",
            "        for student in students:\n            student.eval()",
            "        for student in students[:1]:\n            student.eval()",
            VALIDATE,
        ),
        (
            "others-left-in-eval-mode",
            "all but the first student train on in evaluation mode",
            "for student, mode in zip(students, modes, strict=True):",
            "for student, mode in zip(students[:1], modes[:1], strict=True):",
            VALIDATE,
        ),
        (
            "mean-of-ranks",
            "held-out sums are the mean over ranks",
            'self.accelerator.reduce(sums, "sum")',
            'self.accelerator.reduce(sums, "mean")',
            VALIDATE,
        ),
        (
            "accuracy-by-length",
            "a choice is judged by the mean over its tokens",
            "right = [int(totals[end - n : end].argmin()) == answer for end, n, answer in per_question]",
            "totals = totals / torch.as_tensor(np.maximum(1, data.num_targets))\n        right = [int(totals[end - n : end].argmin()) == answer for end, n, answer in per_question]",
            VALIDATE,
        ),
        (
            "rows-of-another-chunk",
            "the teacher is asked for the first rows of a batch in every chunk",
            "_metrics(student, hidden_NH[rows], batch.labels_N[rows], signal, rows, names, self.measures)",
            "_metrics(student, hidden_NH[rows], batch.labels_N[rows], signal, slice(0, len(batch.labels_N[rows])), names, self.measures)",
            VALIDATE,
        ),
    ),
    *in_file(
        "llmkd/training/student_run.py",
        (
            "nan-is-the-best",
            "a value that is no number may be the best",
            "if by and step and not math.isnan(values[by]):",
            "if by and step:",
            BEST,
        ),
        (
            "best-a-step-early",
            "the step before the best one is kept",
            'self.best = {"by": by, "step": step, "value": values[by]}',
            'self.best = {"by": by, "step": max(1, step - 1), "value": values[by]}',
            BEST,
        ),
        (
            "held-out-means",
            "held_out.jsonl holds means in place of sums",
            "sums = {name: float(values[i]) for name, values in held_out.sums.items()}",
            "sums = {name: float(values[i]) / targets for name, values in held_out.sums.items()}",
            "training/test_weights.py",
        ),
        (
            "last-validation-is-the-first",
            "the summary's validation is the first one after the start",
            "(held_out[-1][1] if held_out else {})",
            "(held_out[min(1, len(held_out) - 1)][1] if held_out else {})",
            BEST,
        ),
    ),
    *in_file(
        "llmkd/training/trainer.py",
        (
            "end-not-validated",
            "a run that has its last checkpoint alone is not validated",
            "if self.done in (0, self.source.total_steps) or",
            "if self.done == 0 or",
            "training/test_trainer.py",
        ),
        (
            "none-left-goes-on",
            "a step after which no student is left is saved, and counts as stopped",
            "        if not self.active:\n            return\n        if last or due(self.settings.validation.every",
            "        if last or due(self.settings.validation.every",
            "training/test_trainer.py",
        ),
        (
            "unread-step-saved",
            "after an error a step is saved that may not be finite",
            "if self.is_read(self.step) and all(",
            "if all(",
            "training/test_trainer.py",
        ),
        (
            "written-at-a-question",
            "a student that is written after questions may take no longer than a micro-batch",
            '            heartbeat.at("the writing of the student", patient=True)\n',
            "",
            HEARTBEAT,
        ),
        (
            "rate-of-the-next-step",
            "the rate that is recorded is the next step's",
            "self.students[k].state.learning_rate(progress.step)",
            "self.students[k].state.learning_rate(progress.step + 1)",
            HAND,
        ),
        (
            "norm-of-the-first",
            "every student records the first one's gradient norm",
            "terms, norm = progress.terms[k], progress.grad_norms[k]",
            "terms, norm = progress.terms[k], progress.grad_norms[going[0]]",
            "commands/test_sweep.py",
        ),
        (
            "state-of-the-next-step",
            "a checkpoint keeps the source's state of the step after it",
            "student.save(step, self.source.state(step))",
            "student.save(step, self.source.state(step + 1))",
            "data/test_stream.py",
        ),
    ),
    *in_file(
        "llmkd/teachers/mixture.py",
        (
            "the-teacher-before",
            "a row's own teacher is the one before it",
            "return self.teachers[number] if number >= 0",
            "return self.teachers[number - 1] if number >= 0",
            "teachers/test_mixture.py",
        ),
        (
            "confidence-of-the-first-rows",
            "confidence weighs by the first rows' labels",
            "labels_n = self.labels_N[rows]",
            "labels_n = self.labels_N[: len(self.labels_N[rows])]",
            "teachers/test_mixture.py",
        ),
    ),
    *in_file(
        "llmkd/teachers/cache/shards.py",
        (
            "record-of-the-next-example",
            "an example gets the records of the one behind it",
            "self._map(shard)[start : start + count]",
            "self._map(shard)[min(start + count, len(self._map(shard)) - count) :][:count]",
            "teachers/test_cache.py",
        ),
        (
            "second-shard-from-the-first",
            "examples of later shards begin where those of the first end",
            "start_E = np.concatenate([np.cumsum(part) - part for part in targets])",
            "start_E = np.cumsum(np.concatenate(targets)) - np.concatenate(targets)",
            "teachers/test_cache.py",
        ),
    ),
    *in_file(
        "llmkd/training/auto_batch.py",
        (
            "half-a-step-stays",
            "a step that is repeated keeps the gradients of its first attempt",
            "            self._drop()  # after the `except` block",
            "            gc.collect()  # after the `except` block",
            "training/test_auto_batch.py",
        ),
        (
            "measured-gradients-stay",
            "what is measured leaves its gradients",
            "        finally:\n            self._drop()",
            "        finally:\n            gc.collect()",
            "training/test_auto_batch.py",
        ),
    ),
    *in_file(
        "llmkd/training/step_result.py",
        (
            "nan-of-any-student",
            "a student fails with the one before it",
            "value = values[own[0] : own[-1] + 1].sum()",
            "value = values[: own[-1] + 1].sum()",
            RESULT,
        ),
    ),
]
