"""`llmkd plan`: the memory and time that a recipe needs, before a model is loaded or a GPU is rented."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..console import count, duration, table
from ..output.plots import plot_speeds
from ..planning import devices, fit
from ..planning.caching import Caching, cachings
from ..planning.devices import GPUS, Device
from ..planning.here import real_steps
from ..planning.plan import Plan
from .cost import PER_LAYER, matmul_flops
from .plan_ranks import speed_of_many, ways_to_hold
from .plan_runs import Runs, runs_of


@dataclass(frozen=True)
class Wanted:
    """The options of the command.

    gpu         one of `devices.GPUS`; None for all of them
    cpu         plan for this machine's CPU instead
    memory      bytes that the run must fit into; None for the GPU's memory
    share       share of a GPU's stated peak that a step reaches
    rate        operations per second that a step reaches, in place of all other rates
    measure     also run some real steps on this machine, and print both
    processes   processes of the run, each with such a device; None for one, without the speed of many
    plot        file for a plot of the speed of many GPUs
    """

    gpu: Device | None = None
    cpu: bool = False
    memory: float | None = None
    share: float = devices.SHARE
    rate: float | None = None
    measure: bool = False
    processes: int | None = None
    plot: Path | None = None

    @property
    def room(self) -> float | None:
        return self.memory or (self.gpu and self.gpu.memory)


def run(config: str, overrides: dict[str, Any], wanted: Wanted) -> dict:
    """Print the plan of a recipe, or of each stage of a pipeline or sweep and each group of a sweep's arms, and return the numbers."""
    planned = runs_of(config, overrides)
    found, told = [], {}
    for runs in planned.runs:
        found.append(_tell_cache(runs, wanted) if runs.caches else _tell(runs, wanted, told, not any(one.caches for one in planned.runs)))
        print()
    if planned.kind == "recipe":
        return {"recipe": config} | found[0]
    stages = [{"stage": runs.stage} | one for runs, one in zip(planned.runs, found, strict=True) if runs.stage]
    groups = [one for runs, one in zip(planned.runs, found, strict=True) if not runs.stage]
    numbers = {planned.kind: config, "stages": stages, "groups": groups, "made": list(planned.made), "devices": _sums(found)}
    parts = [count(len(part), name) for part, name in ((stages, "stage"), (groups, "group")) if part]
    print(f"{' and '.join(parts)} one after another: " + "; ".join(_sum_text(one) for one in numbers["devices"]))
    if planned.made:
        print(f"- not planned: the rows that stages write ({', '.join(planned.made)})")
        if "make" in planned.made.values():
            print("- llmkd make --dry_run counts the asks and tokens of a file of llmkd make")
    return numbers


def _tell_cache(runs: Runs, wanted: Wanted) -> dict:
    """Print the plan of a stage that writes teacher caches, and return its numbers."""
    print(f"{runs.name}: writes a cache")
    named = _devices(wanted)
    caches = [_cache_numbers(one, named, wanted) for one in cachings(runs.recipes({})[0], runs.found, not wanted.cpu)]
    out = []
    for number, device in enumerate(named):
        room = device.memory if device.measured or not wanted.memory else wanted.memory
        fits = max(one["needed"] for one in caches) <= room if room else None
        times = [one["devices"][number]["seconds"] if one["devices"] else None for one in caches]
        out.append({"device": device.name, "fits": fits, "seconds": None if None in times else sum(times)})
    return {"caches": caches, "devices": out}


def _tell(runs: Runs, wanted: Wanted, told: dict[str, tuple[str, dict]], with_caches: bool) -> dict:
    """Print the plan of students that train together, and return its numbers. If it equals one that was printed, print that one's name.

    told          printed plans with their numbers; this one is added
    with_caches   also print the cost of llmkd cache for their teachers
    """
    first = runs.plan(wanted.room, not wanted.cpu, None, wanted.processes or 1)
    work = first.work
    key = repr((first.parts, first.flops, first.layer_passes, work.micro_batches, work.tokens, work.targets, work.steps, first.notes))
    if key in told:
        name, numbers = told[key]
        print(f"{runs.name}: as {name}")
        return numbers | ({"arms": runs.arms} if runs.arms else {})

    def needs(change: dict[str, Any]) -> float:
        return _needed(runs.plan(wanted.room, not wanted.cpu, change, wanted.processes or 1), wanted)

    numbers = ({"arms": runs.arms} if runs.arms else {}) | _numbers(first, wanted)
    print(_memory_text(first, wanted, runs.name))
    rows = _device_rows(first, wanted)
    print("\n" + _work_text(first) + "\n\n" + table([{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]))
    numbers["devices"] = [row["_numbers"] for row in rows]
    print("\n" + _rates_text(wanted, first))
    caches = cachings(runs.recipes({})[0], runs.found, not wanted.cpu) if with_caches else []
    if caches:
        numbers["caches"] = [_cache_numbers(one, [row["_device"] for row in rows], wanted) for one in caches]
    if wanted.processes:
        numbers["ways_to_hold"] = ways_to_hold(runs, needs, wanted.room)
        device = rows[-1]["_device"] if wanted.cpu else wanted.gpu or GPUS["h100"]
        numbers["speeds"], lines = speed_of_many(runs, first, _rate(wanted, device), device)
        if wanted.plot:
            plot_speeds(wanted.plot, runs.name, lines)
    if wanted.measure:
        numbers["measured"] = _measured(runs, first, wanted, rows[-1]["_device"])
    if wanted.room:
        numbers |= _fit(runs.recipes({})[0], len(runs.arms), first, wanted, needs)
    for note in first.notes:
        print(f"- {note}")
    numbers["notes"] = first.notes
    told[key] = runs.name, numbers
    return numbers


def _cache_numbers(cache: Caching, named: list[Device], wanted: Wanted) -> dict:
    """Print the memory, time and disk space that `llmkd cache` needs for a teacher, and return the numbers."""
    needed = cache.peak if wanted.cpu else devices.held_on_gpu(cache.peak, cache.parts.get("teacher's weights", 0.0))
    numbers = {"setting": cache.setting, "memory": cache.parts, "needed": needed, "bytes_of_target": cache.width, "devices": []}
    text = f"\nllmkd cache writes {cache.width:,} bytes a target ({cache.setting}.cache), and needs {_amount(needed, 'GB')} GB"
    if cache.targets is not None:
        numbers |= {"targets": cache.targets, "bytes": cache.targets * cache.width}
        for device in named:
            seconds = max(cache.flops / _rate(wanted, device)(cache.dtype), PER_LAYER * cache.layers * cache.batches)
            numbers["devices"].append({"device": device.name, "seconds": seconds})
        times = ", ".join(f"{duration(one['seconds'])} on {one['device']}" for one in numbers["devices"])
        text += f"; {cache.targets:,} targets, {cache.targets * cache.width / 1e9:,.3g} GB on disk; {times}, without reading and writing"
    print(text)
    return numbers


def _measured(runs: Runs, first: Plan, wanted: Wanted, here: Device) -> dict:
    """Print memory and time of some real steps on this machine next to the plan's."""
    import torch

    on_gpu = torch.cuda.is_available()
    planned = first if wanted.cpu and not on_gpu else runs.plan(None, on_gpu)
    real = real_steps(runs.recipes({}), planned.work)
    seconds = planned.seconds_of_micro_batch(_rate(wanted, here), PER_LAYER)
    unit = _unit(planned.peak)
    rows = [
        {"on this machine": f"peak of a step, {unit}", "planned": _amount(planned.peak, unit), "measured": _amount(real.peak, unit)},
        {"on this machine": "a step of the largest micro-batch", "planned": _time(seconds), "measured": _time(real.seconds)},
    ]
    print("\n" + table(rows))
    return {"peak": real.peak, "planned_peak": planned.peak, "seconds": real.seconds, "planned_seconds": seconds}


def _rate(wanted: Wanted, device: Device) -> Callable[[str], float]:
    """A function from a dtype to the operations per second that a step reaches on the device."""
    share = 1.0 if wanted.rate else wanted.share
    return lambda dtype: wanted.rate or share * device.rate(dtype)


def _sums(parts: list[dict]) -> list[dict]:
    """For each device: whether all parts fit, and their total time. None where that is unknown for some part; `known_seconds` sums the others."""
    out = []
    for of_device in zip(*(one["devices"] for one in parts), strict=True):
        fits, seconds = [one["fits"] for one in of_device], [one["seconds"] for one in of_device]
        known = [one for one in seconds if one is not None]
        both = {"fits": None if None in fits else all(fits), "seconds": None if None in seconds else sum(known)}
        out.append({"device": of_device[0]["device"], **both, "known_seconds": sum(known), "unknown": len(seconds) - len(known)})
    return out


def _sum_text(device: dict) -> str:
    time = duration(device["known_seconds"])
    if device["unknown"]:
        time = (
            f"{time} and the time of {count(device['unknown'], 'part')} whose data is not known"
            if device["known_seconds"]
            else "a time that is not known"
        )
    return f"{time} on {device['device']}" + (" (does not fit)" if device["fits"] is False else "")


def _needed(planned: Plan, wanted: Wanted) -> float:
    return planned.peak if wanted.cpu else devices.held_on_gpu(planned.peak, planned.weights)


def _numbers(planned: Plan, wanted: Wanted) -> dict:
    work = planned.work
    return {
        "memory": {"parts": planned.parts, "peak": planned.peak, "at": planned.at, "needed": _needed(planned, wanted)},
        "micro_batch": {
            "tokens": work.batch_tokens,
            "targets": work.batch.num_targets,
            "flops": planned.flops,
        },
        "writing": planned.writing and vars(planned.writing),
        "run": {
            "steps": work.steps,
            "examples": work.examples,
            "tokens": work.tokens,
            "targets": work.targets,
            "micro_batches": work.micro_batches,
            "flops": planned.total_flops,
        },
    }


def _memory_text(planned: Plan, wanted: Wanted, config: str) -> str:
    unit = _unit(planned.peak)
    rows = [(name, size) for name, size in planned.parts.items()]
    rows.append((f"peak of a step (in the {planned.at})", planned.peak))
    if not wanted.cpu:
        rows.append(("with CUDA's context and fragmentation", _needed(planned, wanted)))
    shown = [{"memory": name, unit: _amount(size, unit)} for name, size in rows]
    device = "this CPU" if wanted.cpu else "one GPU"
    many = f"one of {planned.ranks} processes, each with {device}" if planned.ranks > 1 else f"one process, {device}"
    return f"{config}: {many}\n\n" + table(shown)


def _unit(size: float) -> str:
    return "GB" if size >= 1e9 else "MB"


def _amount(size: float, unit: str) -> str:
    return f"{size / {'GB': 1e9, 'MB': 1e6}[unit]:,.2f}"


def _work_text(planned: Plan) -> str:
    work, flops, writing = planned.work, sum(planned.flops.values()), planned.writing
    shape = " x ".join(f"{n:,}" for n in work.batch.student.shape)
    read = "tokens" if "input_ids" in work.batch.student.inputs else "numbers"
    text = f"largest micro-batch: {shape} {read}, {work.batch.num_targets:,} targets, {flops / 1e12:,.3g} TFLOP"
    if writing:
        text += (
            f"\nwriting: up to {writing.batches * writing.answers:,} answers of {writing.new:,} tokens a step and process, {writing.answers:,} at a time, "
            f"after prompts of up to {writing.prompt:,}; {writing.peak / 1e9:,.2f} GB are then in memory"
        )
    if work.tokens is None:
        return f"{text}\nthe run: its data is not known, so times are of one such micro-batch"
    total = sum(planned.total_flops.values())
    tokens = f"{work.tokens:,} tokens with padding, " if work.batch.student.given is None else ""  # encoders need not read tokens
    return f"{text}\nthe run: {work.steps:,} steps, {work.examples:,} examples in all, {tokens}{work.targets:,} targets, {total / 1e15:,.3g} PFLOP"


def _device_rows(planned: Plan, wanted: Wanted) -> list[dict]:
    return [_row(planned, wanted, one) for one in _devices(wanted)]


def _devices(wanted: Wanted) -> list[Device]:
    """The devices whose times are printed; this machine is the last."""
    named = [] if wanted.cpu else [wanted.gpu] if wanted.gpu else list(devices.GPUS.values())
    return [*named, _this_machine()]


@functools.cache  # measured once, so that all parts of a plan use the same rate
def _this_machine() -> Device:
    import torch

    if not torch.cuda.is_available():
        measured = matmul_flops("cpu")
        return Device("this machine", 0.0, measured, measured, measured=True)
    measured = matmul_flops("cuda")
    return Device("this machine", torch.cuda.mem_get_info()[1], measured, measured / 2, measured=True)


def _row(planned: Plan, wanted: Wanted, device: Device) -> dict:
    rate = _rate(wanted, device)
    step, whole = (planned.seconds(rate, PER_LAYER, whole) for whole in (False, True))
    if planned.writing:
        dtype = planned.dtypes["student"]
        writing = planned.writing.seconds(rate(dtype), device.bandwidth, PER_LAYER, 2 if dtype in ("bfloat16", "float16") else 4)
        step, whole = step + writing, None if whole is None else whole + planned.work.steps * writing
    room = device.memory if device.measured or not wanted.memory else wanted.memory
    fits = _needed(planned, wanted) <= room if room else None
    unit = "a step" if planned.total_flops else "a micro-batch"
    numbers = {"device": device.name, "memory": room or None, "fits": fits, "rates": {"half": device.half, "single": device.single}}
    numbers |= {"seconds_of_step" if planned.total_flops else "seconds_of_micro_batch": step, "seconds": whole}
    return {
        "device": device.name,
        "GB": f"{room / 1e9:,.0f}" if room else None,
        "fits": None if fits is None else "yes" if fits else "no",
        "TFLOP/s": f"{rate(planned.dtypes['student']) / 1e12:,.3g}",
        unit: _time(step),
        "the run": "" if whole is None else duration(whole),
        "_numbers": numbers,
        "_device": device,
    }


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds < 60 else duration(seconds)


def _rates_text(wanted: Wanted, planned: Plan) -> str:
    dtype = planned.dtypes["student"]
    if wanted.rate:
        return f"rates: {wanted.rate / 1e12:g} TFLOP/s, as given by --tflops"
    stated = "" if wanted.cpu else f"of the {dtype} peak that the makers state, and for this machine "
    return (
        f"rates: {wanted.share:.0%} (an assumption, --share) {stated}of what a large product reached just now; at least {PER_LAYER * 1e3:g} ms for a pass "
        "through a layer. Loading, validation and saving are not in these times"
    )


def _fit(recipe: Recipe, arms: int, first: Plan, wanted: Wanted, needs: Callable[[dict], float]) -> dict:
    needed, room = _needed(first, wanted), wanted.room
    unit = _unit(needed)
    if needed <= room:
        print(f"it fits: {_amount(needed, unit)} of {_amount(room, unit)} {unit}")
        return {"fits": True, "changes": []}
    there = f"{_amount(needed, unit)} {unit}, and there are {_amount(room, unit)}"
    print(f"it does not fit: {there}. What would save memory, planned again with each:\n")
    found = fit.savings(recipe, needed, needs, arms)
    both = None if not found or any(one.needed <= room for one in found) else fit.together(found, needed, room, needs)
    rows = [*found, *([both] if both else [])]
    if rows:
        print(table([_saving_row(one, room, unit) for one in rows]))
    if not any(one.needed <= room for one in rows):
        print("none of them, nor several together, fits; a smaller student or teacher, or more memory, is needed")
    return {"fits": False, "changes": [_saving_numbers(one, room) for one in rows]}


def _saving_row(one: fit.Saving, room: float, unit: str) -> dict:
    words = " ".join(f"--{path} {_word(value)}" for path, value in one.change.settings.items())
    return {
        f"saves, {unit}": _amount(one.saves, unit),
        f"needs, {unit}": _amount(one.needed, unit),
        "fits": "yes" if one.needed <= room else "no",
        "what is learned": "the same" if one.change.same else "differs",
        "change": words,
    }


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {one}" for name, one in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _saving_numbers(one: fit.Saving, room: float) -> dict:
    return {
        "settings": one.change.settings,
        "needed": one.needed,
        "saves": one.saves,
        "fits": one.needed <= room,
        "same_result": one.change.same,
    }
