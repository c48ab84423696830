"""Evaluation with lm-evaluation-harness: the model is the trained one, and its scores and their record are those of the harness."""

import math
import statistics

import pytest
import torch

pytest.importorskip("lm_eval")
from llmkd_eval.harness import benchmarks, record_files
from llmkd_eval.harness.evaluate import evaluate
from llmkd_eval.harness.local_tasks import write_tasks

from llmkd.cli import main
from llmkd.commands.export import export
from tests.kit.processes import launch
from tests.kit.questions import TASKS, by_hand, hellaswag, likelihoods, model, tasks_in, trained
from tests.test_real_data import SHARED


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
