"""`llmkd eval`: each task runs once and whole, what is wrong is refused before a model is loaded, and what is finished is kept."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval")
from llmkd_eval.harness import benchmarks, record_files
from llmkd_eval.harness.evaluate import evaluate, evaluate_all
from llmkd_eval.harness.local_tasks import write_tasks

from llmkd.cli import main
from llmkd.errors import Stopped, UserError
from tests.kit.questions import NOUNS, TASKS, commonsense_qa, hellaswag, tasks_in, trained, write_rows

REPO = Path(__file__).parents[2]


def command(capsys, *words) -> tuple[int, str, str]:
    code = main(["eval", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_nothing_is_evaluated_twice_or_mixed_up(base, small, tmp_path, tasks_dir, capsys, monkeypatch):
    import datasets

    from llmkd.models import pretrained

    datasets.enable_progress_bars()  # as where the library was imported before the command
    loaded, real = [], pretrained.load_pretrained
    monkeypatch.setattr(pretrained, "load_pretrained", lambda folder, *a, **k: (loaded.append(folder), real(folder, *a, **k))[1])
    out = tmp_path / "out"
    eval_ = functools.partial(command, capsys, base, "--tasks_dir", tasks_dir, "--out", out, "--tasks")
    code, table, err = eval_("commonsense_qa", "--limit", 4)
    assert code == 0 and "acc" in table and "±" in table and len(loaded) == 1
    first = (out / "commonsense_qa.json").read_bytes()
    code, again, err = eval_("commonsense_qa", "--limit", 4)
    assert code == 0 and again == table and "evaluated already" in err and len(loaded) == 1
    for words, what in ((("--limit", 5), "limit 4 there and 5 now"), (("--limit", 4, "--fewshot", 1), "fewshot 0 there and 1 now")):
        code, table, err = eval_("hellaswag,commonsense_qa", *words)
        assert code == 2 and what in err and len(err.splitlines()) == 1 and not table
    code, _, err = eval_("commonsense_qa", "--limit", 4, "--dtype", "float32")
    assert code == 2 and "model.dtype float64 there and float32 now" in err
    code, _, err = command(capsys, small, "--tasks_dir", tasks_dir, "--out", out, "--tasks", "commonsense_qa", "--limit", 4)
    assert code == 2 and "model.fingerprint" in err
    assert len(loaded) == 1 and (out / "commonsense_qa.json").read_bytes() == first and not (out / "hellaswag.json").exists()
    code, table, _ = eval_("commonsense_qa", "--limit", 4, "--dtype", "float32", "--force")
    assert code == 0 and len(loaded) == 2 and record_files.read_record(out, "commonsense_qa")["model"]["dtype"] == "float32"


def test_other_items_or_torn_files_are_no_result(base, tmp_path, tasks_dir, capsys):
    write_rows(tmp_path / "data/q.jsonl", [commonsense_qa(i + 1) for i in range(7)])
    write_tasks(tmp_path / "data", tmp_path / "tasks")
    out = tmp_path / "out"
    words = [base, "--tasks", "commonsense_qa", "--out", out, "--tasks_dir"]
    assert command(capsys, *words, tasks_dir)[0] == 0
    code, _, err = command(capsys, *words, tmp_path / "tasks")
    assert code == 2 and "the task's items have changed" in err
    whole = (out / "commonsense_qa.jsonl").read_bytes()
    (out / "commonsense_qa.jsonl").write_bytes(whole[:-30])
    with pytest.raises(UserError, match="does not match commonsense_qa.json"):
        record_files.read_items(out, "commonsense_qa")
    (out / "commonsense_qa.jsonl").write_bytes(whole.replace(b"0.0", b"1.0", 1) if b"0.0" in whole else whole.replace(b"1.0", b"0.0", 1))
    with pytest.raises(UserError, match="does not match commonsense_qa.json"):  # edited, and as long as before
        record_files.read_items(out, "commonsense_qa")
    code, _, err = command(capsys, *words, tasks_dir)
    assert code == 0 and "is damaged" in err and (out / "commonsense_qa.jsonl").read_bytes() == whole


def test_refusals_come_before_a_model_is_loaded(base, tmp_path, tasks_dir, capsys, monkeypatch):
    import lm_eval.tasks

    from llmkd.models import pretrained

    own = Path(lm_eval.tasks.__file__).parent / "hellaswag"  # stands for all of the harness's own tasks, whose index takes half a minute
    real = benchmarks.index
    monkeypatch.setattr(benchmarks, "index", lambda folder, defaults: real(own if defaults else folder, False))
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    write_rows(tmp_path / "data/q.jsonl", [commonsense_qa(0)])
    write_tasks(tmp_path / "data", tmp_path / "broken")
    (tmp_path / "data/q.jsonl").unlink()
    (tmp_path / "broken/hellaswag.yaml").write_text("task: [")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/recipe.yaml").write_text("")
    for words, said in (
        ([base, "--tasks", "helaswag", "--tasks_dir", tasks_dir], "no such task; did you mean hellaswag"),
        ([base, "--tasks", "held_out", "--tasks_dir", tasks_dir], "--tasks: held_out: a run measures its held-out rows itself"),
        ([base, "--tasks", "hellaswag"], "--tasks: hellaswag: its data cannot be loaded ("),
        (
            [base, "--tasks", "commonsense_qa", "--tasks_dir", tmp_path / "broken"],
            "commonsense_qa: its data cannot be loaded (FileNotFoundError",
        ),
        ([base, "--tasks", "hellaswag", "--tasks_dir", tmp_path / "broken"], "hellaswag.yaml cannot be read as a task"),
        ([base, "--tasks", "hellaswag", "--tasks_dir", tmp_path / "empty"], "holds no task files"),
        ([base, "--tasks", "hellaswag", "--tasks_dir", tmp_path / "nowhere"], "is no folder"),
        ([tmp_path / "nowhere", "--tasks", "hellaswag", "--tasks_dir", tasks_dir], "there is no folder"),
        ([tmp_path / "unfinished", "--tasks", "hellaswag", "--tasks_dir", tasks_dir], "is the run finished?"),
        ([base, "--tasks", "hellaswag", "--tasks_dir", tasks_dir, "--out", base / "config.json"], "is a file; name a folder"),
        ([base, "--tasks", "hellaswag", "--tasks_dir", tasks_dir, "--out", "/proc/nowhere"], "--out: /proc/nowhere cannot be created"),
        ([base, "--tasks", "hellaswag", "--limit", "0"], "--limit: found 0, expected a whole number >= 1"),
        ([base, "--tasks", "hellaswag", "--batch_size", "big"], "--batch_size: found 'big'"),
        ([base, "--tasks", "hellaswag", "--shots", "1"], "--shots: eval has no such option"),
        ([base], "no task is given"),
        (["--tasks", "hellaswag"], "no model is given"),
    ):
        code, table, err = command(capsys, *words)
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert code == 2 and not table and len(lines) == 1 and said in lines[0], err


def test_without_the_harness_one_line_says_how_to_install_it(base, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    code, _, err = command(capsys, base, "--tasks", "hellaswag")
    assert code == 2 and "pip install 'llmkd[eval]'" in err and len(err.splitlines()) == 1


def own_task(folder: Path, name: str, rows: list[dict], **fields) -> None:
    write_rows(folder / f"{name}.jsonl", rows)
    fields = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}} | fields
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields | {"test_split": "test", "doc_to_text": "{{q}}"}))


def test_what_does_not_fit_into_the_context_fails_in_words_and_the_other_tasks_are_done(small, tmp_path, capsys):
    generation = {"output_type": "generate_until", "doc_to_target": "{{a}}", "metric_list": [{"metric": "exact_match"}]}
    rows = [{"q": "Say " + "so " * n, "a": "It is so."} for n in (1, 200)]
    own_task(tmp_path / "tasks", "long_answer", rows, **generation, generation_kwargs={"until": ["\n"], "max_gen_toks": 96})
    own_task(tmp_path / "tasks", "short_answer", rows, **generation, generation_kwargs={"until": ["\n"], "max_gen_toks": 6})
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{c}}", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    own_task(tmp_path / "tasks", "long_choice", [{"q": "Say", "c": ["so", "so " * 150]}], **choice)
    words = [small, "--tasks", "long_answer,long_choice,short_answer", "--tasks_dir", tmp_path / "tasks", "--out", tmp_path / "out"]
    code, _, err = command(capsys, *words)
    refusals = [line for line in err.splitlines() if line.startswith("llmkd: ")]
    assert code == 2 and len(refusals) == 2
    assert "long_answer: up to 96 tokens are to be generated, and the model's context holds 96" in refusals[0]
    assert "long_choice: an answer has " in refusals[1]
    assert tasks_in(tmp_path / "out") == ["short_answer"]
    items = record_files.read_items(tmp_path / "out", "short_answer")
    assert [item["truncated"] for item in items] == [False, True] and all(isinstance(item["answers"][0], str) for item in items)


def test_a_signal_keeps_what_is_finished_and_the_same_command_goes_on(base, tmp_path, tasks_dir, monkeypatch, capsys):
    out, real = tmp_path / "out", record_files.write_task

    def write_and_signal(*a):
        record = real(*a)
        os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(record_files, "write_task", write_and_signal)
    with pytest.raises(Stopped, match="1 of 3 evaluations done; run the same command to continue"):
        evaluate(base, TASKS, tasks_dir=tasks_dir, out=out)
    assert tasks_in(out) == TASKS[:1] and not list(out.glob("*.tmp-*"))
    kept = (out / f"{TASKS[0]}.json").read_bytes()
    monkeypatch.setattr(record_files, "write_task", real)
    monkeypatch.setattr(
        "llmkd_eval.harness.live_model._Progress.add_partial", lambda self, *_: os.kill(os.getpid(), signal.SIGINT) or stop_now(self)
    )
    code, _, err = command(capsys, base, "--tasks", ",".join(TASKS), "--tasks_dir", tasks_dir, "--out", out)
    assert code == 75 and "0 of 2 evaluations done" in err and tasks_in(out) == TASKS[:1]
    monkeypatch.undo()
    assert evaluate(base, TASKS, tasks_dir=tasks_dir, out=out).keys() == set(TASKS)
    assert sorted(tasks_in(out)) == sorted(TASKS) and (out / f"{TASKS[0]}.json").read_bytes() == kept


def stop_now(progress) -> None:
    assert progress.stop()
    raise Stopped("stopped by a signal")


def test_results_go_beside_a_run_and_elsewhere_for_other_models(world, base, small, tmp_path, tasks_dir, monkeypatch):
    folder = trained(world, tmp_path, **{"student.model": str(base)})
    monkeypatch.chdir(tmp_path)
    one = ["commonsense_qa"]
    evaluate(folder / "adapter", one, tasks_dir=tasks_dir)
    assert tasks_in(folder) == one and (folder / "eval/commonsense_qa.json").exists()
    evaluate(base, one, tasks_dir=tasks_dir)
    assert tasks_in(Path("runs/eval") / f"{base.parent.name}--student") == one
    found = evaluate_all([str(base), str(small)], one, tasks_dir=tasks_dir, out="both")
    assert len(found) == 2 and len(list(Path("both").glob("*/commonsense_qa.json"))) == 2
    made, real = [], __import__("lm_eval.tasks", fromlist=["TaskManager"]).TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *a, **k: made.append(a) or real(*a, **k))
    evaluate(small, one, tasks_dir=tasks_dir, out="again")
    assert not made, "the tasks were indexed again"


def test_data_is_known_by_its_columns(tmp_path, capsys):
    data, to = tmp_path / "data", tmp_path / "tasks"
    write_rows(data / "a/train-00000-of-00001.parquet", [hellaswag(0)])
    write_rows(data / "a/validation-00000-of-00002.parquet", [hellaswag(1)])
    write_rows(data / "a/validation-00001-of-00002.parquet", [hellaswag(2)])
    write_rows(data / "a/test-00000-of-00001.parquet", [hellaswag(3) | {"label": ""}])
    arc = commonsense_qa(0) | {"choices": {"label": list("ABCD"), "text": NOUNS[:4]}}
    write_rows(data / "arc.jsonl", [arc])
    write_rows(data / "training rows.jsonl", [{"instruction": "a", "output": "b"}])
    (data / "bad.json").write_text("{")
    assert main(["tasks", str(data), "--to", str(to)]) == 0
    assert "validation-00001" in capsys.readouterr().out and [path.name for path in to.iterdir()] == ["hellaswag.yaml"]
    task = benchmarks.find_tasks(["hellaswag"], to, 1)["hellaswag"]
    assert len(task.eval_docs) == 2 and task.has_training_docs() and len(task.training_docs()) == 1
    write_rows(data / "b/other.jsonl", [hellaswag(4)])
    capsys.readouterr()  # what datasets shows while it reads
    for folder, said in (
        (data, "both hold rows of hellaswag"),
        (tmp_path / "no", "there is no such folder"),
        (to, "has no validation data of"),
    ):
        assert main(["tasks", str(folder), "--to", str(to)]) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1


def test_help_and_importing_cost_nothing(tmp_path):
    modules = ", ".join(f"llmkd_eval.{path.stem}" for path in (REPO / "eval").glob("*.py") if path.stem != "__init__")
    code = f"import json, sys, {modules}\nfrom llmkd.cli import main\ncodes = [main(['eval', '--help']), main(['tasks', '-h'])]\n"
    code += "print(json.dumps([codes, sorted({m.split('.')[0] for m in sys.modules})]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0] and "--tasks_dir" in done.stdout
    assert not {"torch", "lm_eval", "transformers", "datasets", "peft", "accelerate", "pyarrow"} & set(modules)
    script = subprocess.run(
        [sys.executable, str(REPO / "eval/run.py"), "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    )
    assert script.stdout.startswith("usage: llmkd eval")
