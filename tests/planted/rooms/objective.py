"""Faults in the objective, the fused head and the terms."""

from tests.planted.fault import in_file

FUSED = "losses/test_fused.py"
DTYPES = "losses/test_fused_dtypes.py"

FAULTS = [
    *in_file(
        "llmkd/losses/objective.py",
        (
            "t-squared",
            "the divergence is multiplied by T instead of T^2",
            'terms["kd"] = T * T * value',
            'terms["kd"] = T * value',
            f"{FUSED}::test_equals_autograd_on_the_dense_logits",
        ),
        (
            "t-in-the-gradient",
            "the gradient of the divergence lacks T",
            "alpha=T * kd, out=grad_nV",
            "alpha=kd, out=grad_nV",
            f"{FUSED}::test_equals_autograd_on_the_dense_logits",
        ),
        (
            "t-in-the-slopes-sum",
            "the part of the softmax in the gradient lacks T",
            "slope_sum = -T * kd * slope_sum\n",
            "slope_sum = -kd * slope_sum\n",
            f"{FUSED}::test_every_divergence_equals_autograd_on_the_dense_logits",
        ),
        (
            "ce-has-its-whole-weight",
            "the cross-entropy is not weighted by 1 - kd_ratio",
            '{"ce": (1 - self.kd_ratio) * ce, "kd"',
            '{"ce": ce, "kd"',
            "training/test_run.py::test_both_terms_are_logged_and_mixed",
        ),
        (
            "label-gradient",
            "the label's part of the gradient is not weighted",
            "total_nV.new_full(label.shape, -ce))",
            "total_nV.new_full(label.shape, -1.0))",
            f"{FUSED}::test_equals_autograd_on_the_dense_logits",
        ),
        (
            "soft-cross-entropy",
            "the cross-entropy is that of the softened distribution",
            '{"ce": hard.cross_entropy(logits_nV, labels_n)}',
            '{"ce": _softmax(logits_nV / T, torch.empty_like(logits_nV)).cross_entropy(logits_nV / T, labels_n)}',
            f"{FUSED}::test_temperature_leaves_the_cross_entropy_alone",
        ),
        (
            "term-of-no-weight",
            "a term of weight 0 is added all the same",
            "for name, term in terms.items() if shares[name])",
            "for name, term in terms.items())",
            f"{FUSED}::test_a_term_of_no_weight_is_left_out_even_when_infinite",
        ),
        (
            "logit-offset",
            "differences of log-probabilities leave out the normalisers",
            "offset_n = q.log_peak_n - p.log_peak_n",
            "offset_n = 0 * (q.log_peak_n - p.log_peak_n)",
            f"{FUSED}::test_every_divergence_equals_autograd_on_the_dense_logits",
        ),
    ),
    *in_file(
        "llmkd/losses/rows.py",
        (
            "rows-of-the-first-chunk",
            "every chunk asks a sparse signal for the first rows",
            "slice(rows.start + part.start, rows.start + part.stop)",
            "slice(part.start, part.stop)",
            "teachers/test_sparse.py::test_the_fused_loss_takes_it_in_chunks",
        ),
        (
            "chunk-end",
            "the last chunk's slice may end beyond the rows",
            "slice(start, min(start + size, n))",
            "slice(start, start + size)",
            f"{FUSED}::test_the_chunk_changes_nothing {FUSED}::test_other_signals",
            "a slice that ends beyond a tensor ends with it, so every tensor that is indexed has the same rows",
        ),
    ),
    *in_file(
        "llmkd/losses/fused.py",
        (
            "teacher-not-softened",
            "the teacher's logits are not divided by T",
            "return torch.div(logits_nV, temperature, out=out) if soften and temperature != 1 else logits_nV",
            "return logits_nV",
            f"{FUSED}::test_equals_autograd_on_the_dense_logits",
        ),
        (
            "backward-does-not-scale",
            "the gradient of the hidden states ignores the factor of the loss",
            "(grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype)",
            "grad_hidden.to(scale.dtype).to(grad_hidden.dtype)",
            "training/test_parity.py::test_micro_batches_do_not_matter training/test_by_hand.py",
        ),
        (
            "weights-gradient-does-not-scale",
            "the gradient of the head's weights ignores the factor of the loss",
            "grads = [(g * scale).to(dtype)",
            "grads = [g.to(dtype)",
            "training/test_by_hand.py",
        ),
        (
            "autocast-reaches-the-loss",
            "autocast narrows the products of the loss",
            "with torch.autocast(hidden_NH.device.type, enabled=False):",
            "with torch.autocast(hidden_NH.device.type, enabled=torch.is_autocast_enabled(hidden_NH.device.type)):",
            f"{DTYPES}::test_autocast_does_not_narrow_the_loss",
        ),
        (
            "chunks-start-anew",
            "the loss is that of the last chunk",
            "total += _sum(objective.combine(terms, shares))",
            "total = 0 * total + _sum(objective.combine(terms, shares))",
            f"{FUSED}::test_the_chunk_changes_nothing",
        ),
    ),
    *in_file(
        "llmkd/losses/terms.py",
        ("terms-weight", "a term's weight is ignored", "Loss(self.factor * rows_n.sum(),", "Loss(rows_n.sum(),", "losses/test_head.py"),
        (
            "teacher-of-another",
            "a student that learns without a teacher takes the teacher of the other students",
            "signal = signal if self.needs_teacher else None",
            "signal = signal",
            "training/test_golden_losses.py",
        ),
        (
            "one-name-twice",
            "two terms may have one name",
            "if shared := taken & set(term.names):",
            "if shared := set():",
            "training/test_terms.py::test_names_belong_to_one_term",
        ),
    ),
    *in_file(
        "llmkd/head.py",
        (
            "head-scale",
            "the logits are divided by the family's factor",
            "logits_NV = torch.mul(logits_NV, self.scale, out=out)",
            "logits_NV = torch.mul(logits_NV, 1 / self.scale, out=out)",
            f"{FUSED}::test_scale_and_softcap_of_both_heads",
        ),
        (
            "softcap",
            "the soft cap does not multiply",
            "torch.tanh(logits_NV / self.softcap) * self.softcap",
            "torch.tanh(logits_NV / self.softcap)",
            f"{FUSED}::test_scale_and_softcap_of_both_heads",
        ),
        (
            "vocabulary-not-cut",
            "padding columns stay among the logits",
            "            weight_VH = project.weight[: self.vocab]",
            "            weight_VH = project.weight",
            f"{FUSED}::test_padding_of_the_vocabulary_is_not_seen",
        ),
        (
            "adapted-vocabulary-not-cut",
            "padding columns stay among the logits of a head with an adapter",
            "widen(project(hidden_NH))[:, : self.vocab]",
            "widen(project(hidden_NH))",
            "losses/test_head.py",
        ),
        (
            "head-backward-scale",
            "the gradient of the hidden states lacks the head's factor",
            "                grad_hidden_nH *= self.scale\n",
            "                pass\n",
            f"{FUSED}::test_scale_and_softcap_of_both_heads",
        ),
        (
            "bias-gradient-scale",
            "the gradient of the head's bias lacks its factor",
            "dtype=total.dtype), alpha=self.scale)",
            "dtype=total.dtype), alpha=1.0)",
            "losses/test_head.py",
        ),
        (
            "bfloat16-logits",
            "half-precision logits stay so",
            "return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x",
            "return x",
            f"{DTYPES}::test_bfloat16_at_a_large_vocabulary_is_close_to_float32",
        ),
    ),
]
