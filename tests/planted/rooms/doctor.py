"""Faults in `llmkd doctor` itself: a check that no longer looks, or looks away."""

from tests.planted.fault import in_file

DATA, LOSSES, MODELS, TRAINING, SOUND = (
    f"doctor/test_{name}.py" for name in ("faults_data", "faults_losses", "faults_models", "faults_training", "sound")
)

FAULTS = [
    *in_file(
        "llmkd/doctor/examine.py",
        ("exceptions-pass", "a check that raises has passed", 'result = failed(f"it could not', 'result = passed(f"it could not', DATA),
        (
            "goes-on-without-data",
            "checks are asked although nothing was read",
            "if lacking and check.needs",
            "if False and check.needs",
            DATA,
        ),
        ("random-state", "the random state is another afterwards", ", torch.random.fork_rng():", ":", SOUND),
    ),
    *in_file(
        "llmkd/doctor/data.py",
        ("answers-not-looked-for", "answers that are not supervised pass", "if squeezed(answer) not in text", "if False", DATA),
        ("prompts-not-looked-for", "prompts that are supervised pass", "if extra and not data", "if False and not data", DATA),
        ("labels-not-compared", "labels are not compared", "if own[t + 1] != label or own[t]", "if own[t]", DATA),
        ("targets-not-counted", "a target may be missing", "if found != wanted:", "if False:", DATA),
        ("teachers-view", "packed rows are not looked at", "for packed in (False, True):", "for packed in (False,):", DATA),
    ),
    *in_file(
        "llmkd/doctor/losses.py",
        ("itself-not-compared", "a divergence from itself passes", "if most <= limit and (", "if most <= 1e9 and (", LOSSES),
        ("values-not-compared", "terms are not compared with the textbook", "if max(gaps.values()) <=", "if 0 <=", LOSSES),
        ("slopes-not-compared", "the gradient is not compared", "and max(slopes) <= near", "", LOSSES),
        ("one-for-all", "a target may move others", "if moved.max().item() > 1e-5", "if moved.max().item() > 1e5", LOSSES),
        ("total-not-compared", "the whole loss may move otherwise", "if abs(whole - step) > 1e-4", "if abs(whole - step) > 1e4", LOSSES),
        ("looks-ahead", "earlier logits may move", "if earlier > limit:", "if False:", LOSSES),
        ("reads-nothing", "later logits need not move", "(view.rows_N % T > at)]) == 0:", "(view.rows_N % T > at)]) == -1:", LOSSES),
        ("narrow-passes", "bfloat16 logits pass", "max(0.1 * narrow, 1e-6)", "max(10 * narrow, 1e-6)", LOSSES),
    ),
    *in_file(
        "llmkd/doctor/plain.py",
        ("textbook-without-t", "the textbook has no T^2", "return temperature**2 * value_N", "return value_N", LOSSES),
        ("all-float64", "a float32 teacher is compared as float64", "for dtype in precisions(part, labels_N)}", "for dtype in ()}", LOSSES),
        ("textbook-softcap", "the textbook has no soft cap", "if head.softcap else out_NV", "if False else out_NV", LOSSES),
        ("textbook-tail", "the textbook's tail holds all tokens", "(q_NV * (1 - named_NV))", "(q_NV * 1)", LOSSES),
    ),
    *in_file(
        "llmkd/doctor/models.py",
        ("vocabularies-pass", "other ids pass", "if other:", "if False:", MODELS),
        ("logits-pass", "other logits pass", "if gaps[setting] > setup.rounding(model):", "if False:", MODELS),
        ("adapter-passes", "an adapter that changes nothing passes", "if not changed[source.setting] > 1e-6:", "if False:", MODELS),
        ("adapter-trains", "the teacher's adapter trains after it was switched off", "p.requires_grad_(False)", "pass", SOUND),
        ("draws", "two passes may differ", "elif gap > 0.1 * setup.rounding(model):", "elif False:", MODELS),
        ("worse-passes", "a teacher that knows less is a warning", "if gain < -2 * error else", "if False else", MODELS),
    ),
    *in_file(
        "llmkd/doctor/training.py",
        ("unasked-trains", "what trains is not compared", "if wanted != trained:", "if wanted > trained:", TRAINING),
        (
            "adapter-not-compared",
            "an adapter's scale is not compared",
            "if problem := _other_adapter(setup):",
            "if problem := None:",
            TRAINING,
        ),
        ("exchange-not-compared", "what two processes exchange is not compared", "apart = max(apart, exchanged)", "pass", TRAINING),
        ("optimizer-lacks", "the optimizer's list is not compared", "if held != {", "if False and held != {", TRAINING),
        (
            "frozen-moves",
            "what is frozen may move",
            "if (others := _sums([student, *setup.live.values()], trained)) != frozen:",
            "if False:",
            TRAINING,
        ),
        ("nothing-moves", "a step may change nothing", "fixed = [name for name in still if name not in zero]", "fixed = []", TRAINING),
        (
            "no-gradient",
            "tensors without a gradient pass",
            "return (failed if lost else warned)",
            "return (warned if lost else warned)",
            TRAINING,
        ),
        ("plain-not-compared", "two splits that are both wrong pass", "if max(apart, against or 0.0) <=", "if apart <=", TRAINING),
        (
            "moves-pass",
            "padding and packing may move the loss",
            "if all(gap.max().item() <= setup.allowed and",
            "if all(gap.max().item() <= 1e9 or",
            TRAINING,
        ),
        (
            "dealt-twice",
            "an example may be on both ranks",
            "if sorted(i for one in dealt",
            "if False and sorted(i for one in dealt",
            TRAINING,
        ),
        (
            "ranks-pass",
            "ranks need not agree",
            "return passed(found) if apart <= _limit(setup) else",
            "return passed(found) if True else",
            TRAINING,
        ),
    ),
    *in_file(
        "llmkd/doctor/setup.py",
        ("weights-lost", "the student's weights are not put back", "p.copy_(before[name])", "pass", TRAINING),
        ("whole-data", "all rows are read", "limit=min(one.limit or rows, rows)", "limit=one.limit", SOUND),
    ),
    *in_file(
        "llmkd/doctor/files.py",
        (
            "saved-passes",
            "another saved student passes",
            "return passed(found) if gap <= setup.rounding(student) else",
            "return passed(found) if True else",
            MODELS,
        ),
        (
            "exported-passes",
            "another exported student passes",
            "if off <= near and gap",
            "if gap",
            MODELS,
        ),
        ("rounding-passes", "what is exported is not compared", "and gap <= max(near, 3 * rounding):", "and True:", MODELS),
        ("moved-little", "a merge is compared with an adapter that does little", "while change < 0.3", "while change < 0.0001", MODELS),
        ("never-stops", "an end token that is not saved passes", "if lacking := [token", "if False and [token", MODELS),
        ("cache-passes", "another cache passes", "wrong = wrong or bad", "wrong = False", MODELS),
        (
            "kl-not-compared",
            "a cache's distribution is not compared",
            "wrong = wrong or not distance <= 0.02",
            "wrong = wrong or False",
            MODELS,
        ),
        ("full-disk", "a full disk passes", "if needed > free:", "if False:", MODELS),
    ),
    *in_file(
        "llmkd/doctor/weights.py",
        ("not-moved", "a new adapter is saved, which changes nothing", "p.add_((torch.randn", "p.add_(0 * (torch.randn", MODELS),
        ("stays-wide", "a model stays in another dtype", "t.data = t.data.to(dtype)", "pass", MODELS),
    ),
    *in_file(
        "llmkd/commands/doctor.py",
        ("failure-is-0", "a failed check ends with 0", "    if wrong:", "    if False:", SOUND),
        ("without-stand-ins", "a stage waits for the one before it", "if name and Path(", "if False and Path(", SOUND),
    ),
]
