"""What `llmkd plan --processes` adds: the ways to hold the models among the processes, and the speed of many."""

from collections.abc import Callable

from ..console import table
from ..errors import UserError
from ..planning import exchange
from ..planning.devices import Device
from ..planning.exchange import exchanged, how_sharded, sizes_of, speeds
from ..planning.plan import Plan
from ..planning.ranks import strategies
from .cost import PER_LAYER
from .plan_runs import Runs

_NAMES = {(False, False): "whole", (False, True): "teacher sharded", (True, False): "student sharded", (True, True): "all sharded"}


def ways_to_hold(runs: Runs, needs: Callable[[dict], float], room: float | None) -> list[dict]:
    """Print the memory of a process for each way to hold the models, and return the numbers.

    needs   returns the bytes of a process with some settings changed, {dotted path: value}
    room    bytes that each process has; None if unknown
    """
    rows, numbers, refusals = [], [], []
    for settings in strategies(runs.recipes({})[0]):
        try:
            needed, why = needs(settings), None
        except UserError as error:
            needed, why = None, "; ".join(error.problems)
        fits = None if room is None or needed is None else needed <= room
        numbers.append({"settings": settings, "needed": needed, "fits": fits, "refused": why})
        answer = "refused" if why else {None: "", True: "yes", False: "no"}[fits]
        rows.append({"settings": _words(settings), "GB a process": "" if why else f"{needed / 1e9:,.2f}", "fits": answer})
        refusals += [f"{_words(settings)} is refused: {why}"] if why else []
    print("\n".join(["\nways to hold the models:\n", table(rows), *refusals]))
    return numbers


def _words(settings: dict[str, str]) -> str:
    return " ".join(f"--{path} {value}" for path, value in settings.items())


def speed_of_many(runs: Runs, planned: Plan, rate: Callable[[str], float], device: Device) -> tuple[list[dict], dict]:
    """Print the tokens per second of 1 to 512 such devices. Returns the numbers, and the lines of a plot: {strategy: [(devices, tokens per second)]}."""
    work, recipe = planned.work, runs.recipes({})[0]
    many = 1 if work.tokens is None else max(1, round(work.micro_batches / (work.steps * planned.ranks)))
    seconds = many * planned.seconds_of_micro_batch(rate, PER_LAYER)
    sizes, numbers, lines, rows = sizes_of(recipe, runs.found), [], {}, {}
    for settings in strategies(recipe):
        try:
            changed = runs.recipes(settings)[0]
        except UserError:
            continue  # `ways_to_hold` says why
        sharded = how_sharded(changed, runs.found.with_teachers(changed))
        found = list(speeds(exchanged(sizes, sharded, many), many * work.batch_tokens, seconds, device))
        lines[_NAMES[sharded]] = [(one.ranks, one.tokens) for one in found]
        numbers.append({"settings": settings, "speeds": [vars(one) for one in found]})
        for one in found:
            rows.setdefault(one.ranks, {"processes": f"{one.ranks}"})[_NAMES[sharded]] = f"{one.tokens:,.0f} ({one.efficiency:.0%})"
    each = "such a machine" if device.measured else device.name
    print(f"\ntokens a second, each process with {each}, and the share of what they would reach if none waited for another:\n")
    print(table(list(rows.values())))
    print(
        f"assumed: each process takes {many} micro-batch{'es' if many > 1 else ''} of {work.batch_tokens:,} tokens a step, so that steps grow with the processes; "
        f"computing and sending overlap wholly; links at {exchange.LINK_SHARE:.0%} of {device.link / 1e9:g} GB/s within a machine of "
        f"{exchange.PER_NODE}, and of {min(device.link, exchange.BETWEEN) / 1e9:g} GB/s for each process between machines; no latency"
    )
    return numbers, lines
