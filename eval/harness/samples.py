"""Turns the harness's results of a task into its record and its items."""

import datetime
import math

from llmkd.errors import UserError


def request_key(arguments: tuple) -> tuple:
    """A request's identity: its text and the continuation, if there is one."""
    return tuple(part for part in arguments if isinstance(part, str))


def in_words(metric: dict) -> str:
    """A metric with its standard error, if it has one."""
    return f"{metric['value']:.4f}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}")


def record_of(found: dict, name: str, items: list[dict], settings: dict, seconds: float) -> dict:
    """A task's record from the result of the harness."""
    values, better = found["results"][name], found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{how}")
            error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            metrics[_metric(metric, how)] = {"value": float(value), "stderr": error, "higher_is_better": better.get(metric)}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return settings | {
        "version": found["versions"][name],
        "fewshot": found["n-shot"][name],
        "n": len(items),
        "metrics": metrics,
        "truncated": sum(item["truncated_requests"] for item in items),
        "items_sha256": None,
        "date": date,
        "seconds": round(seconds, 2),
    }


def items_of(samples: list[dict], truncated: set) -> list[dict]:
    """One item for each document, from the harness's samples, of which a document has one for each filter (way to read an answer)."""
    items: dict[int, dict] = {}
    for sample in samples:
        requests = [request_key(arguments) for arguments in sample["arguments"]]
        shortened = sum(key in truncated for key in requests)
        item = {
            "id": sample["doc_id"],
            "hash": sample["doc_hash"],
            "metrics": {},
            "truncated": shortened > 0,
            "truncated_requests": shortened,
        }
        item = items.setdefault(sample["doc_id"], item)
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):  # others are pairs, which only the aggregate turns into a number
                item["metrics"][_metric(metric, sample["filter"])] = float(sample[metric])
        answers = [answers[0] for answers in sample["resps"]]
        if all(isinstance(answer, tuple | list | float) for answer in answers):
            item["loglikelihoods"] = [float(answer[0] if isinstance(answer, tuple | list) else answer) for answer in answers]
        else:
            item["answers"] = answers
        if isinstance(sample["target"], str | int):
            item["target"] = sample["target"]
        numbers = [*item["metrics"].values(), *item.get("loglikelihoods", [])]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"item {item['id']} has a metric that is not finite; check the model, or try --dtype float32")
    return [items[key] for key in sorted(items)]


def _metric(name: str, how: str) -> str:
    return name if how == "none" else f"{name},{how}"
