"""Faults in what is measured of losses, features, models and memory, and in answers from elsewhere."""

from tests.planted.fault import in_file

FEATURES = "training/test_features.py"
OWN = "training/test_own_text.py"
IMPORTED = "teachers/test_import_logprobs.py"
COST = "commands/test_cost.py"

FAULTS = [
    *in_file(
        "llmkd/losses/target_weights.py",
        (
            "hellinger-unhalved",
            "the Hellinger distance is root 2 times too large",
            ".square().sum(-1).div(2).sqrt()",
            ".square().sum(-1).sqrt()",
            "losses/test_target_weights.py",
        ),
        (
            "position-from-one",
            "the first target of an example has a smaller weight",
            "torch.exp2(-position_n.double() / half_life)",
            "torch.exp2(-(position_n.double() + 1) / half_life)",
            "losses/test_target_weights.py",
        ),
    ),
    *in_file(
        "llmkd/losses/objective.py",
        (
            "nan-hidden",
            "a NaN in the logits gives a finite divergence",
            "nan_n = 0 * offset_n",
            "nan_n = torch.zeros_like(offset_n)",
            "losses/test_divergences.py losses/test_fused.py losses/test_closed_form.py",
        ),
        (
            "none-is-one",
            "a part that no target carries counts where it is infinite",
            "for name, term in terms.items() if shares[name])",
            "for name, term in terms.items())",
            "losses/test_fused.py losses/test_weights.py losses/test_divergences.py",
        ),
    ),
    *in_file(
        "llmkd/losses/rows.py",
        (
            "infinite-weighted",
            "an infinite term without a weight is NaN",
            "torch.where(weight_n == 0, 0.0, weight_n * term_n)",
            "weight_n * term_n",
            "losses/test_weights.py losses/test_counts.py losses/test_fused.py",
        ),
        (
            "parts-in-the-order-computed",
            "rows of a later part come first",
            "sorted(found, key=lambda one: one[0].start)",
            "found",
            "losses/test_counts.py losses/test_by_source.py losses/test_weights.py",
        ),
    ),
    *in_file(
        "llmkd/training/features.py",
        (
            "measured-on-the-same",
            "what a map leaves is measured where it was fitted",
            "for some in (chosen[:first], chosen[first:last])",
            "for some in (chosen[:first], chosen[:first])",
            FEATURES,
        ),
        ("maps-with-dropout", "maps are fitted to states with dropout", "    student.eval()\n", "    student.train()\n", FEATURES),
        (
            "student-stays-in-eval",
            "a student whose states were measured trains in evaluation mode",
            "student.train(training)",
            "pass",
            FEATURES,
        ),
        (
            "bias-left-out-of-the-start",
            "a map starts without its bias",
            "held.copy_(sharded_like(value, held))",
            "held.copy_(sharded_like(value * (held.ndim > 1), held))",
            FEATURES,
        ),
        ("scale-always", "scale: none is not heeded", 'if features.scale == "teacher_variance":', "if True:", FEATURES),
    ),
    *in_file(
        "llmkd/training/own_text.py",
        ("own-text-weighted", "what a student writes has the weights of the data", ".unweighted()\n", "\n", OWN),
        (
            "finished-of-the-written",
            "answers without a token count as finished",
            "sum(one.finished for one in found) / len(found)",
            "sum(one.finished for one in found) / max(1, len(whole))",
            OWN,
        ),
        (
            "own-text-of-the-first",
            "the first held-out prompts are always asked",
            'random.Random("own text").sample(may, min(count, len(may)))',
            "may[:count]",
            OWN,
        ),
    ),
    *in_file(
        "llmkd/training/teacher_check.py",
        (
            "best-student",
            "a teacher is compared with the worst student",
            'min(one["ce"] for one in metrics)',
            'max(one["ce"] for one in metrics)',
            "training/test_teacher_check.py",
        ),
    ),
    *in_file(
        "llmkd/training/memory.py",
        (
            "room-of-all",
            "every process of a machine takes all of its memory",
            ' / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))',
            "",
            "training/test_auto_batch.py::test_half_of_what_is_free_is_room_for_the_processes_of_a_machine",
        ),
        (
            "swap-is-room",
            "memory is what the machine has, not what is free",
            '"MemAvailable" in line',
            '"MemTotal" in line',
            "training/test_auto_batch.py::test_half_of_what_is_free_is_room_for_the_processes_of_a_machine",
        ),
    ),
    *in_file(
        "llmkd/training/model_watch.py",
        (
            "teacher-unwatched",
            "a teacher's files may change under a run",
            "[student, *(teacher.files for teacher in teachers if teacher.cache is None)]",
            "[student]",
            "training/test_model_watch.py::test_a_model_file_that_is_rewritten_under_a_run_ends_it_with_all_that_it_has_learnt",
        ),
    ),
    *in_file(
        "llmkd/training/auto_batch.py",
        (
            "optimizer-takes-no-room",
            "no room is reserved for the optimizer's state",
            "room = gauge.room - sum(2 * local(p).nbytes for",
            "room = gauge.room - sum(0 * local(p).nbytes for",
            "training/test_auto_batch.py::test_room_is_kept_for_the_optimizers_state",
        ),
    ),
    *in_file(
        "llmkd/training/step_result.py",
        (
            "places-of-the-last",
            "only the last micro-batch's examples are named",
            "examples |= {int(micro.example_N[n]) for n in bad_N}",
            "examples = {int(micro.example_N[n]) for n in bad_N}",
            "training/test_step_result.py",
        ),
        (
            "kept-the-other-way",
            "the share of targets that count is its reciprocal",
            'terms["kept"] = counts.targets / counts.whole',
            'terms["kept"] = counts.whole / counts.targets',
            "training/test_keep.py",
        ),
    ),
    *in_file(
        "llmkd/teachers/cache/import_logprobs.py",
        ("sum-unchecked", "probabilities may sum to more than 1", "if total > 1 + SLACK:", "if False:", IMPORTED),
        ("shifted-unnoticed", "lists that are shifted by a token are taken", "if entry and label not in entry:", "if False:", IMPORTED),
        ("row-from-zero", "rows are numbered from 0", "self.encoded.row == row - 1)", "self.encoded.row == row)", IMPORTED),
        ("ambiguous-strings", "a string of several tokens is the last of them", "if often[text] == 1}", "}", IMPORTED),
        (
            "prompt-uncompared",
            "the prompt's own tokens are not compared",
            'self._same(given[:last], ids[:last].tolist(), "token")',
            'self._same(given[last - 1 : last], ids[last - 1 : last].tolist(), "token")',
            IMPORTED,
        ),
        (
            "missing-in-the-middle",
            "a target in the middle may have no entry",
            "if not entry and n + 1 < len(labels):",
            "if False:",
            IMPORTED,
        ),
    ),
    *in_file(
        "llmkd/teachers/cache/stored_head.py",
        (
            "bias-in-the-weight",
            "the bias is in each column of the weight too",
            ".to(dtype) - bias_V).T.cpu()",
            ".to(dtype)).T.cpu()",
            "teachers/test_cache.py",
        ),
        (
            "cap-forgotten",
            "a stored head has no soft cap",
            "Head(project, weight.shape[0], self.scale, self.softcap)",
            "Head(project, weight.shape[0], self.scale, None)",
            "teachers/test_cache.py",
        ),
    ),
    *in_file(
        "llmkd/models/size.py",
        (
            "embedding-in-the-body",
            "embedding and head count among the layers' weights",
            "if not (size == vocab * hidden and",
            "if not (False and",
            COST,
        ),
        (
            "adapter-of-one-side",
            "an adapter has the parameters of one of its matrices",
            'lora.rank * sum(t["shape"])',
            'lora.rank * t["shape"][0]',
            COST,
        ),
    ),
    *in_file(
        "llmkd/models/float8.py",
        (
            "scale-of-the-layer",
            "a layer has one scale for all its rows",
            'torch.linalg.vector_norm(x_NK, float("inf"), -1, keepdim=True).float()',
            'torch.linalg.vector_norm(x_NK, float("inf")).float().expand(len(x_NK), 1)',
            "models/test_float8.py",
        ),
        (
            "routers-rounded",
            "layers that choose experts are rounded",
            'if not {*_ROUTERS} & {name, *path.split(".")} and',
            "if",
            "models/test_teacher_transforms.py::test_sizes_that_are_no_multiples_of_16_and_routers_stay",
        ),
    ),
    *in_file(
        "llmkd/models/offload.py",
        (
            "head-without-its-cap",
            "a head on another device has no soft cap",
            "head.vocab, head.scale, head.softcap)",
            "head.vocab, head.scale, None)",
            "models/test_shared_weights.py::test_a_head_held_elsewhere_has_its_scale_and_its_cap",
        ),
        (
            "weights-stay",
            "an offloaded layer's weights stay on the device",
            "        part._parameters[name] = parameter\n",
            "        pass\n",
            "models/test_shared_weights.py::test_a_teacher_that_is_held_elsewhere_says_the_same",
        ),
    ),
]
