"""Faults in what a plan says of memory, operations and time."""

from tests.planted.fault import in_file

PLAN, HELD, COMMAND = "planning/test_plan.py", "planning/test_held_to_measurement.py", "commands/test_plan.py"
RANKS, OTHERS = "planning/test_ranks.py", "planning/test_other_tasks.py"

FAULTS = [
    *in_file(
        "llmkd/planning/other_tasks.py",
        (
            "coming-reads-as-nothing",
            "a model that is still to be trained has no tokenizer of its recipe",
            "    if found.tokenizer:\n",
            "    if False:\n",
            OTHERS,
        ),
    ),
    *in_file(
        "llmkd/planning/assumed.py",
        ("given-are-targets", "the tokens that are given count as targets", "processor.longest) - given)", "processor.longest))", OTHERS),
    ),
    *in_file(
        "llmkd/planning/build.py",
        (
            "bases-apart",
            "a base of student and teacher is counted twice",
            "        deduplicate_weights(bases, without_values=True, named=found.student.has_as_its_base)\n",
            "",
            PLAN,
        ),
        (
            "cut-apart",
            "what a model of fewer decoder layers has of its base is counted twice",
            "found.student.cut_from or found.student.base",
            "found.student.base",
            OTHERS,
        ),
        ("scales-apart", "scales of a base that two models hold are counted twice", "        share_scales(bases)\n", "", PLAN),
        (
            "merged-shares",
            "a merged teacher is taken to share its base",
            " and not (config.adapter and one.merge_adapter)",
            "",
            PLAN,
        ),
    ),
    *in_file(
        "llmkd/planning/work.py",
        (
            "unmade-is-read",
            "data that a stage is still to make is looked for",
            "path.parent in made and not path.exists()",
            "False",
            COMMAND,
        ),
    ),
    *in_file(
        "llmkd/commands/plan.py",
        (
            "unknown-is-nothing",
            "parts of which the time is not known are left out without a word",
            '"unknown": len(seconds) - len(known)',
            '"unknown": 0',
            COMMAND,
        ),
    ),
    *in_file(
        "llmkd/planning/live_memory.py",
        (
            "frees-nothing",
            "what is freed stays counted",
            "        self.now -= size\n        self.parts[part] -= size\n",
            "        self.parts[part] -= size\n",
            HELD,
        ),
        (
            "views-counted",
            "a view is counted as memory of its own",
            "key in self._held or tensor.device",
            "False and key in self._held or tensor.device",
            HELD,
        ),
        ("products-halved", "a product's operations are halved", "return 2 * a_MK.shape[0]", "return a_MK.shape[0]", PLAN),
    ),
    *in_file(
        "llmkd/planning/measure.py",
        (
            "kept-states-forgotten",
            "states of an encoder that are kept take no memory",
            "        parts[STATES] = kept\n",
            "        pass\n",
            OTHERS,
        ),
        (
            "base-not-whole",
            "one layer too few is extended to",
            "(wanted - have) * (more.phases",
            "(wanted - have - 1) * (more.phases",
            PLAN,
        ),
        ("smallest-phase", "the peak is the least phase", "return max(self.phases", "return min(self.phases", HELD),
        ("paged-on-gpu", "paged state is counted on the GPU", 'if optim.name.startswith("paged") and gpu:', "if False:", PLAN),
    ),
    *in_file(
        "llmkd/planning/plan.py",
        (
            "targets-by-tokens",
            "the loss's operations grow with the tokens",
            "count * (by_target if name == LOSS",
            "count * (by_token if name == LOSS",
            PLAN,
        ),
        (
            "next-step-unread",
            "what the models read of the next step takes no memory",
            "parts[INPUTS] *= 2 * work.in_step",
            "parts[INPUTS] *= work.in_step",
            OTHERS,
        ),
    ),
    *in_file(
        "llmkd/planning/step.py",
        ("no-state", "the optimizer has no state yet", "    state.optimizer.step()\n", "", PLAN),
        ("gradients-always", "gradients of micro-batches before are always there", "    if not gradients:\n", "    if False:\n", PLAN),
    ),
    *in_file(
        "llmkd/planning/work.py",
        (
            "first-of-step",
            "the micro-batches after the first are those of the whole step",
            "for micro in step[1:])",
            "for micro in step)",
            PLAN,
        ),
    ),
    *in_file(
        "llmkd/planning/fit.py",
        ("smallest-first", "the smallest saving comes first", "key=lambda one: -one.saves)\n\n", "key=lambda one: one.saves)\n\n", PLAN),
    ),
    *in_file(
        "llmkd/commands/plan.py",
        (
            "longest-group-alone",
            "of a sweep's groups the longest alone is told",
            "else sum(known)}",
            "else max(known)}",
            f"{COMMAND}::test_a_sweep_is_planned_group_by_group_as_its_arms_train",
        ),
    ),
    *in_file(
        "llmkd/planning/models.py",
        (
            "initial-values",
            "weights without values are given initial ones",
            "PreTrainedModel.initialize_weights = lambda *args, **kwargs: None",
            "pass",
            f"{PLAN}::test_a_model_that_also_sees_is_built_without_values",
        ),
    ),
    *in_file(
        "llmkd/head.py",
        (
            "gpu-product-narrow",
            "a GPU's logits are rounded to half precision",
            "torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32, **",
            "torch.mm(hidden_NH, weight_VH.T, **",
            "test_fake_cuda.py",
        ),
    ),
    *in_file(
        "llmkd/models/packing_detection.py",
        (
            "asked-each-pass",
            "transformers reads positions in every pass",
            "return None if _ONE_EXAMPLE.get() else own(",
            "return own(",
            "training/test_step_result.py::test_the_host_waits_for_the_device_only_where_somebody_asks",
        ),
        (
            "told-to-all-threads",
            "a pass changes what transformers is told in other threads",
            "        _ONE_EXAMPLE.reset(token)\n",
            "        pass\n",
            "models/test_packing.py",
        ),
    ),
    *in_file(
        "llmkd/training/parallel.py",
        (
            "whole-gradients-kept",
            "the gradients of all of a sharded student are whole until the last micro-batch",
            "now = now or distiller.student.adapter is None",
            "now = now or distiller.student is None",
            RANKS,
        ),
    ),
    *in_file(
        "llmkd/planning/step.py",
        (
            "both-micro-batches-counted",
            "a sharded step of two micro-batches has the operations of two",
            "phase.flops //= 1 + twice",
            "phase.flops //= 1",
            RANKS,
        ),
    ),
    *in_file(
        "llmkd/process/rank_messages.py",
        (
            "waits-for-the-failed",
            "a process waits for one that has failed until the group's timeout",
            "os._exit(1)",
            "pass",
            "process/test_machine_errors.py::test_a_process_that_waits_for_one_that_has_failed_ends_by_itself",
        ),
    ),
    *in_file(
        "llmkd/planning/exchange.py",
        (
            "once-each-way",
            "a sharded student's layers come together once",
            "(2 * sizes.layers + sizes.rest)",
            "(sizes.layers + sizes.rest)",
            RANKS,
        ),
        (
            "gradients-once",
            "all of a sharded student's gradients wait for the last micro-batch",
            "micro_batches if sizes.all_train else 1",
            "1",
            RANKS,
        ),
        ("all-parts", "a rank sends its own part to itself, too", "(ranks - 1) / ranks * (", "1.0 * (", RANKS),
    ),
    *in_file(
        "llmkd/planning/ranks.py",
        ("taken-unseen", "what FSDP2 frees stays counted", "        live_memory.resized(tensor)\n", "        pass\n", RANKS),
    ),
    *in_file(
        "llmkd/planning/writing.py",
        (
            "one-sample-planned",
            "of several answers to a prompt one is planned",
            "for _ in range(settings.samples)]",
            "for _ in range(1)]",
            f"{PLAN}::test_every_answer_to_a_prompt_is_planned",
        ),
        (
            "short-answers",
            "of an answer half is in memory when its last token is written",
            "writing.prompt + writing.new - 1)[1]",
            "writing.prompt + writing.new // 2)[1]",
            f"{PLAN}::test_memory_of_writing_is_that_of_a_model_that_writes",
        ),
    ),
    *in_file(
        "llmkd/planning/fakes.py",
        (
            "offloaded-inputs-stay",
            "the inputs of layers that wait in the host's memory are planned on the GPU",
            'super().__init__(torch.empty_like(x, device="meta"), before, None)',
            "super().__init__(x, before, None)",
            f"{PLAN}::test_offloaded_inputs_of_layers_are_in_the_hosts_memory",
        ),
    ),
    *in_file(
        "docs/evidence.py",
        (
            "scores-without-noise",
            "two models that are measured apart are compared as if one of them had no error",
            "math.sqrt(2) * self.error",
            "self.error",
            "test_evidence.py",
        ),
        ("one-run-more", "a study has a run too many", "len(expand(load_sweep(", "1 + len(expand(load_sweep(", "test_evidence.py"),
    ),
]
