"""Teacher and student on shared weights: bitwise the results of two models, in the memory of one."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import config

from llmkd.batch import Batch, View
from llmkd.config import loader
from llmkd.config.recipe import Lora, Quantization, Student, Teacher
from llmkd.data.collate import collate
from llmkd.errors import UserError
from llmkd.head import Head
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm
from llmkd.models import pretrained, shared_weights
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, load_models, load_teacher
from llmkd.models.offload import head_on, offload
from llmkd.teachers.live import LiveTeacher
from llmkd.training.distiller import Distiller
from llmkd.training.prepare import prepare
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch, train_on_two

LORA = Lora(rank=4, dropout=0.3)
#: KaSA, which PEFT has from 0.21 on, takes the smallest singular values out of the base.
KASA = [{"kasa_config": config.KasaConfig()}] if hasattr(config, "KasaConfig") else []


@pytest.fixture(scope="module")
def batches(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("batches")
    (root / "r.yaml").write_text(json.dumps(plain_recipe(world, root / "out")))
    data = prepare(loader.load_recipe(root / "r.yaml")).train
    return [collate(data, [i, i + 5, i + 9], pad=1) for i in range(3)]


def peft_adapter(base: Path, to: Path, **config) -> str:
    """An adapter with random weights, by PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    config = {"r": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | config
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, p in adapted.named_parameters():
        if "modules_to_save" in name or (p.requires_grad and name.endswith("bias")):
            p.data.add_(torch.randn_like(p), alpha=0.1)
    adapted.save_pretrained(to)
    return str(to)


def parameters(teacher: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in teacher.model.named_parameters()}


def distil(student: Student, teacher: Teacher, batches) -> tuple[list, list, dict, LanguageModel, LanguageModel]:
    """A few steps: losses, gradients, the student's weights; held to what must be true after the teacher has spoken."""
    (learner,), (model,) = load_models([student], [("teacher", teacher)], LoadContext(640, "cpu", seed=7))
    live, distiller, before = LiveTeacher(model), Distiller(learner, [HeadTerm(Objective(0.5, 2.0))]), parameters(model)
    trained = learner.trainable()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses, gradients = [], []
    for i, batch in enumerate(batches):
        signal = live(batch)
        assert learner.trainable().keys() == trained.keys() and all(module.training for module in learner.modules())
        assert not any(module.training for module in model.modules()) and not any(p.requires_grad for p in model.parameters())
        torch.manual_seed(i)
        loss = distiller(batch, signal)
        again = live(batch)  # between forward and backward, as gradient checkpointing computes anew
        assert torch.equal(again.log_probs(slice(None)), signal.log_probs(slice(None)))
        loss.total.backward()
        losses.append(loss.total.item())
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    return losses, gradients, {name: p.detach().clone() for name, p in trained.items()}, learner, model


def assert_same(student: Student, teacher: Teacher, batches) -> tuple[LanguageModel, LanguageModel]:
    """Shared and apart, in every bit; the shared pair."""
    losses, gradients, ends, learner, model = distil(student, teacher, batches)
    apart = distil(student, dataclasses.replace(teacher, share_base=False), batches)
    assert not shared_weights.storage_bytes(apart[3]).keys() & shared_weights.storage_bytes(apart[4]).keys()
    assert losses == apart[0] and distance(ends, apart[2]) == 0
    assert all(distance(a, b) == 0 for a, b in zip(gradients, apart[1], strict=True))
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-6
    return learner, model


def in_common(*several: LanguageModel) -> int:
    """Bytes that are in memory once for two models or more."""
    return sum(sum(shared_weights.storage_bytes(one).values()) for one in several) - sum(shared_weights.storage_bytes(*several).values())


def base_bytes(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("who", ["adapter", "teacher"])
def test_a_shared_base_changes_no_bit(world, batches, who, checkpointing, monkeypatch, capsys):
    loaded, real = [], pretrained.load_pretrained
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *a: loaded.append(a[0]) or real(*a))
    student = Student(model=str(world / "teacher"), lora=LORA, gradient_checkpointing=checkpointing)
    learner, model = assert_same(student, Teacher(model=str(world / who)), batches)
    assert len(loaded) == 1 + 2
    assert in_common(learner, model) == base_bytes(world / "teacher")
    share, size = "100%" if who == "teacher" else r"\d\d%", f"{base_bytes(world / 'teacher') / 1e6:.1f}"
    assert len(re.findall(rf"teacher: shares {share} of its weights with the student: {size} MB are in", capsys.readouterr().err)) == 1


HEADS = {
    "LoRA on the head": ({"target_modules": ("q_proj", "lm_head")}, {"target_modules": ["q_proj", "lm_head"]}),
    "copies of the head": (
        {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "the embedding": ({"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)}, {"target_modules": ["embed_tokens"]}),
    "dora": ({"dora": True}, {"use_dora": True}),
}


@pytest.mark.parametrize("of_teacher", [None, *HEADS])
@pytest.mark.parametrize("of_student", HEADS)
def test_adapters_on_the_head_and_the_embedding_stay_apart(world, batches, tmp_path, of_student, of_teacher):
    """The signal keeps the teacher's head, and uses it while the student works."""
    student = Student(model=str(world / "teacher"), lora=Lora(rank=2, dropout=0.2, **HEADS[of_student][0]))
    path = peft_adapter(world / "teacher", tmp_path / "theirs", **HEADS[of_teacher][1]) if of_teacher else str(world / "teacher")
    learner, model = assert_same(student, Teacher(model=path), batches[:2])
    assert in_common(learner, model) == base_bytes(world / "teacher")


def test_embedding_and_head_that_are_one_tensor(world, batches, tmp_path):
    from llmkd.data.reading.skills import tokenizer
    from tests.kit.families import tiny

    tiny("gemma", vocab_size=640, max_position_embeddings=256).save_pretrained(tmp_path / "tied")
    tokenizer().save_pretrained(tmp_path / "tied")
    for lora in (Lora(rank=2, target_modules=("q_proj", "lm_head")), Lora(target_modules=("q_proj",), modules_to_save=("embed_tokens",))):
        learner, model = assert_same(Student(model=str(tmp_path / "tied"), lora=lora), Teacher(model=str(tmp_path / "tied")), batches[:2])
        assert in_common(learner, model) == base_bytes(tmp_path / "tied")


@pytest.mark.parametrize("config", [{"init_lora_weights": "pissa"}, {"bias": "all"}, *KASA])
def test_an_adapter_that_changes_its_base_leaves_the_others_alone(world, batches, tmp_path, config):
    """What stays equal is in memory once all the same."""
    from llmkd.data.reading.skills import tokenizer
    from tests.kit.families import tiny

    base = tmp_path / "base"
    tiny("qwen2", torch.float32, vocab_size=640, max_position_embeddings=256).save_pretrained(base)
    tokenizer().save_pretrained(base)
    theirs = peft_adapter(base, tmp_path / "theirs", **config)
    for who, other in ((str(base), theirs), (theirs, str(base)), (theirs, theirs)):
        learner, model = assert_same(Student(model=who), Teacher(model=other), batches[:2])
        assert 0 < in_common(learner, model) < base_bytes(base) + (who == other)


def test_a_student_that_trains_in_full_shares_nothing(world, batches):
    learner, model = assert_same(Student(model=str(world / "teacher"), method="full"), Teacher(model=str(world / "adapter")), batches[:2])
    assert in_common(learner, model) == 0


def test_a_base_held_otherwise_is_loaded_apart_and_equal_tensors_once(world, batches, monkeypatch):
    loaded, real = [], pretrained.load_pretrained
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *a: loaded.append(a[0]) or real(*a))
    student = Student(model=str(world / "teacher"), lora=LORA)
    for changes, share in (({"attention": "eager"}, 1), ({"dtype": "float64"}, 1), ({"dtype": "float32"}, 0)):
        (learner,), (model,) = load_models(
            [student], [("teacher", Teacher(model=str(world / "teacher"), **changes))], LoadContext(640, "cpu", seed=7)
        )
        assert in_common(learner, model) == share * base_bytes(world / "teacher")
    assert len(loaded) == 2 + 1 + 2


def test_several_teachers_stand_on_one_base(world, batches, tmp_path, monkeypatch, capsys):
    other = peft_adapter(world / "teacher", tmp_path / "other", target_modules=["v_proj", "lm_head"])
    settings = [Teacher(model=str(world / "adapter")), Teacher(model=other), Teacher(model=str(world / "teacher"))]
    named = [(f"teacher.{i}", one) for i, one in enumerate(settings)]
    loaded, real = [], pretrained.load_pretrained
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *a: loaded.append(a[0]) or real(*a))
    (learner,), teachers = load_models([Student(model=str(world / "student"))], named, LoadContext(640, "cpu", seed=7))
    assert (
        len(loaded) == 2
        and in_common(*teachers) == 2 * base_bytes(world / "teacher")
        and in_common(learner, *teachers) == in_common(*teachers)
    )
    assert "teacher.1: shares" in capsys.readouterr().err
    signals = [LiveTeacher(teacher)(batches[0]) for teacher in teachers]
    for signal, one in zip(signals, settings, strict=True):
        alone = LiveTeacher(load_teacher(one, LoadContext(640, "cpu")))(batches[0])
        assert torch.equal(signal.log_probs(slice(None)), alone.log_probs(slice(None)))
    named[1] = ("teacher.1", Teacher(model=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="^teacher.1.model: there is no folder"):
        load_models([Student(model=str(world / "student"))], named, LoadContext(640, "cpu", seed=7))


RUN = {"student.lora": {"rank": 4, "dropout": 0.2}, "teacher.share_base": True}


def test_a_whole_run_and_what_it_saves_are_the_same(world, trained, tmp_path):
    changes = {"student.model": str(world / "teacher"), **RUN, "data.validation_fraction": 0.2, "validation.every": 2}
    assert distance(trained("shared", **changes), trained("apart", **changes | {"teacher.share_base": False})) == 0
    lines = [(tmp_path / out / "metrics.jsonl").read_text().splitlines() for out in ("shared", "apart")]
    for one, other in zip(*(map(json.loads, some) for some in lines), strict=True):
        assert {k: v for k, v in one.items() if k not in ("targets_per_s", "peak_memory", "time")} == {
            k: v for k, v in other.items() if k not in ("targets_per_s", "peak_memory", "time")
        }


def test_arms_of_a_sweep_share_the_teachers_base_too(world, tmp_path):
    from llmkd.commands.sweep import run_sweep
    from llmkd.config import loader
    from llmkd.training.run import run

    recipe = plain_recipe(world, tmp_path / "unused")
    recipe["student"] = {"model": str(world / "teacher"), "lora": {"rank": 4, "dropout": 0.2}}
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    arms = {"one": {}, "two": {"student.lora.target_modules": ["q_proj", "lm_head"], "optim.lr": 3e-3}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "arms": arms}))
    folder = run_sweep(str(tmp_path / "sweep.yaml"), {}, False)
    assert len(json.loads((folder / "sweep.json").read_text())["groups"]) == 1
    for name in arms:
        alone = tmp_path / "alone" / name
        run(loader.load_recipe(folder / "arms" / name / "recipe.yaml", {"output_dir": str(alone), "teacher.share_base": False}))
        assert distance(weights(folder / "arms" / name), weights(alone)) == 0


@pytest.mark.slow
def test_two_processes_share_a_base_as_one_does(world, trained, tmp_path):
    (tmp_path / "two.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "unused")))
    for who, checkpointing, dropout in (("adapter", True, 0.2), ("teacher", False, 0.0)):
        ends = []
        for share in ("true", "false"):
            out = tmp_path / f"{who}-{share}"
            words = {"output_dir": out, "student.model": world / "teacher", "teacher.model": world / who, "teacher.share_base": share}
            words |= {"student.gradient_checkpointing": str(checkpointing).lower(), "student.lora.dropout": dropout}
            done = train_on_two(["--config", str(tmp_path / "two.yaml"), *(str(w) for k, v in words.items() for w in (f"--{k}", v))])
            assert done.returncode == 0, done.stderr[-3000:]
            assert ("of its weights with the student" in done.stderr) == (share == "true")
            ends.append(weights(out))
        assert distance(*ends) == 0
    one = trained("one", **{"student.model": str(world / "teacher"), "teacher.model": str(world / "teacher")})
    assert distance(ends[0], one) < 1e-12


def peak(base: str, how: str) -> None:
    """In a process of its own: a student and, but for `alone`, a teacher of this base, each used once; prints the peak of memory."""
    view = View({"input_ids": torch.arange(8)[None]}, torch.arange(8))
    batch = Batch(torch.arange(8), torch.zeros(8, dtype=torch.long), view, view)
    named = [] if how == "alone" else [("teacher", Teacher(model=base, dtype="float32", share_base=how == "shared"))]
    (student,), teachers = load_models([Student(model=base, dtype="float32", lora=Lora(rank=2))], named, LoadContext(640, "cpu", seed=7))
    for one in teachers:
        LiveTeacher(one)(batch).log_probs(slice(None))
    student.head.logits(student.hidden(view)).sum().backward()
    status = Path("/proc/self/status").read_text()  # getrusage would still tell of the process that this one was forked from
    print("peak", int(status.split("VmHWM:")[1].split()[0]) * 1024)


@pytest.mark.slow
def test_the_peak_of_memory_is_that_of_one_base(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=640, bos_token_id=None, eos_token_id=1, **sizes))
    model.bfloat16().save_pretrained(tmp_path)  # used in float32: a weight is then memory of its own, and no page of the file
    tokenizer().save_pretrained(tmp_path)
    size, peaks = 2 * base_bytes(tmp_path), []
    for how in ("alone", "shared", "apart"):
        done = launch(1, peak, str(tmp_path), how)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks.append(int(done.stdout.split("peak")[1]))
    alone, shared, apart = peaks
    print(f"base {size / 1e6:.0f} MB; peak {alone / 1e6:.0f} alone, {shared / 1e6:.0f} shared, {apart / 1e6:.0f} apart")
    assert size > 100e6 and shared - alone < 0.25 * size < 0.75 * size < apart - shared


@pytest.mark.parametrize("who", ["adapter", "teacher", "head", "dora"])
def test_a_teacher_that_is_held_elsewhere_says_the_same(world, batches, tmp_path, who):
    path = str(world / who)
    if who in ("head", "dora"):
        path = peft_adapter(world / "teacher", tmp_path / who, target_modules=["q_proj", "lm_head"], use_dora=who == "dora")
    plain = LiveTeacher(load_teacher(Teacher(model=path), LoadContext(640, "cpu")))
    for device in ("cpu", "offload"):
        (learner,), (model,) = load_models(
            [Student(model=str(world / "teacher"))], [("teacher", Teacher(model=path, device=device))], LoadContext(640, "cpu", seed=7)
        )
        for batch in batches:
            assert torch.equal(LiveTeacher(model)(batch).log_probs(slice(None)), plain(batch).log_probs(slice(None)))
        assert not any(p.requires_grad for p in model.parameters()) and in_common(learner, model) == 0
        assert shared_weights.storage_bytes(model.head.project).keys() <= shared_weights.storage_bytes(model).keys()
    offload(model.base_model, "meta")  # a device that refuses every product with a weight that was not brought to it
    ids_BT, mask_B1TT = torch.zeros(2, 5, dtype=torch.long, device="meta"), torch.ones(2, 1, 5, 5, dtype=torch.bool, device="meta")
    logits_BTV = model.base_model(ids_BT, attention_mask=mask_B1TT, use_cache=False).logits
    assert logits_BTV.shape == (2, 5, 640) and logits_BTV.is_meta and {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_head_held_elsewhere_has_its_scale_and_its_cap():
    head, hidden_NH = Head(torch.nn.Linear(8, 12), 10, 0.5, 3.0), torch.linspace(-9, 9, 24).view(3, 8)
    other = head_on(head, torch.device("cpu"))
    assert torch.equal(other.logits(hidden_NH), head.logits(hidden_NH)) and other.project is not head.project
    assert other.logits(hidden_NH).abs().max() < 3
    assert head_on(head, torch.device("meta")).logits(hidden_NH.to("meta")).shape == (3, 10)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu", "disk"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(world, monkeypatch, device):
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *a: pytest.fail("a model was loaded"))
    teachers = [("teacher.0", Teacher(model=str(world / "teacher"))), ("teacher.1", Teacher(model=str(world / "adapter"), device=device))]
    with pytest.raises(
        UserError, match=rf"^teacher.1.device: found {device}, which cannot be used here \(.*\); this machine has cpu, .*offload$"
    ):
        load_models([Student(model=str(world / "teacher"))], teachers, LoadContext(640, "cpu", seed=7))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A base in float32 that bitsandbytes can hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=640, bos_token_id=None, eos_token_id=1, initializer_range=0.1, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_model_learns_in_4_bit_from_itself_in_full(wide, batches):
    student = Student(model=str(wide), lora=LORA, quantization=Quantization(compute_dtype="float32"))
    learner, model = assert_same(student, Teacher(model=str(wide)), batches)
    plain = dict(model.base_model.named_parameters())
    once = sum(p.numel() * 4 for name, p in plain.items() if "embed" in name or "norm" in name or "head" in name)
    assert in_common(learner, model) == once > 0.3 * base_bytes(wide)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("adapter", [False, True])
def test_quantised_bases_are_shared_too(wide, batches, tmp_path, kind, adapter):
    how = Quantization(type=kind, compute_dtype="auto" if kind == "int8" else "float32")
    path = peft_adapter(wide, tmp_path / "theirs", target_modules=["q_proj", "lm_head"]) if adapter else str(wide)
    learner, model = assert_same(Student(model=str(wide), lora=LORA, quantization=how), Teacher(model=path, quantization=how), batches[:3])
    bases = [sum(p.numel() * p.element_size() for n, p in one.base_model.named_parameters() if "lora" not in n) for one in (learner, model)]
    assert in_common(learner, model) == bases[0] == bases[1]
    read_by = [{id(m.quant_state) for m in one.modules() if getattr(m, "quant_state", None)} for one in (learner, model)]
    assert read_by[0] == read_by[1] and bool(read_by[0]) == (kind != "int8")


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "deepseek_v3", "mamba2", "bart", "qwen3_next", "gpt_oss"])
def test_other_families_can_be_twins_and_offloaded(tmp_path, family):
    from tests.kit.families import V, tiny

    plain = LanguageModel(tiny(family), V)
    twin = LanguageModel(shared_weights.copy_sharing_weights(plain.model), V)
    kept = set(plain.model.state_dict())
    for (name, mine), (_, other) in zip(twin.model.named_buffers(), plain.model.named_buffers(), strict=True):
        assert (mine is other) == (name in kept), name  # some families compute a table anew for a longer text
    twin.requires_grad_(False)
    view = View({"input_ids": torch.arange(24).reshape(2, 12)}, torch.arange(24))
    with torch.no_grad():
        expected = plain.hidden(view)
        assert torch.equal(twin.hidden(view), expected)
        places = {name: p.data_ptr() for name, p in twin.named_parameters()}
        offload(twin.model, "cpu")
        assert torch.equal(twin.hidden(view), expected)
    assert places == {name: p.data_ptr() for name, p in plain.named_parameters()} == {n: p.data_ptr() for n, p in twin.named_parameters()}


@pytest.mark.parametrize("at", [0, 63, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_tensors_that_differ_in_one_place_stay_apart(at, dtype):
    """Wherever it is: also beyond the first 64, which are compared first."""
    a = torch.nn.Linear(20, 10).requires_grad_(False)
    equal, other = (torch.nn.Linear(20, 10).requires_grad_(False) for _ in range(2))
    for one in (a, equal, other):
        one.weight.data = torch.linspace(0.5, 1.5, 200).view(10, 20).to(dtype)
        one.bias.data = torch.zeros(10)
    flat = other.weight.data.view(torch.uint8).flatten() if dtype.itemsize == 1 else other.weight.data.flatten()
    flat[at] = 3
    shared_weights.deduplicate_weights([a, equal, other])
    assert equal.weight.data_ptr() == a.weight.data_ptr() and other.weight.data_ptr() != a.weight.data_ptr()
    assert a.bias.data_ptr() == equal.bias.data_ptr() == other.bias.data_ptr()
