"""Adapters from and to folders: PEFT reads back the trained weights, or the adapter is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd.commands.export import export
from llmkd.config.recipe import Lora
from llmkd.config.recipe import Student as StudentSettings
from llmkd.config.recipe import Teacher as TeacherSettings
from llmkd.data.reading.skills import tokenizer
from llmkd.errors import UserError
from llmkd.models import saved_student
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, load_students, load_teacher
from tests.kit.families import tiny
from tests.kit.models import load_student

IDS = torch.arange(40).reshape(4, 10) * 13 % 640


def base(folder, family="llama", dtype=torch.float32, **changes):
    tiny(family, dtype=dtype, vocab_size=640, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def student(path, **changes) -> LanguageModel:
    return load_student(StudentSettings(model=str(path), **changes), 640, "cpu", 0)


def teacher(path) -> LanguageModel:
    return load_teacher(TeacherSettings(model=str(path)), LoadContext(640, "cpu"))


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Its trainable weights changed, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return (model.base_model if isinstance(model, LanguageModel) else model)(input_ids=IDS, use_cache=False).logits


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def by_peft(base_folder, config, folder):
    """An adapter that PEFT made, its values changed and saved; the logits that PEFT gives when it loads it again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config)
    torch.manual_seed(1)
    moved(get_peft_model(plain(base_folder), config)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return logits(PeftModel.from_pretrained(plain(base_folder), folder).eval())


def test_an_adapter_whose_tensors_peft_renames_is_read_back_in_full_by_all(tmp_path):
    """Laguna's checkpoints say shared_expert where its modules are shared_experts: PEFT would lose the adapters there."""
    from peft import PeftModel

    model = moved(student(base(tmp_path / "base", "laguna"), lora=Lora(rank=4)))
    expected = logits(model)
    saved_student.save(model, tmp_path / "ours", StudentSettings(), {})
    model.model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "ours").eval()), expected)
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(teacher(tmp_path / folder)), expected)
        assert torch.equal(logits(student(tmp_path / folder).eval()), expected)
        assert not torch.allclose(expected, logits(plain(tmp_path / "base")), atol=0.1)
    torch.testing.assert_close(logits(plain(export(tmp_path / "ours"))), expected, rtol=1e-4, atol=1e-4)


TIED = {
    "trained tokens": ({"trainable_token_indices": [3, 5, 26, 39]}, True),
    "one copy of the embedding": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "one adapter on the embedding": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "one adapter on the head": ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, True),
    "two adapters": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "two copies": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "neither": ({}, True),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_is_merged_as_it_was_trained_and_stays_tied_where_it_may(tmp_path, kind):
    config, tied = TIED[kind]
    expected = by_peft(base(tmp_path / "base", tie_word_embeddings=True), config, tmp_path / "adapter")
    merged = plain(export(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings is tied
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is tied


def test_parameters_that_are_held_wider_than_the_rest_stay_so_when_merged(tmp_path):
    """DeepSeek-V3's router chooses experts by a bias around 5 in float32, whose differences bfloat16 would round away."""
    from transformers import AutoModelForCausalLM

    base(tmp_path / "wide", "deepseek_v3", n_routed_experts=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    bias = next(t for name, t in model.state_dict().items() if name.endswith("e_score_correction_bias"))
    assert bias.dtype == torch.float32
    bias.copy_(5 + torch.randn_like(bias) * 0.01)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    untrained = student(tmp_path / "base", lora=Lora(rank=4, target_modules=("o_proj",)))
    saved_student.save(untrained, tmp_path / "adapter", StudentSettings(), {})
    merged, held = plain(export(tmp_path / "adapter")), plain(tmp_path / "base")
    assert torch.equal(logits(merged), logits(held))
    assert {n: t.dtype for n, t in merged.state_dict().items()} == {n: t.dtype for n, t in held.state_dict().items()}
    assert {n: t.dtype for n, t in merged.named_buffers()} == {n: t.dtype for n, t in held.named_buffers()}


def test_an_adapter_that_cannot_be_merged_is_a_refusal(tmp_path):
    by_peft(base(tmp_path / "base"), {"lora_bias": True}, tmp_path / "adapter")
    with pytest.raises(UserError, match="export: .* cannot be merged .*bias.*; use the adapter unmerged"):
        export(tmp_path / "adapter")


def test_a_folder_that_does_not_hold_what_was_saved_is_refused(tmp_path):
    from llmkd.models.merge import verify_saved

    model = plain(base(tmp_path / "base"))
    verify_saved(model, tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    with pytest.raises(UserError, match=r"export: 1 tensors, such as \['lm_head.weight'\], were changed by saving"):
        verify_saved(model, tmp_path / "base")


@pytest.mark.parametrize(("family", "router"), [("llama4_text", "Llama4Router"), ("phimoe", "PhimoeTopKRouter")])
def test_all_linear_leaves_out_routers_that_give_more_than_a_product(tmp_path, capsys, family, router):
    model = student(base(tmp_path, family))
    assert model.trainable() and not [name for name in model.trainable() if "router" in name]
    assert f"all-linear leaves out {router}, which is more than a linear layer" in capsys.readouterr().err


def test_what_experts_cannot_have_is_refused_with_the_way_out(tmp_path):
    base(tmp_path, "mixtral")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    for setting, lora in (("dropout: found 0.1", {"dropout": 0.1}), ("dora: found True", {"dora": True})):
        with pytest.raises(
            UserError, match=rf"student.lora.{setting}, which PEFT does not support for experts .*target_modules without the experts"
        ):
            student(tmp_path, lora=Lora(rank=4, **lora))
        assert len(student(tmp_path, lora=Lora(rank=4, target_modules=attention, **lora)).trainable()) >= 16
    assert any("experts" in name for name in student(tmp_path).trainable())
    named = student(tmp_path, lora=Lora(rank=4, target_modules=("q_proj", "w1", "w2", "w3"))).trainable()  # as the hub's files name them
    assert any("experts" in name for name in named) and not any("k_proj" in name for name in named)


def test_what_would_train_in_half_precision_is_said_or_refused(tmp_path, capsys):
    lora = Lora(rank=4, modules_to_save=("lm_head",))
    for name, dtype in (("b", torch.bfloat16), ("h", torch.float16), ("f", torch.float32)):
        base(tmp_path / name, dtype=dtype)
    student(tmp_path / "b")
    student(tmp_path / "f", lora=lora)
    student(tmp_path / "b", lora=lora, dtype="float32", mixed_precision="bf16")
    assert "bfloat16" not in capsys.readouterr().err
    student(tmp_path / "b", lora=lora)
    assert (
        "note: student: 1 tensors, such as base_model.model.lm_head.modules_to_save.default.weight, train in bfloat16"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="student.dtype: 1 tensors, .*lm_head.*, would train in float16; set student.dtype: float32"):
        student(tmp_path / "h", lora=lora, attention="eager")


def test_an_adapter_that_changes_the_base_by_chance_is_refused(tmp_path):
    by_peft(base(tmp_path / "base"), {"init_lora_weights": "pissa_niter_4"}, tmp_path / "adapter")
    for load in (teacher, student):
        with pytest.raises(
            UserError, match="was initialised by pissa_niter_4, which changes the base at random .*path_initial_model_for_weight"
        ):
            load(tmp_path / "adapter")


def test_an_adapter_that_takes_something_out_of_the_base_trains_alone(tmp_path):
    expected = by_peft(base(tmp_path / "base"), {"init_lora_weights": "pissa"}, tmp_path / "adapter")
    assert torch.equal(logits(student(tmp_path / "adapter").eval()), expected)
    arms = [StudentSettings(model=str(tmp_path / "base")), StudentSettings(model=str(tmp_path / "adapter"))]
    with pytest.raises(UserError, match="student.model: .* was initialised by pissa, which changes the base; train it alone"):
        load_students(arms, LoadContext(640, "cpu", seed=0))


def test_dora_on_rows_of_zeros_is_refused(tmp_path):
    model = plain(base(tmp_path, tie_word_embeddings=True))
    with torch.no_grad():
        model.lm_head.weight[0] = 0
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="student.lora.dora: lm_head has rows of zeros, by whose norm DoRA divides"):
        student(tmp_path, lora=Lora(rank=4, dora=True, target_modules=("q_proj", "lm_head")))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_config.json", "llmkd.json", "config.json"])
@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ('"a"', "str")])
def test_json_that_is_no_object_is_a_refusal(tmp_path, file, text, kind):
    by_peft(base(tmp_path / "base"), {}, tmp_path / "adapter")
    (tmp_path / ("base" if file == "config.json" else "adapter") / file).write_text(text)
    with pytest.raises(UserError, match=rf"teacher.model: .*{file} holds {kind}, expected an object"):
        teacher(tmp_path / "adapter")


WRAPPED = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "sharded": lambda name: "_fsdp_wrapped_module." + name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight") if "lora_" in name else name,
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
    "of a larger model, by DDP": lambda name: "module." + name.replace("model.model.layers", "model.language_model.model.layers"),
}


def test_an_adapter_whose_tensors_have_other_names_is_read_where_these_are_certain(tmp_path, capsys):
    lora = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    expected, path = by_peft(base(tmp_path / "base"), lora, tmp_path / "adapter"), tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    for renamed in WRAPPED.values():
        save_file({renamed(name): value for name, value in weights.items()}, path)
        assert torch.equal(logits(teacher(tmp_path / "adapter")), expected)
        said = [line for line in capsys.readouterr().err.splitlines() if "other names than PEFT's" in line]
        assert len(said) == 1 and "it is read as base_model.model." in said[0]
    assert torch.equal(logits(student(tmp_path / "adapter").eval()), expected)
    torch.testing.assert_close(logits(plain(export(tmp_path / "adapter"))), expected, rtol=1e-5, atol=1e-5)


def test_modules_that_the_configuration_names_as_a_larger_model_does_are_those_with_tensors(tmp_path):
    expected = by_peft(base(tmp_path / "base"), {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, tmp_path / "adapter")
    for n, targets in enumerate((r".*language_model.*\.q_proj", [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)])):
        scale = {"model.language_model.layers.1.self_attn.q_proj": 3}
        folder = changed(tmp_path / "adapter", tmp_path / str(n), target_modules=targets, alpha_pattern=scale)
        weights = load_file(folder / "adapter_model.safetensors")
        renamed = {name.replace("model.layers", "model.language_model.layers"): value for name, value in weights.items()}
        save_file(renamed, folder / "adapter_model.safetensors")
        assert torch.equal(logits(teacher(folder)), expected)
    folder = changed(folder, tmp_path / "strange", alpha_pattern={"model.blocks.1.q_proj": 3})
    with pytest.raises(UserError, match="alpha_pattern has model.blocks.1.q_proj, which matches no module of this base"):
        teacher(folder)


def test_names_that_fit_no_layer_are_shown_from_both_sides(tmp_path):
    by_peft(base(tmp_path / "base"), {}, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): value for name, value in load_file(path).items()}, path)
    with pytest.raises(
        UserError,
        match=r"lacks 4 tensors, such as base_model.model.model.layers.0.*lora_A.weight, and holds left-over 4 tensors, such as "
        r"base_model.model.model.blocks.0.*lora_A.weight, for the base .*; it belongs to another base",
    ):
        teacher(tmp_path / "adapter")


def test_kinds_and_options_that_peft_does_not_know_are_named(tmp_path, capsys):
    by_peft(base(tmp_path / "base"), {}, tmp_path / "adapter")
    teacher(changed(tmp_path / "adapter", tmp_path / "newer", use_something=True, something_else=None))
    assert "newer/adapter_config.json sets use_something, which PEFT" in capsys.readouterr().err
    for option, said in (({"peft_type": "FOO"}, "type FOO, which PEFT .* does not know"), ({"arrow_config": {"top_k": 1}}, "type Arrow")):
        with pytest.raises(UserError, match=f"is an adapter of {said}"):
            teacher(changed(tmp_path / "adapter", tmp_path / next(iter(option)), **option))


@pytest.mark.parametrize(("name", "value"), [("peft_type", {}), ("peft_type", 3), ("r", "x"), ("trainable_token_indices", True)])
def test_a_configuration_with_a_value_of_another_type_is_no_bug(tmp_path, name, value):
    by_peft(base(tmp_path / "base"), {}, tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter of type|cannot be loaded") as refused:
        teacher(changed(tmp_path / "adapter", tmp_path / "odd", **{name: value}))
    assert len(refused.value.problems) == 1


def test_a_base_that_is_elsewhere_now_and_one_with_more_tokens_say_what_to_set(tmp_path):
    by_peft(base(tmp_path / "base"), {"modules_to_save": ["embed_tokens"]}, tmp_path / "adapter")
    gone = changed(tmp_path / "adapter", tmp_path / "gone", base_model_name_or_path="/data/models/Qwen2.5-7B")
    with pytest.raises(UserError, match="teacher.model: the adapter .* no folder /data/models/Qwen2.5-7B.*; set teacher.base to the base"):
        teacher(gone)
    with pytest.raises(UserError, match="student.model: the adapter .*; set student.base to the base"):
        student(gone)
    with pytest.raises(
        UserError, match="export: the adapter .*; write where it is now as base_model_name_or_path into .*adapter_config.json"
    ):
        export(gone)
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if "embed_tokens" in name)
    save_file(weights | {name: torch.nn.functional.pad(weights[name], (0, 0, 0, 2))}, path)
    with pytest.raises(
        UserError, match=r"has 642 rows in .*embed_tokens.*, but its base .* has 640: 2 tokens were added .*resize_token_embeddings\(642\)"
    ):
        teacher(tmp_path / "adapter")


def test_an_adapter_that_was_changed_since_it_was_trained_is_refused_by_all(tmp_path):
    model = moved(student(base(tmp_path / "base"), lora=Lora(rank=4)))
    (tmp_path / "adapter").mkdir()
    tokenizer().save_pretrained(tmp_path / "adapter")
    saved_student.save(model, tmp_path / "adapter", StudentSettings(), {})
    elsewhere = changed(tmp_path / "adapter", tmp_path / "elsewhere", base_model_name_or_path=str(tmp_path / "base"), inference_mode=False)
    assert torch.equal(logits(teacher(elsewhere)), logits(model))
    path = elsewhere / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for load in (teacher, student, export):
        with pytest.raises(UserError, match="adapter_model.safetensors has changed since llmkd wrote it"):
            load(elsewhere)
    with pytest.raises(UserError, match="adapter_config.json has changed since llmkd wrote it"):
        teacher(changed(tmp_path / "adapter", tmp_path / "alpha", lora_alpha=3))


def changed(folder, to, **config):
    shutil.copytree(folder, to)
    found = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(found | config))
    return to


def test_a_base_that_is_no_name_and_a_wrong_rank_are_refusals_that_say_what_is_wrong(tmp_path):
    by_peft(base(tmp_path / "base"), {}, tmp_path / "adapter")
    with pytest.raises(UserError, match="student.model: .* names no base model; set student.base to it"):
        student(changed(tmp_path / "adapter", tmp_path / "number", base_model_name_or_path=3))
    with pytest.raises(UserError, match="cannot be loaded .*size mismatch for .*q_proj.lora_A"):
        teacher(changed(tmp_path / "adapter", tmp_path / "rank", r=8))


def test_an_adapter_of_a_wider_base_says_what_to_set(tmp_path):
    by_peft(base(tmp_path / "base"), {}, tmp_path / "adapter")
    narrow = base(tmp_path / "narrow", hidden_size=16)
    for load, setting in ((teacher, "teacher"), (student, "student")):
        with pytest.raises(UserError) as caught:
            load(changed(tmp_path / "adapter", tmp_path / setting, base_model_name_or_path=str(narrow)))
        assert re.fullmatch(
            rf"{setting}.model: the adapter \S+ was trained on another base than {narrow}: \S+q_proj.lora_A\S+ has \d+ inputs, and this base 16; "
            rf"set {setting}.base to its own base",
            str(caught.value),
        )


def test_an_adapted_head_takes_hidden_states_of_autocast(tmp_path, capsys):
    """OPT projects its hidden states to the embedding's width, in autocast's type."""
    from llmkd.batch import View
    from llmkd.losses.fused import fused_loss
    from llmkd.losses.objective import Objective

    model = student(
        base(tmp_path, "opt", word_embed_proj_dim=16), lora=Lora(rank=4, target_modules=("q_proj", "lm_head")), mixed_precision="bf16"
    )
    view = View({"input_ids": IDS}, torch.arange(0, 40, 3))
    fused_loss(model.hidden(view), model.head, torch.arange(14), Objective(), chunk=5)[0].backward()
    assert not model.capabilities.own_forward and all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())
