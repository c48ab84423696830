"""A teacher of your own: a callable from a batch to a signal. Here a table of bigram counts teaches a tiny model.

    python examples/custom_teacher.py

A signal that knows the teacher's whole distribution derives from `llmkd.FullDistribution` and defines `log_probs`. Everything else
(any divergence, temperature, mixtures with other teachers, validation metrics) follows from it. A teacher with hidden states and a
head returns `llmkd.Dense` instead, and never forms [N, V].
"""

from dataclasses import dataclass

import torch

import llmkd

VOCAB, WIDTH = 40, 16


@dataclass(frozen=True)
class TableSignal(llmkd.FullDistribution):
    """Rows of a table of log-probabilities: `table_CV[context_N[i]]` is the distribution at target i."""

    table_CV: torch.Tensor
    context_N: torch.Tensor

    def log_probs(self, rows, log_q_nV=None, temperature=1.0):
        log_p_nV = self.table_CV[self.context_N[rows]]
        return log_p_nV if temperature == 1 else (log_p_nV / temperature).log_softmax(-1)


class BigramTeacher:
    """Counts which token follows which, starting from one count of each. Its signal needs only the tokens before the targets."""

    metrics = ("forward_kl", "reverse_kl", "top1_agreement", "teacher_ce", "teacher_entropy")

    def __init__(self, tokens: torch.Tensor, vocab: int):
        pairs = torch.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab * vocab).view(vocab, vocab)
        self.table_VV = (pairs + 1.0).div(pairs.sum(1, keepdim=True) + vocab).log()

    def __call__(self, batch: llmkd.Batch) -> TableSignal:
        view = batch.teacher
        return TableSignal(self.table_VV, view.inputs["input_ids"].flatten()[view.rows_N])


def make_batch(tokens: torch.Tensor, length: int) -> llmkd.Batch:
    """Rows [B, T] of a long text; every position predicts the next token. Labels are aligned here, once."""
    count = (len(tokens) - 1) // length
    inputs_BT = tokens[: count * length].view(count, length)
    labels_N = tokens[1 : count * length + 1]
    view = llmkd.View({"input_ids": inputs_BT}, torch.arange(count * length))
    return llmkd.Batch(labels_N, torch.arange(count).repeat_interleave(length), view, view)


def main(steps: int = 200) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    chain = torch.softmax(2 * torch.randn(VOCAB, VOCAB, generator=generator), -1)
    tokens = [torch.zeros(1, dtype=torch.int64)]
    for _ in range(4000):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator)[:, 0])
    tokens = torch.cat(tokens)

    teacher, batch = BigramTeacher(tokens, VOCAB), make_batch(tokens[:1601], length=32)
    signal = teacher(batch)

    torch.manual_seed(0)
    student = torch.nn.Embedding(VOCAB, WIDTH)
    project = torch.nn.Linear(WIDTH, VOCAB)
    head, objective = llmkd.Head(project, VOCAB), llmkd.Objective(kd_ratio=1.0, divergence=llmkd.divergences.reverse_kl)
    optimizer = torch.optim.AdamW([*student.parameters(), *project.parameters()], lr=0.02, weight_decay=0.0)
    kl = []
    for _ in range(steps):
        hidden_NH = student(batch.student.inputs["input_ids"]).flatten(0, 1)[batch.student.rows_N]
        total, terms = llmkd.fused_loss(hidden_NH, head, batch.labels_N, objective, signal)
        optimizer.zero_grad()
        (total / batch.num_targets).backward()
        optimizer.step()
        kl.append(terms["kd"].mean().item())
    print(f"KL(student || teacher): {kl[0]:.4f} before, {kl[-1]:.4f} nats per target after {steps} steps")
    return {"before": kl[0], "after": kl[-1]}


if __name__ == "__main__":
    main()
