"""What a student has written while it trains, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .generate import Completion


@dataclass
class Statistics:
    """Counts answers until they are read. `room`: the most tokens that an answer may have."""

    room: int
    answers: list[Completion] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, answers: Sequence[Completion], seconds: float) -> None:
        self.answers += answers
        self.seconds += seconds

    def read(self) -> dict[str, float]:
        """Of the answers since the last time: their number, how many were cut off or are empty (the end token alone, or nothing), the share
        that ended by itself, the mean length in tokens, the entropy at the tokens and the tokens a second; the seconds that they took. Empty
        without an answer."""
        answers, seconds = self.answers, self.seconds
        self.answers, self.seconds = [], 0.0
        if not answers:
            return {}
        tokens, finished = sum(len(one.ids) for one in answers), sum(one.finished for one in answers)
        known = [(one.entropy, len(one.ids)) for one in answers if one.entropy is not None]
        return {
            "written": len(answers),
            "written_cut_off": len(answers) - finished,
            "written_empty": sum(len(one.ids) <= one.finished for one in answers),
            "written_finished": finished / len(answers),
            "written_length": tokens / len(answers),
            **({"written_entropy": sum(e * n for e, n in known) / max(1, sum(n for _, n in known))} if known else {}),
            "written_tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "written_seconds": round(seconds, 3),
        }
