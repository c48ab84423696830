"""Faults in what classifiers read, what is compared at their examples, and what is measured."""

from tests.planted.fault import in_file

STEP, RUN, METRICS = "tasks/test_classifier.py", "tasks/test_classification_run.py", "tasks/test_metrics.py"
BEFORE = "tasks/test_classification_rows.py"
VIEWS = "tasks/test_views.py"

FAULTS = [
    *in_file(
        "llmkd/tasks/planned.py",
        (
            "file-not-in-the-identity",
            "a clip that has changed under the same rows is taken for the same data",
            "*([_hashes(part)] if part else [])",
            "",
            "tasks/test_planned.py",
        ),
    ),
    *in_file(
        "llmkd/data/labelled.py",
        (
            "label-not-in-the-hash",
            "two examples of one text and two classes are taken for one",
            'return self.inputs.content(i) + b"|" + self.names[self.labels[i]].encode()',
            "return self.inputs.content(i)",
            STEP,
        ),
        (
            "padding-on-the-wrong-side",
            "a tokenizer that pads on the left is not asked",
            "[pad, own] if self.left else [own, pad]",
            "[own, pad]",
            STEP,
        ),
    ),
    *in_file(
        "llmkd/data/inputs.py",
        (
            "weights-of-others",
            "a batch has the weights of other examples",
            "w_E[example_N]",
            "w_E[: len(example_N)]",
            "models/test_encoder_decoder.py",
        ),
        (
            "teacher-inputs-not-chosen",
            "chosen examples have the teacher's inputs of others",
            "{id(one): one.take(chosen) for one in (self.inputs, *self.others)}",
            "{id(one): one.take(chosen) if one is self.inputs else one for one in (self.inputs, *self.others)}",
            "models/test_encoder_decoder.py",
        ),
        (
            "teacher-sees-the-draw",
            "a teacher that is to read clean inputs reads augmented ones",
            "seen = draw if one.augmented else None",
            "seen = draw",
            STEP,
        ),
        (
            "one-beginning-for-all",
            "decoders of two teachers that read the same begin alike",
            "key = id(one.inputs), seen, one.given",
            "key = id(one.inputs), seen",
            "models/test_encoder_decoder.py",
        ),
        (
            "teachers-share-an-input",
            "what a second teacher reads is not what an example is known by",
            "return [inputs for key, inputs in every.items() if key != id(self.inputs)]",
            "return [inputs for key, inputs in every.items() if key != id(self.inputs)][:1]",
            VIEWS,
        ),
    ),
    *in_file(
        "llmkd/tasks/readers.py",
        (
            "another-column-augmented",
            "a teacher that reads another column gets the student's draw",
            "augmented=same and not self.clean",
            "augmented=True",
            f"{VIEWS}::test_augmentation_does_not_touch_a_teacher_that_reads_another_column",
        ),
        (
            "numbers-of-other-rows",
            "after a row that is not trained on the numbers of rows, and so their labels, are those of others",
            "return taken[id(self.student)], theirs, trained[kept], trained[longer], counts",
            "return taken[id(self.student)], theirs, kept, trained[longer], counts",
            VIEWS,
        ),
        (
            "too-long-among-trained",
            "rows that are too long are counted by the numbers of other rows",
            "trained[longer], counts",
            "longer, counts",
            "tasks/test_sequences_run.py::test_targets_that_are_long_or_empty_and_the_teacher_of_a_source",
        ),
        (
            "too-long-for-one",
            "rows that only one of the models finds too long are left out without a word",
            "functools.reduce(np.union1d, [long for *_, long in found.values()])",
            "max((long for *_, long in found.values()), key=len)",
            VIEWS,
        ),
        (
            "files-of-the-student",
            "a cache does not depend on what reads the teachers' files",
            'files = [one.identity for one in self.every if one.kind != "text"]',
            'files = [one.identity for one in self.every if one.kind != "text"][:1]',
            VIEWS,
        ),
        (
            "readers-by-kind",
            "two teachers of one column read it in one way",
            "other.column == reader.column and other.identity == reader.identity",
            "other.column == reader.column",
            RUN,
        ),
        (
            "teacher-of-the-students-kind",
            "a teacher is loaded as what the student is",
            'return self.teachers.get(setting.removesuffix(".model"), self.student)',
            "return self.student",
            f"{VIEWS}::test_steps_of_a_student_of_sound_with_a_teacher_of_text",
        ),
    ),
    *in_file(
        "llmkd/tasks/text_reader.py",
        (
            "edits-of-other-rows",
            "after a row that is left out the edited texts are those of others",
            "[rows[i] for i in used]",
            "rows",
            "data/test_edited_texts.py",
        ),
        (
            "pair-of-another-column",
            "a teacher that reads another text reads the student's second text too",
            '(self.column, "text_pair") if self.column == "text" else (self.column,)',
            '(self.column, "text_pair")',
            f"{VIEWS}::test_a_teacher_reads_another_text_which_is_not_edited",
        ),
    ),
    *in_file(
        "llmkd/tasks/target_views.py",
        (
            "empty-is-long",
            "a row without a target is counted as too long too",
            " if rows[i][self.target].strip()]",
            "]",
            "tasks/test_target_views.py::test_a_prompt_that_is_too_long_with_its_target_is_left_out_and_not_cut",
        ),
    ),
    *in_file(
        "llmkd/commands/preview_examples.py",
        (
            "shown-otherwise",
            "llmkd data does not read what teachers read",
            "views_of(one for _, one in teachers)",
            "()",
            VIEWS,
        ),
    ),
    *in_file(
        "llmkd/data/collate.py",
        (
            "others-left-out",
            "where sources name teachers, each reads what the first one reads",
            "batch.examples, mine, strict=True) if keep)\n    own = dict(zip(batch.of_teachers, others, strict=True))",
            "batch.examples, mine, strict=True) if keep)\n    own = {}",
            f"{VIEWS}::test_teachers_of_three_modalities_are_one_mixture_for_a_student_of_text",
        ),
    ),
    *in_file(
        "llmkd/models/classifier.py",
        (
            "masks-of-the-batch",
            "dropout in an adapter of an image model follows the micro-batch",
            "            self.dropout_masks.begin_examples(view)\n",
            "            self.dropout_masks.begin_examples(dataclasses.replace(view, keys=None))\n",
            STEP,
        ),
        (
            "rows-not-chosen",
            "logits are not those of the targets",
            "logits_BC.index_select(0, view.rows_N)",
            "logits_BC",
            STEP,
        ),
        (
            "mean-with-padding",
            "hidden states are a mean over padding too",
            "if mask is None:",
            "if True:",
            STEP,
        ),
        (
            "head-not-drawn",
            "a new head does not follow the seed",
            "            draw(model, model.get_submodule(where))",
            "            pass",
            RUN,
        ),
    ),
    *in_file(
        "llmkd/tasks/metrics/classification.py",
        (
            "absent-classes-left-out",
            "classes without examples are no part of macro F1",
            "class_f1(matrix).mean()",
            "class_f1(matrix)[matrix.sum(1) > 0].mean()",
            METRICS,
        ),
        (
            "rows-and-columns",
            "the confusion matrix is transposed",
            "np.asarray(labels) * classes + np.asarray(answers)",
            "np.asarray(answers) * classes + np.asarray(labels)",
            METRICS,
        ),
    ),
    *in_file(
        "llmkd/tasks/classification.py",
        (
            "order-of-classes",
            "classes in another order are taken for the same",
            "        if theirs == names:",
            "        if sorted(theirs) == sorted(names):",
            BEFORE,
        ),
        (
            "class-unseen",
            "held-out rows of an unknown class are measured",
            "    if lacking:\n        name",
            "    if False:\n        name",
            STEP,
        ),
    ),
    *in_file(
        "llmkd/training/student_run.py",
        ("best-is-lowest", "the lowest F1 is the best", "sign = -1 if by in HIGHER_IS_BETTER else 1", "sign = 1", RUN),
    ),
]
