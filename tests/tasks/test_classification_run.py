"""Runs of classifiers, from a recipe to the folder that they leave."""

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from llmkd.config import loader
from llmkd.data.encoding.tokenizer import load_tokenizer
from llmkd.data.prompt_edits import edited
from llmkd.data.reading.sources import read_sources
from llmkd.files import read_jsonl
from llmkd.models.classifier import ClassifierKind
from llmkd.models.pretrained import new_model
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.kit.by_hand import adam_steps, logged
from tests.kit.classifiers import SMALL, made, rows_of
from tests.kit.processes import assert_one_end, train_on_two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def recipe(folder):
    return functools.partial(made, folder)


@pytest.fixture(scope="module")
def teacher(recipe, folder) -> Path:
    run(recipe("teacher", student__dtype="float64"))
    return folder / "teacher"


@pytest.fixture(scope="module")
def base(folder) -> Path:
    """A body without a head."""
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(**SMALL, vocab_size=len(load_tokenizer("builtin:skills", "")), pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder / "base")
    return folder / "base"


def test_what_a_run_leaves(teacher):
    summary = json.loads((teacher / "summary.json").read_text())
    lines = [json.loads(line)["sums"] for line in (teacher / "held_out.jsonl").read_text().splitlines()]
    label, answer = ([line[name] for line in lines] for name in ("label", "answer"))
    every = list(range(len(summary["labels"])))
    assert summary["validation"]["f1"] == pytest.approx(f1_score(label, answer, labels=every, average="macro", zero_division=0), rel=1e-12)
    assert summary["validation"]["accuracy"] == pytest.approx(np.mean(np.array(label) == answer), rel=1e-12)
    assert summary["labels"] == sorted(summary["labels"]) and len(every) == 8 and "perplexity" not in summary["validation"]
    config = json.loads((teacher / "model/config.json").read_text())
    assert [config["id2label"][str(i)] for i in every] == summary["labels"]
    card = (teacher / "model/README.md").read_text()
    assert "pipeline('text-classification'" in card and "pipeline_tag: text-classification" in card and "eos_token_id" not in card
    assert not (teacher / "model/generation_config.json").exists()
    found = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    f1 = {one["step"]: one["validation"]["f1"] for one in found if "validation" in one and one["step"]}
    assert len(set(f1.values())) > 1 and summary["best"] == {
        "by": "f1",
        "step": max(f1, key=f1.get),
        "value": max(f1.values()),
    }  # of equal ones the first


def test_the_pipeline_of_transformers_answers_as_validation_did(teacher):
    from llmkd.data.reading.skills import rows

    lines = [json.loads(line)["sums"] for line in (teacher / "held_out.jsonl").read_text().splitlines()]
    names = json.loads((teacher / "summary.json").read_text())["labels"]
    classify = transformers.pipeline("text-classification", model=str(teacher / "model"), dtype=torch.float64)
    answers = [one["label"] for one in classify([row["text"] for row in rows("validation", "kinds")[:24]])]
    assert answers == [names[int(line["answer"])] for line in lines]


def test_a_cache_of_the_teacher_is_the_teacher(recipe, teacher, folder):
    """And training with it is training with the teacher, up to float32's rounding in batches of other shapes."""
    from llmkd.commands.cache import cache

    given = {"teacher__model": str(teacher / "model"), "loss__kd_ratio": 0.9, "loss__temperature": 10.0, "teacher__dtype": "float32"}
    live = run(recipe("live", **given))
    cache(recipe("unused", **given, **{"teacher__cache__path": str(folder / "cache")}))
    kept = run(recipe("kept", **given, **{"teacher__cache__path": str(folder / "cache")}))
    assert json.loads((folder / "cache/cache.json").read_text())["kind"]["name"] == "hidden"
    assert all(kept["validation"][name] == pytest.approx(value, abs=1e-6) for name, value in live["validation"].items())
    assert live["validation"]["forward_kl"] > 1e-5
    ours, theirs = (load_file(folder / name / "model/model.safetensors") for name in ("live", "kept"))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-4


def test_an_adapter_with_a_new_head_resumes_bit_for_bit_and_is_used_by_the_pipeline(recipe, teacher, base, folder):
    """Also with dropout in the adapter, hidden states of layers, and another seed's head."""
    given = {
        "student__architecture": None,
        "student__model": str(base),
        "student__method": "lora",
        "student__lora__rank": 2,
        "student__lora__dropout": 0.3,
        "teacher__model": str(teacher / "model"),
        "teacher__dtype": "float32",
        "loss__features__layers": "last",
        "loss__features__init": "xavier",
    }
    whole = run(recipe("whole", **given))
    run(recipe("parted", **given))
    for name in ("adapter", "base", "checkpoints/step-4"):
        shutil.rmtree(folder / "parted" / name)
    (folder / "parted/summary.json").unlink()
    assert run(recipe("parted", **given), resume=True)["validation"] == whole["validation"]
    ours, theirs = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("whole", "parted"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("classifier.weight" in name for name in ours) and not any("lora" in name and "classifier" in name for name in ours)
    classify = transformers.pipeline("text-classification", model=str(folder / "whole/adapter"))
    assert classify.model.config.id2label[0] == whole["labels"][0] and classify("The owl is Ann's.")[0]["label"] in whole["labels"]
    as_teacher = run(recipe("from_adapter", teacher__model=str(folder / "whole/adapter"), train__max_steps=1))
    assert as_teacher["validation"]["teacher_ce"] == pytest.approx(whole["validation"]["ce"], rel=1e-6)
    other = run(recipe("other", **given, seed=7, train__max_steps=1, optim__lr=1e-12))
    assert other["before"]["ce"] != whole["before"]["ce"]  # the head is the seed's


def test_students_on_one_base_end_as_alone(recipe, teacher, base, folder):
    """Two adapters, each with its own copy of the new head, on one base."""
    from llmkd.output.run_folder import RunFolder
    from llmkd.training.run import train_together
    from llmkd.training.shutdown import ShutdownRequest

    common = {"student__architecture": None, "student__model": str(base), "student__method": "lora", "student__lora__dropout": 0.2}
    common |= {"teacher__model": str(teacher / "model"), "teacher__dtype": "float32"}
    own = {"one": {"student__lora__rank": 2}, "two": {"student__lora__rank": 3, "loss__kd_ratio": 1.0, "loss__temperature": 3.0}}
    for name, changes in own.items():
        run(recipe(f"alone_{name}", **common, **changes))
    both = [recipe(f"together_{name}", **common, **changes) for name, changes in own.items()]
    folders = [RunFolder(one, False) for one in both]
    for one in folders:
        one.check()
    with ShutdownRequest() as stop:
        assert train_together(both, folders, stop) == [None, None]
    for name in own:
        alone, together = (load_file(folder / f"{how}_{name}/adapter/adapter_model.safetensors") for how in ("alone", "together"))
        assert alone.keys() == together.keys() and all(torch.equal(alone[key], together[key]) for key in alone), name


def test_the_best_checkpoint_and_a_merged_adapter_are_exported(teacher, folder):
    """After the run of the adapter; what is written answers as the student."""
    from llmkd.commands.export import export

    best = json.loads((teacher / "summary.json").read_text())["best"]["step"]
    ours = load_file(export(teacher, folder / "best", "best") / "model.safetensors")
    saved = load_file(teacher / f"checkpoints/step-{best}/student.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in saved.items())
    merged = transformers.pipeline("text-classification", model=str(export(folder / "whole", folder / "merged")))
    apart = transformers.pipeline("text-classification", model=str(folder / "whole/adapter"))
    one, other = ({of["label"]: of["score"] for of in classify("Is Ann's owl brown?", top_k=None)} for classify in (merged, apart))
    assert one == pytest.approx(other, abs=1e-6)


def test_the_report_shows_the_confusion_matrix(teacher):
    from llmkd_eval.report.run_report import document, read_run

    (table,) = (one for one in document(read_run(teacher)) if getattr(one, "head", [""])[0] == "class")
    assert len(table.rows) == 8 and sum(float(cell) for row in table.rows for cell in row[1:-1]) == 24


def test_data_is_shown_and_other_commands_refuse_in_one_line(recipe, teacher, folder, capsys):
    from llmkd.cli import main

    loader_file = folder / "seen.yaml"
    loader_file.write_text(loader.dump(recipe("seen")))
    assert main(["data", "--config", str(loader_file), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "fish" in out and "example " in out and "class '" in out
    for words in (
        ["doctor", "--config", str(loader_file)],
        ["sample", str(teacher)],
    ):
        assert main(words) == 2
        assert "is for language models; " in capsys.readouterr().err, words


def test_edited_texts_are_what_the_student_learns_from_and_a_killed_run_goes_on(recipe, teacher, folder):
    """0.1 CE + 0.9 T^2 KL at T 10, four steps of two epochs by torch's Adam: the student reads edited texts and the teacher clean ones."""
    still = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    asked = [{"swap": 0.3}, {"delete": 0.2}, {"typo": 0.2}]
    given = {
        "student__architecture": still,
        "student__dtype": "float64",
        "teacher__model": str(teacher / "model"),
        "teacher__dtype": "float64",
        "data__augment": {"prompt": asked, "teacher_sees": "clean"},
        "data__train__limit": 20,
        "loss__kd_ratio": 0.9,
        "loss__temperature": 10.0,
        "optim": {"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": None},
        "train__micro_batch_size": 4,
        "checkpoint__every": 1,
        "checkpoint__keep": 9,
    }
    plan = recipe("edited", **given)
    run(plan)
    prepared, tokenizer = prepare(plan), load_tokenizer("builtin:skills", "", ends=False)
    rows = [row for read in read_sources(plan.data.train, "data.train") for row in read.rows]
    torch.manual_seed(plan.seed)
    kind = ClassifierKind("", prepared.processor.labels, len(tokenizer), prepared.processor.readers.student.pad)
    student = new_model(plan.student, kind.architecture(8), "AutoModelForSequenceClassification").train()
    theirs = transformers.BertForSequenceClassification.from_pretrained(teacher / "model", dtype=torch.float64).eval()

    def logits(model, text):
        return model(**tokenizer(text, return_tensors="pt")).logits[0]

    def losses():
        for step, batches in prepared.source.steps():
            terms = []
            for i in (int(i) for batch in batches for i in batch.example_N):
                text, label = rows[i]["text"], prepared.train.labels[i]
                key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
                z = logits(student, edited(text, asked, plan.seed, (step.number - 1) // 2, f"{key} 1"))
                with torch.no_grad():
                    p = (logits(theirs, text) / 10).softmax(0)
                terms.append(-0.1 * z.log_softmax(0)[label] + 0.9 * 100 * (p * (p.log() - (z / 10).log_softmax(0))).sum())
            yield torch.stack(terms).mean()

    found = adam_steps(student, plan, losses())
    assert len(found) == 4 and np.allclose(found, logged(plan), rtol=1e-9, atol=0)
    shutil.copytree(folder / "edited", out := folder / "killed")
    (out / "summary.json").unlink()
    for name in ("model", "checkpoints/step-4"):
        shutil.rmtree(out / name)
    run(dataclasses.replace(plan, output_dir=str(out)), resume=True)
    ours, theirs = (load_file(folder / name / "model/model.safetensors") for name in ("edited", "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and logged(plan) == [
        record["loss"] for record in read_jsonl(out / "metrics.jsonl") if "loss" in record
    ]


@pytest.fixture(scope="module")
def bert(folder) -> Path:
    """A body of BERT without pooler, and a tokenizer of its kind: no end token, and marks of a pair's second text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "bert")
    torch.manual_seed(6)
    config = transformers.AutoConfig.for_model(**SMALL, vocab_size=len(words), pad_token_id=0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")
    return folder / "bert"


def test_a_model_and_a_teacher_with_tokenizers_of_their_own(recipe, bert, folder, tmp_path):
    """A BERT that lacks a pooler too, trained by an adapter: what is new in it is in the adapter; its teacher reads other tokens."""
    rows = [{"text": "a b", "text_pair": "c", "label": "x"}, {"text": "d", "text_pair": "e f", "label": "y"}] * 4
    file = {"path": str(rows_of(tmp_path / "pairs.jsonl", *rows)), "format": "labelled"}
    given = {"data__train": file, "data__validation": file, "checkpoint__best_by": None}
    run(recipe("words", **given))  # of new weights, with the built-in tokenizer
    own = {"student__architecture": None, "student__tokenizer": None, "student__model": str(bert), "student__method": "lora"}
    summary = run(recipe("pairs", **given, **own, teacher__model=str(folder / "words/model")))
    assert summary["labels"] == ["x", "y"] and summary["validation"]["forward_kl"] > 0
    held = load_file(folder / "pairs/adapter/adapter_model.safetensors")
    assert {"classifier", "pooler"} <= {part for name in held for part in name.split(".")} and not [
        n for n in held if "pooler" in n and "lora" in n
    ]
    classify = transformers.pipeline("text-classification", model=str(folder / "pairs/adapter"))
    found = classify([{"text": row["text"], "text_pair": row["text_pair"]} for row in rows[:2]], top_k=None)
    q = np.array([[one["score"] for one in sorted(of, key=lambda one: one["label"])] for of in found])
    assert -np.log(np.diag(q)).mean() == pytest.approx(summary["validation"]["ce"], abs=1e-5)
    smaller = run(recipe("smaller", **given, teacher__model=str(folder / "pairs/adapter"), train__max_steps=1))
    assert smaller["validation"]["teacher_ce"] == pytest.approx(summary["validation"]["ce"], abs=1e-5)  # of a teacher with fewer tokens


@pytest.mark.slow
def test_two_processes_end_at_what_one_does(recipe, teacher, folder):
    still = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # whose masks would be those of each process
    given = {"teacher__model": str(teacher / "model"), "loss__kd_ratio": 0.5, "student__dtype": "float64", "student__architecture": still}
    run(recipe("one", **given))
    (folder / "two.yaml").write_text(loader.dump(recipe("two", **given)))
    done = train_on_two(["--config", str(folder / "two.yaml")])
    assert not done.returncode, done.stderr
    assert_one_end(folder / "one", folder / "two")
