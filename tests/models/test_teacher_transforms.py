"""Transformed teachers (merged, in 8-bit floats): how far their answers move, and the parts that must not change."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from llmkd.cli import main
from llmkd.commands.cache import cache
from llmkd.commands.cache_check import check
from llmkd.config.recipe import Quantization, Student, Teacher
from llmkd.data.collate import collate
from llmkd.errors import UserError
from llmkd.losses.divergences import forward_kl
from llmkd.models.float8 import Float8Linear
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, load_models, load_teacher
from llmkd.models.shared_weights import storage_bytes
from llmkd.signals import Taps
from llmkd.teachers.fidelity import TARGETS, compare, measured_transform, sample_teacher_batches
from llmkd.teachers.live import LiveTeacher
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import plain_recipe
from tests.models.test_shared_weights import in_common, peft_adapter

FP8 = Quantization(type="fp8")
LINE = re.compile(r"teacher: (.*): KL to the teacher before (\S+) nats per token, top-1 agreement (\S+)% over ([\d,]+) targets")
ADAPTERS = {
    "plain": {"target_modules": "all-linear", "r": 16},  # a rank that 8-bit floats are for, too
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory) -> Path:
    """A base of sizes that 8-bit floats are for, the same with a tied head, and an adapter of each kind on both (float32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    root = tmp_path_factory.mktemp("wide")
    for name, tied in (("base", False), ("tied", True)):
        torch.manual_seed(4)
        sizes = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 256}
        config = LlamaConfig(**sizes, **ids, initializer_range=0.2, tie_word_embeddings=tied, attention_bias=True)
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        for kind, options in ADAPTERS.items():
            peft_adapter(root / name, root / f"{name}-{kind}", **options)
    return root


@pytest.fixture
def batches(make_recipe):
    data = prepare(make_recipe()).train
    return [collate(data, [i, i + 5, i + 9], pad=1) for i in range(4)]


def load(path: Path, batches=None, **options) -> LanguageModel:
    settings = Teacher(model=str(path), **{"dtype": "float32"} | options)
    return load_teacher(
        settings, LoadContext(640, "cpu", around_transform=functools.partial(measured_transform, lambda setting: batches or ()))
    )


def answers(model: LanguageModel, batches) -> torch.Tensor:
    return torch.cat([LiveTeacher(model)(batch).log_probs(slice(None)) for batch in batches])


@pytest.mark.parametrize("base", ["base", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_teacher_says_what_it_said(wide, batches, base, kind):
    path = wide / f"{base}-{kind}"
    before, merged = load(path, dtype="float64"), load(path, batches, dtype="float64", merge_adapter=True)
    assert not any("lora" in name for name, _ in merged.model.named_modules()) and not hasattr(merged.model, "peft_config")
    assert not any(m.training for m in merged.modules()) and not merged.trainable()
    assert {p.dtype for p in merged.parameters()} == {torch.float64}
    assert_close(answers(merged, batches), answers(before, batches), rtol=0, atol=2e-5)  # the adapter's own products are in float32
    assert abs(merged.fidelity["forward_kl"]) < 1e-11 and merged.fidelity["top1_agreement"] > 0.99
    assert type(merged.head.project) is torch.nn.Linear and merged.head.project is merged.base_model.get_output_embeddings()
    tied = merged.base_model.get_output_embeddings().weight is merged.base_model.get_input_embeddings().weight
    assert tied == (base == "tied" and kind not in ("head", "embedding", "copies"))
    single = load(path, batches, merge_adapter=True)
    assert abs(single.fidelity["forward_kl"]) < 1e-10 and single.fidelity["targets"] == sum(b.num_targets for b in batches)


@pytest.mark.parametrize("options", [{"merge_adapter": True}, {"quantization": FP8}, {"merge_adapter": True, "quantization": FP8}], ids=str)
def test_the_last_layer_goes_on_to_be_computed_at_the_rows_alone(wide, batches, options):
    """By the modules that it has now."""
    teacher, seen = load(wide / "base-plain", **options), []
    layer = teacher.base_model.model.layers[-1]
    for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    found, on = LiveTeacher(teacher, Taps(frozenset({1, 2})))(batches[0]), batches[0].teacher
    assert seen == [batches[0].num_targets] * 3 and batches[0].num_targets < on.inputs["input_ids"].numel()
    own = teacher.base_model(**on.inputs, output_hidden_states=True).hidden_states[1].flatten(0, 1)[on.rows_N]
    assert_close(found.layers[1], own)
    assert_close(teacher.base_model.model.norm(found.layers[2]), found.hidden_NH)


def test_the_sum_is_taken_in_float32_and_rounded_once(wide, batches):
    whole, narrow = load(wide / "base-plain", merge_adapter=True), load(wide / "base-plain", batches, dtype="bfloat16", merge_adapter=True)
    apart = load(wide / "base-plain", dtype="bfloat16").base_model
    for name, p in narrow.base_model.named_parameters():
        assert p.dtype == torch.bfloat16
        if name.endswith("q_proj.weight"):
            layer = apart.get_submodule(name.removesuffix(".weight"))
            A, B = (getattr(layer, f"lora_{x}")["default"].weight.double() for x in "AB")
            exact = layer.base_layer.weight.double() + layer.scaling["default"] * B @ A
            assert (p != exact.bfloat16()).double().mean() < 0.005  # where float32 rounds the exact sum across the middle
            assert not torch.equal(p, layer.base_layer.weight)
    assert len(narrow.state_dict()) == len(whole.state_dict())
    assert 1e-7 < narrow.fidelity["forward_kl"] < 1e-2 and narrow.fidelity["top1_agreement"] > 0.9


def test_experts_that_are_no_linear_layers_are_merged_in_float32_too(world, tmp_path, batches):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    torch.manual_seed(6)
    MixtralForCausalLM(MixtralConfig(vocab_size=640, **sizes, initializer_range=0.2)).save_pretrained(tmp_path / "base")
    experts = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    peft_adapter(tmp_path / "base", tmp_path / "adapter", **experts)
    whole, narrow = (load(tmp_path / "adapter", batches, dtype=dtype, merge_adapter=True) for dtype in ("float32", "bfloat16"))
    assert abs(whole.fidelity["forward_kl"]) < 1e-10
    own = dict(load(tmp_path / "base", dtype="bfloat16").base_model.named_parameters())
    for name, p in narrow.base_model.named_parameters():
        wide = whole.base_model.get_parameter(name) - load_base(tmp_path, name) + own[name].float()
        assert (p != wide.bfloat16()).double().mean() < 0.02, name
        assert torch.equal(p, own[name]) != ("experts" in name or "q_proj" in name)


def load_base(folder: Path, name: str) -> torch.Tensor:
    return load(folder / "base").base_model.get_parameter(name)


@pytest.mark.parametrize("dtype, quantization, words", [("float32", FP8, "adapter merged, fp8"), ("bfloat16", None, "adapter merged")])
def test_the_metrics_are_those_of_the_two_teachers(wide, batches, capsys, dtype, quantization, words):
    """An adapter on the head too, which is merged while it is still asked for what it was."""
    options = {"merge_adapter": True, "quantization": quantization}
    before, after = load(wide / "base-head", dtype=dtype), load(wide / "base-head", batches, dtype=dtype, **options)
    said = LINE.search(capsys.readouterr().err)
    log_p, log_q = (answers(one, batches).double() for one in (before, after))
    expected = {
        "forward_kl": forward_kl(log_q, log_p).mean().item(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
        "targets": len(log_p),
    }
    assert after.fidelity == pytest.approx(expected, rel=1e-4)
    assert said[1] == words and said[2] == f"{expected['forward_kl']:.1e}" and said[4] == str(len(log_p))
    assert (1e-3 if quantization else 1e-6) < expected["forward_kl"] < 0.2 and 0.5 < expected["top1_agreement"] < 1


def test_a_comparison_in_float64_does_not_depend_on_chunks(monkeypatch):
    from llmkd.head import Head

    torch.manual_seed(0)
    heads = [Head(torch.nn.Linear(8, 50).double().requires_grad_(False), 40) for _ in range(2)]
    states = [torch.randn(30, 8).double() for _ in range(2)]
    found = []
    for chunk in (8, 56, 8000):
        monkeypatch.setattr("llmkd.teachers.fidelity.default_chunk", lambda *_, chunk=chunk: chunk)
        found.append(compare(states[0], heads[0], states[1], heads[1]))
    p, q = (torch.log_softmax(h.logits(s).double(), -1) for h, s in zip(heads, states, strict=True))
    assert found[0] == pytest.approx(
        {
            "forward_kl": (p.exp() * (p - q)).sum(-1).mean().item(),
            "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "targets": 30,
        },
        rel=1e-12,
    )
    assert found[1] == pytest.approx(found[0], rel=1e-12) and found[2] == pytest.approx(found[0], rel=1e-12)


def test_a_small_distance_is_not_lost_in_float32():
    from llmkd.head import Head

    torch.manual_seed(0)
    head = Head(torch.nn.Linear(8, 500).requires_grad_(False), 500)
    before = torch.randn(300, 8) * 4
    after = before + 3e-4 * torch.randn(300, 8)
    p, q = (torch.log_softmax(head.logits(h).double(), -1) for h in (before, after))
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert 1e-9 < exact < 1e-6 and compare(before, head, after, head)["forward_kl"] == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("kind", ["plain", "dora", "head"])
def test_an_unmerged_adapter_stays_as_it_is_on_top_of_8_bit_layers(wide, batches, kind):
    teacher = load(wide / f"base-{kind}", batches, quantization=FP8)
    body = {name: m for name, m in teacher.base_model.named_modules() if isinstance(m, Float8Linear)}
    assert len(body) == 2 * 7 and any(name.endswith("base_layer") for name in body)
    assert all(p.dtype == torch.float32 for name, p in teacher.named_parameters() if "lora" in name or "embed" in name or "lm_head" in name)
    assert 1e-4 < teacher.fidelity["forward_kl"] < 0.3 and not any(m.training for m in teacher.modules()) and not teacher.trainable()
    rounded = load(wide / f"base-{kind}")  # what it should be: the same model with layers that multiply by the rounded weights
    for name, layer in body.items():
        rounded.base_model.get_submodule(name).weight.copy_(layer.weight)
    weights_only = compare(*(x for one in (rounded, teacher) for x in (torch.cat([one.hidden(b.teacher) for b in batches]), one.head)))
    assert weights_only["forward_kl"] < teacher.fidelity["forward_kl"]


def test_sizes_that_are_no_multiples_of_16_and_routers_stay(world, wide, batches):
    with pytest.raises(
        UserError, match="teacher.quantization.type: found fp8, but .* has no linear layers whose sizes are multiples of 16"
    ):
        load_teacher(Teacher(model=str(world / "teacher"), quantization=FP8), LoadContext(640, "cpu"))
    from llmkd.models import float8

    plain = load(wide / "base").base_model
    plain.model.layers[0].mlp.gate = torch.nn.Linear(32, 32)
    plain.model.layers[0].mlp.odd = torch.nn.Linear(32, 24)
    plain.model.layers[0].mlp.router = torch.nn.Sequential(torch.nn.Linear(32, 32))  # some families' are inside one
    assert float8.convert(plain) == 14
    assert type(plain.model.layers[0].mlp.gate) is type(plain.model.layers[0].mlp.odd) is type(plain.lm_head) is torch.nn.Linear
    assert type(plain.model.layers[0].mlp.router[0]) is torch.nn.Linear


# ---- beside others


@pytest.mark.parametrize("options", [{"merge_adapter": True}, {"quantization": FP8}, {"merge_adapter": True, "quantization": FP8}])
def test_the_students_base_is_not_touched_and_what_stays_equal_is_held_once(wide, options):
    teacher = Teacher(model=str(wide / "base-plain"), dtype="float32", **options)
    (student,), (model,) = load_models(
        [Student(model=str(wide / "base"), dtype="float32")], [("teacher", teacher)], LoadContext(640, "cpu", seed=7)
    )
    own = load(wide / "base").state_dict()
    held = {name.replace(".base_layer", ""): p for name, p in student.base_model.named_parameters() if "lora" not in name}
    assert all(torch.equal(p, own[f"model.{name}"]) for name, p in held.items())
    embeddings = 2 * 640 * 32 * 4
    assert embeddings <= in_common(student, model) < embeddings * 1.1


def test_two_teachers_in_8_bit_on_one_base_hold_it_once(wide):
    teachers = [
        (f"teacher.{i}", Teacher(model=str(wide / f"base-{kind}"), dtype="float32", quantization=FP8))
        for i, kind in enumerate(("plain", "head"))
    ]
    _, found = load_models([], teachers, LoadContext(640, "cpu", seed=7))
    rounded = sum(p.nbytes for p in found[0].parameters() if p.dtype == torch.float8_e4m3fn)
    assert rounded and in_common(*found) >= rounded
    assert max(storage_bytes(*found).values()) > 0


# ---- runs


def teacher_of(wide: Path, **options) -> dict:
    return {"student__dtype": "float32", "teacher": {"model": str(wide / "base-plain"), "dtype": "float32"} | options}


def test_a_run_says_and_records_what_it_moved(world, wide, tmp_path, capsys):
    recipe = plain_recipe(world, tmp_path / "out")
    recipe["teacher"] = {"model": str(wide / "base-plain"), "dtype": "bfloat16"}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    words = ["--train.max_steps", "2", "--teacher.merge_adapter", "true", "--teacher.quantization.type", "fp8"]
    assert main(["train", "--config", str(tmp_path / "r.yaml"), *words]) == 0
    said = LINE.findall(capsys.readouterr().err)
    lines = list(map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()))
    (found,) = [line["fidelity"] for line in lines if "fidelity" in line]
    assert len(said) == 1 and said[0][0] == "adapter merged, fp8" and said[0][1] == f"{found['teacher.forward_kl']:.1e}"
    assert 0 < found["teacher.targets"] <= TARGETS and 1e-5 < found["teacher.forward_kl"] < 0.3
    assert "merged, quantised to fp8" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_a_stream_is_measured_on_its_first_step(wide, make_recipe):
    stream = {"data__streaming": True, "train__max_steps": 2, "data__shuffle_buffer": 16}
    recipe = make_recipe(**teacher_of(wide, merge_adapter=True), **stream)
    run(recipe)
    lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
    (found,) = [line["fidelity"] for line in lines if "fidelity" in line]
    assert abs(found["teacher.forward_kl"]) < 1e-10 and found["teacher.targets"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with 8-bit floats")
@pytest.mark.parametrize("merge", [False, True])
def test_a_run_in_8_bit_floats_on_the_gpu(wide, batches, make_recipe, merge):
    teacher = {"model": str(wide / "base-plain"), "dtype": "bfloat16", "merge_adapter": merge, "quantization": {"type": "fp8"}}
    recipe = make_recipe(student__dtype="bfloat16", teacher=teacher)
    run(recipe)
    lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
    (found,) = [line["fidelity"] for line in lines if "fidelity" in line]
    here = load(wide / "base-plain", batches, dtype="bfloat16", merge_adapter=merge, quantization=FP8).fidelity
    assert found["teacher.forward_kl"] == pytest.approx(here["forward_kl"], rel=0.5)  # of other targets, and by the CPU


def test_as_many_targets_are_asked_as_hold_and_of_those_that_are_the_teachers(make_recipe, world, monkeypatch):
    both = [{"name": name, "model": str(world / "adapter")} for name in ("a", "b")]
    parted = [{"path": str(world / f"{file}.jsonl"), "teacher": name} for file, name in (("train", "a"), ("held", "b"))]
    data = prepare(make_recipe(teacher=both, data__train=parted)).train
    for number, examples in ((0, 37), (1, 9)):
        batches = sample_teacher_batches(data, number, 4, "cpu")
        assert sum(len(b.examples) for b in batches) <= examples and max(len(b.examples) for b in batches) <= 4
        assert {e.teacher for b in batches for e in b.examples} == {number}
        assert sum(b.num_targets for b in batches) <= TARGETS
    monkeypatch.setattr("llmkd.teachers.fidelity.TARGETS", 60)
    few, again = (sample_teacher_batches(data, 0, 4, "cpu") for _ in range(2))
    assert 0 < sum(b.num_targets for b in few) <= 60 and all(torch.equal(a.labels_N, b.labels_N) for a, b in zip(few, again, strict=True))
    monkeypatch.setattr("llmkd.teachers.fidelity.TARGETS", 1)
    assert len(sample_teacher_batches(data, 0, 4, "cpu")) == 1


def test_a_cache_says_how_its_teacher_was_held(wide, make_recipe, tmp_path, capsys):
    path = {"path": str(tmp_path / "cache"), "k": 8}
    changes = teacher_of(wide, merge_adapter=True, quantization={"type": "fp8"}, cache=path)
    cache(make_recipe(**changes))
    assert len(LINE.findall(capsys.readouterr().err)) == 1
    provenance = json.loads((tmp_path / "cache" / "cache.json").read_text())["provenance"]["teacher"]
    assert provenance["quantization"] == "fp8" and provenance["merge_adapter"] is True
    prepare(make_recipe(**changes))
    for other, words in (
        ({"merge_adapter": True}, "with quantization fp8, not None"),
        ({"quantization": {"type": "fp8"}}, "whose adapter was merged, or"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(make_recipe(**teacher_of(wide, cache=path, **other)))


def test_check_compares_both_teachers(wide, make_recipe, capsys):
    check(make_recipe(**teacher_of(wide, merge_adapter=True, quantization={"type": "fp8"})))
    out = capsys.readouterr().out
    assert "unquantised" in out and "adapter merged, fp8" in out
    check(make_recipe(**teacher_of(wide, merge_adapter=True)))
    assert "unmerged" in capsys.readouterr().out


# ---- refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"student.quantization": {"type": "fp8"}}, "student.quantization.type: found fp8, which is for teachers"),
        (
            {"teacher.merge_adapter": True, "teacher.quantization": {"type": "nf4"}},
            "teacher.merge_adapter: found true with quantization nf4",
        ),
        ({"teacher.merge_adapter": True, "teacher.device": "offload"}, "teacher.merge_adapter: found true with device: offload"),
        ({"teacher.merge_adapter": True, "teacher.model": None, "teacher.cache.path": "x"}, "teacher.merge_adapter: set without a model"),
        ({"teacher.quantization": {"type": "fp8"}, "teacher.device": "offload"}, "teacher.device: found offload with quantization"),
        ({"teacher.quantization": {"type": "fp8", "double_quant": False}}, "teacher.quantization.double_quant: set with type: fp8"),
        ({"teacher.quantization": {"type": "fp8", "compute_dtype": "bfloat16"}}, "set with type: fp8"),
    ],
)
def test_contradictions(make_recipe, changes, words):
    with pytest.raises(UserError, match=words):
        make_recipe(**changes)


def test_what_cannot_be_merged_or_rounded_is_refused_before_a_model_is_loaded(world, wide, make_recipe, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"teacher.merge_adapter: found true, and .*teacher is not an adapter; leave it out"):
        prepare(make_recipe(teacher__model=str(world / "teacher"), teacher__merge_adapter=True))
    import shutil

    shutil.copytree(wide / "base", tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    for options, name in (({"merge_adapter": True}, "merge_adapter"), ({"quantization": {"type": "fp8"}}, "quantization")):
        recipe = make_recipe(**teacher_of(wide, base=str(tmp_path / "quantised"), **options))
        with pytest.raises(UserError, match=rf"teacher.{name}: .*quantised is quantised already; leave it out"):
            prepare(recipe)


def test_answers_that_are_not_finite_are_refused(wide, batches, monkeypatch):
    monkeypatch.setattr("llmkd.teachers.fidelity.compare", lambda *a: {"forward_kl": float("nan"), "top1_agreement": 0.0, "targets": 3})
    with pytest.raises(UserError, match="teacher.quantization: the teacher's outputs are finite as it was loaded, and not with fp8"):
        load(wide / "base", batches, quantization=FP8)


def test_fp8_needs_no_bitsandbytes(wide, make_recipe, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a))
    prepare(make_recipe(**teacher_of(wide, quantization={"type": "fp8"})))
