"""A divergence of your own: one function of two tensors of log-probabilities, one value for each row.

    python examples/custom_divergence.py

The function knows nothing about labels, masks, temperature, chunks or devices. llmkd calls it with a few rows at a time and takes its
gradient by autograd. A divergence with the same interface inside llmkd is one function in `llmkd/losses/divergences.py`, its name and
options in `llmkd/config/recipe.py`, and, for speed, its closed form in `llmkd/losses/closed_form.py`.
"""

import torch

import llmkd


def squared_hellinger(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """1 - sum sqrt(p q), from 0 to 1. `log_q` (student) and `log_p` (teacher) are [N, V]; the result is [N].

    Written as half the sum of (sqrt p - sqrt q)^2, so that rounding cannot make it negative.
    """
    return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)


def main() -> torch.Tensor:
    vocab, width, targets = 1000, 32, 64
    torch.manual_seed(0)
    student_head, teacher_head = (llmkd.Head(torch.nn.Linear(width, vocab, bias=False), vocab) for _ in range(2))
    student_NH, teacher_NH = torch.randn(targets, width, requires_grad=True), torch.randn(targets, width)
    labels_N = torch.randint(vocab, (targets,))

    objective = llmkd.Objective(kd_ratio=0.8, temperature=2.0, divergence=squared_hellinger)
    total, terms = llmkd.fused_loss(student_NH, student_head, labels_N, objective, llmkd.Dense(teacher_NH, teacher_head))
    total.backward()
    print(f"cross-entropy {terms['ce'].mean():.4f}, T^2 D {terms['kd'].mean():.4f}, gradient of norm {student_NH.grad.norm():.4f}")

    # the check that every divergence deserves: its gradient against finite differences, in float64
    log_q, log_p = (torch.randn(3, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    assert torch.autograd.gradcheck(lambda logits: squared_hellinger(logits.log_softmax(-1), log_p), log_q.requires_grad_())
    assert squared_hellinger(log_p, log_p).abs().max() < 1e-15
    return terms["kd"]


if __name__ == "__main__":
    main()
