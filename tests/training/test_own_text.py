"""Validation of an on-policy run: the student's own text on held-out prompts against plain forward passes, and a training that it does not change."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkd.config.loader import load_recipe
from llmkd.config.on_policy import OnPolicy
from llmkd.data.written import held_out_prompts_for, prompts_of
from llmkd.models.load import LoadContext, load_teacher
from llmkd.rollouts.generate import generate
from llmkd.rollouts.sampling import Sampling
from llmkd.rollouts.writer import LocalWriter, text_key
from llmkd.teachers.live import LiveTeacher
from llmkd.training.launch import start
from llmkd.training.own_text import OwnText
from llmkd.training.prepare import prepare
from llmkd.training.validate import Evaluator
from tests.conftest import distance
from tests.kit.models import load_student

SETTINGS = {"on_policy__share": 0.5, "on_policy__max_new_tokens": 6, "train__max_steps": 2, "validation__teacher_check": 0}


def test_the_metrics_are_those_of_the_text_that_the_student_writes(trained, make_recipe, world, tmp_path, caplog):
    held = {"data__validation__path": str(world / "held.jsonl"), "on_policy__validation_prompts": 5}
    with_text = trained("with", **SETTINGS, **held)
    without = trained("without", **SETTINGS, **held | {"on_policy__validation_prompts": 0})
    assert distance(with_text, without) == 0
    assert re.search(r"written \d+ tokens, \d+/s  entropy \d\.\d\d  finished \d+%  writing \d\.\d s of \d\.\d s", caplog.text)
    recorded = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < one["teacher_seconds"] < one["training_seconds"] for one in recorded if "loss" in one)
    first, last = (record["validation"] for record in recorded if "validation" in record)
    assert first != last and not any(k.startswith("own") for k in (tmp_path / "without" / "metrics.jsonl").read_text().split('"'))

    recipe = make_recipe(**SETTINGS, **held)
    prepared = prepare(recipe)
    student = load_student(recipe.student, prepared.vocab, "cpu", recipe.seed).eval()
    teacher = load_teacher(recipe.teacher, LoadContext(prepared.vocab, "cpu")).eval()
    data, prompts = prepared.validation, prepared.validation_prompts
    chosen = OwnText.of(data, prompts, 5, None, None).chosen
    assert len(set(chosen)) == 5 and max(chosen) > 4, "not the first ones: files are often sorted"
    sums, tokens, finished = {"reverse_kl": 0.0, "forward_kl": 0.0, "entropy": 0.0}, 0, 0
    for i in chosen:
        ids, mask = data.example(i)
        prompt = ids[: mask.argmax()].tolist()
        ends = {prepared.tokenizer.eos_token_id, *prepared.end_tokens, 1}
        (one,) = generate(student, [prompt], Sampling(1.0, 6, 0), ends, keys=[text_key("held out", data.content_hash(i))])
        with torch.no_grad():
            q, p = (
                torch.log_softmax(m.model(torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1, : prepared.vocab], -1)
                for m in (student, teacher)
            )
        sums["reverse_kl"] += float((q.exp() * (q - p)).sum())
        sums["forward_kl"] += float((p.exp() * (p - q)).sum())
        sums["entropy"] -= float((q.exp() * q).sum())
        tokens += len(one.ids)
        finished += one.finished
    assert {name: first[f"own_{name}"] for name in sums} == {name: pytest.approx(value / tokens, rel=1e-5) for name, value in sums.items()}
    assert first["own_length"] == tokens / 5 and first["own_finished"] == finished / 5


def test_held_out_texts_without_a_prompt_are_left_out(make_recipe, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "The robin sings in the garden at night."}) + "\n")
    text = {"path": str(tmp_path / "t.jsonl"), "format": "text"}
    prepared = prepare(make_recipe(data__validation=text, on_policy={"share": 0.5, "max_new_tokens": 6}))
    assert prepared.validation_prompts.may.tolist() == [False]
    found = held_out_prompts_for(OnPolicy(max_new_tokens=6, prompt_tokens=4), prepared.validation, prepared.validation_places, 256)
    assert found.may.tolist() == [True] and found.own.tolist() == [4]
    assert prompts_of(prepared.validation, prepared.validation_places, 6, 256, 4).own.tolist() == [4]


def test_a_student_that_writes_nothing_has_a_length_of_0(make_recipe, world):
    prepared = prepare(make_recipe(data__validation__path=str(world / "held.jsonl"), on_policy={"max_new_tokens": 6}))

    class Mute(LocalWriter):
        def write(self, prompts, keys, sampling):
            from llmkd.rollouts.generate import Completion

            return [Completion((), False)] * len(keys)

    class Once(Mute):
        """Writes nothing to the first prompt, and ends at once at all others."""

        def write(self, prompts, keys, sampling):
            from llmkd.rollouts.generate import Completion

            return [Completion((1,) * (n > 0), n > 0) for n in range(len(keys))]

    for writer, examples, share in ((Mute, 0, 0.0), (Once, 8, 8 / 9)):
        own = OwnText.of(prepared.validation, prepared.validation_prompts, 99, writer(None, ()), Sampling(1.0, 6, 0))
        assert len(own.chosen) == 9
        data, found = own.write(0, 1)
        assert len(data) == examples and found == {"own_length": share, "own_finished": share}


def stems(text: str) -> list[str]:
    """The words of a text as ROUGE reads it: lower case, letters and digits, stemmed if they have more than three letters."""
    from nltk.stem.porter import PorterStemmer

    return [PorterStemmer().stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


def rouge_l(a: list[str], b: list[str]) -> float:
    """F1 of the longest common subsequence: of its shares of `a` and of `b`."""

    @functools.cache
    def common(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + common(i + 1, j + 1) if a[i] == b[j] else max(common(i + 1, j), common(i, j + 1))

    return 2 * common(0, 0) / (len(a) + len(b)) if a and b else 0.0


def test_the_recipes_script_measures_finished_runs_prompt_by_prompt(trained, world, tmp_path, monkeypatch, capsys):
    """`recipes/on_policy/own_text.py`: sums over each answer, against plain forward passes; a run's own recipe gives the prompts."""
    pytest.importorskip("lm_eval")
    from llmkd_eval.harness.record_files import read_items, read_record

    from llmkd.models.saved_student import as_trained
    from tests.kit.scripts import load_script

    held = {"data__validation__path": str(world / "held.jsonl"), "on_policy__validation_prompts": 0}
    for name, rate in (("one", 1e-2), ("two", 0.3)):
        trained(name, **SETTINGS, **held, optim__lr=rate)
    one, two = tmp_path / "one", tmp_path / "two"
    config = one / "recipe.yaml"
    monkeypatch.setattr("sys.argv", ["own_text.py", "--samples", "2", "--config", str(config), str(one / "adapter"), str(two)])
    script = load_script(Path(__file__).parents[2] / "recipes/on_policy/own_text.py")
    script.main()
    assert "\ntwo: reverse_kl " in capsys.readouterr().out
    items = read_items(two / "eval", "own_text")
    assert read_record(two / "eval", "own_text")["version"].startswith("2 of at most 6 tokens, teacher ")

    prepared = prepare(load_recipe(config, {"on_policy.validation_prompts": 1}))
    context = LoadContext(prepared.vocab, "cpu")
    teacher, student = (load_teacher(as_trained(folder / "adapter"), context).eval() for folder in (one, two))
    assert len(items) == int(prepared.validation_prompts.may.sum()) > 3
    wrote = {}
    for item in items[:4]:
        ids, mask = prepared.validation.example(item["id"])
        prompt = ids[: mask.argmax()].tolist()
        ends = {prepared.tokenizer.eos_token_id, *prepared.end_tokens, 1}
        answers, texts = [], []
        for sample in range(2):
            key = text_key("own_text", prepared.validation.content_hash(item["id"]), sample)
            (written,) = generate(student, [prompt], Sampling(1.0, 6), ends, keys=[key])
            with torch.no_grad():
                q, p = (
                    torch.log_softmax(
                        m.model(torch.tensor([[*prompt, *written.ids]])).logits[0, len(prompt) - 1 : -1, : prepared.vocab], -1
                    )
                    for m in (student, teacher)
                )
            kls = float((q.exp() * (q - p)).sum()), float((p.exp() * (p - q)).sum())
            texts.append(written.ids)
            answers.append((*kls, len(written.ids), written.finished))
        reverse, forward, length, finished = (sum(values) / 2 for values in zip(*answers, strict=True))
        assert reverse > 0.01 and answers[0] != answers[1]
        assert item["metrics"] == {
            "reverse_kl": pytest.approx(reverse, rel=1e-4),
            "forward_kl": pytest.approx(forward, rel=1e-4),
            "reverse_kl_per_token": pytest.approx(reverse / length, rel=1e-4),
            "forward_kl_per_token": pytest.approx(forward / length, rel=1e-4),
            "length": length,
            "finished": finished,
            "rouge_l": 0,  # it has learnt no word of them
        }
        wrote[ids.tobytes()] = texts

    # of questions whose answers are known, the share that is right: here the wording is the whole text
    rows, decode = [item["id"] for item in items], prepared.tokenizer.decode
    asked = prepared.validation_prompts.ids(prepared.validation, rows)
    greedy = [generate(student, [prompt], Sampling(0.0, 6), ends)[0].ids for prompt in asked]
    known = [decode(ids, skip_special_tokens=True).strip() if k < 3 else "something else" for k, ids in enumerate(greedy)]
    monkeypatch.setattr(script, "WORDING", re.compile("(.*)", re.DOTALL))
    values = script.measured(student, LiveTeacher(teacher), prepared, Evaluator(start(), 4), rows, 2, 6, known)
    assert values["right"].tolist() == [k < 3 for k in range(len(rows))] and set(values["right_sampled"]) <= {0, 0.5, 1}
    assert values["reverse_kl"].tolist() == pytest.approx([item["metrics"]["reverse_kl"] for item in items], rel=1e-4)

    # ROUGE-L, as if the data's answers were the beginning of what it wrote first and the end of the other
    assert script.rouge_l(["The robins were singing."], ["A robin sings"]) == [
        pytest.approx(rouge_l(stems("The robins were singing."), ["a", "robin", "sing"]))
    ]
    assert script.first_answer(np.arange(5), np.array([False, True, True, False, True])) == [1, 2]
    own = {key: [*first[:4], *second[3:]] for key, (first, second) in wrote.items()}
    monkeypatch.setattr(script, "first_answer", lambda ids, mask: own.get(ids.tobytes(), []))
    values = script.measured(student, LiveTeacher(teacher), prepared, Evaluator(start(), 4), rows, 2, 6, None)
    expected = [
        [rouge_l(stems(decode(own[key])), stems(decode(ids, skip_special_tokens=True))) for ids in texts] for key, texts in wrote.items()
    ]
    assert values["rouge_l"][:4].tolist() == pytest.approx([sum(both) / 2 for both in expected]) and len({*map(sum, expected)}) > 1
    assert not values["rouge_l"][4:].any()
