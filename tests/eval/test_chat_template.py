"""Evaluations in a chat template are the harness's own; they are never mixed with plain ones. Groups have the harness's means. Task code needs a flag."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval")
from llmkd_eval import after_sweep
from llmkd_eval.comparison.compare import compare
from llmkd_eval.harness import benchmarks, record_files
from llmkd_eval.harness.evaluate import _Work, evaluate, without_asides
from llmkd_eval.harness.groups import group_means
from llmkd_eval.harness.task_code import refuse_task_code

from llmkd.cli import main
from llmkd.config.sweep import Evaluation
from llmkd.errors import UserError
from tests.kit.questions import by_hand, commonsense_qa, likelihoods, model, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return model(tmp_path_factory.mktemp("chat") / "student")


def task_file(name: str, data: Path, **more) -> str:
    fields = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "fewshot_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    return yaml.safe_dump(fields | more)


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory) -> Path:
    """Tasks of seven and three rows, with a description; groups of both whose tasks weigh by size, and alike."""
    root = tmp_path_factory.mktemp("tasks")
    for name, count in (("birds", 7), ("few", 3)):
        write_rows(root / f"{name}.jsonl", [commonsense_qa(i + count) for i in range(count)])
        (root / f"{name}.yaml").write_text(task_file(name, root / f"{name}.jsonl", description="Be brief. "))
    for group, by_size in (("by_items", True), ("alike", False)):
        means = [{"metric": "acc", "weight_by_size": by_size}]
        (root / f"{group}.yaml").write_text(yaml.safe_dump({"group": group, "task": ["birds", "few"], "aggregate_metric_list": means}))
    return root


def with_template(folder: Path, to: Path, template: str | None) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "tokenizer_config.json").read_text())
    (to / "chat_template.jinja").unlink(missing_ok=True)
    (to / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    if template:
        (to / "chat_template.jinja").write_text(template)
    return to


@pytest.mark.parametrize("fewshot", [0, 2])
def test_prompts_are_rendered_as_the_harness_renders_them(base, tasks_dir, tmp_path, fewshot):
    plain = evaluate(base, ["birds"], tasks_dir=tasks_dir, fewshot=fewshot, out=tmp_path / "plain")["birds"]
    record = evaluate(base, ["birds"], tasks_dir=tasks_dir, fewshot=fewshot, chat_template=True, out=tmp_path / "chat")["birds"]
    hand, _ = by_hand(base, tasks_dir, "birds", num_fewshot=fewshot, apply_chat_template=True, fewshot_as_multiturn=True)
    found = likelihoods(tmp_path / "chat", "birds")
    assert [x for item in found for x in item] == pytest.approx([x for item in hand for x in item], abs=1e-9)
    assert found != likelihoods(tmp_path / "plain", "birds")
    assert (record["chat_template"], plain["chat_template"]) == (True, None)
    assert len(record["model"]["chat_template"]) == 64 and "chat_template" not in plain["model"]


def test_results_with_and_without_it_are_never_mixed(base, tasks_dir, tmp_path, capsys):
    command = ["eval", str(base), "--tasks", "birds", "--tasks_dir", str(tasks_dir), "--out"]
    for run, more in (("a", ["--chat_template"]), ("b", [])):
        assert main([*command, str(tmp_path / run / "eval"), *more]) == 0
        assert main([*command, str(tmp_path / run / "eval"), *(["--chat_template"] if not more else [])]) == 2
        then, now = ("on", "off") if more else ("off", "on")
        assert f"(chat_template {then} there and {now} now)" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "was evaluated with chat_template on" in capsys.readouterr().err
    shutil.copytree(tmp_path / "a", tmp_path / "sweep/arms/a")
    after_sweep.check(tmp_path / "sweep", Evaluation(tasks=("birds",), tasks_dir=str(tasks_dir), chat_template=True))
    with pytest.raises(UserError, match="eval.chat_template: found False, and a was evaluated on birds with True"):
        after_sweep.check(tmp_path / "sweep", Evaluation(tasks=("birds",), tasks_dir=str(tasks_dir)))
    with pytest.raises(UserError, match="eval.chat_template: found False, and a was evaluated on birds with True"):
        after_sweep.check(tmp_path / "sweep", Evaluation(tasks=("by_items",), tasks_dir=str(tasks_dir)))
    other = with_template(base, tmp_path / "other", "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="model.chat_template"):
        evaluate(other, ["birds"], tasks_dir=tasks_dir, chat_template=True, out=tmp_path / "a/eval")


def test_a_model_without_a_template_is_refused_before_it_is_loaded(base, tasks_dir, tmp_path, capsys):
    none = with_template(base, tmp_path / "none", None)
    assert (
        main(["eval", str(none), "--tasks", "birds", "--tasks_dir", str(tasks_dir), "--chat_template", "--out", str(tmp_path / "o")]) == 2
    )
    assert f"--chat_template: the tokenizer of {none} has no chat template" in capsys.readouterr().err


def test_a_description_that_a_template_does_not_take_is_named(base, tasks_dir, tmp_path, capsys):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}"
    evaluate(with_template(base, tmp_path / "m", template), ["birds"], tasks_dir=tasks_dir, chat_template=True, out=tmp_path / "o")
    assert "warning: birds: the chat template takes no system message" in capsys.readouterr().err
    evaluate(base, ["few"], tasks_dir=tasks_dir, chat_template=True, out=tmp_path / "p")
    assert "system message" not in capsys.readouterr().err


def test_a_groups_mean_is_the_harnesss(base, tasks_dir, tmp_path, capsys):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = ["eval", str(base), "--tasks", "by_items,alike", "--tasks_dir", str(tasks_dir), "--out", str(tmp_path / "eval"), "--json", "-"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    rows = {row["task"]: row for row in json.loads(out)}
    assert list(rows) == ["birds", "few", "by_items", "alike"]
    a, b = rows["birds"]["value"], rows["few"]["value"]
    assert rows["by_items"]["value"] == pytest.approx((7 * a + 3 * b) / 10) and rows["alike"]["value"] == pytest.approx((a + b) / 2)
    assert a != b and (rows["by_items"]["weighting"], rows["alike"]["weighting"]) == ("items", "tasks")
    for name, row in rows.items():
        assert (row["items"], row["shots"]) == ({"birds": 7, "few": 3}.get(name, 10), 0)
        assert f"{row['value']:.4f} ± {row['stderr']:.4f}" in err
    assert "by_items (mean of 2, by items)" in err and "alike (mean of 2, each alike)" in err
    index, harness = TaskManager(include_path=str(tasks_dir), include_defaults=False), HFLM(pretrained=str(base), device="cpu")
    for name in ("by_items", "alike"):
        with without_asides():
            found = lm_eval.simple_evaluate(harness, tasks=[name], task_manager=index)["results"][name]
        assert (rows[name]["value"], rows[name]["stderr"]) == pytest.approx((found["acc,none"], found["acc_stderr,none"]))
    assert json.loads((tmp_path / "eval/by_items.group.json").read_text())["means"] == {"acc": "items"}
    (tmp_path / "eval/alike.group.json").unlink()
    assert main(words) == 0 and "birds is evaluated already" in capsys.readouterr().err  # and the group is recorded again
    compared = {row.task: row for row in compare({"a": [tmp_path], "b": [tmp_path]}) if row.arm == "a"}
    assert [(row.task, row.n) for row in compared.values()] == [("birds", 7), ("few", 3), ("alike", 10), ("by_items", 10)]
    assert {name: row.value for name, row in compared.items()} == pytest.approx({name: row["value"] for name, row in rows.items()})
    assert compared["alike"].stderr == pytest.approx(rows["alike"]["stderr"])  # of tasks that weigh by items the harness pools the spread


def test_a_group_whose_tasks_lack_the_metric_has_no_mean(tasks_dir):
    groups = benchmarks.find_groups(["by_items"], tasks_dir, None)
    record = {"n": 3, "fewshot": 0, "metrics": {"acc": {"value": 0.5, "stderr": None, "higher_is_better": True}}}
    assert group_means(groups, {"birds": record, "few": record})[0]["stderr"] is None
    shots = [group_means(groups, {"birds": record, "few": record | {"fewshot": n}})[0]["shots"] for n in (0, 5)]
    assert shots == [0, None]  # tasks of 0 and of 5 have no number in common
    assert not group_means(groups, {"birds": record})
    assert not group_means(groups, {"birds": record, "few": record | {"metrics": {"f1": record["metrics"]["acc"]}}})


CODE = {
    "function": "process_docs: !function here.run\n",
    "verbatim": "process_docs: !<!function> here.run\n",
    "inside a list": "metric_list: [{metric: !function here.run}]\n",
    "python": "x: !!python/name:os.system\n",
    "the hub's metric": "metric_list: [{metric: bleu, hf_evaluate: true}]\n",
    "a metric's file": "metric_list: [{metric: ./here}]\n",
    "pickled data": "dataset_path: pandas\n",
    "included": "include: below/part.txt\n",
}


def test_the_results_of_other_tasks_are_kept_where_one_fails(base, tasks_dir, tmp_path, monkeypatch, capsys):
    real = _Work.run

    def run(work, live, ref, name):
        if name == "few":
            raise UserError("the harness cannot evaluate it")
        return real(work, live, ref, name)

    monkeypatch.setattr(_Work, "run", run)
    words = [
        "--tasks",
        "few,birds,alike",
        "--tasks_dir",
        str(tasks_dir),
        "--out",
        str(tmp_path / "out"),
        "--json",
        str(tmp_path / "all.json"),
    ]
    assert main(["eval", str(base), *words]) == 2
    table, said = capsys.readouterr()
    assert not list((tmp_path / "out").glob("*.group.json"))
    assert f"{base}: few: the harness cannot evaluate it" in said and "birds" in table and "alike" not in table
    (row,) = json.loads((tmp_path / "all.json").read_text())
    assert (row["task"], row["items"], row["metric"]) == ("birds", 7, "acc")


@pytest.mark.parametrize("kind", CODE)
def test_task_files_that_run_code_need_a_flag(tmp_path, kind):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/part.txt").write_text("doc_to_text: !function here.run\n")
    (tmp_path / "t.yaml").write_text("task: t\n" + CODE[kind])
    with pytest.raises(UserError) as found:
        refuse_task_code(tmp_path, tmp_path / "harness")
    (problem,) = found.value.problems
    assert (
        problem.startswith(f"--tasks_dir: {tmp_path}/{'below/part.txt:1' if kind == 'included' else 't.yaml:'}")
        and "--allow_task_code" in problem
    )


def test_the_flag_lets_it_run_and_nothing_runs_without_it(base, tasks_dir, tmp_path, capsys):
    (tmp_path / "here.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef run(doc):\n    return doc['question']\n")
    text = task_file("coded", tasks_dir / "few.jsonl").replace("doc_to_text: '{{question}}'", "doc_to_text: !function here.run")
    (tmp_path / "coded.yaml").write_text(text)
    words = ["eval", str(base), "--tasks", "coded", "--tasks_dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and not (tmp_path / "ran").exists()
    assert "coded.yaml:" in (err := capsys.readouterr().err) and "runs Python (!function here.run)" in err
    with pytest.raises(UserError, match="allow_task_code"):
        after_sweep.check(tmp_path, Evaluation(tasks=("coded",), tasks_dir=str(tmp_path)))
    assert main([*words, "--allow_task_code"]) == 0 and (tmp_path / "ran").exists()
    assert record_files.read_record(tmp_path / "out", "coded")["n"] == 3


def test_templates_of_task_files_reach_no_python(base, tasks_dir, tmp_path, capsys):
    reach = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path}/ran') }}}}"
    (tmp_path / "t.yaml").write_text(task_file("t", tasks_dir / "few.jsonl", doc_to_text=reach))
    assert main(["eval", str(base), "--tasks", "t", "--tasks_dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "SecurityError" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_the_harnesss_own_task_files_need_no_flag(tmp_path):
    own = benchmarks.own_tasks()
    (tmp_path / "t.yaml").write_text(f"include: {own}/hellaswag/hellaswag.yaml\ntask: hellaswag\n")
    refuse_task_code(tmp_path, own)
