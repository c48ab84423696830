"""Faults in what models compute: attention, norms, adapters' products, the last layer, and what is tried at the start."""

from tests.planted.fault import in_file

SHARED = "models/test_attention.py::test_packed_and_shared_rows_equal_rows_apart"
LAST = "models/test_last_layer.py"
NORMS = "models/test_norms.py"
LORA_PRODUCT = "models/test_lora_product.py"
TAPS = "models/test_taps.py"
DROPOUT = "training/test_dropout.py"

FAULTS = [
    *in_file(
        "llmkd/models/lora_product.py",
        (
            "eight-bits",
            "of float32 adapters on bfloat16 weights eight bits are left",
            "    low.copy_(x - high)\n",
            "    low.zero_()\n",
            LORA_PRODUCT,
        ),
        (
            "past-dropout",
            "the adapter reads what dropout was to change",
            "x_NK if dropped is None else dropped.reshape(x_NK.shape)",
            "x_NK",
            LORA_PRODUCT,
        ),
        (
            "adapter-without-gradient",
            "the input has the gradient of the base alone",
            "_add_wide(of_x, grad_low_Nr, A_rK)",
            "pass",
            LORA_PRODUCT,
        ),
    ),
    *in_file(
        "llmkd/models/norms.py",
        (
            "rounded-once",
            "the weight is part of the norm, whose roundings are others then",
            "None, module.variance_epsilon)",
            "module.weight, module.variance_epsilon) / module.weight",
            NORMS,
        ),
        ("any-norm", "norms that are rounded otherwise are replaced too", ".mean().item() < 0.02", ".mean().item() <= 1.0", NORMS),
    ),
    *in_file(
        "llmkd/models/dropout.py",
        (
            "dropout-of-the-first-rows",
            "the last layer's rows have the masks of the row's first positions",
            "computed.positions[view.rows_N], None",
            "computed.positions[: len(view.rows_N)], None",
            DROPOUT,
        ),
        (
            "dropout-of-the-heads-first-chunk",
            "every chunk of the head has the first one's masks",
            "(self.rows[self.chunk],)",
            "(self.rows[: len(self.rows[self.chunk])],)",
            DROPOUT,
        ),
        ("dropout-of-one-module", "all modules have the same masks", "pairs * _GOLDEN + key", "pairs * _GOLDEN", DROPOUT),
        ("dropout-without-scale", "what is kept is not scaled up", "_LANE / (_LANE - dropped)", "1.0", DROPOUT),
        ("dropout-badly-mixed", "masks of some features go together", "    words.mul_(_SECOND)\n", "", DROPOUT),
        (
            "dropout-of-the-other-thread",
            "models on two threads have one another's masks",
            "number, base = next(_NUMBERS), model",
            "number, base = 0, model",
            DROPOUT,
        ),
    ),
    *in_file(
        "llmkd/data/collate.py",
        (
            "dropout-by-the-batch",
            "masks follow the place in the micro-batch",
            "(*key, data.content_hash(i)), len(x)",
            "(*key, indices.index(i)), len(x)",
            DROPOUT,
        ),
        (
            "dropout-of-one-position",
            "all positions of an example have one mask",
            "np.arange(1, length + 1, dtype=np.uint64)",
            "np.ones(length, np.uint64)",
            DROPOUT,
        ),
    ),
    *in_file(
        "llmkd/models/taps.py",
        (
            "taps-of-the-recomputed-pass",
            "the states that are taken count among the tensors that a recomputed layer keeps",
            "    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):\n",
            "    if True:\n",
            f"{TAPS}::test_what_is_taken_inside_of_a_recomputed_layer_counts_for_nothing",
        ),
        (
            "taps-stay",
            "a layer goes on to hand over its states after the pass that was asked",
            "            modules[n]._compiled_call_impl = compiled\n",
            "            pass\n",
            f"{TAPS}::test_a_layer_that_runs_twice_is_no_layer_that_can_be_read",
        ),
        (
            "taps-one-layer-late",
            "the states after a layer are what the layer reads",
            "        _take(taken, n + 1, out if isinstance(out, Tensor) else out[0], rows_N)",
            "        _take(taken, n + 1, args[0], rows_N)",
            f"{TAPS}::test_every_student_on_a_base_and_the_teacher_beside_them_give_their_own",
        ),
        (
            "taps-without-gradient",
            "no gradient flows through the states inside",
            "        taken[number] = hidden_BTH.flatten(0, 1).index_select(0, rows_N)",
            "        taken[number] = hidden_BTH.detach().flatten(0, 1).index_select(0, rows_N)",
            f"{TAPS}::test_what_is_taken_inside_of_a_recomputed_layer_counts_for_nothing",
        ),
    ),
    *in_file(
        "llmkd/models/language_model.py",
        (
            "rows-by-position",
            "hidden states are taken by column alone",
            "hidden_BTH.flatten(0, 1).index_select(0, view.rows_N)",
            "hidden_BTH.flatten(0, 1).index_select(0, view.rows_N % hidden_BTH.shape[1])",
            "models/test_families.py::test_the_fused_path_equals_the_models_own_logits",
        ),
        (
            "packed-without-its-mask",
            "a packed row is attended as one text",
            'return view.inputs | ({"attention_mask": view.packed.mask()} if packed else {})',
            "return view.inputs",
            SHARED,
        ),
        (
            "autocast-forgotten",
            "mixed precision computes in float32",
            "torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False)",
            "torch.autocast(view.rows_N.device.type, enabled=False)",
            "training/test_run.py::test_the_settings_that_change_how_it_is_computed_work_and_stay_near models/test_attention.py::test_under_autocast_products_are_in_its_type",
        ),
    ),
    *in_file(
        "llmkd/models/attention.py",
        (
            "window-by-one",
            "a sliding window is a token too wide",
            "(back >= 0) & (back < window)",
            "(back >= 0) & (back <= window)",
            SHARED,
        ),
        (
            "prefix-after-the-segment",
            "queries behind a prefix are masked as if they stood at its start",
            "torch.arange(m - n, m, device=q.device)[:, None]",
            "torch.arange(n, device=q.device)[:, None]",
            SHARED,
        ),
        (
            "window-forgotten",
            "a segment longer than the window attends to all of itself",
            "plain = n == m and (window is None or n <= window)",
            "plain = n == m",
            SHARED,
        ),
        (
            "heads-interleaved",
            "grouped heads get each other's keys",
            "key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))\n    parts",
            "key, value = (x.repeat(1, groups, 1) for x in (key, value))\n    parts",
            SHARED,
        ),
        (
            "scale-forgotten",
            "a family's scale of the scores is ignored",
            "mask, dropout, plain, scale=scale)",
            "mask, dropout, plain, scale=None)",
            f"{SHARED} models/test_packing.py::test_packed_logits_and_gradients_equal_unpacked_ones",
        ),
        (
            "not-causal",
            "a segment attends to all of itself",
            "mask, dropout, plain, scale=scale)",
            "mask, dropout, False, scale=scale)",
            SHARED,
        ),
    ),
    *in_file(
        "llmkd/models/last_layer.py",
        (
            "rows-stay",
            "the last layer goes on to compute the rows of the last batch",
            "self._active.rows_N = self._active.ids_BT = None\n",
            "pass\n",
            f"{LAST} training/test_run.py::test_validation_metrics_from_the_models_own_logits",
        ),
        (
            "never-proved",
            "a family whose skipped positions matter is taken all the same",
            "return same_hidden and relative_gap(whole[1:], part[1:]) <= 10 * tolerance",
            "return True",
            f"{LAST}::test_it_is_left_out_where_something_else_is_read {LAST}::test_it_is_left_out_where_a_family_is_made_otherwise",
        ),
        (
            "scattered-in-order",
            "rows are put back in another order",
            "out.index_copy_(0, active.rows_N, out_1NC.squeeze(0))",
            "out.index_copy_(0, active.rows_N, out_1NC.squeeze(0).flip(0))",
            f"{LAST}::test_only_the_rows_reach_the_last_layers_modules {LAST}::test_it_is_exact",
        ),
    ),
    *in_file(
        "llmkd/models/families.py",
        (
            "scaling-multiplies",
            "logits_scaling multiplies in every family",
            "in _MULTIPLY_BY_LOGITS_SCALING else 1 / value",
            "in _MULTIPLY_BY_LOGITS_SCALING else value",
            "models/test_families.py::test_the_fused_path_equals_the_models_own_logits",
        ),
        (
            "caps-forgotten",
            "soft caps are not known",
            '("final_logit_softcapping", "logits_soft_cap",',
            '("logits_soft_cap",',
            "models/test_families.py::test_the_fused_path_equals_the_models_own_logits",
        ),
    ),
    *in_file(
        "llmkd/models/startup_checks.py",
        (
            "not-causal-taken",
            "a model that sees later tokens is taken",
            '<= limit:\n        raise UserError(\n            f"{setting}: {model.base_model.config.model_type} lets',
            '<= math.inf:\n        raise UserError(\n            f"{setting}: {model.base_model.config.model_type} lets',
            "models/test_families.py::test_a_model_that_sees_later_tokens_is_refused",
        ),
        (
            "leaks-taken",
            "packed examples may see one another",
            "if not (leak <= 3 * noise + 1e-6 * apart_NV.abs().max().item() and gap <= limit):",
            "if False:",
            "models/test_packing.py::test_a_run_whose_model_leaks_is_refused_before_it_writes",
        ),
        (
            "head-believed",
            "a family whose head is not known is believed",
            "    if gap <= limit:\n        return model\n    family",
            "    if True:\n        return model\n    family",
            "models/test_families.py::test_an_unknown_head_falls_back_to_the_models_own_forward",
        ),
    ),
    *in_file(
        "llmkd/models/probe.py",
        (
            "mode-not-restored",
            "the checks leave the student in evaluation mode",
            "        model.train(training)\n",
            "        pass\n",
            "models/test_attention.py::test_the_checks_leave_the_model_as_it_was training/test_run.py::test_only_the_students_own_parameters_train",
        ),
    ),
    *in_file(
        "llmkd/models/activation_checkpointing.py",
        (
            "last-layer-recomputed",
            "the last layer is recomputed too",
            "n < min(max(1, round(share * len(layers))), len(layers) - 1)",
            "n < max(1, round(share * len(layers)))",
            f"{LAST}::test_layers_are_recomputed_from_the_first_and_never_the_last",
        ),
    ),
    *in_file(
        "llmkd/models/float8.py",
        (
            "scale-of-the-tensor",
            "all rows have one scale",
            'torch.linalg.vector_norm(x_NK, float("inf"), -1, keepdim=True)',
            "x_NK.abs().amax().expand(*x_NK.shape[:-1], 1)",
            "models/test_float8.py",
        ),
        ("activations-scale", "the activations' scale is forgotten", "* scale_N1 * scale_O1.T", "* scale_O1.T", "models/test_float8.py"),
    ),
    *in_file(
        "llmkd/models/model.py",
        (
            "adapter-not-switched",
            "students on one base all use the adapter that is active",
            "            self.model.set_adapter(self.adapter)\n",
            "            pass\n",
            f"{LAST}::test_adapters_side_by_side_and_the_teacher_beside_them commands/test_sweep.py::test_every_arm_ends_as_it_would_alone_to_the_last_bit",
        ),
        (
            "another-adapter-trains",
            "a student names the parameters of the adapter that is active",
            "        self.set_active_adapter()\n        reshard(self.model)",
            "        reshard(self.model)",
            "commands/test_sweep.py::test_every_arm_ends_as_it_would_alone_to_the_last_bit",
        ),
    ),
]
