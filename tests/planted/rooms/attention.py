"""Faults in attention distillation: its mathematics, the queries, keys and values that are taken from a model, and what is refused."""

from tests.planted.fault import in_file

MATHS, READ, RUNS = "losses/test_attention.py", "models/test_attention_taps.py", "training/test_attention.py"
PLACES = "test_batch.py"

FAULTS = [
    *in_file(
        "llmkd/losses/attention_groups.py",
        ("sees-no-own", "a target does not see its own position", "sees_bnm = back_bnm >= 0", "sees_bnm = back_bnm > 0", MATHS),
        ("window-longer", "a window is a position longer", "sees_bnm &= back_bnm < window", "sees_bnm &= back_bnm <= window", MATHS),
        (
            "groups-of-one-more",
            "a group may have one example too many",
            "(len(group) + 1) * n * m > min(",
            "len(group) * n * m > min(",
            f"{MATHS}::test_groups_hold_every_target_once_with_its_own_positions",
        ),
        (
            "positions-as-own",
            "positions behind a prefix are taken as if it were not there",
            "torch.where(number_bm < shared, prefix, own - shared)",
            "torch.where(number_bm < shared, prefix, own)",
            MATHS,
        ),
        (
            "places-without-prefix",
            "a prefix is not counted in a target's place",
            "[target_bn] - (own - shared)",
            "[target_bn] - own",
            MATHS,
        ),
        ("padding-unlimited", "a group may be padding for the most part", "1.5 * pairs + most / 16", "most", MATHS),
    ),
    *in_file(
        "llmkd/losses/attention.py",
        (
            "groups-interleaved",
            "query heads read the key heads in turn",
            "query_bnhd.transpose(1, 2).reshape(b * g, h // g * n, d)",
            "query_bnhd.transpose(1, 2).unflatten(1, (h // g, g)).transpose(1, 2).reshape(b * g, h // g * n, d)",
            MATHS,
        ),
        ("without-scaling", "scores are not scaled", "scores_xam.mul_(scaling).view", "scores_xam.view", MATHS),
        (
            "gradient-unscaled",
            "the gradient of scores is not scaled",
            "scalings[0] * weight_bn[:, None, :, None]",
            "weight_bn[:, None, :, None]",
            MATHS,
        ),
        (
            "relations-scaled-by-the-width",
            "relations are divided by the root of the number of heads",
            "tuple(x.shape[-1] ** -0.5 for x in (ours, theirs))",
            "tuple(x.shape[1] ** -0.5 for x in (ours, theirs))",
            MATHS,
        ),
        ("reversed", "the divergence is KL(student || teacher)", "kl_and_slope(log_p, log_q)", "kl_and_slope(log_q, log_p)", MATHS),
        ("sum-over-heads", "heads are added up", "value_bhn.mean(1)", "value_bhn.sum(1)", MATHS),
        ("slope-not-averaged", "the gradient is that of the sum over heads", "slope_bhnm.div_(h)", "slope_bhnm", MATHS),
        ("mean-of-logs", "mean maps are not divided by the number of heads", "- math.log(x.shape[1])", "", MATHS),
        (
            "mean-slope-of-own-head",
            "the gradient of mean maps leaves out the softmax's own part",
            ".mul_(of_head_bhnm.sum(-1, keepdim=True))",
            ".mul_(0.0)",
            MATHS,
        ),
        (
            "own-window-alone",
            "the student's window alone counts for maps",
            "(student.scaling, teacher.scaling), (student.window, teacher.window)",
            "(student.scaling, teacher.scaling), (student.window, None)",
            MATHS,
        ),
        ("one-scaling", "the teacher's scores have the student's scaling", "scalings[1])\n", "scalings[0])\n", MATHS),
        (
            "values-left-out",
            "relations of values are left out",
            "(student.key, teacher.key), (student.value, teacher.value))",
            "(student.key, teacher.key))",
            MATHS,
        ),
        ("cap-without-slope", "the gradient leaves the soft cap out", "slope_bhnm.mul_(slope_of_cap)", "pass", MATHS),
        ("teacher-uncapped", "the teacher's scores are not capped", "capped(theirs, softcaps[1])[0]", "theirs", MATHS),
        ("relations-averaged", "the three relations are averaged", "torch.stack(rows_N).sum(0)", "torch.stack(rows_N).mean(0)", MATHS),
        (
            "weights-of-the-rows",
            "weights are taken by the group's order",
            "weight_bn *= weight_N[target]",
            "weight_bn *= weight_N[:1]",
            MATHS,
        ),
        (
            "padding-counted",
            "padding counts as a target",
            "weight_bn = group.real_bn.to(rows_N.dtype)",
            "weight_bn = torch.ones_like(group.real_bn, dtype=rows_N.dtype)",
            MATHS,
        ),
        (
            "pairs-summed",
            "pairs of layers are added up",
            "torch.stack(total).mean(), {",
            "torch.stack(total).sum(), {",
            f"{RUNS}::test_pairs_are_averaged",
        ),
        (
            "tile-forgotten",
            "chunks are as large as ever when memory runs out",
            '"tile": self.tile}',
            '"tile": None}',
            f"{RUNS}::test_memory_that_runs_out_halves_the_chunks",
        ),
    ),
    *in_file(
        "llmkd/models/attention.py",
        ("cap-forgotten", "the soft cap of a family is not kept", 'others.get("softcap")), out[0])', "None), out[0])", READ),
        ("given-scaling-forgotten", "the scaling that a family gives is not kept", "if scaling is None else float(scaling)", "", READ),
        (
            "tapped-soft-cap",
            "a soft cap is not noticed where rows are not packed",
            "if packed is not None or watching:",
            "if packed is not None:",
            READ,
        ),
    ),
    *in_file(
        "llmkd/models/taps.py",
        (
            "attention-one-layer-late",
            "attention is that of the next layer",
            "for module in layers_of(model)[number - 1].modules()]",
            "for module in layers_of(model)[number % len(layers_of(model))].modules()]",
            READ,
        ),
        ("attention-stays-watched", "modules stay watched", "            del attention.WATCHED[module]\n", "            pass\n", READ),
    ),
    *in_file(
        "llmkd/models/language_model.py",
        (
            "queries-at-targets-alone",
            "relations read queries of the last layer that were not computed",
            "None if taps.queries else self.capabilities.last_layer",
            "self.capabilities.last_layer",
            f"{READ}::test_queries_of_the_last_layer_are_right_at_all_positions_where_they_are_asked_for",
        ),
    ),
    *in_file(
        "llmkd/models/attention_taps.py",
        ("outputs-unchecked", "what explains no output is used", "<= tolerance(model, *rounds):", "<= float('inf'):", READ),
    ),
    *in_file(
        "llmkd/batch.py",
        (
            "prefix-of-another",
            "an example's prefix segment begins where its own does",
            "shared = (starts[prefix], self.lengths[prefix])",
            "shared = (starts[segment], self.lengths[prefix])",
            PLACES,
        ),
        (
            "prefix-without-length",
            "an example's prefix is as long as its own segment",
            "shared = (starts[prefix], self.lengths[prefix])",
            "shared = (starts[prefix], self.lengths[segment])",
            PLACES,
        ),
    ),
    *in_file(
        "llmkd/config/terms.py",
        (
            "uniform-rounds-down",
            "uniform rounds down",
            "(2 * i * teacher + student) // (2 * student)",
            "i * teacher // student",
            f"{RUNS}::test_pairs_of_layers",
        ),
        (
            "middle-rounds-down",
            "middle rounds down",
            "(((student + 1) // 2, (teacher + 1) // 2),)",
            "((student // 2, teacher // 2),)",
            f"{RUNS}::test_pairs_of_layers",
        ),
    ),
    *in_file(
        "llmkd/training/attention.py",
    ),
    *in_file(
        "llmkd/training/layer_pairs.py",
        (
            "widths-unchecked",
            "relation heads that divide the student's widths alone are taken",
            "x.shape[1] * x.shape[3] for one in (student, teacher) for x",
            "x.shape[1] * x.shape[3] for one in (student, student) for x",
            f"{RUNS}::test_relation_heads_that_do_not_divide_the_widths_are_refused_before_a_model_is_loaded",
        ),
        (
            "outline-of-heads-alone",
            "states that are no tensor of one width are found only when both models are loaded",
            "if any(hidden.ndim != 2 for hidden in inside[0].values()):",
            "if any(hidden.ndim == 0 for hidden in inside[0].values()):",
            "models/test_outline.py::test_what_is_refused_without_weights",
        ),
    ),
]
