"""`llmkd sample`: each model's own greedy answers, one model in memory at a time, beside one another on the terminal and on a page."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkd.cli import main
from llmkd.commands.sample import MODELS, Answer, Asked, Samples, described, models_to_ask, refuse_unfit, sample
from llmkd.commands.sample_text import as_text
from llmkd.config import loader
from llmkd.config.recipe import Student, Teacher
from llmkd.data.prompts import Prompt
from llmkd.data.reading.skills import tokenizer
from llmkd.errors import UserError
from llmkd.models.load import LoadContext, load_teacher
from llmkd.models.saved_student import as_trained
from llmkd.training.run import run as train
from tests.conftest import plain_recipe
from tests.kit.sweep_report import Checked


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run with held-out rows, long enough trained that its student says something else."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "recipe.yaml").write_text(json.dumps(plain_recipe(world, folder / "run")))
    changes = {"data.validation": {"path": str(world / "held.jsonl")}, "validation.teacher_check": 0, "train.max_steps": 6}
    train(loader.load_recipe(folder / "recipe.yaml", changes | {"optim.warmup_steps": 0, "optim.lr": 0.1}))
    return folder / "run"


def greedy(settings: Teacher, texts: list[str], most: int) -> list[str]:
    """What transformers generates, in words."""
    tok, model = tokenizer(), load_teacher(settings, LoadContext(len(tokenizer()), "cpu"))
    asked = [torch.tensor([tok(text)["input_ids"]]) for text in texts]
    out = [model.model.generate(input_ids=ids, max_new_tokens=most, do_sample=False)[0, ids.shape[1] :].tolist() for ids in asked]
    return [tok.decode(ids[:-1] if ids[-1] == tok.eos_token_id else ids) for ids in out]


@pytest.mark.slow
def test_each_model_writes_its_own_text_to_the_runs_held_out_rows(run, world):
    found = sample(run, count=3, max_new_tokens=9)
    rows = [json.loads(line) for line in (world / "held.jsonl").read_text().splitlines()]
    assert list(found.models) == ["teacher", "before", "after"] and found.models["after"] == str(run / "adapter")
    assert found.sampling == {"temperature": 0.0, "max_new_tokens": 9, "seed": 0} and len(found.asked) == 3
    settings = {"teacher": Teacher(model=str(world / "adapter")), "before": Teacher(model=str(world / "student"))}
    settings |= {"after": as_trained(run / "adapter")}
    for one in found.asked:
        row = rows[int(one.place.rpartition(":")[2]) - 1]
        assert one.reference == row["output"] and f"### Instruction:\n{row['instruction']}\n" in one.prompt and one.teacher_prompt is None
        assert all(0 < answer.tokens <= 9 and (answer.finished or answer.tokens == 9) for answer in one.answers.values())
    for name, loaded in settings.items():
        assert [one.answers[name].text for one in found.asked] == greedy(loaded, [one.prompt for one in found.asked], 9)
    assert all(one.answers["before"] != one.answers["after"] for one in found.asked), "else nothing tells them apart"
    assert [row["model"] for row in found.summary()] == ["teacher", "before", "after"]


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(run, monkeypatch):
    import llmkd.models.load as load

    alive, most, real = [], [], load.load_teacher

    def watched(*args, **kwargs):
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        model = real(*args, **kwargs)
        alive.append(weakref.ref(model.base_model))
        return model

    monkeypatch.setattr(load, "load_teacher", watched)
    sample(run, count=1, max_new_tokens=1)
    assert most == [0, 0, 0]


def test_an_answer_that_ended_is_shown_without_its_end_token(run, monkeypatch):
    import llmkd.rollouts.generate as module

    tok, asked = tokenizer(), []
    ended = module.Completion((*tok("It is 7.", add_special_tokens=False)["input_ids"], tok.eos_token_id), True)
    monkeypatch.setattr(module, "generate", lambda model, prompts, sampling, ends, *rest: (asked.append(ends), [ended] * len(prompts))[1])
    (one,) = sample(run, count=1, models=("after",)).asked
    assert one.answers == {"after": Answer("It is 7.", len(ended.ids), True)} and tok.eos_token_id in asked[0]


@pytest.mark.slow
def test_prompts_of_a_file_on_the_terminal_on_a_page_and_as_json(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("Say <b>7</b>\nSay 8\nSay 9\n")
    words = ["sample", str(run), "--prompts", str(tmp_path / "p.txt"), "--count", "2", "--max_new_tokens", "5", "--models", "before,after"]
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*words, "--to", str(tmp_path / "new/s.html"), "--json", str(tmp_path / "s.json")]) == 0
    text, page, numbers = capsys.readouterr().out, (tmp_path / "new/s.html").read_text(), json.loads((tmp_path / "s.json").read_text())
    assert '<tr><td class="words" data-column="before, ' in page and ":is(:not(:first-child), .words)::before" in page, "named on a phone"
    assert list(numbers) == ["run", "sampling", "models", "asked"] and list(numbers["models"]) == ["before", "after"]
    assert [one["place"] for one in numbers["asked"]] == ["p.txt:1", "p.txt:2"] and "p.txt:2  (2 of 2)" in text
    assert Checked(page).rows and "Say &lt;b&gt;7&lt;/b&gt;" in page and "<b>7" not in page and "Say 9" not in page
    (line,) = [line for line in text.splitlines() if "-- before" in line][:1]
    assert "-- after" in line, "side by side"
    for one in numbers["asked"]:
        assert one["reference"] is None and all(answer["tokens"] <= 5 for answer in one["answers"].values())
    assert main([*words, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == numbers and "p.txt:2  (2 of 2)" in err
    assert main([*words, "--temperature", "2", "--json", "-"]) == 0 and json.loads(capsys.readouterr().out)["asked"] != numbers["asked"]


def shown(width: int, **answers: str) -> str:
    asked = Asked("here", "Ask", None, "owl", {name: Answer(text, 3, name != "after") for name, text in answers.items()})
    return as_text(Samples("run", {}, dict.fromkeys(answers, "x"), [asked]), width)


def test_answers_stand_side_by_side_where_there_is_room_and_else_below_one_another():
    wide, narrow = (shown(width, before="one two", after="three\nfour \x1b[2J").split("\n\n")[0].splitlines() for width in (90, 40))
    rows = ("-- reference", "-- before, 3 tokens", "-- after, 3 tokens, cut off"), ("owl", "one two", "three"), ("", "", "four \\x1b[2J")
    assert wide[3:] == ["".join(cell.ljust(31) for cell in row).rstrip() for row in rows]
    assert narrow[3:] == ["-- reference", "owl", "-- before, 3 tokens", "one two", "-- after, 3 tokens, cut off", "three", "four \\x1b[2J"]


def test_what_cannot_be_sampled_is_refused_before_a_model_is_loaded(run, world, tmp_path, capsys, monkeypatch):
    import llmkd.models.load as load

    monkeypatch.setattr(load, "load_teacher", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "long.txt").write_text("Say 7\n" + "owl " * 300 + "\n")
    cases = {
        ("no",): "no: no such folder; name a run's output_dir",
        (str(run), "--seed", "1"): "--seed: given without --temperature",
        (str(run), "--models", "befor"): "--models: found befor, expected one of teacher, before, after; did you mean before?",
        (str(run), "--temperature", "hot"): "--temperature: found hot, expected a number >= 0",
        (str(run), "--to", str(tmp_path)): f"--to: {tmp_path} is a folder; name a file",
        (str(run), "--json", "/proc/none/s.json"): "--json: /proc cannot be written to",
        (str(run), "--prompts", "none.txt"): "--prompts: none.txt: no such file; name a file of prompts",
        (str(run), "--prompts", str(tmp_path / "long.txt")): "long.txt:2: the prompt has",
        (str(tmp_path / "long.txt"),): "long.txt: is a file; name a run's output_dir",
        (str(tmp_path),): "holds neither adapter nor model",
        (str(world / "adapter"),): "adapter: is a model itself, and no run; name a run's output_dir",
        (str(run / "adapter"),): f"adapter: is a model itself, and no run; name the run: {run}",
    }
    for words, problem in cases.items():
        assert main(["sample", *words]) == 2
        assert problem in capsys.readouterr().err, words


def test_a_token_without_a_row_in_a_model_is_refused_in_the_prompt_and_in_the_teachers_context():
    ids = np.arange(5, dtype=np.int32)
    for own, theirs in ((ids, np.append(ids, 9)), (np.append(ids, 9), ids)):
        with pytest.raises(
            UserError, match=f"^p:1: contains the token {tokenizer().convert_ids_to_tokens(9)!r}, for which a model has no row"
        ):
            refuse_unfit([Prompt("p:1", own, theirs)], 9, {}, tokenizer())
    refuse_unfit([Prompt("p:1", ids, ids)], 9, {}, tokenizer())


def test_the_teacher_reads_its_context_and_the_student_does_not(run, tmp_path, monkeypatch):
    import llmkd.rollouts.generate as module

    shutil.copytree(run, tmp_path / "run")
    recipe = loader.read_placed(run / "recipe.yaml")
    recipe["data"]["teacher_context"] = "Be brief."
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(recipe))
    asked, tok = [], tokenizer()
    monkeypatch.setattr(
        module, "generate", lambda model, ids, *rest: (asked.append(tok.decode(ids[0])), [module.Completion((5,), False)])[1]
    )
    (one,) = sample(tmp_path / "run", count=1).asked
    assert one.teacher_prompt == f"Be brief.\n\n{one.prompt}" and asked == [one.teacher_prompt, one.prompt, one.prompt]


def test_every_teacher_that_can_write_is_asked_and_what_cannot_is_said(make_recipe, world, caches, capsys):
    several = [
        {"model": str(world / "adapter"), "weight": 2.0},
        {"cache": {"path": str(caches / "narrow")}},
        {"model": str(world / "teacher")},
    ]
    recipe = make_recipe(teacher=several)
    found = dict(models_to_ask(recipe, world / "adapter", MODELS))
    assert [(name, setting) for name, (setting, _) in found.items()] == [
        ("teacher.0", "teacher.0.model"),
        ("teacher.2", "teacher.2.model"),
        ("before", "student.model"),
        ("after", "sample"),
    ]
    assert "teacher.1: is a teacher cache, not a model that can be loaded; left out" in capsys.readouterr().err
    fresh = make_recipe(student={"architecture": {"model_type": "llama"}, "tokenizer": "builtin:skills", "method": "full"})
    assert list(dict(models_to_ask(fresh, world / "student", ("before", "after")))) == ["after"]
    assert "began with new random weights" in capsys.readouterr().err


def test_a_model_that_is_gone_can_be_left_out(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    recipe = loader.read_placed(run / "recipe.yaml")
    recipe["teacher"]["model"] = str(tmp_path / "gone")
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(recipe))
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "sample: teacher is not here; --models before,after leaves it out" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), "--models", "before,after", "--count", "1", "--max_new_tokens", "1"]) == 0


def test_a_run_without_held_out_rows_or_without_a_teacher_says_so(make_recipe, capsys):
    recipe = make_recipe(teacher=None, loss__kd_ratio=0.0, train__max_steps=2)
    train(recipe)
    with pytest.raises(UserError, match="no held-out rows .* give a file of prompts by --prompts"):
        sample(Path(recipe.output_dir))
    assert "the run had no teacher; left out" in capsys.readouterr().err


def test_models_that_have_changed_since_the_run_are_refused(world, run, tmp_path, monkeypatch):
    import llmkd.models.load as load

    monkeypatch.setattr(load, "load_teacher", lambda *a, **k: pytest.fail("a model was loaded"))
    for name in ("student", "adapter", "teacher"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.copytree(run, tmp_path / "run")
    recipe = loader.read_placed(run / "recipe.yaml")
    recipe["teacher"] |= {"model": str(tmp_path / "adapter"), "base": str(tmp_path / "teacher")}
    recipe["student"]["model"] = str(tmp_path / "student")
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(recipe))
    adapter = tmp_path / "adapter/adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(
        UserError, match=r"^sample: the teacher's adapter \(adapter_model.safetensors\) has changed since .* --models before,after"
    ):
        sample(tmp_path / "run", models=("teacher", "before"))
    (tmp_path / "student/generation_config.json").unlink()
    with pytest.raises(UserError, match=r"^sample: the student's base \(generation_config.json\) is gone since .* --models teacher,after"):
        sample(tmp_path / "run", models=("before",))


def test_a_student_of_fewer_layers_is_called_by_what_it_was_cut_from():
    """And not by the folder of the cache where it lies."""
    wanted = {name: ("", Teacher(model=f"/cache/{name}")) for name in ("teacher", "before", "after")}
    plain = {name: f"/cache/{name}" for name in wanted}
    assert described(Student(model="m"), wanted) == plain
    assert described(Student(model="m", layers=(0, 2)), wanted) == plain | {"before": "layers 0, 2 of m"}
    assert described(Student(model="m", layers=(1,)), {"after": wanted["after"]}) == {"after": "/cache/after"}
