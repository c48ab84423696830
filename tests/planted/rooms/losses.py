"""Faults in the divergences, their closed forms, the objective and the fused head."""

from tests.planted.fault import Fault

DIVERGENCES, CLOSED = "llmkd/losses/divergences.py", "llmkd/losses/closed_form.py"
OBJECTIVE, FUSED = "llmkd/losses/objective.py", "llmkd/losses/fused.py"

FAULTS = [
    Fault(
        "kl-direction",
        "forward KL is taken the other way round",
        DIVERGENCES,
        'up to the teacher\'s entropy."""\n    return _kl(log_p, log_q)',
        'up to the teacher\'s entropy."""\n    return _kl(log_q, log_p)',
        "losses/test_divergences.py::test_worked_by_hand",
    ),
]
