"""The model card: metadata that the hub reads, a text that says what was done, whatever the names hold."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from llmkd.config import loader
from llmkd.config.recipe import Quantization, Source
from llmkd.model_folder.files import find
from llmkd.output.markdown import code_span, escape
from llmkd.output.model_card import model_card
from llmkd.teachers.resolve import TeacherSource
from llmkd.training.run import run
from tests.conftest import weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SUMMARY = {"before": {"ce": 2.0, "targets": 9}, "validation": {"ce": 1.5, "perplexity": 4.5, "forward_kl": 0.25, "targets": 9}}
LICENCE = "license: other\nlicense_name: llama3.2\nlicense_link: https://example.org/a:b\n"


@pytest.fixture
def hub_student(world, tmp_path) -> Path:
    """The student's base as it lies in the hub's cache, with a card of its own."""
    folder = tmp_path / f"models--someone--tiny/snapshots/{COMMIT}"
    shutil.copytree(world / "student", folder)
    (folder / "README.md").write_text(f"---\n{LICENCE}---\n# Tiny\n")
    return folder


def test_the_metadata_are_the_hubs(make_recipe, hub_student, world):
    recipe = make_recipe(
        student__model=str(hub_student),
        data__validation={"path": "owner/rows", "split": "test", "revision": "abc"},
        data__choices={"path": "questions.jsonl"},
        push_to_hub={"repo": "me/mine"},
    )
    both = (Source(path="owner/rows", revision="abc", name="main", limit=5), Source(path="rows.jsonl", weight=2.0))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=both))
    origins = {"data.train": [{"revision": "abcdef", "rows": 5}, {"revision": None, "rows": 1234, "used": 1200}]}
    summary = SUMMARY | {"validation": SUMMARY["validation"] | {"accuracy": 0.75, "accuracy_stderr": 0.1}}
    made = ModelCard(
        model_card(
            recipe,
            summary,
            find(str(hub_student), "s"),
            (TeacherSource("teacher", recipe.teacher, find(str(world / "adapter"), "t"), None),),
            origins,
        )
    )
    data = made.data.to_dict()
    assert {k: v for k, v in data.items() if k not in ("model-index", "tags")} == {
        "base_model": "someone/tiny",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "llama3.2",
        "license_link": "https://example.org/a:b",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["owner/rows"],
    }
    assert data["tags"] == ["llmkd", "lora", "distillation"]
    results = {r.metric_type: r for r in made.data.eval_results}
    assert {k: r.metric_value for k, r in results.items()} == {
        "cross_entropy": 1.5,
        "perplexity": 4.5,
        "forward_kl": 0.25,
        "accuracy": 0.75,
    }
    held_out, questions = results["cross_entropy"], results["accuracy"]
    assert (held_out.dataset_type, held_out.dataset_split, held_out.dataset_revision) == ("owner/rows", "test", "abc")
    assert (questions.dataset_type, questions.dataset_name) == ("custom", "questions.jsonl (held out)")
    text = made.text
    assert f"`someone/tiny` (revision `{COMMIT}`)" in text and "`llama3.2` (`https://example.org/a:b`)" in text
    assert (
        "- trained on: `owner/rows`, configuration `main`, split `train`, revision `abcdef`, format alpaca, 5 rows, at most 5, the first\n"
        in text
    )
    assert (
        "- trained on: `rows.jsonl`, format alpaca, 1,234 rows, 34 of them dropped (too long, or without an answer), 2 passes an epoch\n"
        in text
    )
    assert "| ce (cross-entropy, nats per token) | 2.0000 | 1.5000 |" in text
    assert f"from_pretrained('someone/tiny', revision='{COMMIT}'" in text and "here = 'me/mine'" in text


def test_local_questions_are_not_taken_for_the_held_out_rows(make_recipe, world):
    recipe = make_recipe(data__validation={"path": "held.jsonl"}, data__choices={"path": "questions.jsonl"}, teacher=None)
    summary = SUMMARY | {"validation": {"ce": 1.5, "accuracy": 0.75}}
    made = ModelCard(model_card(recipe, summary, find(str(world / "student"), "s"), (), {}))
    named = {r.metric_type: (r.dataset_name, r.task_type) for r in made.data.eval_results}
    assert named == {
        "cross_entropy": ("held.jsonl (held out)", "text-generation"),
        "accuracy": ("questions.jsonl (held out)", "multiple-choice"),
    }


def test_metrics_that_are_not_finite_are_no_results(make_recipe, world):
    summary = SUMMARY | {"validation": {"ce": 1.5, "perplexity": float("inf"), "forward_kl": float("nan")}}
    made = ModelCard(model_card(make_recipe(), summary, find(str(world / "student"), "s"), (), {}))
    assert [r.metric_type for r in made.data.eval_results] == ["cross_entropy"]


def test_local_folders_are_named_in_the_text_only(make_recipe, world):
    made = ModelCard(model_card(make_recipe(teacher=None), SUMMARY, find(str(world / "student"), "s"), (), {}))
    assert not {"base_model", "base_model_relation", "license", "datasets"} & made.data.to_dict().keys()
    assert f"Base: `{world / 'student'}`" in made.text and "licence of the base is not known" in made.text
    assert "distil" not in made.content.split("## Recipe")[0]


def test_new_weights_have_no_base(make_recipe):
    recipe = make_recipe(student={"architecture": {"model_type": "llama"}, "tokenizer": "builtin:skills", "method": "full"}, teacher=None)
    made = ModelCard(model_card(recipe, SUMMARY | {"validation": {}}, None, (), {}))
    assert made.data.library_name == "transformers" and made.data.base_model is None and made.data.eval_results is None
    assert "new random weights" in made.text and "None were measured." in made.text


@pytest.mark.parametrize("setting", [{"teacher": None}, {"loss__kd_ratio": 0}])
def test_a_student_without_a_teacher_has_no_metrics_of_another_s_teacher(make_recipe, world, setting):
    of_teacher = {"forward_kl": 0.25, "reverse_kl": 0.5, "top1_agreement": 0.75, "teacher_ce": 1.25, "teacher_entropy": 1.0}
    summary = {"before": {"ce": 2.0} | of_teacher, "validation": {"ce": 1.5, "entropy": 1.1, "accuracy": 0.5} | of_teacher}
    made = ModelCard(model_card(make_recipe(**setting), summary, find(str(world / "student"), "s"), (), {}))
    assert {r.metric_type for r in made.data.eval_results} == {"cross_entropy", "accuracy"}
    table = [line.split("|")[1].split("(")[0].strip() for line in made.text.splitlines() if line.startswith("|")]
    assert table == ["metric", "---", "ce", "entropy", "accuracy"] and "teacher" not in made.text.split("## Recipe")[0]
    assert "forward_kl" in summary["validation"]


@pytest.mark.parametrize("output_dir", ["../out/k", "runs/mine/../k/", "/tmp/k"])
def test_the_title_is_a_name_and_no_path(make_recipe, world, output_dir):
    made = ModelCard(model_card(make_recipe(output_dir=output_dir), SUMMARY, find(str(world / "student"), "s"), (), {}))
    assert made.text.strip().splitlines()[0] == "# k" and made.data.model_name == "k"


NASTY = "a: \"b\" 'c' `d` ```e``` | # {f} [g](h) \n---\n- i & <j> é \u2028 %k ~~l~~"


def test_names_that_users_choose_break_nothing(make_recipe, world, tmp_path):
    folder = tmp_path / NASTY.replace("/", "")
    shutil.copytree(world / "student", folder)
    recipe = make_recipe(output_dir=NASTY, student__model=str(folder), data__train={"path": NASTY, "split": NASTY, "revision": NASTY})
    made = ModelCard(model_card(recipe, SUMMARY, find(str(folder), "s"), (), {}))
    assert made.data.eval_results[0].metric_value == 1.5
    assert made.data["tags"] == ["llmkd", "lora"]
    lines = made.text.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("## ")] == ["Use", "Data", "Held-out", "Recipe"]
    fences = [line for line in lines if line.startswith("```")]
    assert len(fences) == 4 and fences[2] == "````yaml" and fences[3] == "````"
    inside = made.text.split("````yaml\n")[1].split("\n````")[0]
    (tmp_path / "again.yaml").write_text(inside)
    assert loader.load_recipe(tmp_path / "again.yaml") == recipe
    compile(made.text.split("```python\n")[1].split("\n```")[0], "snippet", "exec")


def use(made: ModelCard) -> dict:
    """Run the card's own Python."""
    names: dict = {}
    exec(made.text.split("```python\n")[1].split("\n```")[0], names)
    return names


def test_code_spans_and_escapes():
    assert code_span("a") == "`a`" and code_span("a`b") == "`` a`b ``" and code_span("``a\nb") == "``` ``a b ```"
    assert escape("a_b*c _d_") == r"a_b\*c \_d\_"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_snippet_loads_the_student(make_recipe, world, tmp_path, method):
    recipe = make_recipe(student__method=method, data__validation={"path": str(world / "held.jsonl")}, train__max_steps=2)
    summary = run(recipe)
    made = ModelCard.load(tmp_path / "out" / summary["output"] / "README.md")
    assert {r.metric_type for r in made.data.eval_results} >= {"cross_entropy", "perplexity", "forward_kl", "top1_agreement"}
    assert summary["before"]["ce"] != summary["validation"]["ce"]
    names = use(made)
    now = {k.replace(".default", ""): v for k, v in names["model"].state_dict().items()}
    assert all(torch.equal(v, now[k]) for k, v in weights(tmp_path / "out").items())
    assert len(names["tokenizer"]) == 640


@pytest.mark.parametrize(("type_", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_the_snippet_of_a_quantised_student_quantises_its_base(make_recipe, world, tmp_path, type_, layer):
    pytest.importorskip("bitsandbytes")
    plain = make_recipe(student__dtype="float32", train__max_steps=2)
    run(plain)
    recipe = dataclasses.replace(plain, student=dataclasses.replace(plain.student, quantization=Quantization(type=type_)))
    made = ModelCard(model_card(recipe, SUMMARY, find(str(world / "student"), "s"), (), {}))
    assert any(type(m).__name__ == layer for m in use(made)["model"].modules())
    assert f"quantised to {type_} by bitsandbytes during training" in made.text and "bitsandbytes 0." in made.text
