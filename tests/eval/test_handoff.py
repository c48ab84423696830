"""Evaluation with lm-evaluation-harness: the model is the trained one, each task runs once and whole, and its record is right."""

import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")
from llmkd_eval.harness import benchmarks, record_files
from llmkd_eval.harness.evaluate import evaluate, evaluate_all, without_asides
from llmkd_eval.harness.local_tasks import write_tasks

from llmkd.cli import main
from llmkd.commands.export import export
from llmkd.config import loader
from llmkd.errors import Stopped, UserError
from llmkd.training.run import run
from tests.conftest import plain_recipe
from tests.kit.processes import launch
from tests.test_real_data import SHARED

REPO = Path(__file__).parents[2]
TASKS = ["hellaswag", "commonsense_qa", "truthfulqa_mc2"]
NOUNS = "robin wren owl crow dove lark swan duck".split()


def tasks_in(place: Path) -> list[str]:
    """The tasks with both their files, in a run's folder or in the folder of results itself."""
    found = (path for folder in (place, place / "eval") for path in folder.glob("*.json"))
    return sorted({path.stem for path in found if path.with_suffix(".jsonl").exists()})


def hellaswag(i: int) -> dict:
    endings = [f"sings to the {NOUNS[(i + j) % 8]}" + " again" * j + "." for j in range(4)]
    return {"activity_label": "Birds", "ctx_a": f"The {NOUNS[i % 8]} sits.", "ctx_b": "it", "endings": endings, "label": str(i % 4)}


def commonsense_qa(i: int) -> dict:
    choices = {"label": list("ABCDE"), "text": [NOUNS[(i + j) % 8] for j in range(5)]}
    return {"id": f"q{i}", "question": f"Who sings at {i}? ", "choices": choices, "answerKey": "ABCDE"[i % 5]}


def truthfulqa(i: int) -> dict:
    right, wrong = [f"The {NOUNS[i % 8]}.", "Nobody knows."], [f"The {NOUNS[(i + 3) % 8]} and no other.", "All."]
    mc1 = {"choices": right[:1] + wrong, "labels": [1, 0, 0]}
    return {"question": f"Who sings at {i}?", "mc1_targets": mc1, "mc2_targets": {"choices": right + wrong, "labels": [1, 1, 0, 0]}}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory) -> Path:
    """Task files for nine, seven and five rows, in files whose names say nothing."""
    import pyarrow.parquet  # noqa: F401

    root = tmp_path_factory.mktemp("questions")
    write_rows(root / "data/one.jsonl", [hellaswag(i) for i in range(9)])
    write_rows(root / "data/two.json", [commonsense_qa(i) for i in range(7)])
    write_rows(root / "data/three.parquet", [truthfulqa(i) for i in range(5)])
    assert set(write_tasks(root / "data", root / "tasks")) == {*TASKS, "truthfulqa_mc1"}
    return root / "tasks"


def model(folder: Path, positions: int = 2048, rows: int = 0, tied: bool = False, seed: int = 7) -> Path:
    """A float64 model with the corpus's tokenizer; `rows` more in its head than the tokenizer has entries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()) + rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).double().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return model(tmp_path_factory.mktemp("base") / "student")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A context that no TruthfulQA prompt fits in."""
    return model(tmp_path_factory.mktemp("small") / "student", positions=96, seed=8)


def trained(world, tmp_path, **changes) -> Path:
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "run")))
    plain = {"teacher": None, "loss.kd_ratio": 0.0, "train.max_steps": 2}
    run(loader.load_recipe(tmp_path / "recipe.yaml", plain | changes))
    return tmp_path / "run"


def likelihoods(place: Path, task: str) -> list[list[float]]:
    return [item["loglikelihoods"] for item in record_files.read_items(place, task)]


def by_hand(folder: Path, tasks_dir: Path, name: str, **options) -> tuple[list[list[float]], dict]:
    """The harness alone, on a folder that it loads itself: log-likelihoods of each item, and the task's metrics."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=3)
    index = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    with without_asides():
        found = lm_eval.simple_evaluate(harness, tasks=[name], task_manager=index, log_samples=True, **options)
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in found["samples"][name]], found["results"][name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"rows": 24},
        {"rows": 24, "tied": True},
        {"rows": 24, "tied": True, "target_modules": ["q_proj", "lm_head"]},
        {"rows": 24, "tied": True, "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["padded", "padded and tied", "tied, adapted head", "tied, adapted embedding"],
)
def test_adapter_merged_model_and_the_harness_by_hand_agree(world, tmp_path, tasks_dir, case):
    """lm-eval cuts a padded head to the tokenizer where it puts an adapter on it itself (its issue 2748), and the scores move."""
    targets = case.pop("target_modules", "all-linear")
    student = model(tmp_path / "student", **case)
    folder = trained(world, tmp_path, **{"student.model": str(student), "student.lora.target_modules": targets, "optim.lr": 0.05})
    merged = export(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    of_adapter = evaluate(folder, TASKS, tasks_dir=tasks_dir)
    of_merged = evaluate(merged, TASKS, tasks_dir=tasks_dir, out=tmp_path / "merged")
    assert of_adapter["hellaswag"]["model"]["kind"] == "adapter" and of_merged["hellaswag"]["model"]["kind"] == "merged"
    for name in TASKS:
        hand, metrics = by_hand(merged, tasks_dir, name)
        ours, theirs = likelihoods(folder, name), likelihoods(tmp_path / "merged", name)
        assert sum(map(len, hand)) > 19 and [len(item) for item in hand] == [len(item) for item in ours]
        for a, b, c in zip(ours, theirs, hand, strict=True):
            assert a == pytest.approx(c, abs=1e-6) and b == pytest.approx(c, abs=1e-6)
        for metric, value in of_adapter[name]["metrics"].items():
            assert value["value"] == pytest.approx(metrics[f"{metric},none"], abs=1e-6)
            assert value["stderr"] == pytest.approx(metrics[f"{metric}_stderr,none"], abs=1e-6)
            assert of_merged[name]["metrics"][metric]["value"] == pytest.approx(value["value"], abs=1e-6)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_run_trained_in_full_and_a_base_are_what_their_weights_say(world, tmp_path, tasks_dir, base):
    folder = trained(world, tmp_path, **{"student.model": str(base), "student.method": "full", "student.lora": None})
    record = evaluate(folder, ["commonsense_qa"], tasks_dir=tasks_dir)["commonsense_qa"]
    assert record["model"] | {"fingerprint": ""} == {
        "path": str(folder),
        "kind": "full",
        "base": str(base),
        "fingerprint": "",
        "dtype": "float64",
        "quantization": None,
    }
    of_base = evaluate(base, ["commonsense_qa"], tasks_dir=tasks_dir, out=tmp_path / "base")["commonsense_qa"]
    assert of_base["model"]["kind"] == "base" and of_base["model"]["fingerprint"] != record["model"]["fingerprint"]
    assert likelihoods(folder, "commonsense_qa") != likelihoods(tmp_path / "base", "commonsense_qa")


def test_a_student_trained_on_four_bits_is_evaluated_on_them(world, tmp_path, tasks_dir):
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer
    from llmkd.models.load import LoadContext, load_teacher
    from llmkd.models.saved_student import as_trained

    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=648, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer().save_pretrained(tmp_path / "student")
    quantised = {"student.quantization": {"type": "nf4", "compute_dtype": "float32"}}
    folder = trained(world, tmp_path, **{"student.model": str(tmp_path / "student")}, **quantised)
    record = evaluate(folder, ["commonsense_qa"], tasks_dir=tasks_dir, batch_size=1)["commonsense_qa"]
    assert record["model"]["quantization"] == "nf4"
    plain = load_teacher(as_trained(folder / "adapter"), LoadContext(640, "cpu")).model
    prompt, encode = benchmarks.find_tasks(["commonsense_qa"], tasks_dir, None)["commonsense_qa"], tokenizer()
    doc = prompt.eval_docs[0]
    for letter, found in zip("ABCDE", likelihoods(folder, "commonsense_qa")[0], strict=True):
        assert found == pytest.approx(likelihood(plain, encode, prompt.doc_to_text(doc), f" {letter}"), abs=1e-4)


def likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """ln p(continuation | context), written out."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    return sum(logps[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


def test_a_record_says_what_was_measured_and_how(base, tmp_path, tasks_dir):
    from transformers import AutoModelForCausalLM

    from llmkd.data.reading.skills import tokenizer

    record = evaluate(base, ["hellaswag"], tasks_dir=tasks_dir, fewshot=1, limit=6, seed=3, out=tmp_path / "out")["hellaswag"]
    assert record == record_files.read_record(tmp_path / "out", "hellaswag") and tasks_in(tmp_path / "out") == ["hellaswag"]
    assert list(record) == (
        "task version harness llmkd fewshot limit chat_template seeds model n metrics truncated items_sha256 date seconds".split()
    )
    assert (record["version"], record["fewshot"], record["limit"], record["n"], record["truncated"]) == (1.0, 1, 6, 6, 0)
    assert record["seeds"] == dict.fromkeys(("random", "numpy", "torch", "fewshot"), 3)
    items = record_files.read_items(tmp_path / "out", "hellaswag")
    assert [item["id"] for item in items] == list(range(6)) and len({item["hash"] for item in items}) == 6
    plain, lengths = AutoModelForCausalLM.from_pretrained(base), [len(ending) for ending in hellaswag(0)["endings"]]
    right, normed = [], []
    for i, item in enumerate(items):
        best = max(range(4), key=lambda j: item["loglikelihoods"][j])
        best_normed = max(range(4), key=lambda j: item["loglikelihoods"][j] / len(hellaswag(i)["endings"][j]))
        right.append(float(best == i % 4))
        normed.append(float(best_normed == i % 4))
        assert item["metrics"] == {"acc": right[-1], "acc_norm": normed[-1]} and not item["truncated"]
    assert lengths[0] != lengths[3] and record["metrics"]["acc"]["higher_is_better"] is True
    for name, values in (("acc", right), ("acc_norm", normed)):
        error = statistics.stdev(values) / math.sqrt(6)
        assert record["metrics"][name]["value"] == pytest.approx(statistics.mean(values))
        assert record["metrics"][name]["stderr"] == pytest.approx(error)
    task = benchmarks.find_tasks(["hellaswag"], tasks_dir, None)["hellaswag"]
    context = task.doc_to_text(task.eval_docs[0])
    zero = evaluate(base, ["hellaswag"], tasks_dir=tasks_dir, out=tmp_path / "zero")["hellaswag"]
    assert zero["fewshot"] == 0 and zero["n"] == 9
    expected = likelihood(plain, tokenizer(), context, " " + hellaswag(0)["endings"][0])
    assert likelihoods(tmp_path / "zero", "hellaswag")[0][0] == pytest.approx(expected, abs=1e-9)


def test_few_shot_numbers_do_not_depend_on_what_was_evaluated_before(base, tmp_path, tasks_dir, capsys):
    """The harness writes the number of examples into its task, and draws them from a generator that moves on."""
    name = ["commonsense_qa", "truthfulqa_mc2"]
    evaluate(base, name, tasks_dir=tasks_dir, out=tmp_path / "zero")
    records = [evaluate(base, name, tasks_dir=tasks_dir, fewshot=2, out=tmp_path / out) for out in ("a", "b")]
    assert records[0]["commonsense_qa"]["fewshot"] == 2 and records[0]["truthfulqa_mc2"]["fewshot"] == 0
    assert "--fewshot 2 has no effect" in capsys.readouterr().err
    assert (tmp_path / "a/commonsense_qa.jsonl").read_bytes() == (tmp_path / "b/commonsense_qa.jsonl").read_bytes()
    assert likelihoods(tmp_path / "a", name[0]) != likelihoods(tmp_path / "zero", name[0])
    assert likelihoods(tmp_path / "a", name[1]) == likelihoods(tmp_path / "zero", name[1])
    evaluate(base, name, tasks_dir=tasks_dir, fewshot=2, seed=9, out=tmp_path / "c")
    assert likelihoods(tmp_path / "c", name[0]) != likelihoods(tmp_path / "a", name[0])
    hand, _ = by_hand(base, tasks_dir, name[0], num_fewshot=2)
    assert [x for item in likelihoods(tmp_path / "a", name[0]) for x in item] == pytest.approx([x for item in hand for x in item], abs=1e-9)


def command(capsys, *words) -> tuple[int, str, str]:
    code = main(["eval", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_nothing_is_evaluated_twice_or_mixed_up(base, small, tmp_path, tasks_dir, capsys, monkeypatch):
    from llmkd.models import pretrained

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
        ([base, "--tasks", "hellaswag", "--tasks_dir", tasks_dir, "--out", "/proc/nowhere"], "--out: /proc/nowhere cannot be made"),
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


def test_prompts_longer_than_the_context_are_counted_and_said(small, tmp_path, tasks_dir, capsys):
    from llmkd.data.reading.skills import tokenizer

    records = evaluate(small, TASKS, tasks_dir=tasks_dir, out=tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    found, encode = benchmarks.find_tasks(TASKS, tasks_dir, None), tokenizer()
    cut_of = {}
    for name in TASKS:
        task, marked = found[name], []
        for doc in task.eval_docs:
            texts = [f"{task.doc_to_text(doc)} {choice}" for choice in task.doc_to_choice(doc)]
            marked.append(sum(len(encode(text)["input_ids"]) > 97 for text in texts))  # the last token is not read
        cut_of[name] = sum(marked)
        assert records[name]["truncated"] == sum(marked)
        assert [item["truncated"] for item in record_files.read_items(tmp_path / "out", name)] == [n > 0 for n in marked]
    assert cut_of["truthfulqa_mc2"] == 20 and cut_of["hellaswag"] == 0
    assert len(said) == sum(n > 0 for n in cut_of.values())
    assert "20 requests, of 5 of 5 items, are longer than the model's context of 96 tokens" in said[-1]


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


@pytest.mark.slow
def test_two_processes_find_what_one_finds(base, tmp_path, tasks_dir):
    """With few-shot examples, which the harness draws one item after another, and a number of items that two do not divide."""
    words = [str(base), "--tasks", "commonsense_qa,truthfulqa_mc2", "--fewshot", "3", "--tasks_dir", str(tasks_dir), "--out"]
    done = launch(2, main, ["eval", *words, str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("commonsense_qa") == 1, "the table is the first process's"
    assert main(["eval", *words, str(tmp_path / "one")]) == 0
    for name in ("commonsense_qa", "truthfulqa_mc2"):
        one, two = (record_files.read_record(tmp_path / out, name) for out in ("one", "two"))
        timed = {"date": 0, "seconds": 0, "items_sha256": 0, "metrics": 0}
        assert one | timed == two | timed
        for metric, value in one["metrics"].items():
            assert value == pytest.approx(two["metrics"][metric], abs=1e-9)
        for a, b in zip(record_files.read_items(tmp_path / "one", name), record_files.read_items(tmp_path / "two", name), strict=True):
            assert a["id"] == b["id"] and a["hash"] == b["hash"] and a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-9)


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


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_a_real_model_on_real_questions_scores_as_by_hand(tmp_path):
    write_tasks(SHARED, tmp_path / "tasks")
    stories = SHARED / "models/stories260K"
    records = evaluate(stories, TASKS, tasks_dir=tmp_path / "tasks", limit=6, out=tmp_path / "out")
    for name in TASKS:
        hand, metrics = by_hand(stories, tmp_path / "tasks", name, limit=6)
        assert records[name]["metrics"]["acc"]["value"] == pytest.approx(metrics["acc,none"], abs=1e-6)
        assert [x for item in likelihoods(tmp_path / "out", name) for x in item] == pytest.approx(
            [x for item in hand for x in item], abs=1e-4
        )
