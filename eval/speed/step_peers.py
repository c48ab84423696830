"""Peers' whole training steps, for eval/speed/step.py, on the models and examples that llmkd's rows have.

torchtune's and TRL's own trainers run here, each in its own loop; what they are given by us is models, weights and examples. Only the
row of TRL's chunked loss is a loop of ours, after its DistillationTrainer, which trains on what the student itself writes.
"""

from .step_cases import Case
from .step_setup import Setup
from .step_torchtune import Torchtune
from .step_trl import chunked, gkd


def peers(setup: Setup) -> list[Case]:
    torchtune = "its recipe's own train(); adapters on all linear layers; divides its gradient by the targets twice"
    return [
        Case("torchtune, batches of 4", Torchtune(packed=False), remark=torchtune),
        Case(f"torchtune, packed rows of {setup.options.tokens // 4}, compiled", Torchtune(packed=True), remark=torchtune),
        Case("TRL GKDTrainer, lmbda 0, batches of 4", gkd, remark="no CE; gradient checkpointing off, where its default is on"),
        Case("TRL's chunked divergence, batches of 4", chunked, remark="no CE; in a plain loop, on transformers' bodies"),
    ]
