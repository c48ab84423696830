"""The parameters that train, for every kind of student: exactly its own, whatever else is in the model."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from llmkd.batch import View
from llmkd.config.recipe import Lora, Student, Teacher
from llmkd.errors import UserError
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.model_folder.files import find
from llmkd.models import pretrained, saved_student
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, load_models, load_teacher
from llmkd.models.lora import refuse_missing_modules
from tests.conftest import distance
from tests.kit.models import load_student

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load(path, **changes) -> LanguageModel:
    return load_student(Student(model=str(path), **changes), 640, "cpu", 0)


def touched(model: LanguageModel) -> set[str]:
    """The base's modules whose adapters, or copies, train."""
    return {part for name in model.trainable() for part in name.split(".") if part in ALL | {"lm_head", "embed_tokens", "norm"}}


LINEAR = "The model's linear modules are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"

VARIANTS = {
    "all-linear": (Lora(), ALL),
    "a list": (Lora(target_modules=("q_proj", "v_proj")), {"q_proj", "v_proj"}),
    "an expression": (Lora(target_modules=r".*\.1\.mlp\.(up|down)_proj"), {"up_proj", "down_proj"}),
    "rslora": (Lora(rslora=True), ALL),
    "dora": (Lora(dora=True), ALL),
    "the head": (Lora(target_modules=("q_proj", "lm_head")), {"q_proj", "lm_head"}),
    "a copy of the head": (Lora(target_modules=("q_proj",), modules_to_save=("lm_head",)), {"q_proj", "lm_head"}),
    "a copy of the embedding": (Lora(target_modules=("q_proj",), modules_to_save=("embed_tokens",)), {"q_proj", "embed_tokens"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_adapter_trains(world, variant, tmp_path):
    lora, expected = VARIANTS[variant]
    model = load(world / "student", lora=lora)
    assert touched(model) == expected
    assert all(any(mark in name for mark in ("lora_", "modules_to_save")) for name in model.trainable())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.05, weight_decay=0.1)
    view, labels_N = View({"input_ids": torch.arange(20).reshape(2, 10)}, torch.arange(0, 20, 2)), torch.arange(10)
    for _ in range(3):
        fused_loss(model.hidden(view), model.head, labels_N, Objective(), chunk=3)[0].backward()
        assert all(p.grad is not None for p in model.trainable().values())
        assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    own_NV = model.eval().base_model(**view.inputs, use_cache=False).logits.flatten(0, 1)[view.rows_N, :640]
    assert_close(model.head.logits(model.hidden(view)), own_NV, rtol=1e-12, atol=1e-12)

    saved_student.save(model, tmp_path / "adapter", Student(), {})
    again = load_teacher(Teacher(model=str(tmp_path / "adapter")), LoadContext(640, "cpu"))
    with torch.no_grad():
        assert_close(again.head.logits(again.hidden(view)), own_NV.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lora", [Lora(rank=3, alpha=7.0), Lora(rank=3, alpha=7.0, rslora=True)], ids=["plain", "rslora"])
def test_an_update_is_alpha_over_rank(world, lora):
    model = load(world / "student", lora=dataclasses.replace(lora, target_modules=("up_proj",)))
    for name, layer in model.base_model.named_modules():
        if name.endswith("1.mlp.up_proj"):
            x = torch.linspace(-1, 1, layer.base_layer.in_features, dtype=torch.float64)
            A, B = layer.lora_A["default"].weight, torch.nn.init.normal_(layer.lora_B["default"].weight)
            with torch.no_grad():
                expected = layer.base_layer.weight @ x + 7 / (3**0.5 if lora.rslora else 3) * (B @ (A @ x))
                assert_close(layer(x[None])[0], expected, rtol=1e-12, atol=1e-12)
            return
    raise AssertionError("no such layer")


def test_full_training_trains_every_weight(world):
    model = load(world / "student", method="full")
    assert model.trainable().keys() == dict(model.model.named_parameters()).keys()


@pytest.mark.parametrize(
    "lora, words",
    [
        (Lora(target_modules=("q_porj",)), f"student.lora.target_modules: the model has no module 'q_porj'; did you mean q_proj. {LINEAR}"),
        (Lora(target_modules="all-liner"), "student.lora.target_modules: the model has no module 'all-liner'; did you mean all-linear"),
        (
            Lora(modules_to_save=("lm_haed",)),
            f"student.lora.modules_to_save: the model has no module 'lm_haed'; did you mean lm_head. {LINEAR}",
        ),
        (
            Lora(target_modules=("q_proj", "vproj")),
            f"student.lora.target_modules: the model has no module 'vproj'; did you mean v_proj. {LINEAR}",
        ),
        (
            Lora(target_modules=("q_proj", "xyz")),
            "student.lora.target_modules: the model has no module 'xyz'; leave it out, or name another",
        ),
    ],
)
def test_modules_that_are_not_there_are_refused(world, lora, words, monkeypatch):
    """When the model is there, and before its weights, or the teacher's, are loaded."""
    with pytest.raises(UserError, match=words):
        load(world / "student", lora=lora)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=words):
        load_models(
            [Student(model=str(world / "student"), lora=lora)],
            [("teacher", Teacher(model=str(world / "teacher")))],
            LoadContext(640, "cpu", seed=0),
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_that_are_there_are_found_without_weights(world, variant):
    refuse_missing_modules(Student(model=str(world / "student"), lora=VARIANTS[variant][0]), find(str(world / "student"), "student.model"))


def test_an_adapter_is_trained_on_from_where_it_stands(world, trained, tmp_path):
    first = trained("first", **{"student.lora.rank": 3, "teacher": None})
    second = trained(
        "second", **{"student.model": str(tmp_path / "first/adapter"), "student.lora": None, "teacher": None, "optim.lr": 1e-12}
    )
    assert 0 < distance(first, second) < 1e-9
    config = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert config["r"] == 3 and config["base_model_name_or_path"] == str(world / "student")
    assert json.loads((tmp_path / "second/summary.json").read_text())["output"] == "adapter"
    assert "lora: null" in (tmp_path / "second/recipe.yaml").read_text()


def test_the_steps_after_an_adapter_are_those_of_one_long_run_with_a_fresh_optimizer(world, make_recipe, trained, tmp_path):
    """Gradients through an adapter that was loaded equal those through the same adapter in memory."""
    trained("first", teacher=None)
    model = load(tmp_path / "first/adapter")
    fresh = load(world / "student", lora=Lora(rank=4))
    saved = load_file(tmp_path / "first/adapter/adapter_model.safetensors")
    for name, p in fresh.trainable().items():
        p.data.copy_(saved[name.replace(".default", "")])
    view, labels_N = View({"input_ids": torch.arange(20).reshape(2, 10)}, torch.arange(0, 20, 2)), torch.arange(10)
    for m in (model, fresh):
        fused_loss(m.hidden(view), m.head, labels_N, Objective(), chunk=3)[0].backward()
    assert model.trainable().keys() == fresh.trainable().keys()
    for name, p in model.trainable().items():
        assert_close(p.grad, fresh.trainable()[name].grad, rtol=1e-12, atol=1e-14)


def test_an_adapter_of_another_hand_works(world, tmp_path):
    """No record of ours beside it, made by PEFT alone, with its base's folder moved since."""
    shutil.copytree(world / "adapter", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/away"}))
    with pytest.raises(UserError, match="trained on a base that is not here"):
        load(tmp_path / "theirs")
    model = load(tmp_path / "theirs", base=str(world / "teacher"))
    assert touched(model) == ALL
    assert model.model.peft_config["default"].base_model_name_or_path == str(world / "teacher")


def test_a_recipe_that_contradicts_the_adapter_is_refused(world):
    with pytest.raises(UserError, match=r"student.lora.rank: found 7, but the adapter .* has 4; leave student.lora out"):
        load(world / "adapter", lora=Lora(rank=7))
    with pytest.raises(UserError, match=r"student.lora.target_modules: found \('q_proj',\), but the adapter .* has \["):
        load(world / "adapter", lora=Lora(rank=4, target_modules=("q_proj",)))
    with pytest.raises(UserError, match=r"student.lora.rslora: found True, but the adapter .* has False"):
        load(world / "adapter", lora=Lora(rank=4, rslora=True))
    with pytest.raises(UserError, match="student.method: found full, and .* is an adapter"):
        load(world / "adapter", method="full")


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_adapter_that_is_no_change_of_weights_is_refused(world, tmp_path, who):
    """A prompt that is put before the input would be left out without a word."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world / "teacher")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match=f"{who}.model: .*PROMPT_TUNING"):
        if who == "student":
            load(tmp_path / "prompt")
        else:
            load_teacher(Teacher(model=str(tmp_path / "prompt")), LoadContext(640, "cpu"))


def test_an_adapter_that_acts_from_a_mark_in_the_text_on_is_refused(world, tmp_path):
    shutil.copytree(world / "adapter", tmp_path / "activated")
    config = json.loads((tmp_path / "activated/adapter_config.json").read_text())
    (tmp_path / "activated/adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [5, 6]}))
    with pytest.raises(UserError, match="is an adapter of type aLoRA, which is more than a change of weights"):
        load_teacher(Teacher(model=str(tmp_path / "activated")), LoadContext(640, "cpu"))


def test_tables_that_older_versions_saved_with_the_weights_are_no_strangers(world, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(world / "student", tmp_path / "old")
    weights = load_file(tmp_path / "old/model.safetensors")
    for name, allowed in (("model.layers.0.self_attn.rotary_emb.inv_freq", True), ("model.layers.0.self_attn.extra", False)):
        save_file(weights | {name: torch.ones(4)}, tmp_path / "old/model.safetensors", {"format": "pt"})
        if allowed:
            load(tmp_path / "old")
        else:
            with pytest.raises(UserError, match="holds, beyond its architecture, 1 tensors, such as model.layers.0.self_attn.extra"):
                load(tmp_path / "old")


def test_all_linear_leaves_out_what_mamba_reads_past_its_adapter(tmp_path, capsys):
    from llmkd.data.reading.skills import tokenizer
    from tests.kit.families import tiny

    tiny("mamba2", vocab_size=640).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.trainable() and not [name for name in model.trainable() if "out_proj" in name]
    assert "all-linear leaves out out_proj" in capsys.readouterr().err


def test_gradient_checkpointing_is_refused_where_a_family_has_none(tmp_path):
    from llmkd.data.reading.skills import tokenizer
    from tests.kit.families import tiny

    model = tiny("ctrl", vocab_size=640)
    assert not model.supports_gradient_checkpointing
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="student.gradient_checkpointing: ctrl does not support it"):
        load(tmp_path, gradient_checkpointing=True)


@pytest.mark.parametrize("rows", [(640, 704), (704, 640), (768, 704)])
def test_padded_heads_are_cut_and_the_saved_student_keeps_its_shape(world, trained, tmp_path, rows):
    """Qwen2.5 has heads of 151,936 and 152,064 rows for one tokenizer."""
    from transformers import AutoModelForCausalLM

    results = {}
    for fill in (0.0, 5.0):
        for name, size in zip(("student", "teacher"), rows, strict=True):
            model = AutoModelForCausalLM.from_pretrained(world / name)
            model.resize_token_embeddings(size, mean_resizing=False)
            for p in (model.lm_head.weight, model.get_input_embeddings().weight):
                p.data[640:] = fill * torch.randn(size - 640, p.shape[1], dtype=p.dtype) if size > 640 else p.data[640:]
            model.save_pretrained(tmp_path / f"{name}{fill}")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(world / name / file, tmp_path / f"{name}{fill}" / file)
        changes = {
            "student.model": str(tmp_path / f"student{fill}"),
            "teacher.model": str(tmp_path / f"teacher{fill}"),
            "train.max_steps": 2,
        }
        results[fill] = trained(f"lora{fill}", **changes)
    trained("full", **changes, **{"student.method": "full", "student.lora": None})
    assert load_file(tmp_path / "full/model/model.safetensors")["lm_head.weight"].shape[0] == rows[0]
    assert distance(results[0.0], results[5.0]) == 0


@pytest.mark.parametrize("changes", [{}, {"lora": Lora(target_modules=("q_proj", "out_proj", "fc1"))}, {"method": "full"}])
def test_what_a_model_sees_or_hears_with_is_left_alone(tmp_path, changes):
    """Text gives it no gradient, and a parameter without one would stop several processes from agreeing."""
    from llmkd.data.reading.skills import tokenizer
    from tests.kit.families import tiny

    tiny("gemma3", vocab_size=640).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, **changes)
    assert model.trainable() and not [name for name in model.trainable() if "vision" in name or "projector" in name]
    view, labels_N = View({"input_ids": torch.arange(20).reshape(2, 10)}, torch.arange(0, 20, 2)), torch.arange(10)
    fused_loss(model.hidden(view), model.head, labels_N, Objective(), chunk=3)[0].backward()
    assert all(p.grad is not None for p in model.trainable().values())


def test_an_added_token_that_a_model_has_no_row_for_is_left_out(world, trained, make_recipe, tmp_path):
    """Gemma 3's tokenizer has an image token more than the 1B model has rows."""
    from transformers import AutoTokenizer

    from llmkd.data.encoding.tokenizer import vocab_size
    from llmkd.training.prepare import prepare

    changes = {}
    for name in ("student", "teacher"):
        shutil.copytree(world / name, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert vocab_size(tokenizer) == 640
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.add_tokens(["<note>"])
        tokenizer.save_pretrained(tmp_path / name)
        changes[f"{name}.model"] = str(tmp_path / name)
    assert distance(trained("with", **changes), trained("without", **{"teacher.model": str(world / "teacher")})) == 0
    from llmkd.commands.export import export

    export(tmp_path / "with")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a <note>", "output": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: contains the token '<note>', for which a model has no row"):
        prepare(make_recipe(**changes, **{"data.train.path": str(tmp_path / "bad.jsonl")}))


def test_a_tokenizer_with_ordinary_entries_beyond_the_model_is_refused(world, make_recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    from llmkd.training.prepare import prepare

    shutil.copytree(world / "student", tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    model.resize_token_embeddings(600)
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="student.model: the tokenizer has 640 entries and the model 600 rows"):
        prepare(make_recipe(**{"student.model": str(tmp_path / "student")}))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "float64"])
def test_a_saved_student_is_loaded_in_the_type_that_it_was_trained_in(world, tmp_path, dtype):
    """And says the same bit for bit; of the base's own type, float64, it is an adapter in each of them."""
    settings = Student(model=str(world / "student"), dtype=dtype, lora=Lora(rank=2))
    student = load_student(settings, 640, "cpu", 0)
    with torch.no_grad():
        for name, p in student.trainable().items():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).to(p), alpha=0.1)
    saved_student.save(student, tmp_path / "adapter", settings, {})
    found = saved_student.as_trained(tmp_path / "adapter")
    assert (found.dtype, found.quantization, found.model) == (dtype, None, str(tmp_path / "adapter"))
    own = load_teacher(found, LoadContext(640, "cpu"))
    assert str(own.dtype) == f"torch.{'float64' if dtype == 'auto' else dtype}" == str(student.dtype)
    ids = torch.arange(3, 23)[None]
    view = View({"input_ids": ids}, torch.arange(20))
    with torch.no_grad():
        assert torch.equal(own.head.logits(own.hidden(view)), student.eval().head.logits(student.hidden(view)))


def test_attention_that_would_be_fetched_from_the_hub_is_refused_before_anything_is_loaded(world, tmp_path):
    from llmkd.models.pretrained import load_pretrained

    shutil.copytree(world / "student", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    with pytest.raises(UserError, match="asks for flash_attention_2, but flash-attn is not installed; set student.attention: sdpa"):
        load_pretrained(tmp_path / "m", "student.model")
    load_pretrained(tmp_path / "m", "student.model", attention="sdpa")
    with pytest.raises(UserError, match="student.architecture: the architecture asks for attn_implementation: 'owner/kernel'"):
        load_student(Student(architecture={"model_type": "llama", "attn_implementation": "owner/kernel"}, method="full"), 640, "cpu", 0)


def test_a_checkpoint_that_was_saved_under_torchs_wrappers_is_read_and_saved_under_its_own_names(world, tmp_path, capsys):
    from safetensors.torch import save_file

    from llmkd.models.pretrained import load_pretrained

    shutil.copytree(world / "student", tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)

    def wrapped(name: str) -> str:
        name = name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
        return "module._orig_mod." + name.replace("self_attn.", "self_attn._fsdp_wrapped_module.")

    save_file({wrapped(name): value for name, value in tensors.items()}, path, {"format": "pt"})
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "m/config.json", tmp_path / "other")
    save_file({f"base.{name}": value for name, value in tensors.items()}, tmp_path / "other/model.safetensors", {"format": "pt"})
    both = "lacks 21 tensors, such as lm_head.weight, and holds, beyond its architecture, 21 tensors, such as base.lm_head.weight; "
    with pytest.raises(UserError, match=both):
        load_pretrained(tmp_path / "other", "student.model")
    model = load_pretrained(tmp_path / "m", "student.model")
    assert capsys.readouterr().err.count("names of torch's wrappers") == 1
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == tensors.keys()
    save_file({wrapped(name): value for name, value in tensors.items()} | {"lm_head.weight": tensors["lm_head.weight"].clone()}, path)
    with pytest.raises(UserError, match="holds tensors with names of torch's wrappers, such as .*, and others without"):
        load_pretrained(tmp_path / "m", "student.model")


def test_new_adapters_follow_from_the_seed(world):
    settings = Student(model=str(world / "student"), lora=Lora(rank=2))
    one, same, other = (load_student(settings, 640, "cpu", seed).trainable() for seed in (3, 3, 4))
    assert all(torch.equal(p, same[name]) for name, p in one.items())
    assert all(torch.equal(p, other[name]) == ("lora_B" in name) for name, p in one.items())


def test_a_model_with_too_few_rows_is_refused(world):
    with pytest.raises(UserError, match="student.model: the tokenizer has 641 entries and the model's embedding 640"):
        load_student(Student(model=str(world / "student")), 641, "cpu", 0)


def test_dora_trains_a_magnitude_beside_each_pair_of_matrices(world):
    plain, dora = (load(world / "student", lora=Lora(rank=2, target_modules=("q_proj",), dora=dora)).trainable() for dora in (False, True))
    assert plain.keys() < dora.keys() and {name.split(".")[-3] for name in dora.keys() - plain.keys()} == {"lora_magnitude_vector"}
