"""Faults in how models are loaded, adapted, shared, merged and saved."""

from tests.planted.fault import in_file

WEIGHTS = "models/test_shared_weights.py"
STUDENTS = "models/test_students.py"
TRANSFORMS = "models/test_teacher_transforms.py"
BEST = "training/test_best.py"
SAVED = f"{STUDENTS}::test_a_saved_student_is_loaded_in_the_type_that_it_was_trained_in"

FAULTS = [
    *in_file(
        "llmkd/models/shared_weights.py",
        (
            "first-64-entries",
            "tensors whose first 64 entries are equal are taken for one",
            "torch.equal(a.flatten()[:64], b.flatten()[:64]) and torch.equal(a, b)",
            "torch.equal(a.flatten()[:64], b.flatten()[:64])",
            f"{WEIGHTS}::test_tensors_that_differ_in_one_place_stay_apart",
        ),
        (
            "parts-apart-again",
            "sharded models on one base hold it twice from the first pass on",
            "            model.load_state_dict({}, strict=False)",
            "            pass",
            "models/test_sharding.py::test_teacher_and_student_on_one_base_hold_it_once_in_parts",
        ),
        (
            "trained-weights-shared",
            "weights that train are shared",
            "if not parameter.requires_grad and parameter.dtype",
            "if parameter.dtype",
            f"{WEIGHTS}::test_a_student_that_trains_in_full_shares_nothing",
        ),
        (
            "base-in-another-form",
            "a base that is held in 4 bit is shared with one that is not",
            "how = (dtype, settings.attention, settings.quantization)",
            "how = (dtype, settings.attention)",
            f"{WEIGHTS}::test_a_model_learns_in_4_bit_from_itself_in_full",
        ),
        (
            "base-in-another-type",
            "a base in float32 is shared with one in float64",
            "how = (dtype, settings.attention, settings.quantization)",
            "how = (settings.attention, settings.quantization)",
            f"{WEIGHTS}::test_a_base_held_otherwise_is_loaded_apart_and_equal_tensors_once",
        ),
        (
            "changed-base-shared",
            "a base that an adapter changes is shared",
            "usual = isinstance(init, bool) or init in _LEAVE_BASE",
            "usual = True",
            f"{WEIGHTS}::test_an_adapter_that_changes_its_base_leaves_the_others_alone",
        ),
    ),
    *in_file(
        "llmkd/models/load.py",
        (
            "teacher-with-dropout",
            "the teacher is in training mode",
            "    teacher.requires_grad_(False).eval()\n",
            "    teacher.requires_grad_(False).train()\n",
            "training/test_run.py::test_only_the_students_own_parameters_train",
        ),
        (
            "teacher-with-gradients",
            "the teacher's weights require gradients",
            "    teacher.requires_grad_(False).eval()\n",
            "    teacher.requires_grad_(True).eval()\n",
            f"{WEIGHTS}::test_a_shared_base_changes_no_bit",
        ),
        (
            "base-trains",
            "with an adapter the base trains too",
            "        model.requires_grad_(False)\n        names",
            "        names",
            f"{STUDENTS}::test_exactly_the_adapter_trains training/test_run.py::test_only_the_students_own_parameters_train",
            "PEFT freezes every parameter of a base when it puts the first adapter on it; the line only says so before",
        ),
        (
            "adapters-not-from-one-seed",
            "a sweep's students begin with other adapters than alone",
            "        torch.manual_seed(context.seed)\n        with attribute_to_student(k):\n            if found[k].adapter:",
            "        with attribute_to_student(k):\n            if found[k].adapter:",
            "commands/test_sweep.py::test_every_arm_ends_as_it_would_alone_to_the_last_bit",
        ),
        (
            "seed-forgotten",
            "new adapters do not depend on the run's seed",
            "        torch.manual_seed(context.seed)\n        with attribute_to_student(k):\n            if found",
            "        torch.manual_seed(0)\n        with attribute_to_student(k):\n            if found",
            f"{STUDENTS}::test_new_adapters_follow_from_the_seed",
        ),
        (
            "student-without-dropout",
            "the student trains in evaluation mode",
            "name, autocast=autocast).train()",
            "name, autocast=autocast).eval()",
            "training/test_resume.py::test_dropout_is_on_and_prompts_are_edited training/test_run.py::test_only_the_students_own_parameters_train",
        ),
        (
            "half-precision-trains",
            "float16 weights train",
            "    if torch.float16 in narrow.values():",
            "    if False:",
            "models/test_adapters.py::test_what_would_train_in_half_precision_is_said_or_refused",
        ),
    ),
    *in_file(
        "llmkd/models/adapters.py",
        (
            "nan-in-an-adapter",
            "an adapter with NaN is loaded",
            "if not torch.isfinite(value).all():",
            "if False:",
            "training/test_refused.py models/test_adapters.py",
        ),
        (
            "left-over-tensors",
            "an adapter of another base is loaded",
            '    if sides:\n        raise UserError(\n            f"{setting}: the adapter',
            '    if None:\n        raise UserError(\n            f"{setting}: the adapter',
            "training/test_refused.py models/test_adapters.py models/test_adapter_names.py",
        ),
        (
            "other-settings",
            "a recipe that contradicts its adapter is taken",
            "        if there is not None and not same:",
            "        if False:",
            f"{STUDENTS}::test_a_recipe_that_contradicts_the_adapter_is_refused",
        ),
    ),
    *in_file(
        "llmkd/models/lora.py",
        (
            "rslora-forgotten",
            "rslora has the scale of plain LoRA",
            "use_rslora=lora.rslora",
            "use_rslora=False",
            "training/test_by_hand.py",
        ),
        (
            "alpha-is-the-default",
            "alpha is always 32",
            "lora_alpha=lora.alpha",
            "lora_alpha=32.0",
            f"{STUDENTS}::test_an_update_is_alpha_over_rank",
        ),
        ("alpha-is-rank", "alpha is always the rank", "lora_alpha=lora.alpha", "lora_alpha=lora.rank", "training/test_by_hand.py"),
        (
            "dora-forgotten",
            "dora is plain LoRA",
            "use_dora=lora.dora",
            "use_dora=False",
            f"{STUDENTS}::test_dora_trains_a_magnitude_beside_each_pair_of_matrices",
        ),
        (
            "dropout-forgotten",
            "the adapter has no dropout",
            "lora_dropout=lora.dropout",
            "lora_dropout=0.0",
            "training/test_accumulation.py training/test_resume.py::test_dropout_is_on_and_prompts_are_edited",
        ),
        (
            "copies-forgotten",
            "modules_to_save are not trained",
            "modules_to_save=list(dict.fromkeys((*lora.modules_to_save, *copies))) or None",
            "modules_to_save=None",
            f"{STUDENTS}::test_exactly_the_adapter_trains",
        ),
    ),
    *in_file(
        "llmkd/models/adapters.py",
        (
            "modules-in-any-order",
            "the modules of a saved adapter's configuration stand in the order of a set",
            "setattr(out, name, sorted(value))",
            "setattr(out, name, sorted(value, reverse=True))",
            "commands/test_export.py::test_export_loads_in_plain_transformers_and_says_the_same",
        ),
    ),
    *in_file(
        "llmkd/commands/export.py",
        (
            "whole-export-not-told",
            "a folder with a finished export is like any other",
            "if _is_whole(to) else",
            "if False else",
            "commands/test_export.py::test_export_loads_in_plain_transformers_and_says_the_same",
        ),
    ),
    *in_file(
        "llmkd/config/loader.py",
        (
            "missing-recipes-of-stages",
            "a pipeline's missing recipe is not named at its line",
            "    _refuse_missing_recipes(pipeline, where)\n",
            "",
            "config/test_pipeline_files.py::test_a_missing_recipe_is_named_where_it_is_written",
        ),
    ),
    *in_file(
        "llmkd/models/merge.py",
        (
            "checkpoint-not-loaded",
            "an export of a checkpoint has the last weights",
            "        load_trained_weights(adapted, checkpoint)\n    ids_BT",
            "        pass\n    ids_BT",
            BEST,
        ),
        (
            "checkpoint-after-the-check",
            "a checkpoint's weights are loaded when the adapter is merged",
            "    if checkpoint:\n        load_trained_weights(adapted, checkpoint)\n    ids_BT = probe_ids(vocab)\n    with torch.no_grad():\n"
            "        expected = adapted(input_ids=ids_BT, use_cache=False).logits\n",
            "    ids_BT = probe_ids(vocab)\n    with torch.no_grad():\n        expected = adapted(input_ids=ids_BT, use_cache=False).logits\n"
            "        if checkpoint:\n            load_trained_weights(adapted, checkpoint)\n",
            BEST,
        ),
        (
            "layers-stay-wide",
            "the layers of a merged teacher are float32 whatever they were",
            "        t.data = t.data.to(held.get(name, t.dtype))\n",
            "        pass\n",
            f"{TRANSFORMS}::test_the_sum_is_taken_in_float32_and_rounded_once",
        ),
        (
            "merged-in-its-own-type",
            "an adapter is merged in 16 bit",
            "layer.to(functools.reduce(torch.promote_types, held.values(), torch.float32))",
            "pass",
            f"{TRANSFORMS}::test_the_sum_is_taken_in_float32_and_rounded_once {TRANSFORMS}::test_experts_that_are_no_linear_layers_are_merged_in_float32_too",
        ),
        (
            "merge-stays-wide",
            "an export is in float32 whatever the base was in",
            "have a wider dtype than the rest, such as the bias of a router\n        t.data = t.data.to(held[name])\n",
            "have a wider dtype than the rest, such as the bias of a router\n        pass\n",
            "models/test_adapters.py::test_parameters_that_are_held_wider_than_the_rest_stay_so_when_merged",
        ),
        (
            "tied-while-merging",
            "a tied head's adapter is merged into the embedding too",
            "    tied = _untied(base)\n",
            "    tied = False\n",
            "commands/test_export.py::test_an_adapter_on_a_tied_head_merges_into_the_head_alone models/test_adapters.py::test_a_tied_head_is_merged_as_it_was_trained_and_stays_tied_where_it_may",
        ),
        (
            "saved-otherwise",
            "an export is not read back",
            "    if wrong or again.keys() - saved.keys():",
            "    if False:",
            "models/test_adapters.py::test_a_folder_that_does_not_hold_what_was_saved_is_refused",
        ),
        (
            "logits-moved",
            "a merge that moves the logits is kept",
            "    if not gap <= 1e-3 * max(1.0, expected.abs().max().item()):",
            "    if False:",
            "models/test_merge.py models/test_adapters.py",
        ),
    ),
    *in_file(
        "llmkd/models/saved_student.py",
        ("type-forgotten", "a student is evaluated in the base's type", 'dtype=record.get("dtype", "auto")', 'dtype="auto"', SAVED),
        ("type-not-recorded", "a student's type is not written down", '"dtype": settings.dtype,', '"dtype": "auto",', SAVED),
        (
            "quantization-forgotten",
            "a student that learned on 4 bits is evaluated on 16",
            "quantization=quantization and Quantization(**quantization)",
            "quantization=None",
            "models/test_quantization.py::test_the_card_of_a_four_bit_dora_student_loads_it",
        ),
    ),
    *in_file(
        "llmkd/models/kinds.py",
        (
            "too-few-rows",
            "a model with fewer rows than the tokenizer has entries is taken",
            "    if rows < tokens:\n",
            "    if False:\n",
            f"{STUDENTS}::test_a_model_with_too_few_rows_is_refused",
        ),
    ),
]
