"""What a plan finds of configurations alone, and how it extends a few layers to many."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmkd.config import loader
from llmkd.config.on_policy import OnPolicy
from llmkd.config.recipe import Lora, Optim, Quantization
from llmkd.data.examples import TokenExamples
from llmkd.errors import UserError
from llmkd.planning import fit
from llmkd.planning.build import build
from llmkd.planning.caching import cachings
from llmkd.planning.devices import bytes_in, held_on_gpu
from llmkd.planning.fakes import fake_tensors
from llmkd.planning.find import find
from llmkd.planning.known_models import KNOWN
from llmkd.planning.live_memory import LiveMemory
from llmkd.planning.measure import Measured, extended, measure, state_bytes
from llmkd.planning.model_configs import find_config
from llmkd.planning.models import Depth, empty_model
from llmkd.planning.plan import Plan, in_host_memory, plan
from llmkd.planning.quantized import bytes_of
from llmkd.planning.step import LOSS, TEACHER, WRITING, _have_state
from llmkd.planning.work import KnownData, assumed_examples, known_data, work_of
from llmkd.planning.writing import Writing, as_written, watched_writing, writing_of
from llmkd.rollouts.generate import generate
from llmkd.rollouts.sampling import Sampling
from llmkd.teachers.cache.records import make_record_format
from llmkd.teachers.cache.shards import read_header
from tests.conftest import plain_recipe
from tests.kit.models import load_student

#: The number of parameters that each model's page on the hub gives; tied weights once, Gemma 3 4B with its vision tower, GPT-2 without its stored masks.
PARAMETERS = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-0.6B-Base": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-xl": 1_557_611_200,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_tables_configurations_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = empty_model(KNOWN[name], "student.model", "auto", "auto")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_a_model_that_also_sees_is_built_without_values():
    """Gemma 3 4B with one of its 34 layers, of 94,382,592 parameters each: 3 x 2560 x 2048 and 3 x 2560 x 10240 of matrices, and six norms."""
    with fake_tensors(False):
        model = empty_model(KNOWN["google/gemma-3-4b-it"], "student.model", "auto", "auto", layers=1)
    left = PARAMETERS["google/gemma-3-4b-it"] - 33 * (3 * 2560 * 2048 + 3 * 2560 * 10240 + 4 * 2560 + 2 * 256)
    assert sum(p.numel() for p in model.parameters()) == left


@pytest.fixture
def configs_only(world, tmp_path):
    """The small world's recipe in a folder of its own, with models that have a configuration and nothing else."""
    for name in ("student", "teacher", "adapter"):
        (tmp_path / name).mkdir()
        file = "adapter_config.json" if name == "adapter" else "config.json"
        shutil.copy(world / name / file, tmp_path / name)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": str(tmp_path / "teacher")}))
    recipe = plain_recipe(world, tmp_path / "out")
    recipe["student"]["model"], recipe["teacher"]["model"] = str(tmp_path / "student"), str(tmp_path / "adapter")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path / "recipe.yaml"


def test_configurations_alone_give_the_bytes_of_every_weight(configs_only):
    """By hand: Llama's matrices in float64, LoRA's in float64 beside them (width 16, MLP 32, two layers; the teacher 24 and 48)."""
    recipe = loader.load_recipe(configs_only, {"data.max_length": 32})
    found = find([recipe], configs_only.parent)
    planned = plan([recipe], found, None, gpu=False)
    vocab = json.loads((configs_only.parent / "student" / "config.json").read_text())["vocab_size"]

    def body(width: int, mlp: int) -> int:
        return 2 * (4 * width * width + 3 * width * mlp + 2 * width) + width + 2 * vocab * width

    def adapter(width: int, mlp: int) -> int:
        return 2 * 4 * (4 * (width + width) + 3 * (width + mlp))

    assert planned.parts["trained"] == 8 * adapter(16, 32)
    assert planned.parts["optimizer"] == pytest.approx(
        2 * planned.parts["trained"], abs=4 * 28
    )  # and a step's number for each of 28 tensors
    rotary = 8 * 2 * 16  # a head's frequencies, twice
    assert planned.parts["student's weights"] == pytest.approx(8 * body(16, 32), abs=rotary)
    assert planned.parts["teacher's weights"] == pytest.approx(8 * (body(24, 48) + adapter(24, 48)), abs=rotary)
    assert "tokenizer is not on this machine" in planned.notes[0]
    assert planned.work.batch.student.inputs["input_ids"].shape == (4, 31) and planned.work.batch.num_targets == 4 * 31
    assert planned.work.tokens is None and planned.seconds(lambda dtype: 1e9, 0, whole=True) is None


def test_operations_are_counted_as_products(make_recipe, tmp_path):
    """Two operations a weight and token in a pass, and as many for the gradient of the activations; the head at the targets alone."""
    recipe = make_recipe(student__method="full", student__lora=None, teacher=None, train__batch_size=4, data__train__limit=4)
    planned = plan([recipe], find([recipe], tmp_path), None, gpu=False)
    tokens, targets = planned.work.batch_tokens, planned.work.batch.num_targets
    vocab, matrices = find([recipe], tmp_path).vocab, 2 * (4 * 16 * 16 + 3 * 16 * 32)
    assert planned.flops[LOSS] == 3 * 2 * vocab * 16 * targets
    rest = planned.flops["backward pass"]
    assert 0.6 * 6 * matrices * tokens < rest < 6 * matrices * tokens + 7 * 2 * tokens * tokens * 16  # the last layer in part; attention
    assert TEACHER not in planned.flops


def test_extension_is_exact_where_memory_grows_in_proportion():
    def measured(counts) -> Measured:
        a, b, c = counts
        return Measured({"loss": {"x": 5 + 3 * a + 2 * b, "y": 7.0 * c}, "first": {"x": 11}}, {LOSS: 10 * a + c})

    found = extended((4, 1, 2), (30, 1, 80), measured)
    assert found.phases == {"loss": {"x": 5 + 90 + 2, "y": 560.0}, "first": {"x": 11}} and found.flops == {LOSS: 380}
    assert found.peak == "loss"


@pytest.mark.slow
def test_a_deep_model_is_planned_from_few_layers_as_it_is_in_full(configs_only, monkeypatch):
    for name, layers in (("student", 10), ("teacher", 4)):
        path = configs_only.parent / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    few = {"student.lora.target_modules": ["q_proj"], "teacher.model": str(configs_only.parent / "teacher")}
    recipe = loader.load_recipe(configs_only, {"data.max_length": 48, "student.gradient_checkpointing": 0.5} | few)
    found = find([recipe], configs_only.parent)
    short = plan([recipe], found, None, gpu=True)
    monkeypatch.setattr("llmkd.planning.measure.extended", lambda few, full, measured: measured(full))
    whole = plan([recipe], found, None, gpu=True)
    assert short.peak == pytest.approx(whole.peak, rel=0.005) and short.at == whole.at
    assert short.flops == pytest.approx(whole.flops, rel=1e-9)


def test_offloaded_inputs_of_layers_are_in_the_hosts_memory(configs_only):
    """Before the backward pass a GPU has less by one input, [tokens, width], for each recomputed layer. Of a frozen base the first stays: it is a leaf."""
    path = configs_only.parent / "student" / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": 5}
    path.write_text(json.dumps(config))
    for method, inputs in ({"student.method": "full", "student.lora": None}, 4), ({}, 3):
        kept = {}
        for how in (True, "offload"):
            changes = {"student.gradient_checkpointing": how, "teacher": None, "loss.kd_ratio": 0, "data.max_length": 32}
            recipe = loader.load_recipe(configs_only, changes | method)
            found = find([recipe], configs_only.parent)
            batch, gradients = work_of(found.data, recipe, 1).cases[0]
            kept[how] = measure([recipe], found, batch, gradients, None, True).phases[LOSS]["activations"]
        one = batch.student.inputs["input_ids"].numel() * config["hidden_size"] * 8
        assert kept[True] - kept["offload"] == inputs * -(-one // 512) * 512
    assert in_host_memory(recipe, found, 7) == 4 * 7 * config["hidden_size"] * 8


def test_what_a_quantised_matrix_and_an_optimizers_state_take():
    """4 bit: half a byte, a float32 for 64 weights, or a byte for these and a float32 for 256 bytes. 8-bit AdamW: two bytes, two float32 for 256."""
    assert bytes_of(4096 * 4096, 4096, Quantization(type="nf4", double_quant=False)) == 4096 * 4096 * (1 / 2 + 4 / 64)
    assert bytes_of(4096 * 4096, 4096, Quantization(type="nf4")) == 4096 * 4096 * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert bytes_of(4096 * 4096, 4096, Quantization(type="int8")) == 4096 * 4096 + 4 * 4096
    ps = [torch.nn.Parameter(torch.empty(n)) for n in (4096, 100)]
    assert state_bytes(Optim(name="adamw_8bit"), ps, True) == 2 * (4096 + 4 * 16) + 8 * 100
    assert state_bytes(Optim(name="paged_adamw"), ps, True) == 0 and state_bytes(Optim(name="paged_adamw"), ps, False) == 8 * 4196


def test_an_adapter_of_a_run_to_come_is_what_its_recipe_says(configs_only):
    folder = configs_only.parent
    first = {"output_dir": str(folder / "runs" / "one"), "student": {"model": str(folder / "teacher"), "lora": {"rank": 3}}}
    (folder / "1.yaml").write_text(json.dumps(first | {"data": {"train": {"path": "none.jsonl"}}}))
    found = find_config(str(folder / "runs" / "one" / "adapter"), "teacher.model", None, None, folder)
    assert found.adapter == Lora(rank=3) and found.base == str(folder / "teacher") and "1.yaml, which has not run yet" in found.origin
    merged = find_config(str(folder / "runs" / "one" / "model"), "teacher.model", None, None, folder)
    assert merged.adapter is None and merged.config == found.config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", ["is not in the hub's cache", "hf download nobody/nothing config.json"]),
        ("./nowhere", ["there is no folder"]),
    ],
)
def test_a_model_that_is_not_here_is_named(tmp_path, name, words):
    with pytest.raises(UserError) as info:
        find_config(name, "student.model", None, None, tmp_path)
    assert all(word in str(info.value) for word in words)


def test_a_base_of_student_and_teacher_is_counted_once(configs_only):
    """Wherever one has more layers than the other, as where a few stand for all; in float64. In 4 and 64 bit the layers are apart, and embeddings, norms
    and head are not. A full student, a copy of the teacher's own and a merged adapter have a base of their own."""
    path, adapted = configs_only.parent / "teacher" / "config.json", configs_only.parent / "adapter" / "adapter_config.json"
    vocab = json.loads(path.read_text())["vocab_size"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    adapted.write_text(json.dumps(json.loads(adapted.read_text()) | {"target_modules": "all-linear"}))
    matrices, adapter, rest = 4 * 24 * 24 + 3 * 24 * 48, 4 * (4 * 48 + 3 * 72), (2 * vocab + 1) * 24

    def weights(student: int, teacher: int, **changes) -> float:
        one = {"student.model": str(path.parent)} | {name.replace("__", "."): value for name, value in changes.items()}
        recipe = loader.load_recipe(configs_only, one)
        with fake_tensors(False):
            ready = build([recipe], find([recipe], configs_only.parent), Depth(student), [teacher], None, False)
            models, states = [*ready.student_models, *ready.teacher_models], [state.distiller for state in ready.students]
            tensors = [
                x for model in (*models, *states) for x in (*model.parameters(), *model.buffers()) if x.numel() > 8
            ]  # not of the rotary part
            storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
        return sum(one.nbytes() for one in storages.values())

    def base(layers: int) -> int:
        return 8 * (layers * (matrices + 48) + rest)

    for student, teacher in (3, 2), (2, 3):
        adapters = 8 * (student + teacher) * adapter
        assert weights(student, teacher) == base(3) + adapters
        assert weights(student, teacher, teacher__share_base=False) == base(2) + base(3) + adapters
    assert weights(3, 2, teacher__merge_adapter=True) == base(2) + base(3) + 8 * 3 * adapter
    assert weights(3, 2, student__method="full", student__lora=None) == base(2) + base(3) + 8 * 2 * adapter
    four = {"type": "nf4", "double_quant": False}
    held = {n: bytes_of(n, 1, Quantization(**four)) for n in (24 * 24, 24 * 48)}
    layer = 4 * held[24 * 24] + 3 * held[24 * 48]
    assert weights(3, 2, student__quantization=four) == base(2) + 8 * 48 + 3 * layer + 8 * 5 * adapter
    both = weights(3, 2, student__quantization=four, teacher__quantization=four)
    assert both == 8 * (3 * 48 + rest) + 3 * layer + 8 * 5 * adapter


def test_a_written_answer_is_as_long_as_it_may_be():
    """Prompts of 4 and 9 tokens and one that is supervised throughout; room for 12 tokens, answers of 6: the second prompt has none."""
    masks = [[False] * 4 + [True] * 2, [False] * 9 + [True], [True] * 8]
    offsets = np.cumsum([0, *map(len, masks)])
    examples = TokenExamples(np.zeros(offsets[-1], np.int32), np.concatenate(masks), offsets, np.arange(3))
    written = as_written(examples, OnPolicy(max_new_tokens=6), 12)
    assert written.lengths.tolist() == [10, 10, 8] and written.num_targets.tolist() == [6, 1, 6]
    settings = OnPolicy(share=0.5, max_new_tokens=6, batch_size=3)
    planned = writing_of(settings, SimpleNamespace(batch_size=10, max_steps=4), written, 2)
    assert (planned.answers, planned.batches, planned.prompt, planned.new, planned.models) == (3, 1, 9, 6, 1)
    known = dataclasses.replace(planned, weights=100.0, layers=2)
    assert known.seconds(rate=60.0, bandwidth=50.0, per_layer=0.1, bytes_each=2) == 6 * 2 * 50 * 3 / 60
    assert known.seconds(1e9, 50.0, 0.1, 2) == 6 * 2 and known.seconds(1e9, None, 0.1, 2) == pytest.approx(6 * 0.2)


def test_every_answer_to_a_prompt_is_planned(make_recipe):
    """Half of a step's 4 prompts with 3 answers each: 8 examples, of which 6 are written; so is the work of 5 steps of 2 examples at a time."""
    recipe = make_recipe(
        on_policy={"share": 0.5, "samples": 3, "max_new_tokens": 2}, train={"batch_size": 4, "micro_batch_size": 2, "max_steps": 5}
    )
    examples = assumed_examples(4, 6)
    work = work_of(KnownData(examples, None, False), recipe)
    assert (work.examples, work.micro_batches, work.tokens) == (5 * 8, 5 * 4, 5 * 8 * 6)
    planned = writing_of(recipe.on_policy, recipe.train, examples)
    assert (planned.answers, planned.batches) == (6, 1)


@pytest.mark.parametrize("prompt", [4, 90])
def test_memory_of_writing_is_that_of_a_model_that_writes(make_recipe, tmp_path, prompt):
    """Eight answers of 100 tokens: after short prompts their keys and values are most, after long ones reading these is."""
    recipe = make_recipe(on_policy={"share": 1, "max_new_tokens": 100})
    found = find([recipe], tmp_path)
    with fake_tensors(False):
        ready = build([recipe], found, Depth(2), [2], None, False)
        planned = watched_writing(ready, Writing(8, 1, prompt, 100, 1), recipe.on_policy).parts[WRITING]
    student, memory = load_student(recipe.student, found.vocab, "cpu", 0), LiveMemory()
    for tensor in (*student.parameters(), *student.buffers()):
        memory.add(tensor)
    weights = memory.now
    with memory:
        # of two lengths, whose mask a plan counts: of equal ones transformers makes none
        generate(student, [[5] * (prompt - k % 2) for k in range(8)], Sampling(1.0, 100), [], 8)
    assert memory.phases["load"].peak - weights == pytest.approx(planned, rel=0.05)


def test_a_cache_to_be_written(make_recipe, caches, tmp_path):
    """Of bfloat16 hidden states: two bytes for each of 24 numbers; of the eight most likely tokens the bytes of a record of that kind. The teacher's
    weights and the operations of its pass by hand: two for each weight of its matrices and adapter, and token."""
    recipe = make_recipe(teacher__cache={"path": str(tmp_path / "none"), "kind": "hidden", "hidden_dtype": "bfloat16"})
    found = find([recipe], tmp_path)
    (cache,) = cachings(recipe, found, gpu=False)
    examples = found.data.examples
    assert cache.width == 2 * 24 and cache.targets == examples.num_targets.sum() and cache.layers == 2
    assert cache.batches == -(-len(examples) // recipe.validation.micro_batch_size)
    matrices = 2 * (4 * 24 * 24 + 3 * 24 * 48 + 4 * (4 * 48 + 3 * 72))
    products = 2 * matrices * examples.max_lengths.sum()
    assert products < cache.flops < 1.6 * products  # and attention
    narrow = make_recipe(teacher__cache={"path": str(tmp_path / "none"), "kind": "topk", "k": 8})
    (other,) = cachings(narrow, find([narrow], tmp_path), gpu=False)
    written = read_header(caches / "narrow", "x")
    assert other.width == make_record_format(narrow.teacher.cache, found.vocab).bytes and written["kind"]["k"] == 8
    assert other.peak > cache.peak  # by the probabilities
    assert not plan([narrow], find([narrow], tmp_path), None, gpu=False).flops.get(TEACHER)  # a run from it multiplies nothing there


def test_the_largest_micro_batches_are_those_that_a_run_cuts(make_recipe, tmp_path):
    recipe = make_recipe(train__batch_size=8, train__micro_batch_size=4, train__epochs=3)
    known = known_data(recipe, find([recipe], tmp_path).student)
    work = work_of(known, recipe)
    lengths = known.examples.lengths
    assert work.batch.student.inputs["input_ids"].shape[0] == 4
    assert work.batch.student.inputs["input_ids"].shape[1] in (lengths.max() - 1, lengths.max())
    assert work.steps == 15 and work.examples == 3 * 37 and work.targets == 3 * known.examples.num_targets.sum()
    assert work.tokens >= 3 * lengths.sum() and work.later.num_targets <= work.batch.num_targets
    alone = make_recipe("alone", train__batch_size=4, train__micro_batch_size=4)
    assert work_of(known, alone).later is None


def test_amounts_of_memory():
    assert bytes_in("24GB") == bytes_in("24") == 24e9 and bytes_in("22.5 GiB") == 22.5 * 2**30 and bytes_in("900mb") == 9e8
    for text in ("", "0GB", "GB", "-3GB", "24 parsecs"):
        with pytest.raises(ValueError, match="expected an amount of memory"):
            bytes_in(text)
    assert held_on_gpu(10e9, 6e9) == 10e9 + 0.05 * 4e9 + 0.6e9


def test_savings_are_sorted_and_put_together(make_recipe):
    recipe = make_recipe()
    saved = {"student.gradient_checkpointing": 3, "train.micro_batch_size": 5, "teacher.device": 2}

    def needs(change: dict) -> float:
        if "optim.name" in change:
            raise UserError("optim.name: refused")
        return 20 - sum(saved.get(path, 0) for path in change)

    found = fit.savings(recipe, 20, needs)
    assert [one.saves for one in found] == [5, 5, 3, 2]  # micro-batches of 2 and of 1
    both = fit.together(found, 20, 12.5, needs)
    assert (
        both.needed == 12
        and both.change.settings.keys() == {"train.micro_batch_size", "student.gradient_checkpointing"}
        and both.change.same
    )
    assert fit.together(found, 20, 3, needs) is None


def test_time_is_the_larger_of_computing_and_calling(make_recipe, tmp_path):
    recipe = make_recipe()
    work = dataclasses.replace(work_of(known_data(recipe, find([recipe], tmp_path).student), recipe), tokens=None)
    planned = Plan({}, LOSS, {LOSS: 4e12, TEACHER: 2e12}, 10, {"student": "bfloat16", "teacher": "float32"}, work, [])
    rate = {"bfloat16": 2e12, "float32": 1e12}.get
    assert planned.seconds(rate, 0.001, whole=False) == pytest.approx(4)
    assert planned.seconds(rate, 1, whole=False) == pytest.approx(10)
    known = dataclasses.replace(planned, work=dataclasses.replace(work, tokens=3 * work.cost, targets=5 * work.batch.num_targets))
    assert known.total_flops == pytest.approx({LOSS: 20e12, TEACHER: 6e12}) and known.seconds(rate, 0, whole=True) == pytest.approx(16)
    assert known.seconds(rate, 0, whole=False) == pytest.approx(16 / work.steps)


def test_assumed_examples_have_one_length():
    examples = assumed_examples(3, 7)
    assert examples.lengths.tolist() == [7, 7, 7] and examples.num_targets.tolist() == [7, 7, 7]


@pytest.mark.parametrize("gradients", [False, True])
def test_before_the_step_that_is_watched_gradients_are_there_only_where_micro_batches_came_before(gradients):
    weight, memory = torch.nn.Parameter(torch.ones(2)), SimpleNamespace(enter=lambda *_: None, rename=lambda *_: None)
    state = SimpleNamespace(parameters={"w": weight}, optimizer=torch.optim.AdamW([weight], lr=0.0))
    _have_state(memory, state, gradients)
    assert (weight.grad is not None) == gradients and state.optimizer.state[weight]
