"""Students of some of their base's layers: equal to a model built by hand from those layers, an ordinary model for plain tools, or refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmkd.config import loader
from llmkd.config.recipe import LayerChoice, Student
from llmkd.errors import UserError
from llmkd.model_folder.files import find
from llmkd.model_folder.layers import write_layers
from llmkd.models import depth, pretrained
from llmkd.models.block_influence import block_influence, most_influential
from llmkd.training.run import run
from tests.conftest import plain_recipe
from tests.kit.families import tiny

FOUR = dict.fromkeys(("num_hidden_layers", "n_layer"), 4)
KEPT = (0, 2, 3)
IDS = torch.tensor([[5, 9, 3, 40, 41, 77, 8, 8, 30, 2, 60, 11]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """From a family to the folder of a tiny model of it with four layers."""
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family, **FOUR).save_pretrained(made[family])
        return made[family]

    return of


def by_hand(whole: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """The model in memory with these layers alone; settings with an entry for each layer are cut by their names."""
    body = whole.transformer if hasattr(whole, "transformer") else whole.model
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, nn.ModuleList([getattr(body, name)[i] for i in kept]))
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(given := getattr(whole.config, key, None), list):
            setattr(whole.config, key, [given[i] for i in kept])
    whole.config.num_hidden_layers = len(kept)
    return whole


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text", "smollm3"])
def test_a_cut_model_is_the_one_built_by_hand_and_plain_transformers_load_it(folder, family):
    files = depth.cut(find(str(folder(family)), "student.model"), KEPT)
    plain = AutoModelForCausalLM.from_pretrained(files.base, dtype="auto").eval()
    whole = AutoModelForCausalLM.from_pretrained(folder(family), dtype="auto").eval()
    with torch.no_grad():
        full = whole(input_ids=IDS, use_cache=False).logits
        expected = by_hand(whole, KEPT)(input_ids=IDS, use_cache=False).logits
        ours = pretrained.load_pretrained(files.base, "student.model").eval()
        for model in (plain, ours):
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected) and not torch.equal(full, expected)
        cached = plain(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        last = plain(input_ids=IDS[:, -1:], past_key_values=cached).logits[:, -1]
        torch.testing.assert_close(last, expected[:, -1])
    assert cached.get_seq_length() == IDS.shape[1] and plain.config.num_hidden_layers == 3
    if family == "gemma3_text":
        before = json.loads((folder(family) / "config.json").read_text())["layer_types"]
        assert files.config["layer_types"] == [before[i] for i in KEPT]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen3_next", "layer 3 is not like layer 0 in linear_attn"),
        ("jamba", "layer 1 is not like layer 0 in feed_forward"),
        ("deepseek_v2", "layer 1 is not like layer 0 in mlp"),
        ("diffllama", "layer 2 would not compute as it did (self_attn.lambda_init)"),
        ("minicpm3", "scale_depth makes what a layer computes depend on its place"),
        ("gemma3", "more parts than one stack of layers"),
        ("bart", "does not say how many layers"),
    ],
)
def test_families_whose_layers_are_not_alike_are_refused(folder, family, said):
    settings = Student(model=str(folder(family)), layers=KEPT, method="full")
    with pytest.raises(UserError) as info:
        depth.find_student(settings)
    (problem,) = info.value.problems
    assert problem.startswith("student.layers: ") and said in problem and "leave it out" in problem


def test_layers_that_depend_on_their_place_are_refused(folder, tmp_path):
    for change, said in (
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx makes"),
        ({"n_layer": 5}, "expected one list of 5"),
        ({"n_layer": None}, "does not say how many layers"),
    ):
        place = shutil.copytree(folder("gpt2"), tmp_path / str(len(list(tmp_path.iterdir()))))
        config = json.loads((place / "config.json").read_text()) | change
        (place / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=said):
            depth.find_student(Student(model=str(place), layers=KEPT))


def test_every_tensor_keeps_its_bytes_whatever_the_files_are(folder, tmp_path):
    before = load_file(folder("llama") / "model.safetensors")
    wanted = {}
    for name, value in before.items():
        parts = name.split(".")
        if "layers" not in parts:
            wanted[name] = value
        elif int(parts[2]) in KEPT:
            wanted[".".join([*parts[:2], str(KEPT.index(int(parts[2]))), *parts[3:]])] = value
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder("llama"), dtype="auto").save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for source in (folder("llama"), sharded):
        to = tmp_path / f"to-{source.name}"
        to.mkdir()
        config = json.loads((source / "config.json").read_text())
        write_layers(source, to, config, KEPT, 4, "student.model")
        found = load_file(to / "model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert not (to / "model.safetensors.index.json").exists()


def test_numbers_that_cannot_be_are_refused_by_the_configuration_alone(world):
    def kept(layers):
        files = find(str(world / "student"), "student.model")
        return depth.kept_of(Student(model=str(world / "student"), layers=layers), files)

    assert kept((1,)) == (1,) and kept(LayerChoice(count=1, by="even")) == (0,) and kept(LayerChoice(count=1)) is None
    for layers, said in (
        ((0, 2), "found layer 2, but student.model has 2 layers, 0 to 1"),
        ((0, 1), "keeps all 2 layers"),
        (LayerChoice(count=3), "student.layers.count: found 3, but student.model has 2 layers"),
        (LayerChoice(count=2), "keeps all 2 layers"),
        (LayerChoice(count=2, by="even"), "keeps all 2 layers"),
    ):
        with pytest.raises(UserError, match=said):
            kept(layers)
    with pytest.raises(UserError, match=r"student.model is an adapter.*merge it first"):
        depth.find_student(Student(model=str(world / "adapter"), layers=(0,)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student.layers": [1, 0]}, "student.layers: found [1, 0], expected each number once, in ascending order"),
        ({"student.layers": [1, 1]}, "expected each number once"),
        ({"student.layers": []}, "found an empty list"),
        ({"student.layers": [-1]}, "expected a number greater than or equal to 0"),
        ({"student.layers": {"count": 1, "by": "evn"}}, "did you mean even?"),
        ({"student.layers": [0], "push_to_hub.repo": "a/b"}, "push_to_hub: set with student.layers and an adapter"),
        (
            {"student.layers": [0], "student.model": None, "student.architecture": {"model_type": "llama"}, "student.method": "full"},
            "new weights (student.architecture) have no layers",
        ),
    ],
)
def test_settings_that_contradict_are_refused(world, tmp_path, changes, said):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    with pytest.raises(UserError) as info:
        loader.load_recipe(path, changes)
    assert any(said in problem for problem in info.value.problems), info.value.problems


@pytest.mark.parametrize(
    ("count", "of", "numbers"),
    [(1, 5, (0,)), (2, 5, (0, 4)), (3, 5, (0, 2, 4)), (4, 6, (0, 2, 3, 5)), (6, 12, (0, 2, 4, 7, 9, 11)), (5, 6, (0, 1, 3, 4, 5))],
)
def test_even_numbers_begin_with_the_first_and_end_with_the_last(count, of, numbers):
    assert depth.evenly(count, of) == numbers


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_block_influence_is_that_of_float64_loops_over_hidden_states(folder, family):
    model = AutoModelForCausalLM.from_pretrained(folder(family), dtype="auto").eval()
    examples = [IDS[0], IDS[0, 3:8], IDS[0, :1]]
    found = block_influence(model, examples)
    assert not any(module._forward_hooks for module in model.modules())
    cosines = [[] for _ in range(4)]
    for ids in examples:
        body = model.transformer if hasattr(model, "transformer") else model.model
        norm = "ln_f" if hasattr(body, "ln_f") else "norm"
        final, identity = getattr(body, norm), nn.Identity()
        setattr(body, norm, identity)  # or the last of the hidden states would be normed
        states = [x[0].detach().numpy().astype(np.float64) for x in model(input_ids=ids[None], output_hidden_states=True).hidden_states]
        setattr(body, norm, final)
        for layer in range(4):
            for t in range(len(ids)):
                a, b = states[layer][t], states[layer + 1][t]
                cosines[layer].append(float(a @ b) / np.sqrt(float(a @ a) * float(b @ b)))
    np.testing.assert_allclose(found, [1 - np.mean(one) for one in cosines], rtol=1e-9, atol=1e-12)


def test_the_most_influential_layers_are_kept_in_their_order():
    assert most_influential([0.1, 0.5, 0.2, 0.5], 2) == (1, 3) and most_influential([0.9, 0.1, 0.2], 2) == (0, 2)
    assert most_influential([0.5, 0.5, 0.5], 2) == (0, 1)


def test_a_damaged_smaller_model_is_made_again(folder, caplog):
    whole = find(str(folder("qwen3")), "student.model")
    files = depth.cut(whole, (1, 2))
    path = files.base / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-8] + bytes(8))
    assert depth.cut(whole, (1, 2)).base == files.base and path.read_bytes() == raw
    assert "has changed since llmkd wrote it" in caplog.text and "it is written again" in caplog.text


def test_an_adapter_is_on_a_base_beside_it_that_plain_tools_load(world, make_recipe, tmp_path):
    from peft import PeftModel

    from llmkd.commands.export import export

    recipe = make_recipe(student__layers=[1], train__epochs=1)
    summary = run(recipe)
    out = tmp_path / "out"
    assert summary["layers"] == [1] and (out / "base").is_dir()
    named = json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((out / "base").resolve())
    shutil.rmtree(depth.model_cache() / "models")  # nothing is left of what the run was made from but the run
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named, dtype="auto"), out / "adapter").eval()
    assert plain.get_base_model().config.num_hidden_layers == 1
    hand = by_hand(AutoModelForCausalLM.from_pretrained(world / "student", dtype="auto"), (1,)).eval()
    with plain.disable_adapter(), torch.no_grad():
        assert torch.equal(plain(input_ids=IDS, use_cache=False).logits, hand(input_ids=IDS, use_cache=False).logits)
    merged = AutoModelForCausalLM.from_pretrained(export(out), dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    card = (out / "adapter/README.md").read_text()
    assert f"- Base: layer 1 of `{world / 'student'}`" in card and f"from_pretrained({named!r}" in card
    again = run(
        make_recipe("again", student__model=str(out / "adapter"), student__lora=None, train__batch_size=64, optim__warmup_steps=0)
    )  # trained further
    assert again["steps"] == 1


def test_layers_by_influence_are_measured_once_recorded_and_resumed(world, make_recipe, tmp_path, caplog, monkeypatch):
    changes = {"student__layers": {"count": 1}, "student__method": "full", "train__max_steps": 4, "checkpoint__every": 2}
    summary = run(make_recipe("whole", **changes))
    assert "student.layers: block influence on 37 training examples: 0: " in caplog.text
    kept = summary["layers"]
    assert json.loads((tmp_path / "whole/identity.json").read_text())["the layers of the student"] == str(kept[0])
    part = make_recipe("part", **changes)
    run(part)
    shutil.rmtree(tmp_path / "part/model")
    (tmp_path / "part/summary.json").unlink()
    shutil.rmtree(tmp_path / "part/checkpoints/step-4")
    monkeypatch.setattr(depth, "choose_layers", lambda *given: pytest.fail("measured again"))
    assert run(part, resume=True)["layers"] == kept
    assert torch.equal(
        *(load_file(tmp_path / name / "model/model.safetensors")["model.layers.0.mlp.up_proj.weight"] for name in ("whole", "part"))
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "part/model")
    assert model.config.num_hidden_layers == 1
    with pytest.raises(UserError, match="student.layers"):
        run(make_recipe("part", **changes | {"student__layers": [kept[0]]}), resume=True)
