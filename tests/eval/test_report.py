"""The report of a sweep: its numbers are those of the files, its sentences follow the statistics, and nothing breaks it."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llmkd_eval.report import published
from llmkd_eval.report.document import Para, Span, Table, as_markdown
from llmkd_eval.report.sweep_files import read_sweep

from llmkd.cli import main
from tests.conftest import plain_recipe
from tests.kit.sweep_report import BASE, TWO, checked, written


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
        "No arm learns from a teacher",
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
