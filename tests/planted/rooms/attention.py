"""Faults in attention distillation: its mathematics, the queries, keys and values that are taken from a model, and what is refused."""

from tests.planted.fault import in_file

MATHS, READ, RUNS = "losses/test_attention.py", "models/test_attention_taps.py", "training/test_attention.py"
PLACES = "test_batch.py"

FAULTS = [
    *in_file(
        "llmkd/losses/attention.py",
        ("sees-no-own", "a target does not see its own position", "sees_nm = back_nm >= 0", "sees_nm = back_nm > 0", MATHS),
        ("window-longer", "a window is a position longer", "sees_nm &= back_nm < window", "sees_nm &= back_nm <= window", MATHS),
        (
            "groups-interleaved",
            "query heads read the key heads in turn",
            "widen(query_nhd).unflatten(1, (g, h // g)).transpose(0, 1).flatten(1, 2)",
            "widen(query_nhd).unflatten(1, (h // g, g)).permute(2, 0, 1, 3).flatten(1, 2)",
            MATHS,
        ),
        ("without-scaling", "scores are not scaled", "widen(key_gmd).transpose(1, 2)) * scaling", "widen(key_gmd).transpose(1, 2))", MATHS),
        (
            "relations-scaled-by-the-width",
            "relations are divided by the root of the number of heads",
            "math.sqrt(ours_rnd.shape[-1])",
            "math.sqrt(heads)",
            MATHS,
        ),
        (
            "reversed",
            "the divergence is KL(student || teacher)",
            "forward_kl(log_q, log_p).mean(-1)",
            "forward_kl(log_p, log_q).mean(-1)",
            MATHS,
        ),
        ("sum-over-heads", "heads are added up", "forward_kl(log_q, log_p).mean(-1)", "forward_kl(log_q, log_p).sum(-1)", MATHS),
        ("mean-of-logs", "mean maps are not divided by the number of heads", "- math.log(log_nhm.shape[1])", "", MATHS),
        (
            "own-window-alone",
            "the student's window alone counts for maps",
            "key_gmd.shape[1], (student.window, teacher.window))",
            "key_gmd.shape[1], (student.window, None))",
            MATHS,
        ),
        (
            "one-scaling",
            "the teacher's scores have the student's scaling",
            "scores(query_T_nhd, key_T_gmd, teacher.scaling)",
            "scores(query_T_nhd, key_T_gmd, student.scaling)",
            MATHS,
        ),
        (
            "values-left-out",
            "relations of values are left out",
            "(student.key, teacher.key), (student.value, teacher.value))",
            "(student.key, teacher.key))",
            MATHS,
        ),
        ("relations-averaged", "the three relations are averaged", "torch.stack(total_N).sum(0)", "torch.stack(total_N).mean(0)", MATHS),
        (
            "pairs-summed",
            "pairs of layers are added up",
            "torch.stack(found).mean(0)",
            "torch.stack(found).sum(0)",
            f"{RUNS}::test_pairs_are_averaged",
        ),
        (
            "chunks-of-one",
            "a chunk has a row too many",
            "size = max(1, _TILE // row_bytes)",
            "size = 1 + _TILE // row_bytes",
            f"{MATHS}::test_chunks_change_nothing",
        ),
    ),
    *in_file(
        "llmkd/models/attention.py",
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
        ("outputs-unchecked", "what explains no output is used", "<= tolerance(model):", "<= float('inf'):", READ),
    ),
    *in_file(
        "llmkd/batch.py",
        (
            "prefix-after-own",
            "an example's own segment stands before its prefix",
            "if (before := self.prefix_of[own[i]]) < 0 else (before, own[i])",
            "if (before := self.prefix_of[own[i]]) < 0 else (own[i], before)",
            PLACES,
        ),
        (
            "prefix-not-counted",
            "targets behind a prefix are placed as if it were not there",
            "starts[segments[-1]] - sum(lengths[one] for one in segments[:-1])",
            "starts[segments[-1]]",
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
        (
            "widths-unchecked",
            "relation heads that divide the student's widths alone are taken",
            "_refuse_widths(settings.parts, (ours[one], theirs[other]))",
            "_refuse_widths(settings.parts, (ours[one], ours[one]))",
            f"{RUNS}::test_relation_heads_that_do_not_divide_the_widths_are_refused_with_those_that_do",
        ),
    ),
]
