"""Faults in how a refusal of one student of several is told from one of all."""

from tests.planted.fault import in_file

EACH = "training/test_side_by_side.py"
OWN = f"{EACH}::test_what_a_students_own_settings_ask_for"
ARMS = "commands/test_sweep_failures.py::test_an_arm_whose_own_loss_its_data_do_not_carry_leaves_the_others"

FAULTS = [
    *in_file(
        "llmkd/training/prepare.py",
        (
            "first-student-for-all",
            "the first arm that is refused ends the others of its group",
            "for_each_student(many, lambda one: check_terms(one, configs, data.train))",
            "check_terms(recipe, configs, data.train)",
            f"{OWN} {ARMS}",
        ),
        (
            "first-students-package",
            "a package that another arm's optimizer needs is missed when the models are loaded",
            "for_each_student(many, lambda one: check_packages(",
            "for_each_student(many[:1], lambda one: check_packages(",
            OWN,
        ),
        (
            "first-students-files",
            "the damaged adapter of one arm ends the others of its group",
            "        with attribute_to_student(0):\n            verify(",
            "        if True:\n            verify(",
            f"{EACH}::test_the_files_of_the_first_student_and_of_its_teacher",
        ),
    ),
    *in_file(
        "llmkd/commands/cost.py",
        (
            "estimate-ends-the-sweep",
            "a sweep ends where the arm that its cost is estimated of is refused",
            'if getattr(error, "student", None) is None:',
            "if True:",
            ARMS,
        ),
    ),
    *in_file(
        "llmkd/training/checkpoint.py",
        (
            "no-checkpoint-for-all",
            "an arm whose checkpoints are damaged ends the others of its group",
            "    if 0 < len(lost) < len(folders):\n",
            "    if False:\n",
            "training/test_checkpoint.py::test_students_of_whose_own_no_step_is_usable_are_named_one_by_one",
        ),
    ),
]
