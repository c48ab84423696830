"""What `llmkd plan --processes` adds: the ways to hold the models among the processes, and the speed of many GPUs."""

from collections.abc import Callable

from ..console import table
from ..errors import UserError
from ..planning import exchange
from ..planning.devices import GPUS, Device
from ..planning.exchange import exchanged, how_sharded, sizes_of, speeds
from ..planning.plan import Plan
from ..planning.ranks import strategies
from .cost import PER_LAYER
from .plan_runs import Runs

_NAMES = {(False, False): "whole", (False, True): "teacher sharded", (True, False): "student sharded", (True, True): "all sharded"}


def ways_to_hold(runs: Runs, needs: Callable[[dict], float], room: float | None) -> list[dict]:
    """Print what each process needs for each of them, and return the numbers. `needs`: with some settings changed."""
    rows, numbers = [], []
    for settings in strategies(runs.recipes({})[0]):
        try:
            needed = needs(settings)
        except UserError as error:
            rows.append({"settings": _words(settings), "GB a process": "", "fits": "refused", "": str(error).partition(": ")[0]})
            continue
        fits = None if room is None else needed <= room
        numbers.append({"settings": settings, "needed": needed, "fits": fits})
        shown = "" if fits is None else "yes" if fits else "no"
        rows.append({"settings": _words(settings), "GB a process": f"{needed / 1e9:,.2f}", "fits": shown})
    print("\nways to hold the models:\n\n" + table(rows))
    return numbers


def _words(settings: dict[str, str]) -> str:
    return " ".join(f"--{path} {value}" for path, value in settings.items())


def speed_of_many(runs: Runs, planned: Plan, rate: Callable[[str], float], gpu: Device | None) -> tuple[list[dict], dict]:
    """Print tokens a second of 1 to 512 GPUs, and return the numbers, and the lines of a plot: {strategy: [(GPUs, tokens a second)]}."""
    device, work, recipe = gpu or GPUS["h100"], planned.work, runs.recipes({})[0]
    many = 1 if work.tokens is None else max(1, round(work.micro_batches / (work.steps * planned.ranks)))
    seconds = many * planned.seconds_of_micro_batch(rate, PER_LAYER)
    sizes, numbers, lines, rows = sizes_of(recipe, runs.found), [], {}, {}
    for settings in strategies(recipe):
        try:
            changed = runs.recipes(settings)[0]
        except UserError:
            continue
        sharded = how_sharded(changed, runs.found.with_teachers(changed))
        found = list(speeds(exchanged(sizes, sharded, many), many * work.batch_tokens, seconds, device))
        lines[_NAMES[sharded]] = [(one.ranks, one.tokens) for one in found]
        numbers.append({"settings": settings, "speeds": [vars(one) for one in found]})
        for one in found:
            rows.setdefault(one.ranks, {"GPUs": f"{one.ranks}"})[_NAMES[sharded]] = f"{one.tokens:,.0f} ({one.efficiency:.0%})"
    print(
        f"\ntokens a second of {device.name}s, and of what so many would do that need not wait for each other:\n\n"
        + table(list(rows.values()))
    )
    print(
        f"assumed: each GPU takes {many} micro-batch{'es' if many > 1 else ''} of {work.batch_tokens:,} tokens a step, so that steps grow with the GPUs; "
        f"computing and sending overlap wholly; links at {exchange.LINK_SHARE:.0%} of {device.link / 1e9:g} GB/s within a machine of "
        f"{exchange.PER_NODE}, and of {min(device.link, exchange.BETWEEN) / 1e9:g} GB/s for each GPU between machines; no latency"
    )
    return numbers, lines
