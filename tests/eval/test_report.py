"""The report of a sweep: its numbers are those of the files, its sentences follow the statistics, and nothing breaks it."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from llmkd_eval.report import charts, published, svg, sweep_charts
from llmkd_eval.report.document import Para, Span, Table, as_html, as_markdown
from llmkd_eval.report.sweep_files import read_sweep

from llmkd.cli import main
from tests.conftest import plain_recipe
from tests.kit.sweep_report import BASE, TWO, checked, drawn, written


@pytest.mark.slow
def test_a_real_sweep_is_reported_with_the_numbers_of_its_files(world, tmp_path, capsys):
    from llmkd.commands.sweep import run_sweep

    recipe = plain_recipe(world, tmp_path / "unused")
    recipe["data"]["validation_fraction"], recipe["validation"], recipe["train"]["max_steps"] = 0.2, {"every": 2}, 4
    recipe["optim"]["warmup_steps"] = 1
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    sweep = {"output_dir": str(tmp_path / "out"), "recipe": "base.yaml", "grid": {"loss.kd_ratio": [0, 0.5, 1.0]}, "seeds": [1, 2]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    folder = run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html"), str(folder / "report.md")]
    page, text = checked((folder / "report.html").read_text()), (folder / "report.md").read_text()
    for arm in ("kd_ratio-0", "kd_ratio-0.5", "kd_ratio-1"):
        seeds = [(folder / f"arms/{arm}_seed-{seed}/held_out.jsonl").read_text().splitlines() for seed in (1, 2)]
        rows = [json.loads(line) for seed in seeds for line in seed]
        mean = sum(row["sums"]["ce"] for row in rows) / sum(row["targets"] for row in rows)
        assert [row for row in page.rows if row[:1] == [arm] and f"{mean:.4f}" in row[1]] and f"| `{arm}` |" in text, (arm, mean)
    assert "seed" not in read_sweep(folder).arms["kd_ratio-1"].changes
    assert "Teacher passes over the training data: 2; one for each arm that distils would have been 4, so 2 were saved." in text


def test_nothing_of_torch_is_loaded():
    code = "import sys, llmkd_eval.report.write; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_benchmark_rows_and_sentences_follow_the_items(made):
    folder = made(TWO)
    html, text = written(folder)
    page = checked(html)
    right = {}
    for arm in TWO:
        right[arm] = [json.loads(line)["metrics"]["acc"] for line in (folder / f"arms/{arm}/eval/quiz.jsonl").read_text().splitlines()]
    n = len(right["kd"])
    means = {arm: sum(x) / n for arm, x in right.items()}
    differences = [a - b for a, b in zip(right["kd"], right["sft"], strict=True)]
    mean = sum(differences) / n
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    row = next(row for row in page.rows if row[0] == "kd" and any(cell.startswith(f"{means['kd']:.4f} ±") for cell in row))
    assert f"{mean:+.4f} ±{stderr:.4f}" in row and row[-1] == "higher, better"
    assert f"quiz acc: `kd` is better than `sft` (difference {mean:+.4f}, 95 % " in text
    assert "2026-01-02T03:04:05+00:00" in html and "a machine" in html and "torch 2.x" in html


def test_the_same_arms_in_other_words_when_the_items_say_otherwise(made):
    _, text = written(made({"sft": ({"loss.kd_ratio": 0}, 0.7), "kd": ({}, 0.5)}))
    assert "quiz acc: `kd` is worse than `sft` (difference -" in text and "`kd` is better" not in text


def test_no_difference_is_said_to_be_none_shown(made):
    _, text = written(made({"sft": ({"loss.kd_ratio": 0}, 0.5), "kd": ({}, 0.501)}, items=60, held=False))
    assert re.search(
        r"quiz acc: no difference shown between `kd` and `sft` \(Holm's p [01]\.\d+\)\. A true difference of 0\.\d+ would", text
    )
    assert "`kd` is better" not in text and "No arm and the baseline both have two seeds or more" in text


@pytest.mark.parametrize(
    ("goods", "words"),
    [
        ({"a": 0.5, "b": 0.5}, r"no difference from the baseline `sft` shown for any of `a` and `b` \(smallest Holm's p 1.0000\)\."),
        (
            {"a": 0.5, "b": 0.9},
            r"`b` is better than `sft` \(.*?\); no difference from the baseline `sft` shown for `a` \(Holm's p 1.0000\)\.",
        ),
        (dict.fromkeys("abcde", 0.5), r"no difference from the baseline `sft` shown for any of the 5 arms \(smallest"),
        (
            dict.fromkeys("abcde", 0.5) | {"f": 0.9},
            r"`f` is better than .*; no difference from the baseline `sft` shown for 5 of 6 arms \(",
        ),
    ],
)
def test_arms_that_show_no_difference_are_listed_apart_from_the_baseline(made, goods, words):
    _, text = written(made({"sft": ({}, 0.5)} | {arm: ({"optim.lr": ord(arm)}, good) for arm, good in goods.items()}, held=False))
    assert re.search("quiz acc: " + words, text), text[:900]


def test_too_few_items_and_equal_answers_are_said_to_tell_nothing(made):
    folder = made({"sft": ({"loss.kd_ratio": 0}, 0.2), "kd": ({}, 0.9)}, items=4, held=False)
    text = written(folder)[1]
    assert text.count("4 items cannot show any difference: p cannot be below 0.1250.") == 2 and "would have been shown" not in text
    again = made({"a": ({"loss.kd_ratio": 0}, 0.5), "b": ({}, 0.5)}, held=False)
    text = written(again)[1]
    assert "quiz acc: no difference shown between `b` and `a` (Holm's p 1.0000). `b` is the same as `a` on every item." in text
    assert (
        "would have been shown" not in text
        and "b: the same as the baseline on every item, so the smallest difference that could be shown" in text
    )


def test_many_arms_are_counted_and_seeds_are_asked(made):
    arms = {"sft": ({"loss.kd_ratio": 0}, 0.4)} | {f"lr{i}": ({"optim.lr": i / 1000}, 0.8) for i in range(1, 7)}
    html, text = written(made(arms, seeds=(1, 2, 3)))
    checked(html)
    assert "quiz acc: 6 of 6 arms are better than `sft`" in text and "show over 3 seeds too" in text


def test_values_over_seeds_are_means_of_the_seeds(made):
    folder = made(TWO, seeds=(1, 2))
    page = checked(written(folder)[0])
    for arm in TWO:
        rows = [[json.loads(x) for x in (folder / f"arms/{arm},seed={seed}/held_out.jsonl").read_text().splitlines()] for seed in (1, 2)]
        means = [sum(row["sums"]["ce"] for row in some) / sum(row["targets"] for row in some) for some in rows]
        assert any(row[0] == arm and row[1].startswith(f"{sum(means) / 2:.4f}") for row in page.rows)


def groups(*given: tuple[str, float]) -> list[dict]:
    return [{"arms": list(arms), "shared": len(arms) > 1, "why": "w", "estimate": None, "seconds": seconds} for arms, seconds in given]


FOUR = {name: ({"optim.lr": i / 10} | ({"loss.kd_ratio": 0} if name == "a" else {}), 0.5) for i, name in enumerate("abcd", 1)}


@pytest.mark.parametrize(
    ("planned", "took", "passes", "rows"),
    [
        ([("abc", 9.0), ("d", 3.0)], "All arms took 12.0 seconds, the stages before them 7.0.", "2; one for each arm that distils would have been 3, so 1 were", ["1", "2"]),
        # killed before anything was recorded, or failed, and planned again
        ([("abc", 0.0), ("abcd", 8.0)], "All arms took 8.0 seconds, the stages", "1; one for each arm that distils would have been 3, so 2 were", ["2"]),
        ([("abcd", 5.0), ("abcd", 8.0)], "All arms took 8.0 seconds, earlier attempts at them 5.0, the", "1; one for each arm that distils would have been 3, so 2 were", ["2"]),
        # the first two ended in the first group, the others went on in a second
        ([("abcd", 5.0), ("cd", 4.0)], "All arms took 9.0 seconds, the stages", "2; one for each arm that distils would have been 3, so 1 were", ["1", "2"]),
        ([("ab", 5.0), ("cd", 0.0)], "All arms took at least 5.0 seconds, the stages", "at least 2; one for each arm that distils would have been 3, so at most 1 were", ["1", "2"]),
    ],
)  # fmt: skip
def test_a_group_that_was_planned_again_is_counted_once(made, planned, took, passes, rows):
    html, text = written(made(FOUR, groups=groups(*planned)))
    assert took in text and f"Teacher passes over the training data: {passes} saved." in text
    found = [row for row in checked(html).rows if len(row) == 8 and row[2].startswith(("side by side", "alone: w"))]
    assert [row[0] for row in found] == rows
    assert [row[5] for row in found if row[5] == "not recorded"] == ["not recorded"] * ("at least" in took)
    assert ("the seconds were not recorded" in text) == ("at least" in took)


def test_a_group_that_waits_is_not_said_to_have_been_trained(made):
    folder = made(FOUR, groups=groups(("ab", 5.0), ("cd", 0.0)))
    changed(folder, c="waiting", d="waiting")
    _, text = written(folder)
    assert "All arms took 5.0 seconds" in text and "training data: 1; one for each arm that distils would have been 1, so 0 were" in text


NASTY = '<script>alert("1")</script>|`x`&amp;*a*'


def test_what_people_wrote_is_escaped(made):
    arms = {"sft": ({}, 0.5), NASTY: ({"optim.lr": NASTY}, 0.7)}
    folder = made(arms, base={"data.train.path": NASTY})
    data = json.loads((folder / "sweep.json").read_text())
    data["arms"]["bad"] = {
        "arm": "bad",
        "seed": 1,
        "folder": "arms/bad",
        "changes": {},
        "status": "failed",
        "reason": NASTY + "\nsecond line",
    }
    data["machine"], data["groups"][0]["why"], data["groups"][0]["shared"] = NASTY, NASTY, False
    (folder / "sweep.json").write_text(json.dumps(data))
    html, text = written(folder)
    page = checked(html)
    assert any(row[0] == NASTY for row in page.rows) and "<script" not in html
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", outside) and "second line" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def changed(folder: Path, **arms) -> None:
    data = json.loads((folder / "sweep.json").read_text())
    for name, status in arms.items():
        data["arms"][name] |= {"status": status, "reason": "step 2: ce is not finite" if status == "failed" else None}
    (folder / "sweep.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "arms, options, states, words",
    [
        ({"only": ({}, 0.5)}, {}, {}, ["one arm, so there is nothing to compare", "`only`", "No map"]),
        (
            TWO,
            {"held": False},
            {},
            ["No finished arm has held-out rows", "it is not known whether the teacher was the better model", "quiz acc"],
        ),
        (TWO, {"tasks": ()}, {}, ["No finished arm has been measured on a benchmark", "Held-out CE: `kd` is better"]),
        (
            TWO,
            {"held": False, "tasks": ()},
            {},
            ["have neither held-out rows", "No finished arm has held-out rows"],
        ),
        (TWO, {}, {"sft": "failed"}, ["the baseline `sft` has no finished run", "`sft`: step 2: ce is not finite", "0."]),
        (TWO, {}, {"kd": "waiting"}, ["only the baseline `sft` is finished", "Runs that wait", "1 of 2 runs not trained yet: `kd`."]),
        (TWO, {}, {"kd": "waiting", "sft": "waiting"}, ["No arm is finished", "`sft`, `kd`. llmkd sweep with --resume trains them"]),
    ],
)
def test_what_is_missing_is_said(made, arms, options, states, words):
    folder = made(arms, **options)
    changed(folder, **states)
    html, text = written(folder)
    checked(html)
    for word in words:
        assert word in text, word


def test_a_sweep_that_has_not_begun_and_a_folder_that_is_none(made, tmp_path, capsys):
    folder = made(TWO, base={}, groups=[], stages={}, versions={})
    for gone in (folder / "arms").rglob("*"):
        if gone.is_file():
            gone.unlink()
    data = json.loads((folder / "sweep.json").read_text())
    data["base"] = {}
    for arm in data["arms"].values():
        arm["status"] = "waiting"
    (folder / "sweep.json").write_text(json.dumps(data))
    html, text = written(folder)
    checked(html)
    for words in (
        "base recipe is not recorded yet",
        "No arm has a teacher",
        "No run has logged two steps",
        "No group of arms has been planned",
    ):
        assert words in text
    assert main(["report", str(tmp_path)]) == 2 and "holds no sweep.json" in capsys.readouterr().err
    (folder / "sweep.json").write_text("{}")
    assert main(["report", str(folder)]) == 2 and "is not a sweep's state" in capsys.readouterr().err
    assert main(["report", str(folder), "--x"]) == 2 and main(["report"]) == 2


def test_one_task_that_cannot_be_compared_does_not_cost_the_others(made):
    folder = made(TWO, tasks=("quiz", "other"))
    path = folder / "arms/kd/eval/other.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    (folder / "arms/kd/held_out.jsonl").unlink()
    html, text = written(folder)
    checked(html)
    assert "other: not compared;" in text and "with version 1" in text and "quiz acc: `kd` is better" in text
    assert "held_out: not measured in every run of kd" in text and "| `sft` | 1.5" in text


GRID = {f"kd_ratio={r},lr={lr}": ({"loss.kd_ratio": r, "optim.lr": lr}, 0.4 + r / 4 + lr) for r in (0, 0.5, 1.0) for lr in (0.1, 0.01)}


def test_two_settings_make_maps_with_their_values_in_the_cells(made):
    folder = made(GRID | {"full": ({"student.method": "full", "loss.kd_ratio": 1}, 0.9)})
    html, text = written(folder)
    checked(html)
    sweep = read_sweep(folder)
    chosen, arms = sweep_charts.varied(sweep)
    assert chosen == ["loss.kd_ratio", "optim.lr"] and len(arms) == 6
    assert "Not in it, since they differ in more: `full`." in text and '"' not in "".join(chosen)
    for title in ("Held-out CE", "Held-out KL(teacher || student)", "Held-out agreement with the teacher", "quiz acc"):
        picture = next(p for p in re.findall(r"<svg.*?</svg>", html, re.S) if f">{title.replace('|', '|')} (" in p and "Heat map" in p)
        words = [element.text for element in drawn(picture).iter("text")]
        assert len(drawn(picture).findall("rect[@rx]")) == 6 + picture.count('class="best"') and "baseline" in words
        if title == "quiz acc":
            for arm in GRID:
                assert f"{json.loads((folder / f'arms/{arm}/eval/quiz.json').read_text())['metrics']['acc']['value']:.4f}" in words
    head = text.index("| loss.kd\\_ratio" if "| loss.kd\\_ratio" in text else "| loss.kd_ratio \\\\ optim.lr | 0.01 | 0.1 |")
    assert text[head:].splitlines()[2].startswith("| 0 |")


@pytest.mark.parametrize(
    "arms, chosen, inside",
    [
        ({f"r{r}": ({"loss.kd_ratio": r}, 0.5) for r in (0, 0.25, 1.0)}, ["loss.kd_ratio"], 3),
        # single changes of two settings lie in one map, at the base's value of the other
        ({"sft": ({"loss.kd_ratio": 0}, 0.5), "kd": ({}, 0.5), "r1": ({"loss.kd_ratio": 1}, 0.5), "slow": ({"optim.lr": 1e-3}, 0.5)}, ["loss.kd_ratio", "optim.lr"], 4),
        ({f"{a}{b}{c}": ({"loss.kd_ratio": a, "optim.lr": b, "seed2": c}, 0.5) for a in (0, 1) for b in (1, 2) for c in (1, 2)}, [], 0),
        (TWO, [], 0),
    ],
)  # fmt: skip
def test_which_settings_vary(made, arms, chosen, inside):
    sweep = read_sweep(made(arms))
    found, members = sweep_charts.varied(sweep)
    assert found == chosen and len(members) == inside


def test_one_numeric_setting_makes_lines_with_error_bars_and_words_make_none(made):
    html, text = written(made({f"r{r}": ({"loss.kd_ratio": r}, 0.4 + r / 3) for r in (0, 0.25, 1.0)}))
    checked(html)
    picture = next(p for p in re.findall(r"<svg.*?</svg>", html, re.S) if "quiz acc (higher is better)" in p)
    assert len(drawn(picture).findall(".//line[@class='errors s0']")) == 3 and "| loss.kd_ratio | value | standard error |" in text


def test_settings_that_are_words_are_left_to_the_tables(made):
    _, text = written(made({name: ({"loss.divergence": name}, 0.5) for name in ("a", "b", "c")}))
    assert "its values are no numbers" in text


@pytest.mark.parametrize("teacher_ce, model, warned", [(1.5, None, False), (4.0, None, True), (1.5, "org/big", True)])
def test_a_teacher_that_is_worse_or_not_tuned_comes_with_the_advice(made, teacher_ce, model, warned):
    folder = made(TWO, teacher_ce=teacher_ce, base={"teacher.model": model} if model else {})
    html, text = written(folder)
    assert (published.ADVICE in re.sub(r"\\(.)", r"\1", text)) == warned == ('class="warn"' in html)
    assert f"{teacher_ce:.4f} | 3.0000 | 0.9600 to 0.4200 |" in text  # means of the first and last three of 30 steps
    assert ("tuned by this sweep's stage teacher" in text) == (model is None)


def test_several_teachers_and_a_cache_alone_are_teachers(made, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/cache.json").write_text("{}")
    cache, several = str(tmp_path / "cache"), [{"model": "OUT/stages/teacher/adapter"}, {"model": "org/big", "weight": 2}]
    arms = {"sft": ({"loss.kd_ratio": 0}, 0.5), "mixed": ({"teacher": several}, 0.7), "kept": ({"teacher.cache.path": cache}, 0.7)}
    arms["product"] = ({"teacher": several, "mixture.combine": "log_probabilities"}, 0.7)
    base = {key: value for key, value in BASE.items() if key != "teacher.model"}
    folder = made(arms, whole=base)
    html, text = written(folder)
    plain = re.sub(r"\\(.)", r"\1", text).replace("`", "")
    assert (
        "| stages/teacher/adapter and org/big (probabilities) | tuned by this sweep's stage teacher; a model as it is | 1.5000 | 3.0000 |"
        in plain
    )
    assert f"{cache.rpartition('/')[2]} | a teacher cache | 1.5000 | 3.0000 |" in plain
    assert "adapter and org/big (log_probabilities) | tuned by" in plain  # another teacher altogether
    assert plain.count("is not known to be tuned on this data") == 3
    assert [run.distils for run in read_sweep(folder).runs] == [False, True, True, True]


LLAMA = {
    "student.model": "meta-llama/Llama-3.2-1B-Instruct",
    "teacher.model": "OUT/stages/teacher/adapter",
    "optim.lr": 3e-4,
    "train.batch_size": 32,
}


def test_published_results_stand_beside_arms_of_their_kind_for_that_recipe_alone(made):
    arms = TWO | {"all": ({"loss.kd_ratio": 1.0}, 0.7), "untuned": ({"teacher.model": "meta-llama/Llama-3.1-8B-Instruct"}, 0.6)}
    folder = made(arms, base=LLAMA, tasks=("hellaswag",), items=50)
    recipe = folder / "stages/teacher/recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(json.dumps({"student": {"model": "meta-llama/Llama-3.1-8B-Instruct"}}))
    html, text = written(folder)
    rows = {row[0]: row for row in checked(html).rows if len(row) == 10}
    assert len(rows) == 1 + len(published.ROWS)
    for name, arm in (("1B tuned by LoRA without a teacher", "sft"), ("1B distilled, kd_ratio 0.5, lr 3e-4", "kd"), ("1B distilled, kd_ratio 1.0", "all"), ("1B distilled, untuned teacher", "untuned"), ("1B distilled, lr 1e-5", "none")):  # fmt: skip
        assert rows[name][1] == arm
        stated = next(row.values for row in published.ROWS if row.name == name)
        assert [float(cell) for cell in rows[name][2::2]] == list(stated)
        if arm != "none":
            own = json.loads((folder / f"arms/{arm}/eval/hellaswag.json").read_text())["metrics"]["acc"]["value"]
            assert rows[name][5].startswith(f"{own:.4f} ±") and rows[name][3] == "–"
    assert published.SOURCE in html and "train.batch_size: here 32, there 128" in text and "hellaswag version 1" in text


def test_no_published_results_for_other_recipes(made):
    assert published.SOURCE not in written(made(TWO))[0]


def test_values_that_are_not_finite_leave_the_charts_whole(made):
    folder = made(TWO)
    with open(folder / "arms/kd/metrics.jsonl", "a") as file:
        file.write(
            '{"step": 31, "ce": NaN, "kd": Infinity, "loss": NaN}\n{"step": 32, "validation": {"ce": Infinity, "forward_kl": null}}\n{"cut'
        )
    checked(written(folder)[0])
    nan, inf = math.nan, math.inf
    for picture in (
        charts.lines("a", "t", "x", "y", [charts.Series("s", 0, [(0, nan), (1, inf), (2, 1.0)], "dots", [None, 0.1, 0.2])]),
        charts.lines("a", "t", "x", "y", []),
        charts.lines("a", "t", "x", "y", [charts.Series("s", 30, [(1e-5, 2.0), (1e-2, 2.0), (0, 3.0)], "dots")], [1e-5, 1e-2], True),
        charts.lines("a", "t", "x", "y", [charts.Series("s", 3, [(k, 1e9 * k) for k in range(9)])]),
        charts.forest("a", "t" * 90, "x", [charts.Interval("n" * 90, 0.0, None, "none"), charts.Interval("b", nan, None, "none"), charts.Interval("c", -1e-7, (-inf, 0.0), "worse")]),
        charts.forest("a", "t", "x", []),
        charts.heatmap("a", "t", "x", "y", ["l" * 50] * 12, ["k" * 50], {(0, 0): charts.Cell(nan, "", "no figure"), (0, 5): charts.Cell(2.0, "2.00000000")}, False),
        charts.heatmap("a", "t", "x", "y", ["1"], ["1"], {}, None),
    ):  # fmt: skip
        drawn(picture)


def test_the_best_cell_is_framed_whichever_way_is_up():
    cells = {(0, 0): charts.Cell(1.0, "1.0"), (0, 1): charts.Cell(2.0, "2.0")}
    for up, best, strong in ((True, 1, 1), (False, 0, 0)):
        root = ET.fromstring(charts.heatmap("a", "t", "x", "y", ["p", "q"], ["r"], cells, up))
        boxes = [r for r in root.iter("rect") if r.get("class") != "best"]
        (frame,) = [r for r in root.iter("rect") if r.get("class") == "best"]
        assert frame.get("x") == boxes[best].get("x") and boxes[strong].get("class") == f"h{len(svg.HEAT) - 1}"


@pytest.mark.parametrize(
    ("values", "low", "high"), [([0.0] * 3, -1, 1), ([0.0, 3e-17], -1, 1), ([2.0] * 3, 1.9, 2.1), ([-2.0, -2.0 + 1e-15], -2.1, -1.9), ([2e-7, 3e-7], 2e-7, 3e-7)]
)  # fmt: skip
def test_the_axis_of_a_constant_figure_has_a_sensible_range(values, low, high):
    assert svg.limits(values) == pytest.approx((low, high))
    picture = charts.lines("a", "t", "x", "y", [charts.Series("s", 0, list(enumerate(values)), "dots")])
    words = [element.text for element in drawn(picture).iter("text")]
    assert ("-1.0" in words and "1.0" in words) == (high == 1) and ("2.00" in words) == (high == 2.1), words


def test_every_series_and_shade_has_its_colour_in_the_style():
    html = as_html("t", [], "f")
    for i in range(len(svg.SERIES)):
        assert f".s{i} {{ stroke: var(--s{i}); }}" in html and f".f{i} {{ fill: var(--s{i}); }}" in html
    for i in range(len(svg.HEAT)):
        assert f".h{i} {{ fill: var(--h{i}); }}" in html and f".t{i} {{ fill: var(--t{i}); }}" in html


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0, 1), (-3.7e-4, 9e-5), (12, 4300), (0.49, 0.51)):
        ticks = svg.nice_ticks(low, high)
        step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
        assert 4 <= len(ticks) <= 10 and low - 1e-12 <= ticks[0] < low + step * 1.001 and high + 1e-12 >= ticks[-1] > high - step * 1.001
        assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - m) for m in (1, 2, 5, 10)) < 1e-6


def test_both_colour_schemes_define_every_variable_and_text_can_be_read_on_them():
    html = as_html("t", [Para("x", "warn")], "f")
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", html))
    assert used <= set(svg.LIGHT) == set(svg.DARK) and used >= {"page", "text", "s0", f"s{len(svg.SERIES) - 1}", f"h{len(svg.HEAT) - 1}"}
    light, dark = re.findall(r":root \{([^}]*)\}", html)
    for names, given in ((svg.LIGHT, light), (svg.DARK, dark)):
        assert all(f"--{name}: {colour};" in given for name, colour in names.items())
        for name, colour in names.items():  # WCAG 2.1: 4.5 for text, 3 for lines
            if name in ("text", "quiet", "better", "worse") or name.startswith("s"):
                assert contrast(colour, names["page"]) >= (3 if name.startswith("s") else 4.5), (name, colour)
        assert all(contrast(names[f"t{i}"], names[f"h{i}"]) >= 4.5 for i in range(len(svg.HEAT)))
    assert "@media screen and (prefers-color-scheme: dark)" in html


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_markdown_of_names_with_marks_of_markdown():
    text = as_markdown("a_b *c*", [Para(("see ", Span("x`y"), " <b>")), Table(["h|h"], [["a|b"], [Span("c|d")]])], "foot", "p.html")
    assert "# a_b \\*c\\*" in text and "see `` x`y `` \\<b\\>" in text and "| h\\|h |" in text and "| `c\\|d` |" in text


def test_what_is_left_out_is_also_said_on_the_terminal(made, capsys):
    folder = made(TWO, tasks=[f"quiz{n}" for n in range(5)])
    for task in range(5):
        (folder / f"arms/kd/eval/quiz{task}.jsonl").unlink()
        record = folder / f"arms/kd/eval/quiz{task}.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"items_sha256": "0" * 64}))
    assert main(["report", str(folder)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert said[0].startswith("note: quiz0: not compared; ") and "kd/eval/quiz0.jsonl: cannot be read" in said[0]
    assert len(said) == 7 and said[6] == "4 more notes at the end of the report"
