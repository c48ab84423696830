"""The share of a step's examples that the student writes: a number, a schedule, or adaptive, rising when held-out rows get worse."""

from typing import Any

from ..config.on_policy import AdaptiveShare
from ..config.schedule import value_at
from ..console import info


class Share:
    """The share by step.

    An adaptive share follows DistiLLM (Ko et al. 2024, arXiv 2402.03898, algorithm 1, as in its code). When a validation's cross-entropy is at
    least `tolerance` above a reference, the share rises by `step`, and that cross-entropy becomes the reference. The first reference is that
    of the first validation. The share never falls.

    most   the upper bound of an adaptive share
    """

    def __init__(self, setting: float | dict[str, Any] | AdaptiveShare, total_steps: int, most: float = 1.0):
        self.setting, self.total_steps, self.most = setting, total_steps, most
        self.adaptive = setting.adaptive if isinstance(setting, AdaptiveShare) else None
        self.rises, self.before = 0, None

    def at(self, step: int) -> float:
        """The share in a step."""
        if self.adaptive:
            return self._after(self.rises)
        return value_at(self.setting, step, self.total_steps)

    def _after(self, rises: int) -> float:
        return min(self.most, self.adaptive.start + self.adaptive.step * rises)

    @property
    def changes(self) -> bool:
        return self.adaptive is not None or isinstance(self.setting, dict)

    def validated(self, ce: float) -> None:
        """Called after each validation with the cross-entropy of held-out rows, in nats per token."""
        if not self.adaptive:
            return
        if self.before is None:
            self.before = ce
        elif ce >= self.before + self.adaptive.tolerance:
            info(
                f"on_policy.share: held-out ce is {ce:.4f}, and was {self.before:.4f}; the share rises to {self._after(self.rises + 1):.4g}"
            )
            self.rises, self.before = self.rises + 1, ce

    def state(self) -> dict:
        """The state for a checkpoint, as JSON values."""
        return {"share": {"rises": self.rises, "before": self.before}} if self.adaptive else {}

    def restore(self, state: dict) -> None:
        """Restore what `state` returned. ValueError if it is missing or malformed."""
        if not self.adaptive:
            return
        try:
            self.rises, self.before = int(state["share"]["rises"]), state["share"]["before"]
        except (KeyError, TypeError, ValueError):
            raise ValueError("it does not say how large the adaptive on_policy.share was") from None
