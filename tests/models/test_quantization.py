"""4 and 8 bit: teachers, QLoRA students, their gradients, resume and export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from llmkd.batch import View
from llmkd.config.recipe import Lora, Quantization
from llmkd.config.recipe import Student as StudentSettings
from llmkd.config.recipe import Teacher as TeacherSettings
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.losses.divergences import forward_kl
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.models import saved_student
from llmkd.models.depth import find_student
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, load_teacher
from llmkd.models.pretrained import load_pretrained
from tests.conftest import distance
from tests.kit.models import load_student

pytest.importorskip("bitsandbytes")
NF4 = Quantization(compute_dtype="float32")
KINDS = {
    "nf4": NF4,
    "nf4, plain constants": Quantization(double_quant=False, compute_dtype="float32"),
    "fp4": Quantization(type="fp4", compute_dtype="float32"),
    "int8": Quantization(type="int8"),
}


@pytest.fixture(scope="module")
def single(world, tmp_path_factory) -> Path:
    """The small world's bases in float32 and 64 wide, which bitsandbytes wants."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    root = tmp_path_factory.mktemp("single")
    for name, seed, tied in (("student", 1, False), ("teacher", 2, False), ("tied", 3, True)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=648,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return root


def student(single, quantization, name="student", **changes) -> LanguageModel:
    settings = StudentSettings(model=str(single / name), lora=Lora(rank=4), quantization=quantization, **changes)
    return load_student(settings, 640, "cpu", 0)


def batch():
    ids_BT = torch.arange(40).reshape(4, 10) * 13 % 640
    return View({"input_ids": ids_BT}, torch.arange(0, 40, 3)), torch.arange(14) * 5 % 640


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    view, labels_N = batch()
    model.zero_grad(set_to_none=True)
    fused_loss(model.hidden(view), model.head, labels_N, Objective(0.0, 1.0, forward_kl), chunk=5)[0].backward()
    return {name: p.grad.clone() for name, p in model.trainable().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_student_trains_only_its_adapter(single, kind):
    model = student(single, KINDS[kind])
    assert model.training and any(type(m).__name__ in ("Linear4bit", "Linear8bitLt") for m in model.modules())
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in model.trainable().items()) and model.trainable()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    losses = []
    for _ in range(4):
        view, labels_N = batch()
        loss = fused_loss(model.hidden(view), model.head, labels_N, Objective(), chunk=5)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p.detach().view(torch.uint8), frozen[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_after_an_evaluation_equal_those_before_it(single, kind, checkpointing):
    model = student(single, KINDS[kind], gradient_checkpointing=checkpointing)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model.model(input_ids=batch()[0].inputs["input_ids"])
        model.hidden(View({"input_ids": torch.tensor([[5]])}, torch.tensor([0])))
    model.train()
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_four_bit_layers_are_never_repacked_on_cpus_that_could(single, monkeypatch):
    """With AVX512-BF16, evaluation would turn the weights into a form whose product has no gradient."""
    from bitsandbytes.nn import Linear4bit

    real = Linear4bit.__init__

    def capable(self, *a, **k):
        real(self, *a, **k)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(Linear4bit, "__init__", capable)
    model = student(single, NF4)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_teacher_is_in_eval_mode_and_says_the_same_twice(single, kind):
    pupil = student(single, None)
    teacher = load_teacher(TeacherSettings(model=str(single / "teacher"), quantization=KINDS[kind]), LoadContext(640, "cpu"))
    full = load_teacher(TeacherSettings(model=str(single / "teacher")), LoadContext(640, "cpu"))
    view, _ = batch()
    with torch.no_grad():
        first, second, plain = teacher.hidden(view), teacher.hidden(view), full.hidden(view)
    assert torch.equal(first, second) and not torch.equal(first, plain)
    assert not any(m.training for m in teacher.modules()) and not teacher.trainable()
    assert all(m.training for m in pupil.modules())
    q, p = (torch.log_softmax(m.head.logits(h), -1) for m, h in ((teacher, first), (full, plain)))
    assert 0 < forward_kl(q, p).mean() < 0.2


def test_heads_stay_exact_beside_a_quantised_body(single):
    for name in ("student", "tied"):
        model = student(single, NF4, name)
        view, _ = batch()
        with torch.no_grad():
            own = model.eval().base_model(**view.inputs, use_cache=False).logits.flatten(0, 1)[view.rows_N, :640]
            assert_close(model.head.logits(model.hidden(view)), own, rtol=1e-5, atol=1e-5)


def test_a_base_saved_in_four_bit_with_its_head_quantised_too(single, tmp_path):
    """As others publish them: quantised on disk, here with the head as well."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["none"]
    )
    AutoModelForCausalLM.from_pretrained(single / "student", quantization_config=config).save_pretrained(tmp_path / "base")
    model = load_student(StudentSettings(model=str(tmp_path / "base"), lora=Lora(rank=2)), 640, "cpu", 0)
    assert type(model.head.project).__name__ == "Linear4bit"
    view, _ = batch()
    with torch.no_grad():
        own = model.base_model(**view.inputs, use_cache=False).logits.flatten(0, 1)[view.rows_N, :640]
        assert_close(model.head.logits(model.hidden(view)), own, rtol=1e-5, atol=1e-5)
    assert set(gradients(model)) == set(model.trainable())
    with pytest.raises(UserError, match="student.quantization: .* is quantised already"):
        student(tmp_path, NF4, "base")
    with pytest.raises(UserError, match="student.method: found full"):
        load_student(StudentSettings(model=str(tmp_path / "base"), method="full"), 640, "cpu", 0)


def qlora(single, **changes):
    return {
        "student.model": str(single / "student"),
        "student.quantization": {"type": "nf4", "compute_dtype": "float32"},
        "teacher.model": str(single / "teacher"),
        "student.lora.dropout": 0.2,
        **changes,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_a_four_bit_run_resumes_bit_for_bit(single, trained, tmp_path, optimizer):
    changes = {"optim.name": optimizer, "checkpoint.every": 2, "checkpoint.keep": 9, "student.lora.rank": 64, "data.train.limit": 24}
    changes = qlora(single, **changes)  # three steps
    whole = trained("whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for done in ("adapter", "summary.json", "loss.png"):
        path = tmp_path / "cut" / done
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for step in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        if step.name != "step-2":
            shutil.rmtree(step)
    assert distance(trained("cut", resume=True, **changes), whole) == 0


def test_a_packed_four_bit_run_is_the_unpacked_one(single, trained):
    changes = qlora(single, **{"student.lora.dropout": 0.0, "teacher.quantization": {"type": "nf4", "compute_dtype": "float32"}})
    assert distance(trained("packed", **changes, **{"data.packing": True}), trained("apart", **changes)) < 1e-4


def test_a_four_bit_run_reads_hidden_states_and_attention_in_a_student_of_fewer_layers(single, trained, tmp_path):
    """The same as of the smaller model by its own path; packed as apart."""
    relations = {"what": "relations", "relation_heads": 4}
    how = {"student.lora.dropout": 0.0, "loss.features": {"layers": [[1, 2]]}, "loss.attention": relations, "data.train.limit": 16}
    layers = {"student.layers": [1]}
    of_base = trained("base", **qlora(single, **how, **layers))
    for name in ("features", "attention"):
        values = [record[name] for record in read_jsonl(tmp_path / "base/metrics.jsonl") if name in record]
        assert len(values) == 2 and min(values) > 1e-3
    smaller = find_student(StudentSettings(model=str(single / "student"), layers=(1,))).base
    assert distance(trained("own", **qlora(single, **how, **{"student.model": str(smaller)})), of_base) == 0
    assert distance(trained("packed", **qlora(single, **how, **layers), **{"data.packing": True}), of_base) < 1e-4


def test_merging_goes_into_the_unquantised_base_and_says_how_far_that_is(world, single, trained, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from llmkd.commands.export import export

    trained("out", **qlora(single, **{"student.lora.dropout": 0.0, "data.validation": {"path": str(world / "held.jsonl")}}))
    record = json.loads((tmp_path / "out/adapter/llmkd.json").read_text())
    assert record["quantization"]["type"] == "nf4"
    merged_folder = export(tmp_path / "out")
    said = capsys.readouterr().err
    assert "KL" in said and "unquantised" in said
    merged = AutoModelForCausalLM.from_pretrained(merged_folder)
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(single / "student")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out/adapter")
    ids = batch()[0].inputs["input_ids"]
    with torch.no_grad():
        gap = (merged(ids).logits - adapted(ids).logits).abs().max()
        trained_model = load_teacher(TeacherSettings(model=str(tmp_path / "out/adapter"), quantization=NF4), LoadContext(640, "cpu"))
        far = (merged(ids).logits - trained_model.base_model(ids).logits).abs().max()
    assert gap < 1e-4 < far
    metrics = json.loads((merged_folder / "llmkd.json").read_text())
    assert metrics["trained_on"]["type"] == "nf4" and 0 < metrics["drift"]["forward_kl"] < 1
    from huggingface_hub import ModelCard

    card = ModelCard.load(merged_folder / "README.md")
    assert ModelCard.load(tmp_path / "out/adapter/README.md").data.eval_results and not card.data.eval_results, "those are of another model"
    assert card.data.library_name == "transformers" and f"| forward_kl | {metrics['drift']['forward_kl']:.4f} |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    assert "peft" not in code
    found = {}
    exec(code, found)
    assert found["model"].config.vocab_size == 648


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_base_that_is_quantised_on_disk_is_merged_into_the_dequantised_base(single, trained, tmp_path, capsys, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from llmkd.commands.export import export
    from llmkd.data.reading.skills import tokenizer

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **(four if bits == 4 else {}))
    AutoModelForCausalLM.from_pretrained(single / "student", quantization_config=config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    trained("out", **{"student.model": str(tmp_path / "base"), "teacher": None})
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "out"))
    assert "merged into the dequantised base" in capsys.readouterr().err
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
    assert "merged into the dequantised one" in (tmp_path / "out/merged/README.md").read_text()
    ids = batch()[0].inputs["input_ids"]
    with torch.no_grad():
        own = load_teacher(TeacherSettings(model=str(tmp_path / "out/adapter")), LoadContext(640, "cpu")).base_model(ids).logits
        assert (merged(ids).logits - own).abs().max() < (1e-4 if bits == 4 else 0.3)


def test_a_model_that_quantisation_hardly_makes_smaller_is_said(single, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    student(single, NF4)
    assert "quantised linear layers are 10% of its memory" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(single / "student", num_hidden_layers=2)
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "small")
    load_teacher(TeacherSettings(model=str(tmp_path / "small"), quantization=NF4), LoadContext(64, "cpu"))
    assert "quantised linear layers" not in capsys.readouterr().err


def test_an_adapter_on_another_precision_than_it_was_trained_on_is_said(single, trained, tmp_path, capsys):
    trained("out", **qlora(single))
    capsys.readouterr()
    load_teacher(TeacherSettings(model=str(tmp_path / "out/adapter")), LoadContext(640, "cpu"))
    assert "was trained on nf4, and is used on an unquantised" in capsys.readouterr().err


def test_without_bitsandbytes_the_install_line_is_given(make_recipe, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a))
    from llmkd.training.prepare import prepare

    for changes, setting in (
        ({"student.quantization": {"type": "nf4"}}, "student.quantization"),
        ({"teacher.quantization": {"type": "int8"}}, "teacher.quantization"),
        ({"optim.name": "adamw_8bit"}, "optim.name"),
    ):
        with pytest.raises(UserError, match=rf"{setting}: needs bitsandbytes.*pip install"):
            prepare(make_recipe(**changes))


@pytest.mark.parametrize(("type_", "setting"), [("nf4", "student"), ("int8", "teacher")])
def test_what_bitsandbytes_cannot_load_is_one_line_with_the_way_out(single, monkeypatch, type_, setting):
    """As on a machine whose GPU, or whose lack of one, it does not know."""

    from transformers import AutoModelForCausalLM

    def fails(*given, **options):
        raise RuntimeError("No GPU found. A GPU is needed for quantization.\nSee the installation guide")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(UserError) as refused:
        load_pretrained(single / "student", f"{setting}.model", quantization=Quantization(type=type_))
    (line,) = refused.value.problems
    assert line == (
        f"{setting}.model: {single / 'student'} cannot be loaded (RuntimeError: No GPU found. A GPU is needed for quantization.); "
        f"load it without {setting}.quantization, or check its files"
    )


def test_int8_with_dora_is_refused_before_it_fails(single, trained, tmp_path, make_recipe):
    with pytest.raises(UserError, match="student.lora.dora: found true with quantization int8"):
        make_recipe(**{"student.quantization": {"type": "int8"}, "student.lora.dora": True})
    trained("out", **qlora(single, **{"student.lora.dora": True, "student.lora.dropout": 0.0}))
    for load, settings, who in (
        (lambda settings: load_teacher(settings, LoadContext(640, "cpu")), TeacherSettings, "teacher"),
        (lambda settings: load_student(settings, 640, "cpu", 0), StudentSettings, "student"),
    ):
        given = settings(model=str(tmp_path / "out/adapter"), quantization=Quantization(type="int8"))
        with pytest.raises(UserError, match=f"{who}.quantization: found int8 with a DoRA adapter"):
            load(given)


def test_the_card_of_a_four_bit_dora_student_loads_it(single, trained, tmp_path, monkeypatch):
    """Also on a CPU where bitsandbytes would repack the weights in evaluation."""
    from bitsandbytes.nn import Linear4bit

    trained("out", **qlora(single, **{"student.lora.dora": True, "student.lora.dropout": 0.0}))
    real = Linear4bit.__init__

    def capable(self, *a, **k):
        real(self, *a, **k)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(Linear4bit, "__init__", capable)
    code, found = (tmp_path / "out/adapter/README.md").read_text().split("```python\n")[1].split("```")[0], {}
    exec(code, found)
    ids = batch()[0].inputs["input_ids"]
    own = load_teacher(saved_student.as_trained(tmp_path / "out/adapter"), LoadContext(640, "cpu"))
    with torch.no_grad():
        assert torch.equal(found["model"].eval()(ids).logits, own.base_model(ids).logits)
