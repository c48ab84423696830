"""What is refused before data are read and torch is loaded: by settings, configurations, headers of weights, and what the machine says."""

import json
import shutil
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest

from llmkd.cli import main
from llmkd.config.teacher import Teacher
from llmkd.errors import UserError
from llmkd.model_folder.modules import refuse_missing_modules
from llmkd.process import devices
from llmkd.training import early_checks, prepare
from tests.conftest import plain_recipe, said

FULL = {"student.method": "full", "student.lora": None}


@pytest.fixture
def first(world, tmp_path, capsys, monkeypatch):
    """The lines that `llmkd train` says of a recipe, whose data must not have been read by then."""
    monkeypatch.setattr(prepare, "read_data", lambda data: pytest.fail("the data were read"))

    def go(changes: dict) -> list[str]:
        (tmp_path / "r.json").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
        told = [word for name, value in changes.items() for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))]
        assert main(["train", "--config", str(tmp_path / "r.json"), *told]) == 2
        return said(capsys).splitlines()

    return go


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"student.lora.target_modules": ["q_porj"]},
            "student.lora.target_modules: the model has no module 'q_porj'; did you mean q_proj? ",
        ),
        ({"student.lora.target_modules": "qproj"}, "student.lora.target_modules: the model has no module 'qproj'; did you mean q_proj? "),
        ({"student.lora.target_modules": "all-liner"}, "did you mean all-linear? "),
        ({"student.lora.target_modules": "q_proj, v_proj"}, "last names write [q_proj, v_proj]"),
        (
            {"student.lora.modules_to_save": ["lm_haed"]},
            "student.lora.modules_to_save: the model has no module 'lm_haed'; did you mean lm_head? ",
        ),
        ({"student.lora.rank": 10**6}, "student.lora.rank: found 1000000, and the model's largest matrix has 640 rows or columns"),
        ({"student.tokenizer": "nobody/nothing"}, "student.tokenizer: nobody/nothing is no folder here and could not be downloaded"),
        ({"student.tokenizer": "./nothing"}, "student.tokenizer: there is no folder "),
        (
            {"student": {"architecture": {"model_type": "lama"}, "method": "full", "tokenizer": "builtin:skills"}, "teacher": None},
            "student.architecture.model_type: found lama, which transformers does not know; did you mean llama?",
        ),
        ({"teacher.device": "gpu"}, "teacher.device: found gpu, which is not the name of a device (did you mean cuda?); name a device"),
        ({"teacher.device": "cuda:-1"}, "teacher.device: found cuda:-1, which is not the name of a device; name a device"),
        ({"loss.features": {"layers": [[3, 1]]}}, "loss.features.layers: found layer 3 of the student, which has 2 layers"),
        ({"loss.features": {"projection": "none"}}, "loss.features.projection: found none, and the student's states are 16 wide"),
        ({"loss.attention": {"layers": [[1, 9]]}}, "loss.attention.layers: found layer 9 of the teacher, which has 2 layers"),
        (FULL | {"student.dtype": "bfloat16", "teacher": {"ema": 0.9}}, "teacher.ema: the student's weights would train in bfloat16"),
        (
            {"student.lora.modules_to_save": ["lm_head"], "student.dtype": "bfloat16", "teacher": {"ema": 0.9}},
            "teacher.ema: student.lora.modules_to_save would train in bfloat16",
        ),
        (
            {"student.lora.modules_to_save": ["lm_head"], "student.dtype": "float16"},
            "student.dtype: modules_to_save would train in float16",
        ),
        ({"student.attention": "flash_attention_2"}, "student.attention: found flash_attention_2, but flash-attn is not installed"),
    ],
    ids=str,
)
def test_it_is_refused_before_data_are_read(first, changes, words):
    (line,) = first(changes)
    assert words in line, line


def with_config(folder: Path, to: Path, **changes) -> str:
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | changes))
    return str(to)


def test_what_a_models_own_configuration_says(first, world, tmp_path):
    half = with_config(world / "student", tmp_path / "half", dtype="float16")
    awq = with_config(world / "teacher", tmp_path / "awq", quantization_config={"quant_method": "awq", "bits": 4})
    assert "student.dtype: float16 weights cannot be trained in full" in first(FULL | {"student.model": half})[0]
    assert "is quantised; quantised weights cannot be trained" in first(FULL | {"student.model": awq, "teacher": None})[0]
    assert "student.method: found full, and " in first(FULL | {"student.model": str(world / "adapter"), "teacher": None})[0]
    assert "teacher.model: " in (line := first({"teacher.model": awq})[0]) and "which needs gptqmodel; pip install 'gptqmodel'" in line
    assert (
        "teacher.quantization: " in (line := first({"teacher.model": awq, "teacher.quantization": {}})[0]) and "quantised already" in line
    )


@pytest.mark.parametrize(
    ("cpus", "gpus", "shown", "name", "why"),
    [
        (True, None, None, "cuda", "built for CPUs only"),
        (False, 0, None, "cuda", "needs a GPU, but this process sees none"),
        (False, 2, None, "cuda:2", "this process sees 2"),
        (False, 2, None, "cuda:1", None),
        (False, 2, "0", "cuda:1", "this process sees 1 (see CUDA_VISIBLE_DEVICES)"),
        (False, None, "", "cuda", "sees none (see CUDA_VISIBLE_DEVICES"),
        (False, None, None, "cuda:7", None),  # no driver's folder, as in some containers: torch will tell
        (False, 8, None, "npu:0", None),
        (False, 8, None, "cpu", None),
        (False, 8, None, "cdua:0", "did you mean cuda?"),
    ],
)
def test_which_devices_a_machine_may_have(tmp_path, monkeypatch, cpus, gpus, shown, name, why):
    monkeypatch.setattr(devices, "_torch_is_built_for_cpus", lambda: cpus)
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    for number in range(gpus or 0):
        (tmp_path / f"gpus/0000:0{number}").mkdir(parents=True)
    (tmp_path / "gpus").mkdir(exist_ok=True) if gpus == 0 else None
    found = devices.why_missing(name)
    assert (found is None) if why is None else (why in found), found


def test_torchs_record_of_how_it_was_built():
    import torch

    assert devices._torch_is_built_for_cpus() == (torch.version.cuda is None and torch.version.hip is None)


def test_names_that_transformers_gives_to_weights_of_other_names_are_not_refused(tmp_path):
    """Mixtral's files name each expert's matrices, and the model has one module for all of them."""
    names = ["model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.self_attn.q_proj.weight"]
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (tmp_path / "config.json").write_text("{}")
    refuse_missing_modules(tmp_path, {"model_type": "mixtral"}, ["experts", "gate_up_proj", "lm_head"], [])
    refuse_missing_modules(tmp_path, {"model_type": "no_such_family"}, ["gate_up_porj"], [])
    with pytest.raises(UserError, match="no module 'gate_up_porj'"):
        refuse_missing_modules(tmp_path, {"model_type": "mixtral"}, ["gate_up_porj"], [])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"labels": [5], "top": [[[5, -0.1]]]}\n{"labels": [5], "top"\n', ":2: is not JSON"),
        ('\n{"labels": [5], "top": [[[5, 0.1]]]}\n', ":2: target 1: found 0.1 for token 5, expected a log-probability"),
        ('{"labels": [5], "top": [[[5, NaN]]]}\n', ":1: target 1: found nan for token 5"),
        ('{"prompt": "x", "text": "y"}\n', ":1: found neither top, prompt_logprobs nor logprobs.content"),
        ("[" * 100_000 + "\n", ":1: is not JSON"),
        ("", ": holds no lines"),
    ],
    ids=["cut", "positive", "nan", "form", "deep", "empty"],
)
def test_a_bad_line_of_imported_log_probabilities(world, tmp_path, capsys, monkeypatch, content, line):
    monkeypatch.setattr(prepare, "read_data", lambda data: pytest.fail("the data were read"))
    (tmp_path / "r.json").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    (tmp_path / "told.jsonl").write_text(content)
    arguments = [
        "cache",
        "--config",
        str(tmp_path / "r.json"),
        "--teacher.cache.path",
        str(tmp_path / "c"),
        "--import",
        str(tmp_path / "told.jsonl"),
    ]
    assert main(arguments) == 2
    assert f"told.jsonl{line}" in (found := said(capsys)) and found.count("\n") == 1, found
    assert not (tmp_path / "c").exists()


def test_a_model_of_the_hub_is_looked_for_early_where_nothing_can_be_fetched(world, tmp_path, monkeypatch):
    """Else the hub may have it: what is not here is found out when it is fetched."""
    adapter = tmp_path / "adapter"
    shutil.copytree(world / "adapter", adapter)
    saved = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "nobody/nothing"}
    (adapter / "adapter_config.json").write_text(json.dumps(saved))
    for offline in (True, False):
        monkeypatch.setattr(early_checks, "is_offline_mode", lambda offline=offline: offline)
        for name in ("nobody/nothing", str(adapter)):
            expected = pytest.raises(UserError, match="could not be downloaded") if offline else nullcontext()
            with expected:
                assert early_checks.local_files(Teacher(model=name), "teacher.model") is None
