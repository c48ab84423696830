"""Statistics of what an on-policy student writes during training, and warnings if its text is of little use."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .generate import Completion


@dataclass
class Statistics:
    """Collects answers until they are read, and further counts by name. `name`: the prefix of the metrics."""

    name: str = "written"
    answers: list[Completion] = field(default_factory=list)
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, answers: Sequence[Completion], seconds: float) -> None:
        self.answers += answers
        self.seconds += seconds

    def read(self) -> dict[str, float]:
        """Metrics of the answers since the last call: their number, how many were cut off or are empty (only an end token, or nothing), the share
        that ended by itself, mean length in tokens, mean entropy, tokens per second, and seconds. For a server's answers also the age of its
        student in steps, the difference of log-probabilities from the student's own, and the mean weight. Without answers only the counts."""
        answers, seconds, counts = self.answers, self.seconds, self.counts
        self.answers, self.seconds, self.counts = [], 0.0, Counter()
        if not answers:
            return dict(counts)
        tokens, finished = sum(len(one.ids) for one in answers), sum(one.finished for one in answers)
        known = {
            "_entropy": [(one.entropy, len(one.ids)) for one in answers if one.entropy is not None],
            "_staleness": [(one.staleness, 1) for one in answers if one.staleness is not None],
            "_apart": [(one.apart, len(one.ids)) for one in answers if one.apart is not None],
            "_weight": [(w, 1) for one in answers for w in one.weights or ()],
        }
        found = {
            "": len(answers),
            "_cut_off": len(answers) - finished,
            "_empty": sum(len(one.ids) <= one.finished for one in answers),
            "_finished": finished / len(answers),
            "_length": tokens / len(answers),
            **{name: sum(x * n for x, n in each) / max(1, sum(n for _, n in each)) for name, each in known.items() if each},
            "_tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "_seconds": round(seconds, 3),
        }
        return {f"{self.name}{what}": value for what, value in found.items()} | counts


WINDOW = 64  # answers on which a warning is based
UNKNOWN = math.log(2)  # nats per token by which a student's cross-entropy on the data may exceed its teacher's at the start
LOOP, PERIOD = 24, 8  # an answer loops if its last LOOP tokens repeat at most PERIOD tokens
RANDOM = 0.75  # of the entropy of the uniform distribution
DRIFT, LEAST = 2.0, 4  # lengths drift if they differ by this factor and by so many tokens


class Watch:
    """Notices if a student's text is of little use. Returns each warning once: a line that begins with "warning:" and says what to do.

    room   the most tokens in an answer
    fits   the share of the data's answers that are not longer
    """

    def __init__(self, room: int, vocab: int, fits: float = 1.0):
        self.room, self.vocab, self.fits = room, vocab, fits
        self.behind: float | None = None  # the student's cross-entropy minus the teacher's before the first step, in nats per token
        self.first: float | None = None  # mean length of the first window
        self.window: list[Completion] = []
        self.said: set[str] = set()

    def checked(self, ce: float, teacher_ce: float) -> None:
        """Called before the first step with the cross-entropies of student and teacher on training examples."""
        self.behind = ce - teacher_ce

    def validated(self, metrics: dict[str, float]) -> list[str]:
        """The warnings after a validation; none once answers have been trained on. The teacher's cross-entropy on the student's text is the student's
        entropy plus KL(q || p), per token."""
        if self.first is not None or self.window or "unlikely" in self.said or not {"own_entropy", "own_reverse_kl"} <= metrics.keys():
            return []
        unlikely, most = metrics["own_entropy"] + metrics["own_reverse_kl"], math.log(self.vocab)
        if unlikely <= RANDOM * most:
            return []
        self.said |= {"unlikely", "random"}
        return [
            f"warning: on_policy: at the start the student's text is almost as unlikely to the teacher as random tokens ({unlikely:.2f} nats per token; random "
            f"ones have {most:.2f}), and after such prefixes it teaches little; train the student on the data first, or let on_policy.share grow from 0"
        ]

    def add(self, answers: Sequence[Completion]) -> list[str]:
        """The warnings after these answers, which are in the order in which they were written."""
        found = []
        for one in answers:
            self.window.append(one)
            if len(self.window) == WINDOW:
                seen = self._look()
                found += [text for name, text in seen.items() if name not in self.said]
                self.said |= seen.keys()
                self.first = self.first if self.first is not None else self._length()
                self.window = []
        return found

    def _length(self) -> float:
        return sum(len(one.ids) for one in self.window) / len(self.window)

    def _look(self) -> dict[str, str]:
        found, length = {}, self._length()
        known, most = [one.entropy for one in self.window if one.entropy is not None], math.log(self.vocab)
        if self.first is None and known and (spread := sum(known) / len(known)) > RANDOM * most:
            found["random"] = (
                f"warning: on_policy: at the start the student writes almost at random (entropy {spread:.2f} of at most {most:.2f} nats per token), and after "
                "such prefixes a teacher teaches little; train it on the data first, or let on_policy.share grow from 0"
            )
        useful = sum(one.finished and len(one.ids) > 1 for one in self.window) / WINDOW
        if self.first is None and not found and self.behind is not None and self.behind > UNKNOWN and useful < self.fits / 2:
            found["untuned"] = (
                f"warning: on_policy: at the start the student does not know the task: {useful:.0%} of its first {WINDOW} answers say something and end within "
                f"on_policy.max_new_tokens ({self.room}), where {self.fits:.0%} of the data's do, and on the data's its cross-entropy is {self.behind:.2f} nats per token above the "
                "teacher's; train it on the data first, or let on_policy.share grow from 0"
            )
        elif not any(one.finished for one in self.window):
            found["unfinished"] = (
                f"warning: on_policy: none of the last {WINDOW} answers ended within on_policy.max_new_tokens ({self.room}), so the student does not learn to "
                "end; raise it, or train on the data first until answers end"
            )
        if 2 * sum(loops(one.ids) for one in self.window) > WINDOW:
            found["loops"] = (
                f"warning: on_policy: most of the last {WINDOW} answers repeat themselves to their end; train on the data first, lower on_policy.share or "
                "optim.lr, or raise on_policy.temperature"
            )
        if self.first and abs(length - self.first) >= LEAST and not 1 / DRIFT < length / self.first < DRIFT:
            found["drift"] = (
                f"warning: on_policy: the answers have become {'longer' if length > self.first else 'shorter'}: {length:.0f} tokens on average, and {self.first:.0f} at "
                "first; if that is not intended, lower optim.lr or on_policy.share, or use another divergence"
            )
        return found


def loops(ids: Sequence[int]) -> bool:
    """Whether a text ends with the same few tokens over and over."""
    tail = ids[-LOOP:]
    return len(tail) == LOOP and any(tail[n:] == tail[:-n] for n in range(1, PERIOD + 1))
