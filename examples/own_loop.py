"""Distillation in a plain PyTorch loop: llmkd's fused loss, two tiny models, a few seconds on a CPU, no network.

    python examples/own_loop.py

The data are sequences of a random Markov chain, so that the best possible cross-entropy is known. The first positions of
each sequence are a prompt: their labels are -100, and the loop selects the supervised positions itself.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmkd

VOCAB, LENGTH, PROMPT = 48, 24, 4


def make_model(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, tie_word_embeddings=False, **sizes))


def make_chain(generator: torch.Generator) -> torch.Tensor:
    """The chain's transition probabilities [VOCAB, VOCAB]."""
    return torch.softmax(2 * torch.randn(VOCAB, VOCAB, generator=generator), -1)


def sample(chain: torch.Tensor, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [B, T] and labels [B, T]: `labels[b, t]` is the token that position t must predict, -100 in the prompt."""
    tokens = [torch.randint(VOCAB, (batch_size,), generator=generator)]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator)[:, 0])
    sequence = torch.stack(tokens, 1)
    labels = sequence[:, 1:].clone()
    labels[:, :PROMPT] = -100
    return sequence[:, :-1], labels


def last_hidden(model: LlamaForCausalLM, inputs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The hidden states [N, H] before the head, at the supervised positions alone."""
    return model.model(inputs).last_hidden_state.flatten(0, 1)[keep]


def train(student, objective: llmkd.Objective, chain: torch.Tensor, steps: int, teacher=None, batch_size: int = 16) -> dict[str, float]:
    """Train the student in place. Returns the mean of each term over the last tenth of the steps, in nats per target."""
    head = llmkd.Head(student.lm_head, VOCAB)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3, weight_decay=0.0)
    generator, history = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        inputs, labels = sample(chain, batch_size, generator)
        keep = labels.flatten() != -100
        signal = None
        if teacher is not None:
            with torch.no_grad():
                signal = llmkd.Dense(last_hidden(teacher, inputs, keep), llmkd.Head(teacher.lm_head, VOCAB))
        targets = int(keep.sum())  # with gradient accumulation: of all micro-batches of the optimizer step
        total, terms = llmkd.fused_loss(last_hidden(student, inputs, keep), head, labels.flatten()[keep], objective, signal)
        optimizer.zero_grad()
        (total / targets).backward()
        optimizer.step()
        history.append({name: term.mean().item() for name, term in terms.items()})
    late = history[-max(1, steps // 10) :]
    return {name: sum(step[name] for step in late) / len(late) for name in late[0]}


def main(steps: int = 150) -> dict[str, dict[str, float]]:
    chain = make_chain(torch.Generator().manual_seed(0))
    teacher = make_model(width=64, seed=0)
    results = {"teacher": train(teacher, llmkd.Objective(), chain, steps)}
    divergence = llmkd.make_divergence("generalized_jsd", beta=0.1)
    results["student alone"] = train(make_model(width=16, seed=1), llmkd.Objective(), chain, steps)
    results["student distilled"] = train(make_model(width=16, seed=1), llmkd.Objective(0.5, 1.0, divergence), chain, steps, teacher)
    for name, terms in results.items():
        print(f"{name:18}", "  ".join(f"{term} {value:.4f}" for term, value in terms.items()))
    return results


if __name__ == "__main__":
    main()
