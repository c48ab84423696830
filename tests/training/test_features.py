"""loss.features in runs: what it starts from and says, what it refuses, and that nothing but the student leaves with the student."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from llmkd.cli import main
from llmkd.commands.sweep import run_sweep
from llmkd.config.recipe import Optim
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.training import build, loop, optim
from llmkd.training.features import sample_batches
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, said, weights
from tests.training.test_resume import LONG, comparable, unfinish

MIDDLE, BOTH = {"loss__features": {"weight": 0.7}}, {"loss__features": {"layers": [[1, 1], [2, 2]], "distance": "cosine"}}
MAP = {f"terms.features.maps.0.{name}" for name in ("weight", "bias")}
KEPT = MAP | {"terms.features.scales"}


def of_checkpoint(out, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step}/student.safetensors")


def records(out) -> list[dict]:
    return [record for record in read_jsonl(out / "metrics.jsonl") if "loss" in record]


def test_a_run_says_what_share_is_left_learns_it_and_exports_nothing_of_it(trained, make_recipe, world, tmp_path, capsys, monkeypatch):
    """Map and share against numpy's least squares on transformers' own hidden states, which are without dropout; the share on targets that the
    map has not seen."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    started, start = [], build.start_features
    monkeypatch.setattr(
        build,
        "start_features",
        lambda features, term, *rest: (start(features, term, *rest), started.append(copy.deepcopy(term.maps[0])))[0],
    )
    shutil.copytree(world / "student", tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    settings = LONG | MIDDLE | {"student__model": str(tmp_path / "student")}
    exported = trained("out", **settings)
    recipe = make_recipe(**settings)
    prepared = prepare(recipe)
    student = LlamaForCausalLM.from_pretrained(recipe.student.model)
    adapter = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tmp_path.parent / recipe.teacher.model[:-7] / "teacher"), recipe.teacher.model
    )
    states = []
    for batches in sample_batches(prepared.train, range(20), 16, 4, "cpu"):
        both = ([], [])
        for batch in batches:
            for model, view, kept in ((student, batch.student, both[0]), (adapter, batch.teacher, both[1])):
                with torch.no_grad():
                    kept.append(model(**view.inputs, output_hidden_states=True).hidden_states[1].flatten(0, 1)[view.rows_N].numpy())
        states.append([np.concatenate(one) for one in both])
    (x, y), (x_rest, y_rest) = states
    one = np.ones((len(x_rest), 1))
    solution = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], 1), y, rcond=None)[0]
    share = ((np.concatenate([x_rest, one], 1) @ solution - y_rest) ** 2).sum() / ((y_rest - y_rest.mean(0)) ** 2).sum()
    assert_close(started[0].weight.detach(), torch.from_numpy(solution[:-1].T), rtol=1e-8, atol=1e-9)
    assert_close(started[0].bias.detach(), torch.from_numpy(solution[-1]), rtol=1e-8, atol=1e-9)
    (first,) = [record for record in read_jsonl(tmp_path / "out/metrics.jsonl") if "unexplained" in record]
    assert first == {"step": 0, "unexplained": {"student 1, teacher 1": pytest.approx(share, rel=1e-9)}}
    lines = said(capsys).splitlines()
    assert "student: 27,856 parameters, 2,176 of them train, and 408 of maps that are no part of it; 6 steps" in lines
    line = next(line for line in lines if line.startswith("features: "))
    assert f"on {len(x_rest)} targets: student 1, teacher 1: {share:.1%}" in line and "teacher's variance unexplained" in line
    every = records(tmp_path / "out")
    for record in every:
        assert record["loss"] == pytest.approx(0.5 * record["ce"] + 0.5 * record["kd"] + 0.7 * record["features"], rel=1e-12)
    assert 0 < every[0]["features"] < 1, "about the share that is left, not far from it"
    saved = of_checkpoint(tmp_path / "out", 6)
    assert {name for name in saved if name.startswith("terms.")} == KEPT
    assert saved["terms.features.scales"].item() == pytest.approx(y.var(0).mean(), rel=1e-9)
    assert not [name for name in exported if "terms" in name or "features" in name]
    assert main(["export", str(tmp_path / "out")]) == 0
    assert (
        load_file(tmp_path / "out/merged/model.safetensors").keys()
        == load_file(tmp_path.parent / recipe.student.model / "model.safetensors").keys()
    )
    plain = PeftModel.from_pretrained(student, tmp_path / "out/adapter"), LlamaForCausalLM.from_pretrained(tmp_path / "out/merged")
    for one, folder, name in zip(plain, ("adapter", "merged"), ("adapter_model.safetensors", "model.safetensors"), strict=True):
        one.save_pretrained(tmp_path / "again" / folder)
        assert (tmp_path / "again" / folder / name).read_bytes() == (tmp_path / "out" / folder / name).read_bytes(), (
            "as plain tools write it"
        )
    assert not [path for folder in ("adapter", "merged") for path in (tmp_path / "out" / folder).iterdir() if "feature" in path.name]


@pytest.mark.parametrize("step", [4])
def test_it_resumes_bit_for_bit_and_measures_nothing_again(trained, make_recipe, tmp_path, monkeypatch, step):
    whole = trained("whole", **LONG, **BOTH)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    unfinish(tmp_path / "again", step)
    monkeypatch.setattr(build, "start_features", lambda *_: pytest.fail("measured again"))
    run(make_recipe("again", **LONG, **BOTH), resume=True)
    assert distance(weights(tmp_path / "again"), whole) == 0
    assert comparable(tmp_path / "again") == comparable(tmp_path / "whole")
    assert distance(of_checkpoint(tmp_path / "again", 6), of_checkpoint(tmp_path / "whole", 6)) == 0


def test_neither_micro_batches_nor_packing_nor_recomputing_matter(trained, tmp_path):
    """And with scale: none the distances are as they are."""
    unscaled = {"loss__features": BOTH["loss__features"] | {"scale": "none"}}
    common = {"checkpoint__every": 5, "student__method": "full", "validation__teacher_check": 0} | unscaled
    trained("plain", **common)
    plain = of_checkpoint(tmp_path / "plain", 5)
    assert plain["terms.features.scales"].tolist() == [1, 1]
    ways = {
        "one": {"train__micro_batch_size": 1},
        "packed": {"data__packing": True, "train__micro_batch_size": 8},
        "recomputed": {"student__gradient_checkpointing": True, "train__micro_batch_size": 3},
    }
    for name, way in ways.items():
        trained(name, **common, **way)
        assert distance(of_checkpoint(tmp_path / name, 5), plain) < 1e-9, name
    assert any(name.startswith("terms.features.maps.1") for name in plain)


def test_with_kd_ratio_0_the_teacher_is_still_asked(trained, tmp_path):
    one = {"train__max_steps": 2, "loss__kd_ratio": 0, "student__method": "full"}
    with_it = trained("with", **one, **MIDDLE)
    assert not [name for name in with_it if "terms" in name or "features" in name]
    record = records(tmp_path / "with")[-1]
    assert "kd" not in record and record["loss"] == pytest.approx(record["ce"] + 0.7 * record["features"], rel=1e-12)
    assert distance(with_it, trained("without", **one)) > 1e-6
    below = distance(*({k: v for k, v in one.items() if "layers.0" in k} for one in (with_it, weights(tmp_path / "without"))))
    assert below > 1e-6


def test_a_student_that_is_its_teacher_has_nothing_to_learn(trained, world, tmp_path, capsys):
    """Layer by layer, without a map: 0, exactly, and so no gradient; and with one, that is said."""
    itself = {
        "teacher__model": str(world / "student"),
        "student__lora__dropout": 0.0,
        "loss__kd_ratio": 1.0,
        "train__max_steps": 1,
        "optim__warmup_steps": None,
    }
    trained("out", **itself, loss__features={"layers": "uniform", "projection": "none"})
    (record,) = records(tmp_path / "out")
    assert record["features"] == 0 and record["kd"] < 1e-12 and record["grad_norm"] < 1e-9
    trained("mapped", **itself, loss__features={"layers": [[1, 1]]})
    lines = said(capsys).splitlines()
    assert [
        line
        for line in lines
        if line.startswith("note: loss.features: a linear map of the untouched student's hidden states explains 100%")
    ]
    assert [line for line in lines if line.startswith("features: the untouched student leaves this share") and line.endswith("0.0%")]
    assert records(tmp_path / "mapped")[0]["features"] < 1e-12


def test_its_maps_have_no_decay_and_a_rate_of_their_own():
    parameters = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("w", "terms.features.maps.0.weight", "terms.other.weight")}
    rates = {"terms.features.maps.0.weight": 0.3, "terms.other.weight": None}
    optimizer = optim.build(Optim(lr=0.1, weight_decay=0.5), parameters, rates)
    student = SimpleNamespace(parameters=parameters, optimizer=optimizer, learning_rate=lambda step: 0.02, max_grad_norm=None)
    for p in parameters.values():
        p.grad = torch.ones(2, 2)
    loop.optimizer_step(student, 1, torch.tensor(1.0), torch.tensor(0.0))
    moved = [1 - p[0, 0].item() for p in parameters.values()]  # AdamW's first step is its rate, beside the decay
    assert moved == pytest.approx([0.02 + 0.02 * 0.5, 0.06, 0.02], rel=1e-4)


def test_a_named_teacher_of_several_gives_its_own_states(trained, world, make_recipe, tmp_path):
    """In the ensemble, and where a source names that teacher: the states are the named one's, at every target."""
    teachers = [{"name": "a", "model": str(world / "stranger")}, {"name": "b", "model": str(world / "adapter")}]
    rows = {"path": str(world / "train.jsonl"), "limit": 12}
    common = {"teacher": teachers, "loss__features": {"teacher": "b"}, "loss__kd_ratio": 0, "train__max_steps": 2, "train__epochs": None}
    trained("routed", **common, data__train=[rows | {"teacher": "b"}, rows])
    trained("alone", **common | {"teacher": {"model": teachers[1]["model"]}, "loss__features": {}}, data__train=[rows, rows])
    one, other = ([record["features"] for record in records(tmp_path / name)] for name in ("routed", "alone"))
    assert one == pytest.approx(other, rel=1e-12)
    with pytest.raises(UserError, match=r"data.train.1.teacher: found 'a', and on these rows nobody would ask 'b' for its hidden states"):
        make_recipe(**common, data__train=[rows, rows | {"teacher": "a"}])


def changed_config(world, to, model: str, **changes) -> str:
    shutil.copytree(world / model, to)
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | changes))
    return str(to)


@pytest.mark.parametrize(
    "features, words",
    [
        ({"layers": [[1, 1], [3, 1]]}, "loss.features.layers: found layer 3 of the student, which has 2 layers"),
        ({"layers": [[2, 5]]}, "loss.features.layers: found layer 5 of the teacher, which has 2 layers"),
        ({"layers": [[1, 2], [1, 2]]}, r"loss.features.layers: found the pair \[1, 2\] twice; give it once"),
        (
            {"projection": "none"},
            "loss.features.projection: found none, and the student's states are 16 wide, the teacher's 24; use linear",
        ),
        (
            {"init": "identity"},
            "loss.features.init: found identity, and the student's states are 16 wide, the teacher's 24; use least_squares",
        ),
    ],
)
def test_what_the_models_do_not_have_is_refused_before_they_are_loaded(make_recipe, monkeypatch, features, words):
    monkeypatch.setattr("llmkd.training.build.load_models", lambda *args: pytest.fail("loaded"))
    with pytest.raises(UserError, match=rf"^{words}"):
        run(make_recipe(loss__features=features))


def test_too_few_targets_for_a_map_are_refused_before_a_model_is_loaded(make_recipe, monkeypatch, trained, tmp_path):
    few = {"data__train__limit": 2, "train__batch_size": 2, "optim__warmup_steps": None}
    with monkeypatch.context() as patch:
        patch.setattr("llmkd.training.build.load_models", lambda *args: pytest.fail("loaded"))
        words = "found least_squares, but a map of states 16 wide needs 51 targets, and the training data .* has 18; use xavier"
        with pytest.raises(UserError, match=rf"^loss.features.init: {words}$"):
            run(make_recipe(**few, loss__features={}))
    trained("out", **few, loss__features={"init": "xavier"})
    assert not [record for record in read_jsonl(tmp_path / "out/metrics.jsonl") if "unexplained" in record]


def test_states_that_do_not_vary_are_refused(make_recipe, world, tmp_path):
    still = tmp_path / "still"
    shutil.copytree(world / "teacher", still)
    from safetensors.torch import save_file

    tensors = {name: t * 0 if "embed" in name else t for name, t in load_file(still / "model.safetensors").items()}
    save_file(tensors, still / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^loss.features.layers: found \[0, 0\], but the hidden states there are the same at every target"):
        run(make_recipe(teacher__model=str(still), loss__features={"layers": [[0, 0]]}))


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"loss.features.layers": [[1, 3]]}, "loss.features.layers: found layer 3 of the teacher, which has 2 layers"),
        (
            {"loss.features.weight": 0.5},
            "loss.features.init: found least_squares, but a map .* 16 wide needs 51 targets, and .* has 18;",
        ),
        ({"loss.attention.layers": [[1, 3]]}, "loss.attention.layers: found layer 3 of the teacher, which has 2 layers"),
    ],
)
def test_the_other_arms_of_a_sweep_are_looked_at_before_a_model_is_loaded(world, tmp_path, monkeypatch, capsys, setting, words):
    loaded = []

    def load(students, *_):
        loaded.append(len(students))
        raise UserError("enough")

    monkeypatch.setattr("llmkd.training.build.load_models", load)
    base = plain_recipe(world, tmp_path / "unused")
    base["data"]["train"]["limit"], base["train"]["batch_size"] = 2, 2
    del base["optim"]["warmup_steps"]
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    sweep = {"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "arms": {"plain": {}, "other": setting}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    assert re.search(rf"(?m)^given up: other: {words}", said(capsys)) and loaded == [1]


def test_few_long_examples_give_no_map_that_was_not_computed(make_recipe, trained, tmp_path):
    """Of two examples one is kept to measure what the map leaves, and the other alone has too few targets for it. Of one none is kept."""
    rows = [{"instruction": f"Say {i}", "output": " ".join(["so"] * 13)} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"data__train__path": str(tmp_path / "rows.jsonl"), "optim__warmup_steps": None, "train__max_steps": 1, "train__epochs": None}
    with pytest.raises(UserError, match="^loss.features.init: .* 16 wide needs 34 targets, and the training examples .* have 27 "):
        trained("two", **few, loss__features={})
    trained("random", **few, loss__features={"init": "xavier"})
    with pytest.raises(UserError, match="^loss.features: the teacher has one training example, but"):
        trained("one", **few, loss__features={"init": "xavier"}, data__train__limit=1)
