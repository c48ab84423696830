"""The divergences and their options, and contradictions of the options. A part of `recipe.py`."""

from collections.abc import Iterator

#: Each divergence with its options: (smallest, largest, default). `losses/divergences.py` holds the functions.
DIVERGENCES: dict[str, dict[str, tuple[float, float, float]]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"forward_weight": (0.0, 1.0, 0.5)},
    "generalized_jsd": {"beta": (0.0, 1.0, 0.5)},
    "skewed_forward_kl": {"alpha": (0.0, 0.99, 0.1)},
    "skewed_reverse_kl": {"alpha": (0.0, 0.99, 0.1)},
    "adaptive_kl": {"head_mass": (0.0, 0.99, 0.5)},
    "total_variation": {},
    "alpha_beta": {"alpha": (0.0, 4.0, 0.2), "beta": (0.0, 4.0, 0.7)},
}
#: The divergences that mix the two distributions, and the least share of one of them: for far smaller shares the logarithm of 1 - (1 - share) is
#: only rounding.
_MIXING, LEAST_MIXED = ("generalized_jsd", "skewed_forward_kl", "skewed_reverse_kl"), 1e-3


def with_defaults(name: str, options: dict[str, float]) -> dict[str, float]:
    """All options of a divergence, those not given with their defaults."""
    return {option: options.get(option, default) for option, (_, _, default) in DIVERGENCES[name].items()}


def option_contradictions(name: str, options: dict[str, float], section: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of the options of a divergence, in the form of `contradictions.contradictions`.

    `section`: the section with the settings `divergence` and `divergence_options`.
    """
    known = DIVERGENCES[name]
    for option, value in options.items():
        paths = (f"{section}.divergence_options.{option}", f"{section}.divergence")
        if option not in known:
            others = [other for other, options_of in DIVERGENCES.items() if option in options_of]
            whose = f"; {option} belongs to {', '.join(others)}" if others else ""
            yield paths, f"{name} has no such option; it has: {', '.join(known) or 'none'}{whose}"
        elif not known[option][0] <= value <= known[option][1]:
            yield paths, f"found {value:g}, expected {known[option][0]:g} to {known[option][1]:g}"
        elif name in _MIXING and 0 < min(value, 1 - value) < LEAST_MIXED:
            yield (
                paths,
                f"found {value!r}, expected 0, 1, or a share from {LEAST_MIXED:g} to {1 - LEAST_MIXED:g}, which float32 tells from them",
            )
    if name == "alpha_beta" and sum((with_defaults(name, {}) | options).values()) < 0.01:
        yield (
            (f"{section}.divergence_options", f"{section}.divergence"),
            "alpha and beta add up to less than 0.01, where float32 computes nothing but rounding; raise one of them",
        )
