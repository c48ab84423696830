"""A sweep's folder written by hand, its report, and what every page of a report must be."""

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from llmkd_eval.report import write as report

BASE = {
    "seed": 0,
    "student.model": "org/small",
    "student.lora.rank": 4,
    "teacher.model": "OUT/stages/teacher/adapter",
    "data.train.path": "train.jsonl",
    "loss.kd_ratio": 0.5,
    "optim.lr": 0.01,
}


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def nested(flat: dict) -> dict:
    out: dict = {}
    for path, value in flat.items():
        *sections, last = path.split(".")
        place = out
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return out


@pytest.fixture
def made(tmp_path):
    """Write a finished sweep by hand: `good` is an arm's chance of a right answer on the task "quiz", and lowers its held-out CE."""

    def make(
        arms: dict[str, tuple[dict, float]],
        seeds=(1,),
        base=None,
        items=200,
        held=True,
        tasks=("quiz",),
        teacher_ce=1.5,
        whole=BASE,
        **state,
    ) -> Path:
        folder, base, entries = tmp_path / "out", whole | (base or {}), {}
        for arm, (changes, good) in arms.items():
            for seed in seeds:
                name = f"{arm},seed={seed}" if len(seeds) > 1 else arm
                run = folder / "arms" / re.sub("[^a-z0-9=.,_]", "-", name)
                run.mkdir(parents=True)
                recipe = base | changes | {"seed": seed}
                (run / "recipe.yaml").write_text(json.dumps(nested(recipe)))
                rng = random.Random(f"{good}{seed}")
                common = [random.Random(i).random() for i in range(items)]
                right = [float((c if rng.random() < 0.9 else rng.random()) < good) for c in common]
                for task in tasks:
                    rows = [{"id": i, "hash": f"h{i:04d}", "metrics": {"acc": x}} for i, x in enumerate(right)]
                    lines(run / f"eval/{task}.jsonl", rows)
                    stated = {"value": sum(right) / items, "stderr": 0.1, "higher_is_better": True}
                    record = {"task": task, "version": 1, "harness": "0.4.13", "n": items, "metrics": {"acc": stated}}
                    (run / f"eval/{task}.json").write_text(json.dumps(record))
                before = {"ce": 3.0, "forward_kl": 1.0, "top1_agreement": 0.1, "teacher_ce": teacher_ce, "targets": 100}
                steps = [{"step": s, "ce": 3 - s / 20, "kd": 1 - s / 50, "loss": 2 - s / 20} for s in range(1, 31)]
                measured = [
                    {"step": s, "validation": before | {"ce": 3 - s / 20 * good, "top1_agreement": 0.1 + s / 60}} for s in (0, 15, 30)
                ]
                lines(run / "metrics.jsonl", (measured[:1] + steps + measured[1:]) if held else steps)
                if held:
                    rows = []
                    for i in range(40):
                        targets = 3 + i % 5
                        ce = targets * (2 - good + 0.1 * common[i] + 0.01 * rng.random())
                        sums = {"ce": ce, "forward_kl": ce / 3, "top1_agreement": targets * good, "teacher_ce": targets * teacher_ce}
                        rows.append({"id": i, "hash": f"r{i}", "place": f"held.jsonl:{i}", "targets": targets, "sums": sums})
                    lines(run / "held_out.jsonl", rows)
                (run / "summary.json").write_text(json.dumps({"steps": 30, "before": before if held else {}, "validation": {}}))
                entry = {"arm": arm, "seed": seed, "folder": str(run.relative_to(folder)), "changes": changes}
                entries[name] = entry | {"status": "done", "reason": None, "seconds": 2.0, "group": 0}
        group = {"arms": list(entries), "shared": True, "why": None, "estimate": {"seconds": 3.0, "bytes": 2e9}, "seconds": 4.5}
        data = {"llmkd": "0.1.0", "base": base, "baseline": next(iter(arms)), "date": "2026-01-02T03:04:05+00:00", "machine": "a machine"}
        data |= {
            "versions": {"torch": "2.x"},
            "stages": {"teacher": {"folder": "stages/teacher", "seconds": 7.0}},
            "groups": [group],
            "arms": entries,
        }
        (folder / "sweep.json").write_text(json.dumps(data | state))
        return folder

    return make


TWO = {"sft": ({"loss.kd_ratio": 0}, 0.5), "kd": ({}, 0.7)}


def written(folder: Path) -> tuple[str, str]:
    page, text = report.write(report.read_report(folder))
    return page.read_text(), text.read_text()


class Checked(HTMLParser):
    """Every tag closed where it should be; ids, addresses, and the tables' cells by row."""

    VOID = {"meta"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.loads, self.rows, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and "svg" not in self.open:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def checked(html: str) -> Checked:
    page = Checked(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.loads)
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and "url(http" not in html and "@import" not in html
    for picture in re.findall(r"<svg.*?</svg>", html, re.S):
        drawn(picture)
    return page


def drawn(picture: str) -> ET.Element:
    """Well-formed, named, and everything in it finite and inside; raw curves are cut by the clip path instead."""
    root = ET.fromstring(picture)
    _, _, width, height = map(float, root.get("viewBox").split())
    if root.get("role") == "img":
        assert root.find("title").text and root.find("desc").text
        assert root.get("aria-labelledby").split() == [root.find("title").get("id"), root.find("desc").get("id")]
    for element in root.iter():
        for names, most in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            assert all(0 <= float(element.get(name)) <= most for name in names if element.get(name)), ET.tostring(element)
        points = [float(n) for pair in (element.get("points") or "").split() for n in pair.split(",")]
        assert all(map(math.isfinite, points))
        if "raw" not in (element.get("class") or ""):
            assert all(0 <= x <= width for x in points[::2]) and all(0 <= y <= height for y in points[1::2])
    return root
